"""Fields of config.json that change an answer and carry no tensor: the class of the config must have each of them.

transformers keeps a field that a class does not know and computes without it. Fields that come with tensors (biases,
norms of queries and keys, experts) need no look here: their tensors would have no place.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayk.errors import ArchitectureError, CheckpointError

# What each is where it changes nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_multiplier": (),
    "attention_chunk_size": (),
    "attn_logit_softcapping": (0,),
    "attn_temperature_tuning": (False,),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (0,),
    "interleaved_sliding_window": (),
    "layer_types": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "no_rope_layers": ([],),
    "num_kv_shared_layers": (0,),
    "residual_multiplier": (1,),
    "rotary_pct": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "sliding_window": (),
    "swiglu_limit": (),
    "use_alibi": (False,),
}


def refuse_unread(folder: Path, file: str, raw: Mapping[str, Any], text: Any, model_class: Any) -> None:
    """CheckpointError for a field of `raw`, the content of `file`, that this model would not read; ArchitectureError
    for a model whose own code would be needed. text: transformers' config of the text model."""
    name = model_class.__name__
    named = raw.get("architectures") or [name]
    named = [named] if isinstance(named, str) else named
    own = raw.get("auto_map") or {}
    if isinstance(own, dict) and "AutoModelForCausalLM" in own and name not in named:
        reason = f"its code comes with the checkpoint and is not run, and {name} need not compute the same"
        raise ArchitectureError(str(named[0]), reason)
    known = {*dir(type(text)), *getattr(type(text), "__dataclass_fields__", {}), *type(text).attribute_map}
    values = next((part for part in (raw.get("text_config"),) if isinstance(part, dict)), raw)
    for field, neutral in NEUTRAL.items():
        value = values.get(field)
        if value is None or value in neutral or field in known:
            continue
        if field == "layer_types" and set(value) == {"full_attention"}:
            continue
        reason = f"has {field}={value!r}, which {name} does not read; its answers would not be this checkpoint's"
        raise CheckpointError(str(folder), file, f"{reason}. Where the field is left over, delete it")
