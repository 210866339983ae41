"""One rank's part of a model: transformers' tensor parallel plan, and KV heads for more ranks than there are.

Every rank loads the same checkpoint, reads its part of each matrix that the plan splits, and sums with the others what
they computed. Linear layers keep plain tensors afterwards: a DTensor would cost each call more than a small product.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from rayk.errors import ArchitectureError, ConfigError

WAIT = timedelta(minutes=30)  # for a rank that loads more slowly than others
KEYS, VALUES = "k_proj", "v_proj"
SPLIT = "colwise"


class Rank(NamedTuple):
    """One of the `ranks` processes that have parts of one replica's model."""

    number: int
    ranks: int


def join(rank: Rank, store: Any, device: torch.device) -> None:
    """Make the group of all ranks, which transformers takes for its own. Once in a process; `store` is torch's."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", store=store, rank=rank.number, world_size=rank.ranks, timeout=WAIT)
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo asks the host's name for an address; all are on one node
    dist.init_process_group("gloo", store=store, rank=rank.number, world_size=rank.ranks, timeout=WAIT)


def plan_of(text: Any) -> dict[str, str]:
    """What transformers splits of a text model's layers, by names with `*` for numbers: "colwise", "rowwise", .."""
    return dict(getattr(text, "base_model_tp_plan", None) or {})


def check_split(text: Any, name: str, ranks: int, quantised: str | None = None) -> None:
    """ArchitectureError for a model without a plan, ConfigError for heads that it cannot split over `ranks`, weights
    that are quantised, and where transformers misses accelerate."""
    if find_spec("accelerate") is None:
        raise ConfigError(f"tp={ranks} needs accelerate, by which transformers splits: pip install 'rayk[tp]'")
    if quantised:
        raise ConfigError(f"{name}: weights quantised by {quantised} are not split over ranks yet; use tp=1")
    plan = plan_of(text)
    if not plan:
        raise ArchitectureError(name, f"transformers has no tensor parallel plan for it; use tp=1 instead of {ranks}")
    if not _splits_keys(plan):
        return  # its attention is whole on every rank
    query, keys = heads_of(text)
    possible = [n for n in range(2, query + 1) if query % n == 0 and (keys % n == 0 or n % keys == 0)]
    if ranks not in possible:
        raise ConfigError(
            f"{name}: {query} query heads and {keys} KV heads do not split over tp={ranks}; "
            f"use tp {', '.join(map(str, (1, *possible)))}"
        )


def heads_of(text: Any) -> tuple[int, int]:
    """Query and KV heads of the whole model."""
    query = int(text.num_attention_heads)
    return query, int(getattr(text, "num_key_value_heads", None) or query)


def _splits_keys(plan: Mapping[str, str]) -> bool:
    return any(style == SPLIT and name.rpartition(".")[2] == KEYS for name, style in plan.items())


def distribution(model_class: Any, config: Any, rank: Rank) -> Any:
    """transformers' settings of a load. Fewer KV heads than ranks: keys and values are loaded whole, see settle()."""
    from transformers.distributed.configuration_utils import DistributedConfig

    text = config.get_text_config(decoder=True)
    whole = None
    if _splits_keys(plan_of(text)) and heads_of(text)[1] < rank.ranks:
        with torch.device("meta"):
            names = model_class(config).tp_plan
        whole = {name: "replicate" for name in names if name.rpartition(".")[2] in (KEYS, VALUES)}
    return DistributedConfig(tp_size=rank.ranks, tp_plan=whole)


def settle(model: Any, text: Any, rank: Rank) -> None:
    """After the load: parts of matrices in memory of their own, which transformers leaves as views of all of them on a
    CPU; plain ones in linear layers; and of keys and values that are whole the rank's one head."""
    own: dict[int, torch.Tensor] = {}  # by address, so that what is tied stays tied
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if isinstance(tensor, DTensor):
                part = tensor.to_local()
                if part.untyped_storage().nbytes() > part.nbytes:
                    part = own.setdefault(part.data_ptr(), part.clone(memory_format=torch.contiguous_format))
                if not isinstance(module, torch.nn.Linear):
                    shape, stride = tensor.shape, tensor.stride()
                    part = DTensor.from_local(
                        part, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride
                    )
                module._parameters[name] = torch.nn.Parameter(part, requires_grad=False)
    query, keys = heads_of(text)
    if not _splits_keys(plan_of(text)) or keys >= rank.ranks:
        return
    head = rank.number * keys // rank.ranks
    for module in model.modules():
        if isinstance(getattr(module, KEYS, None), torch.nn.Linear) and hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = query // rank.ranks
            for name in (KEYS, VALUES):
                _keep_head(getattr(module, name), head, keys)


def _keep_head(projection: torch.nn.Linear, head: int, heads: int) -> None:
    """Only that head of a projection's output."""
    size = projection.out_features // heads
    for name, tensor in projection._parameters.items():
        if tensor is not None:
            part = tensor.data[head * size : (head + 1) * size].clone()
            projection._parameters[name] = torch.nn.Parameter(part, requires_grad=False)
    projection.out_features = size
