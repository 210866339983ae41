"""Pages of another dtype than the model's, by Cluster(kv_dtype=..)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rayk import Cluster
from rayk.errors import ConfigError
from rayk.models import load_model

from ..unit.models.checkpoints import Rows, prompts, write  # noqa: TID252  # tests are no package


@pytest.fixture(scope="module", params=["llama", "deepseek-v3", "falcon"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp(request.param), request.param)


def test_float8_pages_take_a_quarter_of_float32(folder: Path, tmp_path: Path) -> None:
    texts = prompts([40, 7, 60])
    texts.append([*texts[2][:48], 9])
    found = {}
    for dtype in (None, "float8_e4m3fn"):
        kept = {"host_memory": "1MiB", "disk_dir": tmp_path / str(dtype), "disk_memory": "4MiB"}
        with Cluster(folder, replicas=2, page_size=16, pages=12, chunk_size=32, kv_dtype=dtype, **kept) as cluster:
            first, again = (cluster.generate(texts, max_new_tokens=8, ignore_eos=True) for _ in range(2))
            assert [each.error for each in first] == [None] * 4
            assert [each.tokens for each in first] == [each.tokens for each in again]
            assert sum(each.cached_tokens for each in again) > 0
            found[dtype] = cluster.facts[0].page_bytes
            cluster.check_integrity()
    assert found["float8_e4m3fn"] * 4 == found[None]


@torch.inference_mode()
def test_float8_pages_are_near(folder: Path) -> None:
    """An eighth of a value is lost at most; of the logits' norm less."""
    model = load_model(folder)
    (text,) = prompts([60])
    exact = Rows(model, 1).step({0: text})
    rounded = Rows(model, 1, dtype="float8_e4m3fn").step({0: text})
    apart = float((exact - rounded).norm() / exact.norm())
    assert 0 < apart < 0.25


def test_what_is_no_dtype_of_pages(folder: Path) -> None:
    with pytest.raises(ConfigError, match="kv_dtype 'int4' is not one of float32, bfloat16"):
        Cluster(folder, kv_dtype="int4")
