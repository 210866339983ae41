"""Statuses and bodies of what is refused, as OpenAI's clients read them; keys; limits."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from rayk.cluster import Cluster
from rayk.errors import ConfigError, NoReplicaError, OverloadedError, RaykError
from rayk.protocol.admission import AdmissionPolicy
from rayk.request_errors import ForwardError, QueueFullError, RequestTimeoutError
from rayk.server.errors import http_error
from rayk.server.settings import Limits, ServerSettings, read_keys

from .conftest import KEY, Served, serve

PLAIN = {"prompt": "a", "max_tokens": 2}
CHAT = [{"role": "user", "content": "Hello!"}]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", b"{", None),
        ("/v1/completions", b"[1]", None),
        ("/v1/completions", b'"\xff"', None),
        ("/v1/completions", b"[" * 100_000, None),
        ("/v1/completions", {"max_tokens": 2}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": [[]]}, "prompt"),
        ("/v1/completions", {"prompt": ["a", 3]}, "prompt"),
        ("/v1/completions", {"prompt": [2**40]}, "prompt"),
        ("/v1/completions", {"prompt": [5, 100_000]}, "prompt"),
        ("/v1/completions", {"prompt": [5] * 5000}, "prompt"),
        ("/v1/completions", PLAIN | {"max_tokens": "x"}, "max_tokens"),
        ("/v1/completions", PLAIN | {"max_tokens": 0}, "max_tokens"),
        ("/v1/completions", PLAIN | {"top_p": 3}, "top_p"),
        ("/v1/completions", PLAIN | {"n": 1000}, "n"),
        ("/v1/completions", PLAIN | {"best_of": 3}, "best_of"),
        ("/v1/completions", PLAIN | {"suffix": "b"}, "suffix"),
        ("/v1/completions", PLAIN | {"stop": ["a"] * 65}, "stop"),
        ("/v1/completions", PLAIN | {"logit_bias": {"a": 1}}, "logit_bias"),
        ("/v1/completions", PLAIN | {"logit_bias": {"100000": 1}}, "logit_bias"),
        ("/v1/completions", PLAIN | {"logprobs": 50}, "logprobs"),
        ("/v1/completions", PLAIN | {"timeout": -1}, "timeout"),
        ("/v1/completions", PLAIN | {"cache_salt": "\ud800"}, None),
        ("/v1/completions", PLAIN | {"priority": 2**70}, "priority"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"content": "a"}]}, "messages[0].role"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
        ("/v1/chat/completions", {"messages": CHAT, "top_logprobs": 3}, "top_logprobs"),
        ("/v1/chat/completions", {"messages": CHAT, "chat_template": "{{ raise_exception('no') }}"}, "messages"),
        ("/tokenize", {}, "prompt"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ],
)
def test_what_is_wrong_and_which_field(served: Served, path: str, body: Any, param: str | None) -> None:
    status, found = served.ask(path, body)
    error = found["error"]
    assert status == 400, error
    assert error["type"] == "invalid_request_error" and error["message"]
    assert error["param"] is not None or param is None
    assert param is None or error["param"].partition("[")[0] == param.partition("[")[0]


def test_the_client_raises_its_own_errors(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        served.client.completions.create(model="tiny", prompt="a", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as unknown:
        served.client.completions.create(model="gpt", prompt="a")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        served.client.completions.create(model="tiny", prompt="a " * 6000)
    assert long.value.code == "context_length_exceeded"
    wrong = served.client.with_options(api_key="nobody's")
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    assert served.ask("/nowhere")[0] == 404 and served.ask("/v1/completions")[0] == 405
    with pytest.raises(openai.APIStatusError) as late:
        served.client.completions.create(
            model="tiny", prompt="a", max_tokens=3000, extra_body={"ignore_eos": True, "timeout": 0.05}
        )
    assert late.value.status_code == 408


def test_unknown_fields_are_ignored_with_one_warning(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rayk.server"):
        for _ in range(3):
            assert served.ask("/v1/completions", PLAIN | {"no_such_field": 1, "metadata": {}})[0] == 200
    assert [record.getMessage() for record in caplog.records].count(
        "Completion: the field 'no_such_field' is unknown here and ignored"
    ) == 1 and "metadata" not in caplog.text


def test_open_routes_ids_and_metrics(served: Served) -> None:
    for path in ("/health", "/ready", "/version", "/metrics", "/openapi.json"):
        answer = served.send("GET", path, authorization="")
        assert answer.status == 200 and answer.read()
        assert answer.getheader("x-request-id")
    answer = served.send("GET", "/version", **{"x-request-id": "mine"})
    assert answer.getheader("x-request-id") == "mine"
    for stream in (True, False):
        assert served.send("POST", "/v1/completions", PLAIN | {"stream": stream, "user": "metrics"}).read()
    text = served.send("GET", "/metrics").read().decode()
    assert re.search(r'rayk_server_requests_total{[^}]*status="200"}', text) and 'status="499"' not in text
    assert 'rayk_replica_state{cluster="",replica_idx="1",state="ready"} 1.0' in text
    pages = re.findall(r'rayk_pages{cluster="",node="[^"]*",replica_idx="0",state="\w+"} (\S+)', text)
    assert len(pages) == 3 and sum(map(float, pages)) == 400.0
    assert "vllm:" not in text
    schema = json.loads(served.send("GET", "/openapi.json").read())
    assert "prompt" in schema["components"]["schemas"]["CompletionBody"]["required"]
    assert set(schema["paths"]) >= {"/v1/completions", "/v1/chat/completions", "/tokenize"}


def test_keys_are_never_logged(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        served.ask("/v1/completions", PLAIN)
        served.ask("/v1/models", None, authorization="Bearer sk-a-wrong-key")
    assert KEY not in caplog.text and "sk-a-wrong-key" not in caplog.text
    assert KEY not in repr(ServerSettings(models=("m",), keys=(KEY,)))


def test_clients_with_different_keys_share_no_prefix_where_that_is_asked_for() -> None:
    apart, together = (
        ServerSettings(models=("m",), keys=("a", "b"), isolate_keys=isolate) for isolate in (True, False)
    )
    salts = {apart.salt_of(f"Bearer {key}", salt) for key in ("a", "b") for salt in (None, "", "x")}
    assert len(salts) == 6 and not any(salt is None or "Bearer" in salt for salt in salts)
    assert apart.salt_of("bearer  a", "x") == apart.salt_of("Bearer a ", "x")
    assert together.salt_of("Bearer a", "x") == "x" and together.salt_of("Bearer a", None) is None


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nsk-1\n\n sk-2 \n")
    assert read_keys(file) == ("sk-1", "sk-2")
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="has no key"):
        read_keys(file)


def test_statuses() -> None:
    found: dict[RaykError, tuple[int, bool]] = {
        OverloadedError("r", "full", 2.4): (429, True),
        QueueFullError("r", 9): (429, True),
        NoReplicaError("r"): (503, True),
        RequestTimeoutError("r", 1.0): (504, False),
        ForwardError("r", 0, "RuntimeError", "x"): (500, False),
    }
    for error, (status, again) in found.items():
        made = http_error(error)
        assert made.status == status and (made.retry_after is not None) == again
    assert http_error(OverloadedError("r", "full", 2.4)).response().headers["retry-after"] == "3"
    assert http_error(ZeroDivisionError()).status == 500


@pytest.fixture(scope="module")
def narrow(folder: Path) -> Iterator[Served]:
    policy = AdmissionPolicy(max_waiting=1, patience=30, max_running=1)
    limits = Limits(body_bytes=5000, requests=3, prompts=4)
    with (
        Cluster(folder, page_size=16, pages=400, max_batch_size=4, admission=policy) as cluster,
        serve(cluster, limits=limits, request_timeout=50.0) as found,
    ):
        yield found


def test_too_much(narrow: Served) -> None:
    long = {"prompt": "a", "max_tokens": 3500, "ignore_eos": True, "stream": True}
    assert narrow.ask("/v1/completions", {"prompt": "a" * 6000})[0] == 413
    assert narrow.ask("/v1/completions", {"prompt": ["a"] * 5})[0] == 400
    chunked = narrow.connect()
    chunked.request("POST", "/v1/completions", iter([b"a" * 3000] * 3), {"authorization": f"Bearer {KEY}"})
    assert chunked.getresponse().status == 413
    open_ = [narrow.send("POST", "/v1/completions", long)]
    assert open_[0].read(10)  # it runs
    waits = narrow.connect()
    waits.request("POST", "/v1/completions", json.dumps(long), {"authorization": f"Bearer {KEY}"})
    while narrow.cluster.admission_state().waiting < 1:
        pass
    answer = narrow.send("POST", "/v1/completions", long)
    error = json.loads(answer.read())["error"]
    assert answer.status == 429 and error["type"] == "rate_limit_error" and error["code"] == "overloaded"
    assert int(answer.getheader("retry-after")) >= 1
    for each in open_:
        each.close()
    waits.close()
