"""The places and paddings of captured decode steps, on a real model without a device."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from rayk.engine.engine import Engine
from rayk.engine.graphs import DecodeGraphs, EagerRecorder, graph_sizes, with_graphs
from rayk.kvcache.replica import ReplicaCore
from rayk.models import PagedModel, load_model
from rayk.protocol.engine_reports import Tokens
from rayk.protocol.engine_request import Request
from rayk.sampling import SamplingParams

from ..models.checkpoints import write  # noqa: TID252  # tests/ is no package that has an absolute name
from .fake import PageModel, params
from .test_engine import prompts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PagedModel:
    return load_model(write(tmp_path_factory.mktemp("llama"), "llama"))


def core_for(model: PagedModel, pages: int = 60, rows: int = 8) -> ReplicaCore:
    return ReplicaCore(model.cache_params(page_size=4, devices=["cpu"], enable_prefix_caching=True), 0, pages, rows)


def serve(model, core: ReplicaCore, asked: list[list[int]], lengths: list[int]) -> dict[int, list[int]]:
    engine = Engine(core, model)
    found: dict[int, list[int]] = {i: [] for i in range(len(asked))}
    for i, (prompt, count) in enumerate(zip(asked, lengths, strict=True)):
        engine.submit(Request(i, str(i), prompt, SamplingParams(max_new_tokens=count, ignore_eos=True)))
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Tokens):
                for number, token in zip(event.numbers.tolist(), event.tokens.tolist(), strict=True):
                    found[number].append(token)
    return found


def test_tokens_are_the_same_with_graphs(model: PagedModel) -> None:
    """Batches of all sizes, rows that come and go, tables that widen and narrow, pages that run out."""
    asked, lengths = prompts(14, 40, seed=2), [3 + 5 * (i % 6) for i in range(14)]
    plain_core, core = core_for(model), core_for(model)
    graphs = DecodeGraphs(model, core, EagerRecorder(), [1, 2, 4, 8])
    assert serve(graphs, core, asked, lengths) == serve(model, plain_core, asked, lengths)
    assert graphs.replays > 25


def test_a_replay_is_the_padded_batch_bit_by_bit(model: PagedModel) -> None:
    core = core_for(model)
    serve(model, core, prompts(3, 20), [2] * 3)  # the pages are not empty
    graphs = DecodeGraphs(model, core, EagerRecorder(), [4])
    inputs = core.runtime_inputs([]).shards[0]  # type: ignore[union-attr]  # of a single cache
    table = torch.full((4, 16), core.num_pages, dtype=torch.int32)
    table[:3, 0] = torch.tensor([3, 7, 1])
    lengths = torch.tensor([2, 0, 3, 0], dtype=torch.int32)
    tokens = torch.tensor([5, 6, 7, 0])
    fields = {"max_prompt_length": torch.tensor([1]), "max_cache_length": torch.tensor([4])}
    padded = type(inputs)(**{**vars(inputs), **fields, "lookup_table": table, "cache_lengths": lengths})
    three = type(inputs)(**{**vars(padded), "lookup_table": table[:3], "cache_lengths": lengths[:3]})
    want = model.logits(padded, tokens, [1] * 4)[:3].clone()
    before = core.buffers.all_buffers[0].clone()
    assert torch.equal(graphs.logits(three, tokens[:3], [1] * 3), want)
    assert torch.equal(core.buffers.all_buffers[0], before), "it wrote what the padded batch wrote, and nothing else"


def test_what_no_graph_is_for_runs_as_ever(model: PagedModel) -> None:
    """Larger batches than the largest graph, and prompts."""
    asked = prompts(5, 20)
    core = core_for(model)
    graphs = DecodeGraphs(model, core, EagerRecorder(), [1])
    assert serve(graphs, core, asked, [6] * 5) == serve(model, core_for(model), asked, [6] * 5)
    assert graphs.replays == 0
    assert serve(graphs, core, asked[:1], [6]) and graphs.replays >= 5


def test_without_a_device_there_are_none() -> None:
    fake = PageModel()
    assert with_graphs(fake, ReplicaCore(params(), 0, 64, 8, ["cpu"])) is fake


def test_sizes() -> None:
    assert graph_sizes(1) == [1] and graph_sizes(3) == [1, 2, 3] and graph_sizes(20) == [1, 2, 4, 8, 16, 20]
    sizes = graph_sizes(256)
    assert sizes[-1] == 256 and all(b - a <= 16 for a, b in pairwise(sizes))
