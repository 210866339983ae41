"""The layout: linked packages, one name for each, no Ray in the core, imports in one direction."""

import os
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import rayk

LINKED = ["actors", "scheduler"]

IMPORT_ALL_BUT_RAY = """
import importlib, pkgutil, sys
def import_all(package):
    for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if found.name == "rayk.actors.runtime" or found.name.endswith(".__main__"):
            continue
        module = importlib.import_module(found.name)
        if found.ispkg:
            import_all(module)
        assert "ray" not in sys.modules, f"importing {found.name} imported ray"
import_all(importlib.import_module("rayk"))
"""


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds the checkout first, as a script in its root would."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("package", LINKED)
def test_link_is_relative_and_resolves(repo: Path, package: str) -> None:
    link = repo / "rayk" / package
    assert link.is_symlink(), f"{link} is not a symbolic link: this clone was made without them"
    assert os.readlink(link) == f"../{package}"
    assert link.resolve() == repo / package
    assert (link / "__init__.py").is_file()


@pytest.mark.parametrize("package", LINKED)
def test_guard_refuses_the_top_level_name(repo: Path, package: str) -> None:
    done = python(f"import {package}", repo)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert f"import rayk.{package}" in last


@pytest.mark.parametrize("package", LINKED)
def test_linked_package_imports_under_rayk(repo: Path, package: str) -> None:
    done = python(f"import rayk.{package} as p; print(p.__name__, p.__file__)", repo)
    assert done.returncode == 0, done.stderr
    name, file = done.stdout.split(maxsplit=1)
    assert name == f"rayk.{package}"
    assert Path(file.strip()).resolve() == repo / package / "__init__.py"


def test_one_module_imports_ray(repo: Path) -> None:
    done = python(IMPORT_ALL_BUT_RAY, repo)
    assert done.returncode == 0, done.stderr


def test_layers_hold_and_a_breach_is_named(repo: Path, tmp_path: Path) -> None:
    """`make lint` runs this check; a copy of the tree with an import upwards inside a function fails it."""
    copy = tmp_path / "copy"
    for folder in ("rayk", "actors", "scheduler", "tests"):
        shutil.copytree(
            repo / folder,
            copy / folder,
            symlinks=True,
            ignore=lambda _, names: {n for n in names if n == "__pycache__"},
        )
    check = [sys.executable, copy / "tests" / "layers.py"]
    assert subprocess.run(check, capture_output=True).returncode == 0
    with (copy / "scheduler" / "leases.py").open("a") as file:
        file.write("\n\ndef late() -> None:\n    from rayk.actors import channel\n")
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 1
    assert "rayk.scheduler.leases stands below rayk.actors.channel" in done.stdout
    with (copy / "rayk" / "errors.py").open("a") as file:
        file.write("\n\ndef late() -> None:\n    import rayk.context\n")
    assert "a circle of imports" in subprocess.run(check, capture_output=True, text=True).stdout


def test_every_package_on_disk_is_declared(repo: Path) -> None:
    project = tomllib.loads((repo / "pyproject.toml").read_text())
    folders = [init.parent.relative_to(repo) for deep in ("*", "*/*") for init in repo.glob(f"rayk/{deep}/__init__.py")]
    found = {"rayk", *(".".join(folder.parts) for folder in folders)}
    assert found == set(project["tool"]["setuptools"]["packages"])


def test_version_is_said_once(repo: Path) -> None:
    project = tomllib.loads((repo / "pyproject.toml").read_text())["project"]
    assert rayk.__version__ == project["version"]
    try:
        installed = metadata.version("rayk")
    except metadata.PackageNotFoundError:
        pytest.skip("rayk runs from the checkout and is not installed: nothing to compare")
    assert rayk.__version__ == installed


def test_public_names_are_listed_and_there() -> None:
    """They are loaded on first use; dir() and completion know them before."""
    import rayk
    from rayk import request_errors as errors

    assert set(rayk.__all__) <= set(dir(rayk)) and rayk.__all__ == sorted(
        rayk.__all__, key=lambda n: (not n.isupper(), n)
    )
    assert all(getattr(rayk, name) is not None for name in rayk.__all__)
    for name in ("RequestError", "QueueFullError", "RequestTimeoutError", "RequestCancelledError", "ForwardError"):
        assert getattr(rayk, name) is getattr(errors, name)
