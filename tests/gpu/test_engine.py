"""The engine on a CUDA device: captured decode steps against eager ones, and tokens against transformers."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rayk import Cluster
from rayk.engine.graphs import CudaRecorder, DecodeGraphs
from rayk.kvcache.replica import ReplicaCore
from rayk.kvcache.runtime_inputs import LeafInputs
from rayk.models import PagedModel, load_model

from ..greedy.matrix import compare, dense_answers, random_prompts, scarce_pages  # noqa: TID252  # no absolute name
from ..unit.models.checkpoints import VOCAB, dense, write  # noqa: TID252  # as above

DEVICE = "cuda:0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 64: the kernels have smallest sizes."""
    shape = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
    return write(tmp_path_factory.mktemp("llama"), "llama", **shape)


@pytest.fixture(scope="module")
def model(folder: Path) -> PagedModel:
    return load_model(folder, device=DEVICE, dtype="bfloat16")


@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_a_replay_is_bitwise_the_eager_padded_batch(model: PagedModel, page_size: int, rows: int) -> None:
    core = ReplicaCore(model.cache_params(page_size=page_size, devices=[DEVICE]), 0, 64, 32, [DEVICE])
    for buffer in core.buffers.all_buffers:
        buffer.normal_()
    graphs = DecodeGraphs(model, core, CudaRecorder(torch.device(DEVICE)), [1, 4, 8, 32])
    inputs = core.runtime_inputs([])
    assert isinstance(inputs, LeafInputs)
    size = next(size for size in (1, 4, 8, 32) if size >= rows)
    table = torch.full((size, graphs._table.shape[1]), core.num_pages, dtype=torch.int32, device=DEVICE)
    pages = torch.randperm(64, device=DEVICE)[: rows * 2].view(rows, 2).int()
    table[:rows, :2] = pages
    lengths = torch.zeros(size, dtype=torch.int32, device=DEVICE)
    lengths[:rows] = torch.randint(0, 2 * page_size - 1, (rows,), device=DEVICE).int()
    tokens = torch.zeros(size, dtype=torch.int64)
    tokens[:rows] = torch.randint(3, VOCAB, (rows,))
    bounds = {
        "max_prompt_length": torch.tensor([1], dtype=torch.int32),
        "max_cache_length": torch.tensor([graphs._limit], dtype=torch.int32),
    }
    padded = replace(inputs.shards[0], lookup_table=table, cache_lengths=lengths, **bounds)
    eager = model.logits(padded, tokens, [1] * size)[:rows].clone()
    short = replace(padded, lookup_table=table[:rows, :18].contiguous(), cache_lengths=lengths[:rows])
    for _ in range(3):  # a step writes what it writes again
        assert torch.equal(graphs.logits(short, tokens[:rows], [1] * rows), eager)
    assert graphs.replays == 3


@pytest.mark.parametrize("page_size", [16, 128])
def test_tokens_are_those_of_transformers(folder: Path, page_size: int) -> None:
    prompts = random_prompts(VOCAB, page_size, count=32)
    references = dense_answers(dense(folder), prompts)
    common = {"page_size": page_size, "pages": 2 * scarce_pages(prompts, page_size), "max_batch_size": 32}
    # In float32, which the kernels of vllm-flash-attn do not take; FlexAttention would compile for minutes.
    common |= {"device": "cuda", "dtype": "float32", "attention": "torch-sdpa"}
    found = {}
    for graphs in (True, False):
        with Cluster(folder, graphs=graphs, **common) as cluster:
            outputs = cluster.generate(prompts, max_new_tokens=32)
            found[graphs] = [output.tokens for output in outputs]
            assert all(output.error is None for output in outputs)
    kinds = [compare(tokens, reference) for tokens, reference in zip(found[True], references, strict=True)]
    print(f"page {page_size}: {kinds.count('same')} same, {kinds.count('tie')} ties, {kinds.count('wrong')} wrong")
    # TF32 and other orders of sums move logits by more than on the CPU: random weights have close calls.
    assert kinds.count("wrong") <= 3


def test_tiers_and_copies_change_no_token(folder: Path, tmp_path: Path) -> None:
    """Scarce pages, shared beginnings: from the device alone, from tiers, from another replica, and after a restart."""
    rng = random.Random(0)
    starts = [[rng.randrange(3, VOCAB) for _ in range(700)] for _ in range(6)]
    prompts = [
        starts[rng.randrange(6)][: rng.randrange(200, 700)] + [rng.randrange(3, VOCAB) for _ in range(30)]
        for _ in range(120)
    ]
    tiers = {"host_memory": 256 << 20, "disk_dir": tmp_path / "disk", "disk_memory": 256 << 20}
    settings: dict[str, dict[str, Any]] = {
        "alone": {},
        "host": {"host_memory": 256 << 20},
        "two": {"replicas": 2},
        "two, host and disk": {"replicas": 2, **tiers},
        "these again": {"replicas": 2, **tiers},
    }
    found: dict[str, list[list[int]]] = {}
    for name, changes in settings.items():
        common: dict[str, Any] = {"page_size": 16, "pages": 150, "max_batch_size": 16, "longest": 800}
        common |= {"device": "cuda", "dtype": "float32", "attention": "torch-sdpa", **changes}
        with Cluster(folder, **common) as cluster:
            outputs = [o for i in range(0, 120, 24) for o in cluster.generate(prompts[i : i + 24], max_new_tokens=16)]
            reused = [cluster.stats(replica).reused for replica in range(len(cluster.facts))]
            cluster.check_integrity()
        assert all(output.error is None for output in outputs)
        found[name] = [output.tokens for output in outputs]
        sums = {k: sum(getattr(r, f"{k}_tokens") for r in reused) for k in ("device", "peer", "host", "disk")}
        print(f"engine, {name}: reused tokens {', '.join(f'{k} {n}' for k, n in sums.items())}")
        assert all(tokens == found["alone"] for tokens in found.values())
        assert sums["host"] > 0 or "host_memory" not in changes
    assert sums["disk"] > 0
