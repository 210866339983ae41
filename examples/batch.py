"""A column of prompts in Ray Data, answered by actors that each have an engine.

python examples/batch.py ./tiny       # needs ray[data], and a model: rayk example-model ./tiny

A row that cannot be answered has the reason in the column `error`; the others are answered. An engine that dies costs a
retry: the actor makes a new one, and Ray Data replaces an actor that dies.
"""

import sys
from typing import Any

import numpy as np

import rayk


class Answers:
    """For map_batches(): adds `answer` and `error` to batches that have `prompt`. `settings` are sampling settings."""

    def __init__(self, model: str, settings: dict[str, Any] | None = None, **cluster: Any) -> None:
        self._open = lambda: rayk.Cluster(model, **cluster)
        self._settings = settings or {}
        self._cluster = self._open()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        prompts = list(batch["prompt"])
        outputs = self._cluster.generate(prompts, **self._settings)
        lost = [at for at, output in enumerate(outputs) if isinstance(output.error, rayk.ReplicaLostError)]
        if lost:
            self._cluster.close()
            self._cluster = self._open()
            again = self._cluster.generate([prompts[at] for at in lost], **self._settings)
            for at, output in zip(lost, again, strict=True):
                outputs[at] = output
        answers = [output.text if output.error is None else None for output in outputs]
        errors = [None if output.error is None else str(output.error) for output in outputs]
        return batch | {"answer": np.array(answers, object), "error": np.array(errors, object)}


if __name__ == "__main__":
    import ray.data

    prompts = ray.data.from_items([{"prompt": f"What color is number {i}?"} for i in range(200)])
    settings = {"max_tokens": 16, "temperature": 0.8, "seed": 1}
    answered = prompts.map_batches(
        Answers,
        fn_constructor_args=[sys.argv[1], settings],
        fn_constructor_kwargs={"threads": 1, "pages": 256},
        concurrency=2,
        batch_size=32,
        num_cpus=1,
    )
    for row in answered.take(3):
        print(row["prompt"], "->", row["answer"], row["error"])
