"""What a user installs: wheels made from the checkout and from the sdist hold the linked packages."""

import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "rayk", "actors", "scheduler"]
PACKAGES = [
    "rayk",
    "rayk/actors",
    "rayk/scheduler",
    "rayk/scheduler/admission",
    "rayk/scheduler/router",
    "rayk/scheduler/serving",
    "rayk/scheduler/transfers",
    "rayk/attention",
    "rayk/bench",
    "rayk/bench/chaos",
    "rayk/bench/core",
    "rayk/cli",
    "rayk/dispatch",
    "rayk/engine",
    "rayk/kvcache",
    "rayk/manager",
    "rayk/metrics",
    "rayk/models",
    "rayk/planning",
    "rayk/protocol",
    "rayk/replica",
    "rayk/server",
    "rayk/simulate",
    "rayk/workloads",
    "rayk/tiers",
    "rayk/transport",
]


def build(hook: str, tree: Path, into: Path) -> Path:
    """Call one hook of the build backend in tree, without isolation, so that nothing is downloaded."""
    into.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, hook, str(into)],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{hook} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="module")
def tree(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, links kept: builds write beside the sources."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source = repo / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_sdist", tree, tmp_path_factory.mktemp("sdist") / "dist")


@pytest.fixture(scope="module", params=["checkout", "sdist"])
def wheel(request: pytest.FixtureRequest, tree: Path, sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the checkout, then the one built from the unpacked sdist."""
    work = tmp_path_factory.mktemp("wheel")
    if request.param == "sdist":
        with tarfile.open(sdist) as archive:
            archive.extractall(work, filter="data")
        (tree,) = work.iterdir()
    return build("build_wheel", tree, work / "dist")


def expected(repo: Path) -> set[str]:
    """Every file that must be shipped, named as in a wheel: modules, py.typed, templates."""
    files = {f"{package}/{path.name}" for package in PACKAGES for path in (repo / package).glob("*.py")}
    files |= {str(path.relative_to(repo)) for path in (repo / "rayk" / "bench").rglob("*.html.j2")}
    return files | {"rayk/py.typed"}


def test_wheel_holds_every_module_as_a_real_file(repo: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = {info.filename: info for info in archive.infolist() if ".dist-info/" not in info.filename}
        metadata = [name for name in archive.namelist() if ".dist-info/" in name]
    assert set(shipped) == expected(repo)
    links = [name for name, info in shipped.items() if stat.S_ISLNK(info.external_attr >> 16)]
    assert not links
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)
    assert any(name.endswith("/entry_points.txt") for name in metadata)


def test_sdist_holds_every_module_as_a_real_file(repo: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert expected(repo) <= set(members)
    assert all(members[name].isreg() for name in expected(repo))
    assert not any(member.issym() or member.islnk() for member in members.values())


def test_wheel_imports_by_itself(wheel: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import rayk, rayk.actors, rayk.scheduler\n"
        "for package in (rayk, rayk.actors, rayk.scheduler): print(package.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(wheel)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    files = done.stdout.splitlines()
    assert len(files) == 3
    assert all(file.startswith(f"{wheel}/") for file in files), files
