"""What layers that do not attend keep of a sequence: inputs of a convolution, and a matrix or a vector."""

from __future__ import annotations

import torch
from torch import nn

from rayk.planning.model import State

RECURRENT = ("delta", "lightning", "rwkv", "lstm", "retention")


def is_recurrent(module: nn.Module) -> bool:
    """Whether it keeps a state itself: it has a decay or a convolution over tokens, or its class says so."""
    if hasattr(module, "A_log") or any(isinstance(child, nn.Conv1d) for child in module.children()):
        return True
    name = type(module).__name__.lower()
    return any(word in name for word in RECURRENT) and not name.endswith(("block", "layer"))


def state_of(module: nn.Module) -> State | None:
    """What a recurrent layer keeps of a sequence: inputs of convolutions, and a matrix or vector in float32."""
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv1d)]
    kernel = getattr(module, "conv_kernel_size", None) or getattr(module, "kernel_size", None)
    inputs = sum(m.in_channels * (m.kernel_size[0] - 1) for m in convolutions)
    if not convolutions and any("conv" in n for n, _ in module.named_children()) and not isinstance(kernel, int):
        return None
    matrix = _matrix(module)
    if matrix is None and not inputs:
        return None
    return State(inputs, matrix or 0)


def _matrix(module: nn.Module) -> int | None:
    """Elements of the recurrent matrix of a layer."""
    own = {n: getattr(module, n, None) for n in ("num_v_heads", "head_k_dim", "head_v_dim", "num_heads", "head_dim")}
    decay = getattr(module, "A_log", None)
    if own["num_v_heads"] and own["head_k_dim"] and own["head_v_dim"]:
        return int(own["num_v_heads"] * own["head_k_dim"] * own["head_v_dim"])
    size = getattr(module, "ssm_state_size", None)
    if isinstance(decay, torch.Tensor) and decay.squeeze().dim() >= 2:
        return int(decay.numel())  # one number an inner channel and state
    if isinstance(size, int) and own["num_heads"] and own["head_dim"]:
        return int(own["num_heads"] * own["head_dim"] * size)
    name = type(module).__name__.lower()
    if ("delta" in name or "lightning" in name) and own["head_dim"]:
        heads = own["num_heads"] or getattr(module, "num_attention_heads", None)
        return int(heads * own["head_dim"] ** 2) if heads else None
    return width if isinstance(width := getattr(module, "lru_width", None), int) else None
