"""MLA on its latent: pages keep one vector for all heads, and a query is brought into its space.

transformers expands the latent c of each token to keys W_k c and values W_v c of every head. Since q (W_k c) is
(q W_k) c, and the weighted sum of W_v c is W_v of the weighted sum of c, attention can be had over the latent itself:
one KV head, whose key is c with the rotated part behind it and whose value is c (DeepSeek-V2, section 2.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rayk.models.bridge import LATENT, is_attending

States = tuple[torch.Tensor, torch.Tensor]


class Latent:
    """What one attention module needs for that; `rank` elements of a key are the latent."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.rank: int = module.kv_lora_rank
        self._nope: int = module.qk_nope_head_dim

    @property
    def _weights(self) -> torch.Tensor:
        """`[heads, nope + value dim, rank]`: a view, made anew since weights may be moved or changed in place."""
        weight: torch.Tensor = self._module.kv_b_proj.weight
        return weight.view(-1, self._nope + self._module.v_head_dim, self.rank)

    def query(self, query: torch.Tensor) -> torch.Tensor:
        """`[tokens, heads, nope + rope]` as `[tokens, heads, rank + rope]`."""
        plain, turned = query[:, :, : self._nope], query[:, :, self._nope :]
        inside = torch.einsum("thn,hnr->thr", plain, self._weights[:, : self._nope])
        return torch.cat((inside, turned), dim=2)

    def output(self, found: torch.Tensor) -> torch.Tensor:
        """Weighted sums of keys `[tokens, heads, rank + rope]` as those of values, `[tokens, heads, value dim]`."""
        return torch.einsum("thr,hvr->thv", found[:, :, : self.rank], self._weights[:, self._nope :])


def latent_of(module: Any) -> Latent | None:
    """Of an attention module that keep_latents() has seen to."""
    found: Latent | None = module.__dict__.get(LATENT)
    return found


def keep_latents(model: Any) -> bool:
    """Have all attention modules of the model hand over latents while rayk attends; whether it has such, and all of its
    expansions are plain matrices. A quantised one is left as it is, and so are its keys and values."""
    modules = [module for module in model.modules() if hasattr(module, "expand_kv")]
    for module in modules:
        projection = getattr(module, "kv_b_proj", None)
        if type(projection) is not torch.nn.Linear or projection.bias is not None:
            return False
        if type(projection.weight) is not torch.nn.Parameter or not projection.weight.is_floating_point():
            return False
    for module in modules:
        setattr(module, LATENT, Latent(module))
        module.expand_kv = _handing_over(module.expand_kv)
    return bool(modules)


def expand_again(model: Any) -> None:
    """Take keep_latents() back."""
    for module in model.modules():
        if latent_of(module) is not None:
            delattr(module, LATENT)
            del module.expand_kv


def _handing_over(
    expand: Callable[[torch.Tensor, torch.Tensor], States],
) -> Callable[[torch.Tensor, torch.Tensor], States]:
    def expand_kv(kv_nope: torch.Tensor, k_rot: torch.Tensor) -> States:
        if not is_attending():
            return expand(kv_nope, k_rot)
        return torch.cat((kv_nope, k_rot), dim=-1), kv_nope

    return expand_kv
