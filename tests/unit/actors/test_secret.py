"""The secret of a named cluster: who has it comes in, and nothing says it."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayk import InferenceSession, PagedKVCacheManager
from rayk.actors.describe import describe
from rayk.actors.removal import remove_session
from rayk.actors.secret import ASKED, Authenticator, Challenge, Proof, Secret
from rayk.cli.flags import secret_of
from rayk.errors import ConfigError, SecretError

from .fake import FakeRuntime, manager_on, params, session_on

WORD = "correct horse battery"


@pytest.fixture(scope="module")
def secret() -> Secret:
    return Secret(WORD)


@pytest.fixture(scope="module")
def authenticator(secret: Secret) -> Authenticator:
    return Authenticator("prod/0", secret.lock())


def test_who_knows_it_comes_in(authenticator: Authenticator, secret: Secret) -> None:
    authenticator.check(secret.prove(authenticator.challenge()))


def test_who_does_not_stays_out(authenticator: Authenticator, secret: Secret) -> None:
    for proof in (
        None,
        Secret("another secret").prove(authenticator.challenge()),
        Secret(WORD).prove(Challenge(bytes(32), authenticator.challenge().number)),  # another cluster's
        Proof(authenticator.challenge().number, b""),
        Proof(bytes(32), secret.prove(authenticator.challenge()).covered),
    ):
        with pytest.raises(SecretError, match="prod/0"):
            authenticator.check(proof)


def test_an_answer_is_good_once_and_not_for_ever(authenticator: Authenticator, secret: Secret) -> None:
    proof = secret.prove(authenticator.challenge())
    authenticator.check(proof)
    with pytest.raises(SecretError, match="twice"):
        authenticator.check(proof)
    late = secret.prove(authenticator.challenge())
    for _ in range(ASKED):
        authenticator.challenge()
    with pytest.raises(SecretError, match="too late"):
        authenticator.check(late)


def test_what_the_scheduler_keeps_opens_nothing(secret: Secret) -> None:
    """Whoever reads it, and pretends that it were the key."""
    lock = secret.lock()
    authenticator = Authenticator("prod/0", lock)
    asked = authenticator.challenge()
    with pytest.raises(SecretError):
        authenticator.check(Proof(asked.number, lock.digest))
    assert WORD.encode() not in pickle.dumps(lock) and repr(lock) == "Lock()"


def test_no_secret_is_wanted_where_none_was_given_at_the_start() -> None:
    authenticator = Authenticator("prod/0", None)
    authenticator.check(None)
    with pytest.raises(SecretError, match="without a secret"):
        authenticator.challenge()


@pytest.mark.parametrize("bad", ["short", "x" * 2000, b"", 7, "\ud800" * 9])
def test_bad_secrets(bad: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Secret(bad)  # type: ignore[arg-type]  # on purpose
    assert not isinstance(bad, str) or bad not in str(caught.value)


def test_it_is_never_shown_or_sent(secret: Secret) -> None:
    assert WORD not in repr(secret) + str(vars(type(secret))) and not hasattr(secret, "__dict__")
    with pytest.raises(TypeError, match="stays in its process"):
        pickle.dumps(secret)


def test_a_secret_needs_a_name() -> None:
    with pytest.raises(ConfigError, match="a session with a name"):
        InferenceSession("inline", secret=WORD)


def test_the_command_line_reads_files_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYK_SECRET", raising=False)
    assert secret_of(None) is None
    monkeypatch.setenv("RAYK_SECRET", "of the environment")
    assert secret_of(None) == "of the environment"
    file = tmp_path / "secret"
    file.write_text(f"{WORD}\n")
    assert secret_of(file) == WORD
    file.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        secret_of(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        secret_of(tmp_path / "nowhere")


# -- a manager under a name ------------------------------------------------------------------------------------------


@pytest.fixture
def runtime(secret: Secret, caplog: pytest.LogCaptureFixture) -> Iterator[FakeRuntime]:
    """A cluster that was started with the secret, of which nothing is logged."""
    runtime = FakeRuntime()
    with caplog.at_level(logging.DEBUG), manager_on(runtime, name="prod", secret=WORD):
        yield runtime
    assert WORD not in caplog.text and WORD not in repr(runtime.events)


def attach(runtime: FakeRuntime, secret: str | None) -> PagedKVCacheManager:
    with session_on(runtime, "prod", secret) as session:
        return PagedKVCacheManager(params(), session, 16, enable_runtime_checks=True, max_batch_size=8,
                                   router="least-loaded")  # fmt: skip


def test_drivers_attach_with_it_and_not_without(runtime: FakeRuntime) -> None:
    attach(runtime, WORD)
    for wrong in (None, "another secret"):
        with pytest.raises(SecretError, match="prod"):
            attach(runtime, wrong)


def test_it_is_described_and_removed_with_it(runtime: FakeRuntime, secret: Secret) -> None:
    runtime.secret = None
    with pytest.raises(SecretError):
        describe(runtime, "prod")
    with pytest.raises(SecretError):
        remove_session(runtime, "prod")
    assert len([actor for actor in runtime.actors if actor.dead is None]) == 3, "nothing was done"
    runtime.secret = secret
    [state] = describe(runtime, "prod")
    assert len(state.replicas) == 2 and WORD not in repr(state)
    runtime.secret = None
    assert remove_session(runtime, "prod", force=True).actors == 3


def test_a_scheduler_that_began_anew_asks_for_it_still(secret: Secret) -> None:
    runtime = FakeRuntime()
    with manager_on(runtime, name="prod", secret=WORD) as manager:
        kept = next(iter(runtime.store.values()))
        assert kept.roster.lock is not None
        [scheduler] = [actor for actor in runtime.actors if actor.label == "scheduler"]
        with pytest.raises(SecretError):
            runtime.get(scheduler.call("roster", control=True), "it", 1)
        assert manager.replica_states() == ["ready", "ready"]
