"""Models over the other backends, as far as these run without a GPU: whole forwards, not single calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rayk.attention import Backend
from rayk.attention.flash import VllmFlashAttention
from rayk.attention.flash_library import load_first
from rayk.attention.flex import TorchFlex
from rayk.attention.sdpa import TorchSdpa, _padded_decode
from rayk.models import PagedModel, load_model

from ..unit.attention.test_flash import FAKE  # noqa: TID252  # tests are no package
from ..unit.models.checkpoints import Rows, dense, prompts, write  # noqa: TID252  # as above

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
]


class Padded(TorchSdpa):
    """As on CUDA: rows of one token are padded to the longest."""

    def attend(self, query: Any, keys: Any, values: Any, batch: Any, rules: Any) -> torch.Tensor:
        if batch.is_decode:
            return _padded_decode(query, keys, values, batch, rules)
        return super().attend(query, keys, values, batch, rules)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("site") / "vllm_flash_attn"
    folder.mkdir()
    (folder / "flash_attn_interface.py").write_text(FAKE)
    (folder / "kernels.py").write_text("")
    return load_first([folder])


MAKE: dict[str, Callable[[Any], Backend]] = {
    "flash 3": lambda library: VllmFlashAttention(3, library),
    "flash 2": lambda library: VllmFlashAttention(2, library),
    "flex": lambda library: TorchFlex(compiled=False),
    "padded": lambda library: Padded(),
}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt2", "deepseek-v3", "gpt-oss"])
@torch.inference_mode()
def test_logits(tmp_path: Path, library: Any, name: str, kind: str) -> None:
    if (name, kind) == ("gpt-oss", "flash 2"):
        pytest.skip("FA2 has no attention sinks, and says so")
    model = with_backend(load_model(write(tmp_path, name)), MAKE[kind](library))
    texts = prompts([50, 3, 33])
    rows = Rows(model, 3, longest=64)
    rows.blocks.zero_()
    rows.step({0: texts[0][:20], 1: texts[1][:2], 2: texts[2][:16]})
    rows.step({0: texts[0][20:49], 2: texts[2][16:32]})
    got = rows.step({row: text[-1:] for row, text in enumerate(texts)})
    reference = dense(tmp_path)
    want = torch.stack([reference(torch.tensor([text])).logits[0, -1] for text in texts])
    assert float((got - want).abs().max() / want.abs().max().clamp(min=1)) < 1e-5


def with_backend(model: PagedModel, backend: Backend) -> PagedModel:
    """What choose() would have done on a device that the backend takes."""
    model._backends[(torch.float32, 16)] = backend
    return model
