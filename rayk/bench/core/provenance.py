"""What a result was measured on, for results that are compared over time: the commit and the processor."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path


def running_commit() -> str | None:
    """The commit of the checkout that this package lies in, "+changes" if it differs from it; None outside of one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit, tracked = git("rev-parse", "HEAD"), git("ls-files", Path(__file__).name)
    if not commit or not tracked:  # installed into some other checkout's environment
        return None
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def cpu_model() -> str:
    """The processor's name, as Linux has it; the architecture where that is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
