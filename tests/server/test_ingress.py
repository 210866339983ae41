"""An application for Ray Serve, where that is installed; else how to get it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

import rayk.server
from rayk.errors import ConfigError


def opened() -> Any:
    raise AssertionError("it is opened in an ingress replica")


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning")  # by ray.serve
def test_an_application_of_serve() -> None:
    try:
        app = rayk.server.deployment(opened, ["tiny"], ingress=3, settings={"grace": 5.0})
    except ConfigError:
        pytest.skip("ray[serve] is not installed")
    assert type(app).__name__ == "Application"


def test_settings_are_checked_where_the_application_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.serve", None)  # as if it could not be imported
    with pytest.raises(ConfigError, match=r"pip install 'ray\[serve\]'"):
        rayk.server.deployment(opened, ["tiny"])


def test_the_example_names_its_application(repo: Path) -> None:
    config = (repo / "examples" / "serve" / "config.yaml").read_text()
    assert "import_path: examples.serve.app:app" in config
    assert importlib.util.spec_from_file_location("app", repo / "examples" / "serve" / "app.py") is not None
    assert "deployment(cluster, " in (repo / "examples" / "serve" / "app.py").read_text()
