"""examples/batch.py by map_batches of Ray Data, in a Ray of its own: bad rows have their errors; an engine that dies or
the actor that has it costs a retry and no row.

    python tests/clients/ray_data.py    # needs ray[data]; make clients runs it
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from rayk.cli.example_model import write_example_model

sys.path.insert(0, str(Path(__file__).parents[2]))
from examples.batch import Answers

ROWS = 120
LONG = "a " * 5000  # more than the model takes


class Failing(Answers):
    """Its engine fails in one batch, and its process in another, once each."""

    def __init__(self, model: str, marks: str, **more: Any) -> None:
        super().__init__(model, {"max_tokens": 8, "temperature": 0.8, "seed": 1}, **more)
        self._marks = Path(marks)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._first("engine", batch, 40):
            self._cluster._replicas._thread_of[0].fail(0, ZeroDivisionError("a bug of the engine"))
        if self._first("actor", batch, 80):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)

    def _first(self, what: str, batch: dict[str, np.ndarray], row: int) -> bool:
        if row not in batch["row"] or (self._marks / what).exists():
            return False
        (self._marks / what).touch()
        return True


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_example_model(folder / "tiny", steps=2)
        (folder / "marks").mkdir()
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            rows = [{"row": i, "prompt": LONG if i % 50 == 7 else f"number {i}"} for i in range(ROWS)]
            answered = ray.data.from_items(rows, override_num_blocks=12).map_batches(
                Failing,
                fn_constructor_args=[str(folder / "tiny"), str(folder / "marks")],
                fn_constructor_kwargs={"threads": 1, "pages": 256, "page_size": 16},
                concurrency=2, batch_size=10, num_cpus=0.5,
            )  # fmt: skip
            found = sorted(answered.take_all(), key=lambda row: row["row"])
            failed = [row["row"] for row in found if row["error"] is not None]
            died = sorted(os.listdir(folder / "marks"))
            print(f"Ray Data: {len(found)} rows, {len(failed)} with errors; died: {', '.join(died)}")
            assert [row["row"] for row in found] == list(range(ROWS))
            assert failed == [7, 57, 107] and all(found[at]["answer"] is None for at in failed)
            assert all(row["answer"] for row in found if row["error"] is None)
            assert died == ["actor", "engine"]
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
