"""Files of requests: each row answered once, wherever a job was stopped; bad rows are error lines."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayk.cluster import Cluster
from rayk.errors import ConfigError, ReplicaLostError
from rayk.server.batch import Batch
from rayk.server.settings import ServerSettings

SETTINGS = ServerSettings(models=("tiny",))
BAD: list[bytes] = [
    b"{",
    b"[]",
    b'{"custom_id": "no url"}',
    b'{"custom_id": "bad field", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "top_p": 9}}',
    b'{"custom_id": "stream", "url": "/v1/completions", "body": {"prompt": "a", "stream": true}}',
    b'{"custom_id": "model", "url": "/v1/completions", "body": {"prompt": "a", "model": "gpt"}}',
]


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    with Cluster(folder, replicas=2, page_size=16, pages=400) as cluster:
        yield cluster


def row(at: int) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": [40 + at] * 5, "max_tokens": 4, "temperature": 0}
    if at % 3 == 0:
        body = {"messages": [{"role": "user", "content": f"Number {at}"}], "max_tokens": 4, "temperature": 0}
    url = "/v1/chat/completions" if at % 3 == 0 else "/v1/completions"
    return {"custom_id": f"row-{at}", "method": "POST", "url": url, "body": body}


def texts(output: Path) -> dict[str, Any]:
    """By custom id; each row has one line."""
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    found = {}
    for line in lines:
        if line["error"] is None:
            choice = line["response"]["body"]["choices"][0]
            found[line["custom_id"]] = choice.get("text") or choice["message"]["content"]
    return found


def test_a_job_goes_on_wherever_it_was_stopped(cluster: Cluster, tmp_path: Path) -> None:
    given, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps(row(at)).encode() for at in range(30)]
    lines[4:4] = BAD
    lines[20:20] = [b"", lines[0]]  # nothing, and a row that is there twice
    given.write_bytes(b"\n".join(lines))
    job = Batch(given, output)
    done = job.run(cluster, SETTINGS, 8)
    assert (done["rows"], done["answered"], done["failed"], done["left"]) == (37, 37, 6, 0)
    assert done["generated_tokens"] > 0
    want = texts(output)
    assert len(want) == 30
    errors = [each for line in output.read_text().splitlines() if (each := json.loads(line))["error"]]
    assert {each["custom_id"] for each in errors} == {None, "no url", "bad field", "stream", "model"}
    assert {each["error"]["code"] for each in errors} >= {"invalid_row", "400", "model_not_found"}

    whole = output.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 3, len(whole)):
        output.write_bytes(whole[:cut])
        again = Batch(given, output).run(cluster, SETTINGS, 8)
        assert again["before"] + again["answered"] == 37 and again["failed"] == 6 and again["left"] == 0
        assert texts(output) == want
    assert again["answered"] == 0


def test_files_that_are_none(tmp_path: Path) -> None:
    given, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with pytest.raises(ConfigError, match="cannot be read"):
        Batch(given, output)
    given.write_text(json.dumps(row(1)))
    output.write_text("a poem\n")
    with pytest.raises(ConfigError, match="lines that are no answers"):
        Batch(given, output)
    output.write_text('{"id": "batch_req_9_abc", "error": null}\n')
    with pytest.raises(ConfigError, match="answers to other requests"):
        Batch(given, output)
    assert "batch_req_9_abc" in output.read_text()


def test_a_column_of_ray_data(folder: Path, repo: Path) -> None:
    spec = importlib.util.spec_from_file_location("batch_example", repo / "examples" / "batch.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    answers = example.Answers(str(folder), {"max_tokens": 4}, page_size=16, pages=64)
    batch = {"prompt": np.array(["a", "b" * 9000, "c"], object), "row": np.arange(3)}
    first = answers(dict(batch))
    assert [each is None for each in first["error"]] == [True, False, True]
    assert "leaves no room" in first["error"][1] or "can never fit" in first["error"][1]
    lost = answers._cluster
    generate = lost.generate

    def dies(prompts: Any, **settings: Any) -> Any:
        outputs = generate(prompts, **settings)
        return [type(each)(each.id, 1, [], None, 0, "error", ReplicaLostError(0, 0, [], "boom")) for each in outputs]

    lost.generate = dies
    assert list(answers(dict(batch))["answer"]) == list(first["answer"])
    assert answers._cluster is not lost
    answers._cluster.close()
