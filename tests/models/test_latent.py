"""MLA models keep the latent of a token and nothing else, and answer as the dense model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rayk import Cluster
from rayk.errors import BatchError
from rayk.models import load_model
from rayk.models.latent import keep_latents
from rayk.params import MLAKVCacheParams

from ..unit.models.checkpoints import Rows, dense, prompts, write  # noqa: TID252  # tests are no package

RANK, ROPE, LAYERS = 16, 8, 2


@pytest.fixture(scope="module", params=["deepseek-v2", "deepseek-v3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp(request.param), request.param)


def test_a_token_is_its_latent(folder: Path) -> None:
    params = load_model(folder).cache_params(page_size=16)
    assert isinstance(params, MLAKVCacheParams) and params.bytes_per_page == 16 * LAYERS * (RANK + ROPE) * 4


@torch.inference_mode()
def test_expanded_where_the_expansion_is_no_plain_matrix(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapped(torch.nn.Linear):
        pass

    def quantised(model: Any) -> bool:
        for module in model.modules():
            if hasattr(module, "kv_b_proj"):
                module.kv_b_proj.__class__ = Wrapped
        return keep_latents(model)

    monkeypatch.setattr("rayk.models.architecture.keep_latents", quantised)
    model = load_model(folder)
    assert not isinstance(model.cache_params(page_size=16), MLAKVCacheParams)
    monkeypatch.undo()
    latent = load_model(folder)
    (text,) = prompts([40])
    apart = Rows(model, 1).step({0: text}) - Rows(latent, 1).step({0: text})
    assert apart.abs().max() < 1e-4
    with pytest.raises(BatchError, match="make the cache with its cache_params"):
        model.logits(Rows(latent, 1).inputs([0], 4), torch.tensor([5, 6, 7, 8]), [4])


def test_a_cluster_answers_from_latents_with_tiers_and_a_shared_prefix(folder: Path, tmp_path: Path) -> None:
    head, *own = prompts([64, 5, 20, 33, 1])
    texts = [[*head, *each] for each in own]
    reference = dense(folder)
    with Cluster(folder, replicas=2, page_size=16, pages=16, chunk_size=32, host_memory="1MiB") as cluster:
        for _ in range(2):
            for text, output in zip(texts, cluster.generate(texts, max_new_tokens=12, ignore_eos=True), strict=True):
                assert output.error is None
                tokens = torch.tensor([text])
                want = reference.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    do_sample=False,
                    max_new_tokens=12,
                    eos_token_id=None,
                )
                assert output.tokens == want[0, len(text) :].tolist()
        cluster.check_integrity()
