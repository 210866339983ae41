"""Clients that are not ours, against a server of the example model: schemathesis over its openapi.json, and lm-eval,
whose log likelihoods over HTTP are compared with those of its own hf backend.

    make clients        # installs them into .venv-clients, which needs the package index
    python tests/clients/run.py SITE_PACKAGES ST [EXAMPLES]
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayk.cli.example_model import CAPITALS, write_example_model

TASK = """\
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
CHECKS = "not_a_server_error,status_code_conformance,response_schema_conformance"
CLOSE = 1e-3


@contextmanager
def server(model: Path) -> Iterator[str]:
    """Its address."""
    command = [sys.executable, "-m", "rayk", "serve", "--model", str(model), "--runtime", "inline", "--port", "0"]
    more = ["--served-model-name", "tiny", "--pages", "24", "--page-size", "16", "--tool-parser", "hermes"]
    with subprocess.Popen(command + more, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            yield next(line.split()[0] for line in process.stderr if "/v1 serves" in line).removesuffix("/v1")
        finally:
            process.terminate()
            process.communicate(timeout=60)


def schemathesis(st: str, address: str, examples: int, folder: Path) -> None:
    """Raises when it finds anything."""
    more = ["--request-timeout", "60", "--phases", "coverage,fuzzing", "--max-examples", str(examples)]
    subprocess.run([st, "run", f"{address}/openapi.json", "--checks", CHECKS, *more], check=True, cwd=folder)


def likelihoods(folder: Path, site: str, kind: str, arguments: str) -> dict[int, list[float]]:
    """By document, of lm-eval with that backend."""
    out = folder / kind
    command = [sys.executable, "-m", "lm_eval", "--model", kind, "--model_args", arguments, "--tasks", "capitals"]
    more = ["--include_path", str(folder), "--output_path", str(out), "--log_samples", "--device", "cpu"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "PYTHONPATH": site}
    subprocess.run(command + more, check=True, env=os.environ | offline)
    [file] = out.rglob("samples_capitals*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["doc_id"]: [float(each[0][0]) for each in line["resps"]] for line in lines}


def main(site: str, st: str, examples: int = 60) -> None:
    """Both, one after the other."""
    with tempfile.TemporaryDirectory() as name:
        folder, draw = Path(name), random.Random(1)
        model, file = folder / "tiny", folder / "documents.jsonl"
        write_example_model(model)
        documents = []
        for country, capital in list(CAPITALS.items()) * 5:
            others = draw.sample([each for each in CAPITALS.values() if each != capital], 3)
            choices = [f" {each}." for each in (capital, *others)]
            documents.append({"q": f"The capital of {country} is", "choices": choices, "gold": 0})
        file.write_text("\n".join(map(json.dumps, documents)))
        (folder / "capitals.yaml").write_text(TASK.format(file=file))
        with server(model) as address:
            over = f"model=tiny,base_url={address}/v1/completions,tokenizer={model},num_concurrent=4"
            ours = likelihoods(folder, site, "local-completions", over)
            theirs = likelihoods(folder, site, "hf", f"pretrained={model},dtype=float32")
            worst = max(abs(a - b) for at in theirs for a, b in zip(ours[at], theirs[at], strict=True))
            print(f"lm-eval: {sum(map(len, theirs.values()))} log likelihoods, largest difference {worst:.1e}")
            assert worst <= CLOSE
            schemathesis(st, address, examples, folder)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
