"""Reading py-spy's stacks; taking them needs a cluster and is `make profile`."""

import shutil
from pathlib import Path

import pytest

from ..measure.ray_profile import (  # noqa: TID252  # tests/ is no package with an absolute name
    RATE,
    ProfileError,
    Sampler,
    describe,
    read_stacks,
)

STACKS = """<module> (a.py:1);main (a.py:2);work (a.py:9) 30
<module> (a.py:1);main (a.py:2);work (a.py:9);work (a.py:9) 10
<module> (a.py:1);main (a.py:2);get (ray/_private/worker.py:5) 60
"""


def test_samples_count_once_for_each_function_on_the_stack() -> None:
    profile = read_stacks("decode", "driver", 0.5, STACKS)
    assert profile.samples == 100
    assert profile.inner == {"work (a.py:9)": 40, "get (ray/_private/worker.py:5)": 60}
    assert profile.outer["main (a.py:2)"] == 100 and profile.outer["work (a.py:9)"] == 40


def test_a_thread_of_rays_own_has_a_name() -> None:
    assert read_stacks("decode", "replica", 0.5, " 7\n").inner == {"(in C++, no Python function)": 7}


def test_a_profile_in_markdown() -> None:
    text = describe(read_stacks("decode", "driver", 0.5, STACKS), seconds=1000 / RATE)
    assert "## decode: driver" in text and "50% of a core; the interpreter's lock was held 10% of the time" in text
    assert "| 60.0% | get (ray/_private/worker.py:5) | 100.0% | main (a.py:2) |" in text
    assert "| 40.0% | work (a.py:9) | 40.0% | work (a.py:9) |" in text
    assert describe(read_stacks("decode", "driver", 0.0, ""), 1.0)  # an idle process has no samples


def test_without_py_spy_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(ProfileError, match="it is not installed"):
        Sampler(tmp_path, 1.0)
