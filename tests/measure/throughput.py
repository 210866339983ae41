"""Tokens a second on CPU, against transformers' continuous batching and its padded generate(), in one process and run.

    python -m tests.measure.throughput                         # a random model of 49 million parameters
    python -m tests.measure.throughput --prefix 512
    python -m tests.measure.throughput --model path/to/checkpoint --rounds 5 --threads 2

Every round serves the same prompts (24 to 63 tokens of their own after a common prefix, answers of 16 to 48) by each in
turn, in alternating order, and compares the answers. Printed are the medians of the ratios of processor time and wall
time to rayk's, and how many answers are the same. transformers is told to keep the same pages and rows.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

ROWS, PAGE = 64, 16
SHORTEST, LONGEST = 16, 48


class Served(NamedTuple):
    wall: float
    cpu: float
    answers: list[list[int]]


Work = tuple[list[list[int]], list[int]]


def work(seed: int, prefix: int, prompts: int, vocab: int) -> Work:
    """Prompts, and the number of tokens of each answer."""
    random = np.random.default_rng(seed)
    head = random.integers(10, vocab, prefix).tolist()
    texts = [head + random.integers(10, vocab, int(n)).tolist() for n in random.integers(24, 64, prompts)]
    return texts, [int(n) for n in random.integers(SHORTEST, LONGEST + 1, prompts)]


def random_model(folder: Path) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.04,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def by_rayk(folder: Path, texts: list[list[int]], counts: list[int], prefix: int) -> Served:
    from rayk import Cluster
    from rayk.sampling import SamplingParams

    pages = ROWS * (prefix + 64 + LONGEST) // PAGE + 200
    with Cluster(folder, page_size=PAGE, pages=pages, max_batch_size=ROWS, device="cpu") as cluster:
        began, cpu = time.perf_counter(), time.process_time()
        outputs = cluster.generate(texts, [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in counts])
        return Served(time.perf_counter() - began, time.process_time() - cpu, [output.tokens for output in outputs])


def by_continuous_batching(model: Any, texts: list[list[int]], counts: list[int], prefix: int) -> Served:
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=LONGEST)
    batching = ContinuousBatchingConfig(
        page_size=32,
        num_blocks=ROWS * (prefix + 64 + LONGEST) // 32 + 100,
        max_batch_tokens=512,
        max_requests_per_batch=ROWS,
    )
    model.set_attn_implementation("sdpa")
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=batching, block=True, timeout=5
    ) as manager:
        began, cpu = time.perf_counter(), time.process_time()
        numbers = {
            manager.add_request(text, max_new_tokens=n): at
            for at, (text, n) in enumerate(zip(texts, counts, strict=True))
        }
        answers: dict[int, list[int]] = {}
        while len(answers) < len(texts):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                answers[numbers[result.request_id]] = result.generated_tokens
            elif result is None and not manager.is_running():
                raise RuntimeError("continuous batching has stopped")
        served = time.perf_counter() - began, time.process_time() - cpu
    model.set_attn_implementation("sdpa")
    return Served(*served, [answers[at] for at in range(len(texts))])


def by_generate(model: Any, texts: list[list[int]], counts: list[int]) -> Served:
    model.set_attn_implementation("sdpa")
    width = max(map(len, texts))
    tokens, mask = torch.zeros(2, len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        tokens[row, width - len(text) :], mask[row, width - len(text) :] = torch.tensor(text), 1
    began, cpu = time.perf_counter(), time.process_time()
    out = model.generate(
        tokens, attention_mask=mask, do_sample=False, max_new_tokens=max(counts), eos_token_id=None, pad_token_id=0
    )
    served = time.perf_counter() - began, time.process_time() - cpu
    return Served(*served, [row[width : width + n].tolist() for row, n in zip(out, counts, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; a random one unless given")
    parser.add_argument("--prefix", type=int, default=0, help="tokens that all prompts have in common")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without", nargs="*", default=[], choices=("generate", "batching"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or random_model(Path(scratch))
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ways: dict[str, Callable[[list[list[int]], list[int]], Served]] = {
            "rayk": lambda texts, counts: by_rayk(folder, texts, counts, args.prefix),
        }
        if "batching" not in args.without:
            ways["batching"] = lambda texts, counts: by_continuous_batching(model, texts, counts, args.prefix)
        if "generate" not in args.without:
            ways["generate"] = lambda texts, counts: by_generate(model, texts, counts)
        found: dict[str, list[Served]] = {name: [] for name in ways}
        for turn in range(args.rounds):
            texts, counts = work(turn, args.prefix, args.prompts, model.config.vocab_size)
            for name in list(ways)[:: 1 if turn % 2 == 0 else -1]:
                served = ways[name](texts, counts)
                found[name].append(served)
                print(f"round {turn} {name:9}: {served.wall:7.2f} s, {served.cpu:7.2f} s of processor", flush=True)
    ours = found["rayk"]
    tokens = [sum(map(len, each.answers)) for each in ours]
    rate = float(np.median([count / each.wall for count, each in zip(tokens, ours, strict=True)]))
    print(f"prefix {args.prefix}, {args.threads} thread(s): rayk {rate:.0f} tokens/s of answers")
    for name in [name for name in ways if name != "rayk"]:
        pairs = list(zip(found[name], ours, strict=True))
        cpu, wall = (float(np.median([getattr(a, f) / getattr(b, f) for a, b in pairs])) for f in ("cpu", "wall"))
        same = sum(x == y for a, b in pairs for x, y in zip(a.answers, b.answers, strict=True))
        print(f"  {name}: {cpu:.2f} x its processor time, {wall:.2f} x its wall time; {same} answers of "
              f"{len(pairs) * args.prompts} the same")  # fmt: skip


if __name__ == "__main__":
    main()
