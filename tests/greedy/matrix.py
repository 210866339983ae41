"""Greedy tokens of two replicas on scarce pages against model.generate() of transformers, token by token.

Run it by hand for every architecture, chunk size and page size (half an hour on one core):

    python tests/greedy/matrix.py                     # everything
    python tests/greedy/matrix.py llama gemma2 --chunk-size 16 --page-size 128 --runtime ray --tiers

Each configuration serves 64 random prompts of 1 to 700 tokens, many with a common beginning, with so few pages that
requests are preempted at least 20 times; where once is not enough for that, they are served several times, which
the cache makes fuller still. A token may differ from the dense model's only where its two best logits are
within 1e-4; that is counted and printed, and ends the comparison of that prompt. Exit code 1 for any other difference.
With --tiers a small host tier and a disk tier lie below the pages, and every configuration has pages from both.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TIE = 1e-4
NEW_TOKENS = 32
PROMPTS, LONGEST = 64, 700
PREEMPTIONS, ROUNDS = 20, 10
SEEDS = 5
HOST_MEMORY, DISK_MEMORY = "768KiB", "256MiB"
CHUNK_SIZES, PAGE_SIZES = (16, 64, 512), (16, 128)


@dataclass(frozen=True)
class Reference:
    """What the dense model answers to one prompt, and how far its best logit is above the second at each token."""

    tokens: list[int]
    gaps: list[float]


@dataclass(frozen=True)
class Outcome:
    """One configuration. `ties` differ where they may, `wrong` are indices of answers that differ elsewhere."""

    name: str
    chunk_size: int
    page_size: int
    pages: int
    rounds: int
    tokens: int
    cached: int
    preemptions: int
    ties: int
    wrong: list[int]
    seconds: float
    from_host: int
    from_disk: int
    tiers: bool = False

    @property
    def ok(self) -> bool:
        loaded = not self.tiers or (self.from_host > 0 and self.from_disk > 0)
        return not self.wrong and self.preemptions >= PREEMPTIONS and loaded

    def __str__(self) -> str:
        where = f"{self.name:12} chunk {self.chunk_size:4} page {self.page_size:4} pages {self.pages:4}"
        tiers = f" ({self.from_host} host, {self.from_disk} disk)" if self.tiers else ""
        served = f"{self.rounds} round(s), {self.tokens} tokens, {self.cached} cached{tiers}"
        served += f", {self.preemptions} preemptions"
        return f"{where}: {served}, {self.ties} ties, {len(self.wrong)} wrong ({self.seconds:.1f} s)"


def random_prompts(vocab: int, page_size: int, count: int = PROMPTS, seed: int = 0) -> list[list[int]]:
    """1 to 700 tokens; token 0 to 2 are special and left out.

    One in four has any length; a quarter of those is the beginning of another one. The others begin with one of two
    common beginnings of whole pages and end shortly before a page does: many of them run at once, and each answer
    needs another page.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int = 1) -> list[int]:
        found: list[int] = torch.randint(low, high, (size,), generator=generator).tolist()
        return found

    heads = [draw(3, vocab, max(160 // page_size, 1) * page_size) for _ in range(2)]
    long = draw(3, vocab, LONGEST)
    prompts = []
    for i in range(count):
        [length] = draw(1, LONGEST + 1)
        own = draw(3, vocab, max(1, page_size - draw(0, NEW_TOKENS - 2)[0]))
        if i % 16 == 0:
            prompts.append(long[:length])
        elif i % 4 == 0:
            prompts.append(draw(3, vocab, length))
        else:
            prompts.append([*heads[i // 2 % 2], *own])
    return prompts


def dense_answers(model: Any, prompts: Sequence[list[int]], new_tokens: int = NEW_TOKENS) -> list[Reference]:
    """model.generate() for each prompt alone."""
    found = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = [step[0].topk(2).values.tolist() for step in out.logits]
        found.append(Reference(out.sequences[0, len(prompt) :].tolist(), [first - second for first, second in best]))
    return found


def compare(tokens: list[int], reference: Reference) -> str:
    """ "same", "tie" or "wrong"."""
    for at, (mine, theirs) in enumerate(zip(tokens, reference.tokens, strict=False)):
        if mine != theirs:
            return "tie" if reference.gaps[at] <= TIE else "wrong"
    return "same" if len(tokens) == len(reference.tokens) else "wrong"


def scarce_pages(prompts: Sequence[list[int]], page_size: int, new_tokens: int = NEW_TOKENS) -> int:
    """As many as the longest request needs."""
    return -(-(max(len(prompt) for prompt in prompts) + new_tokens) // page_size)


def run(
    name: str,
    folder: Path,
    prompts: Sequence[list[int]],
    references: Sequence[Reference],
    chunk_size: int,
    page_size: int,
    pages: int | None = None,
    session: Any = None,
    new_tokens: int = NEW_TOKENS,
    tiers: Path | None = None,
) -> Outcome:
    """Serve the prompts from two replicas and compare; `tiers` is a folder for a disk tier."""
    from rayk import Cluster

    pages = pages or scarce_pages(prompts, page_size)
    began = time.perf_counter()
    with Cluster(
        folder,
        session,
        replicas=2,
        page_size=page_size,
        pages=pages,
        max_batch_size=32,
        chunk_size=chunk_size,
        watermark=0.0,
        router="round-robin",
        host_memory=HOST_MEMORY if tiers is not None else None,
        disk_dir=tiers,
        disk_memory=DISK_MEMORY if tiers is not None else None,
    ) as cluster:
        outputs, rounds = [], 0
        while not rounds or (rounds < ROUNDS and _preemptions(cluster) < PREEMPTIONS):
            outputs += cluster.generate(prompts, max_new_tokens=new_tokens)
            rounds += 1
        preemptions = _preemptions(cluster)
        loaded = [cluster.stats(r).cache for r in range(2)]
        cluster.check_integrity()
    failed = [output for output in outputs if output.error is not None]
    if failed:
        raise failed[0].error  # type: ignore[misc]  # it has one
    assert {output.replica for output in outputs} == {0, 1}
    kinds = [compare(output.tokens, references[i % len(prompts)]) for i, output in enumerate(outputs)]
    return Outcome(
        name,
        chunk_size,
        page_size,
        pages,
        rounds,
        sum(len(output.tokens) for output in outputs),
        sum(output.cached_tokens for output in outputs),
        preemptions,
        kinds.count("tie"),
        [i for i, kind in enumerate(kinds) if kind == "wrong"],
        time.perf_counter() - began,
        sum(each.h2d_blocks_copied - each.disk_blocks_read for each in loaded),
        sum(each.disk_blocks_read for each in loaded),
        tiers is not None,
    )


def _preemptions(cluster: Any) -> int:
    return sum(cluster.stats(r).preemptions for r in range(2))


def main(write: Callable[..., Path], dense: Callable[[Path], Any], known: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", default=list(known), help=", ".join(known))
    parser.add_argument("--chunk-size", type=int, nargs="*", default=CHUNK_SIZES)
    parser.add_argument("--page-size", type=int, nargs="*", default=PAGE_SIZES)
    parser.add_argument("--pages", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runtime", choices=("inline", "ray"), default="inline")
    parser.add_argument("--tiers", action="store_true")
    args = parser.parse_args()
    from rayk import InferenceSession

    torch.set_num_threads(1)
    bad = 0
    with InferenceSession(args.runtime) as session, tempfile.TemporaryDirectory() as folder:
        for name in args.architectures:
            for page_size in args.page_size:
                for seed in range(SEEDS):  # weights whose answers end early make no pages scarce
                    checkpoint = write(Path(folder) / f"{name}-{page_size}-{seed}", name, seed)
                    model = dense(checkpoint)
                    vocab = model.config.get_text_config().vocab_size
                    prompts = random_prompts(vocab, page_size, seed=args.seed)
                    references = dense_answers(model, prompts)
                    if sum(len(each.tokens) for each in references) > 0.8 * NEW_TOKENS * len(prompts):
                        break
                for chunk_size in args.chunk_size:
                    with tempfile.TemporaryDirectory() as disk:
                        sizes, tiers = (chunk_size, page_size, args.pages), Path(disk) if args.tiers else None
                        done = run(name, checkpoint, prompts, references, *sizes, session, tiers=tiers)
                    bad += not done.ok
                    print(done, "" if done.ok else "FAILED", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tests.unit.models.checkpoints import ARCHITECTURES, dense, write

    sys.exit(main(write, dense, list(ARCHITECTURES)))
