"""How long the state machines run: RAYK_HYPOTHESIS=ci (the default, the same examples each time) or long."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

HERE = Path(__file__).resolve().parent
COMMON = {
    "deadline": None,  # it would measure how busy the machine is; pytest-timeout catches what hangs
    "print_blob": True,
    "report_multiple_bugs": False,
    "phases": [phase for phase in Phase if phase is not Phase.explain],
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
}
PROFILES = {
    "ci": settings(**COMMON, max_examples=100, stateful_step_count=40, derandomize=True, database=None),
    "long": settings(**COMMON, max_examples=3000, stateful_step_count=80),
}

chosen = os.environ.get("RAYK_HYPOTHESIS", "ci")
if chosen not in PROFILES:
    raise pytest.UsageError(f"RAYK_HYPOTHESIS={chosen!r} is not one of {', '.join(PROFILES)}")
# Registered, not loaded: the tests of other folders keep their own profile.
settings.register_profile("rayk-machines", PROFILES[chosen])


@pytest.hookimpl(tryfirst=True)  # before pytest-timeout looks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """More time than the suite's limit: a failing machine shrinks its example for minutes, a long run takes hours."""
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.timeout(0 if chosen == "long" else 900))


@pytest.fixture(autouse=True)
def nobody_starts_replacements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers without Ray have no thread that would."""
    monkeypatch.setattr("rayk.manager.starter.Starter.keep", lambda self: None)
