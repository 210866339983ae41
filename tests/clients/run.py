"""Clients that are not ours, against servers of the example model: schemathesis over openapi.json; lm-eval, whose log
likelihoods over HTTP are compared with those of its own hf backend; chats of several turns by guidellm; and two routers
before two servers.

    make clients        # installs them into .venv-clients, which needs the package index
    python tests/clients/run.py ENVIRONMENT [EXAMPLES]
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

import openai

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


ROUTERS = {"vllm-router": (), "smg": ("launch",)}
"""Commands, and what they are to do."""


@contextmanager
def server(model: Path, pages: int = 24, replicas: int = 1) -> Iterator[str]:
    """Its address."""
    command = [sys.executable, "-m", "rayk", "serve", "--model", str(model), "--runtime", "inline", "--port", "0"]
    more = ["--served-model-name", "tiny", "--page-size", "16", "--tool-parser", "hermes"]
    more += ["--pages", str(pages), "--replicas", str(replicas)]
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


def turns(guidellm: Path, address: str, model: Path, folder: Path) -> None:
    """Chats of three turns, four at a time: none fails, and what was said before is cached."""
    out = folder / "guidellm.json"
    subprocess.run(
        [
            str(guidellm), "run", "--disable-progress",
            "--backend", f"kind=openai_http,target={address},model=tiny,request_format=/v1/chat/completions",
            "--profile", "kind=concurrent,streams=4", "--tokenizer", f"kind=huggingface_auto,model={model}",
            "--data", "kind=synthetic_text,prompt_tokens=40,output_tokens=16,turns=3",
            "--constraint", "kind=max_requests,count=60", "--output", f"kind=json,path={out}",
        ],
        check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    totals = json.loads(out.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    metrics = urlopen(f"{address}/metrics").read().decode().splitlines()
    tokens = {kind: next(line for line in metrics if f'kind="{kind}"' in line and "_server_tokens" in line)
              for kind in ("prompt", "cached")}  # fmt: skip
    print(f"guidellm: {totals}; {tokens}")
    assert totals["errored"] == totals["incomplete"] == 0 and totals["successful"] == 60
    assert float(tokens["cached"].split()[-1]) > 0


def routed(name: str, binary: Path, addresses: list[str]) -> None:
    """A router before those servers: chats, streams and completions are what a server answers itself."""
    with socket.socket() as free, socket.socket() as other:
        free.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, metrics = free.getsockname()[1], other.getsockname()[1]
    command = [str(binary), *ROUTERS[name], "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-port", str(metrics), "--policy", "cache_aware", "--worker-urls", *addresses]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            router = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            direct = openai.OpenAI(base_url=f"{addresses[0]}/v1", api_key="none")
            for _ in range(300):
                with suppress(OSError):
                    urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                time.sleep(0.1)

            def same(number: int) -> bool:
                said = [
                    {"role": "user", "content": f"What is the capital of {list(CAPITALS)[number % len(CAPITALS)]}?"}
                ]
                asked = {"model": "tiny", "messages": said, "temperature": 0, "max_tokens": 12}
                want = direct.chat.completions.create(**asked).choices[0].message.content
                parts = [c.choices[0].delta.content or "" for c in router.chat.completions.create(stream=True, **asked)]
                plain = {"model": "tiny", "prompt": said[0]["content"], "temperature": 0, "max_tokens": 8}
                texts = {each.completions.create(**plain).choices[0].text for each in (router, direct)}
                whole = router.chat.completions.create(**asked).choices[0].message.content
                return want == "".join(parts) == whole and len(texts) == 1

            with ThreadPoolExecutor(4) as pool:
                right = sum(pool.map(same, range(24)))
            print(f"{name}: {right} of 24 the same through it")
            assert right == 24
        finally:
            process.terminate()


def main(environment: Path, examples: int = 60) -> None:
    """All of them, one after the other."""
    [site], binaries = environment.glob("lib/python3*/site-packages"), environment / "bin"
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
            ours = likelihoods(folder, str(site), "local-completions", over)
            theirs = likelihoods(folder, str(site), "hf", f"pretrained={model},dtype=float32")
            worst = max(abs(a - b) for at in theirs for a, b in zip(ours[at], theirs[at], strict=True))
            print(f"lm-eval: {sum(map(len, theirs.values()))} log likelihoods, largest difference {worst:.1e}")
            assert worst <= CLOSE
            schemathesis(str(binaries / "st"), address, examples, folder)
        with server(model, pages=600, replicas=2) as address, server(model, pages=600) as another:
            turns(binaries / "guidellm", address, model, folder)
            for name in ROUTERS:
                routed(name, binaries / name, [address, another])


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *map(int, sys.argv[2:]))
