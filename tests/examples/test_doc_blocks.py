"""What README.md and docs/*.md show works: Python blocks run, and commands and their flags are ones that there are.

A fenced block of another kind, and one that cannot run here, has a comment above it: <!-- by hand: why, or what printed
it -->. <!-- setup: code --> is run before the Python block below it. Blocks of a page share their names.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from rayk.cli.main import app, main

from ..ray.heads import CHECKPOINTS, warm_workers  # noqa: TID252  # tests/ is no package that has an absolute name

REPO = Path(__file__).resolve().parent.parent.parent
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", REPO / "CHANGELOG.md", REPO / "SECURITY.md"]
PAGES += sorted((REPO / "docs").rglob("*.md"))
FENCED = re.compile(r"(?:<!-- ((?:[^-]|-(?!->))*?)\s*-->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    ((?:\.venv/bin/|python -m )?rayk (?:.*\\\n)*.*)", re.MULTILINE)
OTHERS = {"base64", "curl", "docker", "export", "git", "kubectl", "pip", "ray", "source", "cd"}
"""Programs that are not ours."""
RUNNER = """
import json, os, sys, traceback, rayk
blocks = json.load(open(sys.argv[1]))
with rayk.InferenceSession("ray", "local", num_cpus=4, object_store_memory=80_000_000, log_to_driver=False) as session:
    pages = {}
    for page, line, code in blocks:
        names = pages.setdefault(page, {"rayk": rayk, "__name__": "__main__"})
        try:
            exec(compile(code, f"{page}:{line}", "exec"), names)
        except BaseException:
            print(f"{page}:{line}", traceback.format_exc(), file=sys.stderr, sep="\\n")
            os._exit(1)
    print("all ran", flush=True)
"""


class Block(NamedTuple):
    """A fenced block."""

    page: Path
    line: int
    mark: str
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(REPO)}:{self.line}"

    @property
    def by_hand(self) -> bool:
        return self.mark.startswith("by hand:") and len(self.mark) > 15


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        assert text.count("\n```") % 2 == 0, page
        for found in FENCED.finditer(text):
            line = text.count("\n", 0, found.start(3)) + 1
            yield Block(page, line, found[1] or "", found[2], found[3])


def commands(page: Path) -> Iterator[str]:
    """The command lines of a page, continued ones as one."""
    for block in blocks():
        if block.page == page and block.language == "sh" and not block.by_hand:
            yield from filter(str.strip, block.text.replace("\\\n", " ").splitlines())
    for found in INDENTED.finditer(FENCED.sub("", page.read_text())):
        yield found[1].replace("\\\n", " ")


def simple(line: str) -> list[list[str]]:
    """The words of each of a line's commands."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&><")
    lexer.whitespace_split = True
    out: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|;&><"):
            out.append([])
        else:
            out[-1].append(word)
    return out


def parse(words: list[str]) -> None:
    """By the command line's own parser; what it says of unknown commands and flags is raised."""
    if "--help" in words:
        assert main(words) == 0
        return
    command: Any = typer.main.get_command(app)
    context = command.make_context("rayk", list(words))
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        if not rest:
            break
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


def test_every_block_is_run_or_marked() -> None:
    known = {"python", "sh", "yaml", "json"}
    left = [block.where for block in blocks() if block.language not in known and not block.by_hand]
    assert left == [], "no test runs these: say above them what printed them, or why they cannot run here"


def check(words: list[str]) -> None:
    """AssertionError, or an error of the command line, when a command cannot be meant for this checkout."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if not words:
        return
    if "--" in words:
        check(words[words.index("--") + 1 :])
        words = words[: words.index("--")]
    if words[0] == "python":
        words = words[2:] if words[1] == "-m" else words[1:]
    program = words[0].rpartition("/")[2]
    if program == "rayk":
        parse(words[1:])
    elif program.endswith(".py"):
        assert (REPO / words[0]).is_file()
    elif program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in words[1:] if "=" not in word} <= targets
    elif program == "pip":
        extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(",".join(re.findall(r"(?:rayk|\.)\[(.*?)\]", " ".join(words))).split(",")) - {""} <= set(extras)
    else:
        assert (
            program in OTHERS or program.partition(".")[0] in {"rayk", "pytest", "zipfile", "tests"} or words[0] == "-c"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_ones_that_there_are(page: Path) -> None:
    for line in commands(page):
        for words in simple(line):
            try:
                check(words)
            except Exception as error:
                text = error.format_message() if hasattr(error, "format_message") else repr(error)
                pytest.fail(f"{line.strip()}: {text}")


def test_the_site_builds(tmp_path: Path) -> None:
    """Strictly: no page is left out, and no link or anchor leads nowhere."""
    build = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    calm = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=REPO, env=calm, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PagedKVCacheManager" in (tmp_path / "api.html").read_text()


def test_data_is_well_formed() -> None:
    for block in blocks():
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            assert yaml.safe_load(block.text) is not None


@pytest.mark.ray
def test_python_blocks_run(tmp_path: Path) -> None:
    """All in one process, with one local Ray; the model is a tiny one."""
    assert main(["example-model", str(tmp_path / "tiny")]) == 0
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [str(each.getsockname()[1]) for each in (one, two)]
    instead = {
        "path/to/checkpoint": str(tmp_path / "tiny"),
        "/nvme/kv": str(tmp_path / "kv"),
        "16GiB": "16MiB",
        ":5557": f":{ports[0]}",
        ":5657": f":{ports[1]}",
    }
    found = []
    for block in blocks():
        if block.language == "python" and not block.by_hand:
            code = block.mark.removeprefix("setup:").lstrip() + "\n" + block.text
            for text, other in instead.items():
                code = code.replace(text, other)
            found.append((str(block.page.relative_to(REPO)), block.line, code))
    (tmp_path / "blocks.json").write_text(json.dumps(found))
    (tmp_path / "run.py").write_text(RUNNER)
    with warm_workers(tmp_path, CHECKPOINTS) as warm:
        path = f"{warm['PYTHONPATH']}{os.pathsep}{REPO}"  # as where `python` is started in a checkout
        done = subprocess.run(
            [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "blocks.json")],
            cwd=REPO,
            env={**os.environ, **warm, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0 and "all ran" in done.stdout, done.stderr[-3000:]
