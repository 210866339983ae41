"""`rayk generate` in this process: what it prints, and what it says of bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rayk.cli.main import main
from rayk.engine import replicas as serve
from rayk.engine.replicas import ModelSource

from ..models.checkpoints import dense, write  # noqa: TID252  # tests/ is no package that has an absolute name
from .test_detokenizer import make_tokenizer

FIELDS = {"id", "tokens", "text", "cached_tokens", "finish_reason"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer."""
    folder = write(tmp_path_factory.mktemp("llama"), "llama", vocab_size=300)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def generate(folder: Path, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str, model: Path = folder) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["generate", "--model", str(model), "--runtime", "inline", "--page-size", "4", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def lines(tmp_path: Path, *values: Any) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values))
    return str(path)


def dense_tokens(folder: Path, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = dense(folder).generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


def test_json_of_tokens_and_text(generate, folder: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    text = "the stop said"
    prompts = lines(
        tmp_path,
        {"id": "a", "tokens": list(range(5, 25))},
        {"id": 7, "text": text},
        {"tokens": [5, 6], "max_new_tokens": 2, "id": None},
    )
    code, out, err = generate("--prompts", prompts, "--max-new-tokens", "6", "--format", "json")
    assert code == 0, err
    result = json.loads(out)
    a, b, c = result["outputs"]
    assert set(a) == set(b) == FIELDS
    assert [each["id"] for each in (a, b, c)] == ["a", 7, 2], "as they were given, in that order"
    assert a["tokens"] == dense_tokens(folder, list(range(5, 25)), 6)
    assert b["tokens"] == dense_tokens(folder, tokenizer.encode(text), 6)
    assert b["text"] == tokenizer.decode(b["tokens"], skip_special_tokens=True)
    assert len(c["tokens"]) == 2 and c["finish_reason"] == "length"
    prompt = 20 + len(tokenizer.encode(text)) + 2
    made = sum(len(each["tokens"]) for each in (a, b, c))
    assert result["tokens"] == {"prompt": prompt, "cached": 0, "computed": prompt, "generated": made}
    assert result["requests"] == {"submitted": 3, "completed": 3, "failed": 0, "preempted": 0, "retried": 0}
    assert set(result["latency"]) == {"ttft", "itl", "e2e"} and result["throughput"]["generated_tokens_per_s"] > 0


def test_fields_that_there_are_not_fail_their_line_alone(generate, folder: Path, tmp_path: Path) -> None:
    prompts = lines(
        tmp_path,
        {"id": "a", "tokens": [5, 6]},
        {"id": "b", "tokens": [5, 6], "max_tokens": 2},
        {"id": "c", "tokens": [5, 6], "temprature": 2, "note": "x"},
        {"id": "\ud800", "tokens": [5, 6]},
        {"id": "e", "text": "\ud800"},
        {"id": "f", "tokens": [5, 6], "max_new_tokens": 2**80},
        {"id": "g", "tokens": [5, 6], "cache_salt": "\ud800"},
        {"id": "h", "tokens": [2**80]},
        {"id": ["i"], "tokens": [5]},
        {"id": "z", "tokens": [5, 6], "max_new_tokens": 3},
    )
    code, out, err = generate("--prompts", prompts, "--max-new-tokens", "6", "--format", "json")
    outputs = json.loads(out)["outputs"]
    said = [each.get("error", {}).get("message", "") for each in outputs]
    assert code == 1 and "Traceback" not in err
    assert outputs[0]["tokens"] == dense_tokens(folder, [5, 6], 6) and len(outputs[-1]["tokens"]) == 3
    assert "no field 'max_tokens' (did you mean 'max_new_tokens'?)" in said[1]
    assert "no field 'temprature' (did you mean 'temperature'?), 'note'" in said[2]
    assert all("'utf-8'" in each or "UTF-8" in each for each in (said[3], said[4], said[6]))
    assert "max_new_tokens is 12089258" in said[5] and "flat sequence of ints" in said[7]
    assert "a request id must be a str" in said[8]
    assert [each["id"] for each in outputs[3:9:5]] == ["\ud800", ["i"]]
    code, out, err = generate("--prompts", prompts, "--max-new-tokens", "6")
    assert code == 1 and "max_tokens" in err and "Traceback" not in err


def test_log_probabilities_are_in_the_json(generate, tmp_path: Path) -> None:
    prompts = lines(tmp_path, {"tokens": [5, 6], "logprobs": 2}, {"tokens": [5, 6], "logprobs": 0}, {"tokens": [5, 6]})
    code, out, _ = generate("--prompts", prompts, "--max-new-tokens", "3", "--format", "json")
    two, none, without = json.loads(out)["outputs"]
    assert code == 0 and set(without) == FIELDS and set(two) == FIELDS | {"logprobs"}
    assert len(two["logprobs"]) == 3
    for token, found in zip(two["tokens"], two["logprobs"], strict=True):
        assert (
            found["top_ids"][0] == token and found["top"][0] == pytest.approx(found["chosen"]) and found["chosen"] < 0
        )
        assert len(found["top"]) == len(found["top_ids"]) == 2
    assert [(each["top_ids"], each["top"]) for each in none["logprobs"]] == [([], [])] * 3


def test_cached_tokens(generate, tmp_path: Path) -> None:
    prompt = {"tokens": list(range(5, 25))}
    code, out, _ = generate("--prompts", lines(tmp_path, prompt, prompt), "--format", "json", "--max-new-tokens", "4")
    first, second = json.loads(out)["outputs"]
    assert code == 0 and first["tokens"] == second["tokens"]
    assert (first["cached_tokens"], second["cached_tokens"]) == (0, 16)


def test_text(generate) -> None:
    code, out, err = generate("--prompt", "the stop", "said and", "--max-new-tokens", "3")
    assert code == 0 and out.startswith("--- 0 (length, 0 tokens cached)\n") and "\n--- 1 (" in out
    assert "6 generated" in err
    code, out, _ = generate("--prompt", "the stop", "--max-new-tokens", "3")
    assert code == 0 and not out.startswith("---")


def test_seeds(generate) -> None:
    def tokens(*flags: str) -> list[int]:
        code, out, _ = generate("--prompt", "the stop", "--max-new-tokens", "12", "--format", "json", *flags)
        assert code == 0
        found: list[int] = json.loads(out)["outputs"][0]["tokens"]
        return found

    assert tokens("--temperature", "1.5", "--seed", "3") == tokens("--temperature", "1.5", "--seed", "3")
    assert tokens("--seed", "3") != tokens("--seed", "4")
    assert tokens("--greedy") == tokens()


def test_failed_requests_leave_the_others_and_the_exit_code_is_1(generate, folder: Path, tmp_path: Path) -> None:
    good = {"id": "good", "tokens": [5, 6, 7]}
    bad = {
        "empty": {"tokens": []},
        "far": {"tokens": [5, 300]},
        "long": {"tokens": [5] * 2000},
        "words": {"tokens": "abc"},
        "nothing": {},
        "hot": {"tokens": [5], "temperature": "hot"},
        "good": {"tokens": [5]},
    }
    prompts = lines(tmp_path, good, *({"id": name, **each} for name, each in bad.items()), {"id": "z", "text": "the"})
    code, out, _ = generate("--prompts", prompts, "--max-new-tokens", "4", "--format", "json")
    outputs = json.loads(out)["outputs"]
    assert code == 1
    assert outputs[0]["tokens"] == dense_tokens(folder, [5, 6, 7], 4) and "error" not in outputs[-1]
    for each in outputs[1:-1]:
        assert each["finish_reason"] == "error" and each["error"]["kind"] == "RequestError" and each["tokens"] == []
    code, out, err = generate("--prompts", prompts, "--max-new-tokens", "4")
    assert code == 1 and "the prompt is empty" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "either --prompt TEXT or --prompts"),
        (["--prompt", "a", "--prompts", "x"], "either --prompt TEXT or --prompts"),
        (["--prompts", "/nowhere.jsonl"], "cannot be read"),
        (["--prompt", "a", "--greedy", "--top-p", "0.5"], "--greedy and --top-p exclude each other"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature is nan"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--prompt", "a", "--top-p", "2"], "--top-p is 2.0"),
        (["--prompt", "a", "--replicas", "0"], "replicas must be"),
        (["--prompt", "a", "--chunk-size", "0"], "chunk_size must be"),
        (["--prompt", "a", "--router", "best"], "router 'best'"),
        (["--prompt", "a", "--address", "1.2.3.4:5"], "--address is for"),
        (["--prompt", "a", "--attention", "magic"], "magic"),
        (["--prompt", "a", "--colour", "red"], "No such option"),
    ],
)
def test_bad_usage(generate, flags: list[str], message: str) -> None:
    code, out, err = generate(*flags)
    assert code == 2 and out == "" and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"id": "a", "tokens": [1]', "line 2 is not JSON"),
        ("[1, 2]", "line 2 is no object"),
    ],
    ids=["deep", "cut", "list"],
)
def test_files_that_are_not_prompts(generate, tmp_path: Path, line: str, message: str) -> None:
    code, _, err = generate("--prompts", lines(tmp_path, {"tokens": [5]}, line))
    assert code == 2 and message in err
    assert "has no prompts" in generate("--prompts", lines(tmp_path))[2]


def test_damaged_and_missing_checkpoints(generate, folder: Path, tmp_path: Path) -> None:
    code, _, err = generate("--prompt", "a", model=tmp_path / "none")
    assert code == 2 and "does not exist" in err
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in folder.iterdir():
        data = file.read_bytes()
        (damaged / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    code, _, err = generate("--prompt", "a", model=damaged)
    assert code == 2 and "model.safetensors" in err and "Traceback" not in err


def test_memory_is_shown_as_planned_and_as_taken(generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = lines(tmp_path, {"tokens": [5, 6]})
    argv = ("--prompts", prompts, "--max-new-tokens", "1", "--format", "json")
    code, out, err = generate(*argv)
    assert code == 0 and "planned" not in err
    [replica] = json.loads(out)["replicas"]
    for part in ("weights", "pages"):
        taken = replica["memory"][part]["taken"]
        assert taken > 0 and replica["memory"][part]["planned"] == pytest.approx(taken, rel=0.03)
    found: list[str] = []
    monkeypatch.setattr(ModelSource, "planned_bytes", lambda source, ranks: taken)
    monkeypatch.setattr(serve.log, "warning", lambda text, *values: found.append(text % values))
    assert generate(*argv)[0] == 0
    assert len(found) == 1 and "not as planned: weights: " in found[0]


def test_pages_of_another_dtype_and_ranks(generate) -> None:
    asked = ("--prompt", "the stop said", "--pages", "8", "--max-new-tokens", "2", "--format", "json")
    taken = {}
    for flags in ((), ("--kv-dtype", "float8_e4m3fn")):
        code, out, err = generate(*asked, *flags)
        assert code == 0, err
        taken[flags] = json.loads(out)["replicas"][0]["memory"]["pages"]["taken"]
    whole, small = taken.values()
    assert whole == 4 * small
    code, out, err = generate(*asked, "--kv-dtype", "int4")
    assert code == 2 and "kv_dtype 'int4' is not one of float32, bfloat16" in err
    code, out, err = generate(*asked, "--tp", "2")
    assert code == 2 and "tp=2 needs a process for each rank" in err and 'InferenceSession("ray")' in err
