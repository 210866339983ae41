"""Greedy answers through the cache manager are those of model.generate(), for every architecture.

Prompts of 1 to 700 tokens, some with a common beginning, are prefilled in chunks, mixed with rows that decode, in a
cache that shares the prefixes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rayk
from rayk.models import PagedModel, load_model

from ..unit.models.checkpoints import ARCHITECTURES, dense, prompts, write  # noqa: TID252  # tests are no package

pytestmark = pytest.mark.slow

ANSWER = 12
SHARED = (300, 128, 16)
"""Tokens that three of the prompts have in common with the first."""
TIE = 1e-4
"""A differing token is allowed where the dense model's two best logits are this close."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> PagedModel:
    return load_model(folder)


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    """A long prompt, three that begin like it, and four of their own."""
    (shared,) = prompts([640], seed=5)
    own = prompts([60, 9, 1, 33, 1, 17, 700, 128], seed=6)
    return [[*shared, *own[0]], *([*shared[:n], *rest] for n, rest in zip(SHARED, own[1:4], strict=True)), *own[4:]]


@pytest.fixture(scope="module")
def answers(folder: Path, texts: list[list[int]]) -> tuple[list[list[int]], list[float]]:
    """What generate() says, and how far apart the two best logits were, at the least, for each."""
    reference, found, gaps = dense(folder), [], []
    with torch.inference_mode():
        for text in texts:
            tokens = torch.tensor([text])
            out = reference.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=ANSWER,
                eos_token_id=None,
                output_scores=True,
                return_dict_in_generate=True,
            )
            found.append(out.sequences[0, len(text) :].tolist())
            best = torch.cat(out.scores).topk(2).values
            gaps.append(float((best[:, 0] - best[:, 1]).min()))
    return found, gaps


class Driver:
    """The loop of a driver: chunks of prompts and single tokens in one batch, until all have their answer."""

    def __init__(self, model: PagedModel, manager: rayk.PagedKVCacheManager, chunk: int) -> None:
        self.model, self.manager, self.chunk = model, manager, chunk

    def forward(self, inputs: Any, batch: Any) -> list[int]:
        (shard,) = inputs.shards
        tokens = torch.cat([torch.from_numpy(ctx.tokens.active.copy()) for ctx in batch]).long()
        logits = self.model.logits(shard, tokens, [ctx.tokens.active_length for ctx in batch])
        found: list[int] = logits.argmax(-1).tolist()
        return found

    def run(self, texts: list[list[int]]) -> tuple[list[list[int]], int]:
        """Answers, and prompt tokens found in the cache. A request starts when the one before has its prompt in."""
        manager, cached = self.manager, 0
        contexts = [rayk.TextContext(f"r{i}", text, len(text) + ANSWER) for i, text in enumerate(texts)]
        waiting, running = list(contexts), []
        while waiting or running:
            if waiting and all(len(ctx.tokens) > len(texts[contexts.index(ctx)]) for ctx in running):
                running.append(waiting.pop(0))
                manager.claim(running[-1].request_id, 0)
            for ctx in running:
                manager.alloc(ctx, 0)
                if ctx.tokens.active_length > self.chunk:
                    ctx.tokens.chunk(self.chunk)
            (tokens,) = manager.execute([running], self.forward)
            for ctx, token in zip(running, tokens, strict=True):
                ctx.update(token)
            manager.step([running])
            for ctx in [ctx for ctx in running if len(ctx.tokens) == ctx.max_length]:
                running.remove(ctx)
                cached += ctx.cached_prefix_length or 0
                manager.release(ctx.request_id, 0)
        return [ctx.tokens.all[len(text) :].tolist() for ctx, text in zip(contexts, texts, strict=True)], cached


@pytest.mark.parametrize(("page_size", "chunk"), [(16, 16), (16, 64), (16, 512), (128, 16), (128, 64), (128, 512)])
def test_answers_are_those_of_generate(
    model: PagedModel,
    texts: list[list[int]],
    answers: tuple[list[list[int]], list[float]],
    page_size: int,
    chunk: int,
) -> None:
    params = model.cache_params(page_size=page_size, enable_prefix_caching=True)
    with rayk.InferenceSession() as session:
        pages = sum(-(-(len(text) + ANSWER) // page_size) for text in texts)
        with rayk.PagedKVCacheManager(params, session, pages, max_batch_size=len(texts)) as manager:
            got, cached = Driver(model, manager, chunk).run(texts)
    want, gaps = answers
    differ = [i for i in range(len(texts)) if got[i] != want[i]]
    near = [i for i in differ if gaps[i] <= TIE]
    if near:
        print(f"{len(near)} answer(s) differ where two logits are within {TIE}")
    assert differ == near
    assert cached == sum(shared // page_size * page_size for shared in SHARED)
