"""Models that come with their own code, as models that transformers has with the same modules.

Each function gives the fields of the stand-in; the sizes and the cache are the same to a few norms and biases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Raw = Mapping[str, Any]
TEXT_PARTS = ("text_config", "llm_config", "language_config", "language_model_config", "thinker_config")


def _renamed(raw: Raw, model_type: str, architecture: str, names: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """`names`: the stand-in's field -> the model's own."""
    own = {field: raw[name] for field, name in names.items() if raw.get(name) is not None}
    return {**raw, **own, **more, "model_type": model_type, "architectures": [architecture]}


def _llama(raw: Raw, **more: Any) -> dict[str, Any]:
    names = {"num_hidden_layers": "num_layers", "max_position_embeddings": "seq_length"}
    if raw.get("max_position_embeddings") is not None:
        del names["max_position_embeddings"]
    return _renamed(raw, "llama", "LlamaForCausalLM", names, **more)


def _baichuan(raw: Raw) -> dict[str, Any]:
    length = raw.get("max_position_embeddings") or raw.get("model_max_length")
    return _llama(raw, num_key_value_heads=raw["num_attention_heads"], max_position_embeddings=length)


def _qwen(raw: Raw) -> dict[str, Any]:
    """The first Qwen: its feed-forward is half of what it says, in each of two matrices."""
    names = {"max_position_embeddings": "seq_length", "head_dim": "kv_channels"}
    more = {"num_key_value_heads": raw["num_attention_heads"], "intermediate_size": raw["intermediate_size"] // 2}
    return _renamed(raw, "qwen2", "Qwen2ForCausalLM", names, **more, use_sliding_window=False, layer_types=None)


def _chatglm(raw: Raw) -> dict[str, Any]:
    names = {
        "num_hidden_layers": "num_layers",
        "vocab_size": "padded_vocab_size",
        "intermediate_size": "ffn_hidden_size",
        "head_dim": "kv_channels",
        "max_position_embeddings": "seq_length",
    }
    query = raw["num_attention_heads"]
    shared = raw["multi_query_group_num"] if raw.get("multi_query_attention") else query
    more = {"num_key_value_heads": shared, "attention_bias": bool(raw.get("add_qkv_bias"))}
    return _renamed(raw, "glm", "GlmForCausalLM", names, **more, tie_word_embeddings=False)


def _bailing(raw: Raw) -> dict[str, Any]:
    """Ling and Ring: experts beside a shared one, some dense layers first."""
    names = {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"}
    more = {"attention_bias": bool(raw.get("use_qkv_bias", raw.get("use_bias"))), "use_qk_norm": True}
    further = raw.get("num_nextn_predict_layers") or 0  # where the stand-in's class has one
    return _renamed(raw, "glm4_moe", "Glm4MoeForCausalLM", names, **more, num_nextn_predict_layers=further)


def _deepseek(raw: Raw) -> dict[str, Any]:
    """The first DeepSeek MoE: no latent; the stand-in has norms of heads more."""
    more = {"use_qk_norm": False, "head_dim": raw["hidden_size"] // raw["num_attention_heads"]}
    return _renamed(raw, "glm4_moe", "Glm4MoeForCausalLM", {}, **more, num_nextn_predict_layers=0)


def _minimax(raw: Raw) -> dict[str, Any]:
    kinds = [{0: "linear_attention", 1: "full_attention"}[kind] for kind in raw["attn_type_list"]]
    return _renamed(raw, "minimax", "MiniMaxForCausalLM", {}, layer_types=kinds)


def _deepseek_v3(raw: Raw) -> dict[str, Any]:
    return _renamed(raw, "deepseek_v3", "DeepseekV3ForCausalLM", {})


def _text_of(model_type: str, architecture: str) -> Callable[[Raw], dict[str, Any]]:
    """Models of images whose text model's fields stand beside those of the encoder."""
    return lambda raw: _renamed(raw, model_type, architecture, {}, auto_map=None)


def _phi3_small(raw: Raw) -> dict[str, Any]:
    names = {"intermediate_size": "ff_intermediate_size"}
    more = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "silu"}
    return _renamed(raw, "llama", "LlamaForCausalLM", names, **more)


def _phi_first(raw: Raw) -> dict[str, Any]:
    """Phi-1.5 and Phi-2 as first published, with GPT-2's names."""
    names = {
        "num_hidden_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_head_kv",
        "max_position_embeddings": "n_positions",
    }
    width = raw.get("n_inner") or 4 * raw["n_embd"]
    return _renamed(raw, "phi", "PhiForCausalLM", names, intermediate_size=width)


def _minicpm(raw: Raw) -> dict[str, Any]:
    if has_experts(raw):
        return _renamed(raw, "mixtral", "MixtralForCausalLM", {"num_local_experts": "num_experts"})
    return _llama(raw)


FLAT_LLAVA = {"LlavaLlamaForCausalLM": "llama", "LlavaMistralForCausalLM": "mistral", "LlavaQwenForCausalLM": "qwen2"}


def _flat_llava(raw: Raw) -> dict[str, Any]:
    """LLaVA as first published: the text model's fields stand at the top, the encoder is CLIP's large one."""
    text = {n: v for n, v in raw.items() if n not in ("architectures", "auto_map") and not n.startswith("mm_")}
    whole = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    return {**whole, "text_config": {**text, "model_type": FLAT_LLAVA[_named(raw)]}}


def _named(raw: Raw) -> str:
    named = raw.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def has_experts(raw: Raw) -> bool:
    """Whether the fields speak of several experts."""
    counts = (raw.get(n) for n in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"))
    return any(isinstance(n, int) and n > 1 for n in counts)


STAND_INS: dict[str, Callable[[Raw], dict[str, Any]]] = {
    "aquila": _llama,
    "bailing_moe": _bailing,
    "bailing_moe_v2": _bailing,
    "baichuan": _baichuan,
    "chatglm": _chatglm,
    "deepseek": _deepseek,
    "exaone": _llama,
    "flat llava": _flat_llava,
    "internlm": lambda raw: _llama(raw, attention_bias=bool(raw.get("bias", True))),
    "internlm2": lambda raw: _llama(raw, attention_bias=bool(raw.get("bias", False))),
    "kimi_k2": _deepseek_v3,
    "mimo": lambda raw: _renamed(raw, "qwen2", "Qwen2ForCausalLM", {}),
    "minicpm": _minicpm,
    "minimax_m1": _minimax,
    "minimax_text_01": _minimax,
    "orion": _llama,
    "phi-msft": _phi_first,
    "phi3_v": _text_of("phi3", "Phi3ForCausalLM"),
    "phi3small": _phi3_small,
    "phi4mm": _text_of("phi3", "Phi3ForCausalLM"),
    "llava_llama": _text_of("llama", "LlamaForCausalLM"),
    "llava_mistral": _text_of("mistral", "MistralForCausalLM"),
    "llava_qwen": _text_of("qwen2", "Qwen2ForCausalLM"),
    "qwen": _qwen,
    "skywork": _llama,
    "xverse": _llama,
    "Yi": _llama,
}


TEXT_ONLY = ("phi3_v", "phi4mm", "llava_llama", "llava_mistral", "llava_qwen")


def stand_in(raw: Raw) -> dict[str, Any] | None:
    """The fields of the stand-in; None for a model that has none. KeyError or TypeError where a field is missing."""
    kind = _kind(raw)
    if kind == "hunyuan" and raw.get("num_experts", 1) == 1:
        return _renamed(raw, "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", {})
    make = STAND_INS.get(kind)
    found = None if make is None else make(raw)
    dense = found is not None and found["model_type"] == "llama"
    return None if dense and has_experts(raw) else found


def misnamed(raw: Raw) -> bool:
    """Whether its model type names another model than the fields describe, which its stand-in is then."""
    return _kind(raw) != str(raw.get("model_type"))


def _kind(raw: Raw) -> str:
    kind = str(raw.get("model_type"))
    if kind == "deepseek_v2" and raw.get("use_mla") is False:
        return "deepseek"
    if kind == "llava" and not isinstance(raw.get("text_config"), Mapping) and _named(raw) in FLAT_LLAVA:
        return "flat llava"
    return kind


def text_part(raw: Raw) -> tuple[str, dict[str, Any]] | None:
    """The nested config of a text model, with its name; None in a flat config."""
    for name in TEXT_PARTS:
        part = raw.get(name)
        if isinstance(part, Mapping) and part.get("model_type"):
            return name, dict(part)
        if isinstance(part, Mapping) and isinstance(part.get("text_config"), Mapping):
            return name, dict(part["text_config"])
    return None
