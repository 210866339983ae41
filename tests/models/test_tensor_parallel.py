"""Models that are split over ranks, each a process with gloo: what rank 0 answers is what one process answers.

The ranks are those of an engine without Ray: rank 0's engine is the test's child, the others are told by pipes.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from rayk.engine.engine import Engine
from rayk.engine.replicas import ModelSource, ServeSettings, open_engine
from rayk.engine.settings import EngineSettings
from rayk.errors import ArchitectureError, ConfigError
from rayk.models.load import check_folder_split
from rayk.planning.node_plan import measure_node
from rayk.protocol.engine_reports import Tokens
from rayk.protocol.engine_request import Request
from rayk.sampling import SamplingParams

from ..patience import scaled  # noqa: TID252  # tests are no package
from ..unit.models.checkpoints import prompts, write  # noqa: TID252  # tests are no package

pytestmark = pytest.mark.slow

SETTINGS = ServeSettings(
    device="cpu", page_size=16, pages=7, max_batch_size=4, graphs=False, engine=EngineSettings(chunk_size=32)
)
TEXTS = (5, 40, 17, 64, 33)
IMPORTS = ["torch.distributed", "transformers.modeling_utils", "rayk.engine.rank", "rayk.engine.replicas"]
"""Most of what a rank computes otherwise; they are made once, and ranks are forked of who made them."""


def answers(engine: Engine) -> list[list[int]]:
    """Few pages, so that requests make way for others; chunks of 32."""
    found: list[list[int]] = [[] for _ in TEXTS]
    for number, text in enumerate(prompts(TEXTS, seed=3)):
        sampling = SamplingParams(max_new_tokens=24, ignore_eos=True)
        engine.submit(Request(number, str(number), text, sampling))
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Tokens):
                for number, token in zip(event.numbers, event.tokens, strict=True):
                    found[int(number)].append(int(token))
    engine.core.check_integrity()
    return found


def rank_process(number: int, store: Path, folders: list[Path], pipes: list[list[Connection]], out: Any) -> None:
    """One rank, for each folder in turn; pipes[i] are those of folder i."""
    import torch
    from torch.distributed import FileStore

    from rayk.engine.rank import RankWorker
    from rayk.engine.ranks import Ranks
    from rayk.models.tensor_parallel import Rank, join

    torch.set_num_threads(1)
    rank = Rank(number, 1 + len(pipes[0]))
    settings = replace(SETTINGS, tp=rank.ranks)
    join(rank, FileStore(str(store), rank.ranks), torch.device("cpu"))
    for folder, connections in zip(folders, pipes, strict=True):
        source = ModelSource(folder=folder)
        model = source.load("cpu", rank)
        if number:
            RankWorker(number, rank.ranks, model, settings, 0, "cpu").serve(connections[number - 1])
            continue
        ranks = Ranks(0, connections)
        engine = open_engine(model, source, settings, 0, "cpu", 1, measure_node(), None, ranks=ranks)
        out.put((folder.name, answers(engine), engine.stats().preemptions, engine.core.params.bytes_per_page))
        ranks.close()


def split(ranks: int, folders: list[Path], root: Path) -> Iterator[tuple[str, list[list[int]], int, int]]:
    """What rank 0 of so many answers from each folder: its name, answers, preemptions, bytes of its part of a page."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(IMPORTS)
    out, ends = server.Queue(), [[server.Pipe() for _ in range(ranks - 1)] for _ in folders]
    processes = []
    for number in range(ranks):
        mine = [[pair[number > 0] for pair in pairs] for pairs in ends]
        arguments = (number, root / f"store-{ranks}", folders, mine, out)
        processes.append(server.Process(target=rank_process, args=arguments, daemon=True))
        processes[-1].start()
    for pair in (pair for pairs in ends for pair in pairs):
        for end in pair:
            end.close()
    try:
        for _ in folders:
            yield out.get(timeout=scaled(120))
    finally:
        for process in processes:
            process.join(10)
            process.kill()


PLANS = {
    2: ("llama", "qwen3-moe", "gemma3", "phi3", "deepseek-v3"),
    4: ("llama", "gemma2"),  # of 2 KV heads each
}


@pytest.mark.parametrize("ranks", PLANS)
def test_ranks_answer_what_one_process_answers(ranks: int, tmp_path: Path) -> None:
    folders = [write(tmp_path / name, name) for name in PLANS[ranks]]
    for name, found, preemptions, part_bytes in split(ranks, folders, tmp_path):
        source = ModelSource(folder=tmp_path / name)
        engine = open_engine(source.load("cpu"), source, SETTINGS, 0, "cpu", 1, measure_node(), None)
        assert found == answers(engine), name
        assert preemptions == engine.stats().preemptions > 0
        whole = name in ("phi3", "deepseek-v3")  # transformers' plan leaves their attention whole
        assert part_bytes == engine.core.params.bytes_per_page // (1 if whole else 2), name


def test_models_that_cannot_be_split_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match=r"GPT2LMHeadModel.*no tensor parallel plan.*tp=1 instead of 2"):
        check_folder_split(write(tmp_path / "gpt2", "gpt2"), 2)
    folder = write(tmp_path / "llama", "llama")
    with pytest.raises(ConfigError, match=r"4 query heads and 2 KV heads do not split over tp=3; use tp 1, 2, 4"):
        check_folder_split(folder, 3)
    config = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    with pytest.raises(ConfigError, match="quantised by fp8 are not split over ranks yet; use tp=1"):
        check_folder_split(folder, 2)
    with pytest.raises(ConfigError, match="tp=2 splits the matrices of a checkpoint; write is made by a function"):
        ModelSource(make=write).check_split(2)
