"""The recorded planning questions, answered."""

import subprocess
import sys
from pathlib import Path


def test_the_recorded_questions_have_the_recorded_answers(repo: Path, shared_dir: Path) -> None:
    script = shared_dir / "conformance" / "mem_replay.py"
    done = subprocess.run(
        [sys.executable, str(script), str(shared_dir / "conformance" / "public")],
        cwd=repo,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [line.split("mismatches=")[1] for line in done.stdout.splitlines() if "mismatches=" in line]
    assert len(counts) >= 12 and all(int(count) == 0 for count in counts), done.stdout
