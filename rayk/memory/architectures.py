"""Architectures by class name: from the fields of a config.json to parameters, cached heads and windows.

The shapes are those of the modules that the class names stand for; h is the hidden size, counts are per layer unless
said otherwise. Biases, norms and routers count as `rest`: quantized checkpoints keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rayk.memory.fields import Fields
from rayk.memory.model import Window
from rayk.memory.weights import Weights

Layer = Callable[[Fields, int], Weights]
Windowed = Callable[[Fields, int], bool]


def never(f: Fields, layer: int) -> bool:
    return False


def always(f: Fields, layer: int) -> bool:
    return f.has("sliding_window")


def qwen_window(f: Fields, layer: int) -> bool:
    """Layers from max_window_layers on, if windows are used at all."""
    return f.flag("use_sliding_window", False) and layer >= f.number("max_window_layers", 0, least=0)


def every_other(f: Fields, layer: int) -> bool:
    return layer % 2 == 0


def five_of_six(f: Fields, layer: int) -> bool:
    return (layer + 1) % f.number("sliding_window_pattern", 6) != 0


def heads(f: Fields) -> tuple[int, int, int]:
    """Query heads, KV heads, elements of a head."""
    query = f.number("num_attention_heads")
    kv = f.number("num_key_value_heads", query)
    if query % kv:
        raise f.error(f"num_attention_heads {query} is no multiple of num_key_value_heads {kv}: a contradiction")
    hidden = f.number("hidden_size")
    if not f.has("head_dim") and hidden % query:
        raise f.error(f"hidden_size {hidden} is no multiple of num_attention_heads {query}, and head_dim is missing")
    return query, kv, f.number("head_dim", hidden // query)


def attention(f: Fields, qkv_bias: bool = False, out_bias: bool = False, head_norms: bool = False) -> Weights:
    """Projections of queries, keys, values and output."""
    (query, kv, dim), h = heads(f), f.number("hidden_size")
    qkv = (query + 2 * kv) * dim
    rest = qkv * qkv_bias + h * out_bias + 2 * dim * head_norms
    return Weights(linears=h * qkv + query * dim * h, rest=rest)


def gated(f: Fields, width: int) -> int:
    """Gate, up and down projections."""
    return 3 * f.number("hidden_size") * width


def norms(f: Fields, count: int) -> Weights:
    return Weights(rest=count * f.number("hidden_size"))


def llama(f: Fields, layer: int) -> Weights:
    width, bias = f.number("intermediate_size"), f.flag("attention_bias", False)
    mlp = Weights(linears=gated(f, width), rest=(2 * width + f.number("hidden_size")) * f.flag("mlp_bias", False))
    return attention(f, bias, bias) + mlp + norms(f, 2)


def qwen2(f: Fields, layer: int) -> Weights:
    return attention(f, qkv_bias=True) + Weights(linears=gated(f, f.number("intermediate_size"))) + norms(f, 2)


def qwen3_attention(f: Fields) -> Weights:
    bias = f.flag("attention_bias", False)
    return attention(f, bias, bias, head_norms=True) + norms(f, 2)


def qwen3(f: Fields, layer: int) -> Weights:
    return qwen3_attention(f) + Weights(linears=gated(f, f.number("intermediate_size")))


def is_sparse(f: Fields, layer: int) -> bool:
    """Whether that layer of a Qwen model has experts."""
    dense = f.values.get("mlp_only_layers", [])
    return layer not in dense and (layer + 1) % f.number("decoder_sparse_step", 1) == 0


def experts(f: Fields, count: int, width: int) -> Weights:
    """Routed experts and their router."""
    return Weights(experts=count * gated(f, width), rest=count * f.number("hidden_size"))


def qwen2_moe(f: Fields, layer: int) -> Weights:
    own = attention(f, qkv_bias=f.flag("qkv_bias", True)) + norms(f, 2)
    if not is_sparse(f, layer):
        return own + Weights(linears=gated(f, f.number("intermediate_size")))
    shared = Weights(linears=gated(f, f.number("shared_expert_intermediate_size")), rest=f.number("hidden_size"))
    return own + shared + experts(f, f.number("num_experts"), f.number("moe_intermediate_size"))


def qwen3_moe(f: Fields, layer: int) -> Weights:
    if not is_sparse(f, layer):
        return qwen3(f, layer)
    return qwen3_attention(f) + experts(f, f.number("num_experts"), f.number("moe_intermediate_size"))


def mixtral(f: Fields, layer: int) -> Weights:
    return attention(f) + norms(f, 2) + experts(f, f.number("num_local_experts"), f.number("intermediate_size"))


def gemma2(f: Fields, layer: int) -> Weights:
    bias = f.flag("attention_bias", False)
    return attention(f, bias, bias) + Weights(linears=gated(f, f.number("intermediate_size"))) + norms(f, 4)


def gemma3(f: Fields, layer: int) -> Weights:
    return gemma2(f, layer) + Weights(rest=2 * heads(f)[2])


def phi3(f: Fields, layer: int) -> Weights:
    return attention(f) + Weights(linears=gated(f, f.number("intermediate_size"))) + norms(f, 2)


def phi(f: Fields, layer: int) -> Weights:
    """One norm with a bias, and a plain feed-forward of two matrices."""
    h, width = f.number("hidden_size"), f.number("intermediate_size")
    return attention(f, True, True) + Weights(linears=2 * h * width, rest=width + h) + norms(f, 2)


def deepseek(f: Fields, layer: int) -> Weights:
    """Latent attention: queries through a low rank (or directly), keys and values through the cached latent."""
    h, query = f.number("hidden_size"), f.number("num_attention_heads")
    rank, rope, nope = f.number("kv_lora_rank"), f.number("qk_rope_head_dim"), f.number("qk_nope_head_dim")
    value, q_rank = f.number("v_head_dim"), f.number("q_lora_rank", 0, least=0)
    to_query = (h * q_rank + q_rank * query * (nope + rope)) if q_rank else h * query * (nope + rope)
    linears = to_query + h * (rank + rope) + rank * query * (nope + value) + query * value * h
    own = Weights(linears=linears, rest=q_rank + rank) + norms(f, 2)
    dense_until = f.number("first_k_dense_replace", 0, least=0)
    if dense_until > f.number("num_hidden_layers"):
        raise f.error(f"first_k_dense_replace {dense_until} is beyond num_hidden_layers")
    count = f.number("n_routed_experts", 0, least=0)
    if layer < dense_until or not count or layer % f.number("moe_layer_freq", 1):
        return own + Weights(linears=gated(f, f.number("intermediate_size")))
    width = f.number("moe_intermediate_size")
    shared = Weights(linears=gated(f, width * f.number("n_shared_experts", 0, least=0)))
    bias = Weights(rest=count * (f.values.get("topk_method") == "noaux_tc"))
    return own + experts(f, count, width) + shared + bias


def gpt_oss(f: Fields, layer: int) -> Weights:
    """Biases everywhere, one sink a query head, experts with biases."""
    h, count, width = f.number("hidden_size"), f.number("num_local_experts"), f.number("intermediate_size")
    bias = f.flag("attention_bias", True)
    biases = Weights(rest=heads(f)[0] + count + count * (2 * width + h))
    return attention(f, bias, bias) + norms(f, 2) + experts(f, count, width) + biases


@dataclass(frozen=True)
class Architecture:
    """`defaults` are fields that published configs leave out; `part` the nested config of the text model, if any."""

    layer: Layer
    windowed: Windowed = never
    latent: bool = False
    head_bias: bool = False
    part: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def count(self, f: Fields) -> Weights:
        """All layers, embeddings, final norm and output head."""
        layers, h, words = f.number("num_hidden_layers"), f.number("hidden_size"), f.number("vocab_size")
        if layers > MOST_LAYERS:
            raise f.error(f"num_hidden_layers {layers} is absurd")
        tied = f.flag("tie_word_embeddings", False)
        ends = words * h * (1 if tied else 2) + h + (words + h) * self.head_bias
        return sum((self.layer(f, i) for i in range(layers)), Weights(rest=ends))

    def cached(self, f: Fields) -> tuple[int, int, int]:
        """Query heads, KV heads and elements of a head in the cache."""
        if self.latent:
            return f.number("num_attention_heads"), 1, f.number("kv_lora_rank") + f.number("qk_rope_head_dim")
        return heads(f)

    def window(self, f: Fields) -> Window | None:
        """The layers that attend to a window; `layer_types` says which where it is given."""
        layers = f.number("num_hidden_layers")
        types = f.values.get("layer_types")
        if types is not None and (not isinstance(types, list) or len(types) != layers):
            raise f.error(f"layer_types must name all {layers} layers (num_hidden_layers), got {types!r}")
        sliding = [self.windowed(f, i) if types is None else types[i] == "sliding_attention" for i in range(layers)]
        return Window(f.number("sliding_window"), sum(sliding)) if any(sliding) else None


MOST_LAYERS = 10_000
_GEMMA = {"head_dim": 256, "tie_word_embeddings": True}
_GEMMA3 = _GEMMA | {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}

ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(llama),
    "MistralForCausalLM": Architecture(llama, always),
    "MixtralForCausalLM": Architecture(mixtral, always),
    "Qwen2ForCausalLM": Architecture(qwen2, qwen_window),
    "Qwen2MoeForCausalLM": Architecture(qwen2_moe, qwen_window),
    "Qwen3ForCausalLM": Architecture(qwen3, qwen_window, defaults={"head_dim": 128}),
    "Qwen3MoeForCausalLM": Architecture(qwen3_moe, qwen_window),
    "Gemma2ForCausalLM": Architecture(gemma2, every_other, defaults=_GEMMA | {"sliding_window": 4096}),
    "Gemma3ForCausalLM": Architecture(gemma3, five_of_six, defaults=_GEMMA3),
    "Gemma3ForConditionalGeneration": Architecture(gemma3, five_of_six, part="text_config", defaults=_GEMMA3),
    "PhiForCausalLM": Architecture(phi, head_bias=True),
    "Phi3ForCausalLM": Architecture(phi3, always),
    "DeepseekV2ForCausalLM": Architecture(deepseek, latent=True),
    "DeepseekV3ForCausalLM": Architecture(deepseek, latent=True),
    "GptOssForCausalLM": Architecture(gpt_oss, every_other, defaults={"sliding_window": 128}),
}
MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}


def vision_tower(f: Fields, text_hidden: int) -> Weights:
    """A SigLIP encoder and its projection into the text model, as in Gemma 3; never quantized."""
    h, width = f.number("hidden_size"), f.number("intermediate_size")
    patch, image = f.number("patch_size"), f.number("image_size")
    layer = 4 * (h * h + h) + 2 * h * width + width + h + 4 * h
    ends = 3 * patch * patch * h + h + (image // patch) ** 2 * h + 2 * h
    return Weights(rest=f.number("num_hidden_layers") * layer + ends + h * text_hidden + h)
