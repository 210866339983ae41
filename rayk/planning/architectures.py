"""Architectures by class name: from the fields of a config.json to modules, cached heads and windows.

These rules serve where transformers is not installed, or does not know the model. The shapes are those of the modules
that the class names stand for; h is the hidden size. Biases, norms and routers are of the kind `rest`: quantized
checkpoints keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rayk.planning.config_fields import Fields
from rayk.planning.model import CachedLayers
from rayk.planning.weights import Kind, Module, Weights

Parts = Iterator[Module]
Layer = Callable[[Fields, int], Parts]
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


def linear(name: str, columns: int, rows: int) -> Module:
    return Module(name, Kind.linear, columns * rows, columns)


def rest(name: str, count: int) -> Module:
    return Module(name, Kind.rest, count)


def attention(f: Fields, qkv_bias: bool = False, out_bias: bool = False, head_norms: bool = False) -> Parts:
    """Projections of queries, keys, values and output."""
    (query, kv, dim), h = heads(f), f.number("hidden_size")
    yield linear("self_attn.q_proj", h, query * dim)
    yield linear("self_attn.k_proj", h, kv * dim)
    yield linear("self_attn.v_proj", h, kv * dim)
    yield linear("self_attn.o_proj", query * dim, h)
    biases = (query + 2 * kv) * dim * qkv_bias + h * out_bias
    yield rest("self_attn.norms", biases + 2 * dim * head_norms)


def gated(f: Fields, width: int, name: str = "mlp") -> Parts:
    """Gate, up and down projections."""
    h = f.number("hidden_size")
    yield linear(f"{name}.gate_proj", h, width)
    yield linear(f"{name}.up_proj", h, width)
    yield linear(f"{name}.down_proj", width, h)


def norms(f: Fields, count: int) -> Parts:
    yield rest("norms", count * f.number("hidden_size"))


def llama(f: Fields, layer: int) -> Parts:
    width, bias = f.number("intermediate_size"), f.flag("attention_bias", False)
    yield from attention(f, bias, bias)
    yield from gated(f, width)
    yield rest("mlp.biases", (2 * width + f.number("hidden_size")) * f.flag("mlp_bias", False))
    yield from norms(f, 2)


def qwen2(f: Fields, layer: int) -> Parts:
    yield from attention(f, qkv_bias=True)
    yield from gated(f, f.number("intermediate_size"))
    yield from norms(f, 2)


def qwen3_attention(f: Fields) -> Parts:
    bias = f.flag("attention_bias", False)
    yield from attention(f, bias, bias, head_norms=True)
    yield from norms(f, 2)


def qwen3(f: Fields, layer: int) -> Parts:
    yield from qwen3_attention(f)
    yield from gated(f, f.number("intermediate_size"))


def is_sparse(f: Fields, layer: int) -> bool:
    """Whether that layer of a Qwen model has experts."""
    dense = f.values.get("mlp_only_layers", [])
    return layer not in dense and (layer + 1) % f.number("decoder_sparse_step", 1) == 0


def experts(f: Fields, count: int, width: int) -> Parts:
    """Routed experts and their router."""
    h = f.number("hidden_size")
    yield Module("mlp.experts.gate_up_proj", Kind.expert, count * 2 * h * width, h, count)
    yield Module("mlp.experts.down_proj", Kind.expert, count * h * width, width, count)
    yield Module("mlp.gate", Kind.rest, count * h, h)


def qwen2_moe(f: Fields, layer: int) -> Parts:
    yield from attention(f, qkv_bias=f.flag("qkv_bias", True))
    yield from norms(f, 2)
    if not is_sparse(f, layer):
        yield from gated(f, f.number("intermediate_size"))
        return
    yield from gated(f, f.number("shared_expert_intermediate_size"), "mlp.shared_expert")
    yield rest("mlp.shared_expert_gate", f.number("hidden_size"))
    yield from experts(f, f.number("num_experts"), f.number("moe_intermediate_size"))


def qwen3_moe(f: Fields, layer: int) -> Parts:
    if not is_sparse(f, layer):
        yield from qwen3(f, layer)
        return
    yield from qwen3_attention(f)
    yield from experts(f, f.number("num_experts"), f.number("moe_intermediate_size"))


def mixtral(f: Fields, layer: int) -> Parts:
    yield from attention(f)
    yield from norms(f, 2)
    yield from experts(f, f.number("num_local_experts"), f.number("intermediate_size"))


def gemma2(f: Fields, layer: int) -> Parts:
    bias = f.flag("attention_bias", False)
    yield from attention(f, bias, bias)
    yield from gated(f, f.number("intermediate_size"))
    yield from norms(f, 4)


def gemma3(f: Fields, layer: int) -> Parts:
    yield from gemma2(f, layer)
    yield rest("self_attn.norms", 2 * heads(f)[2])


def phi3(f: Fields, layer: int) -> Parts:
    yield from attention(f)
    yield from gated(f, f.number("intermediate_size"))
    yield from norms(f, 2)


def phi(f: Fields, layer: int) -> Parts:
    """One norm with a bias, and a plain feed-forward of two matrices."""
    h, width = f.number("hidden_size"), f.number("intermediate_size")
    yield from attention(f, True, True)
    yield linear("mlp.fc1", h, width)
    yield linear("mlp.fc2", width, h)
    yield rest("mlp.biases", width + h)
    yield from norms(f, 2)


def deepseek(f: Fields, layer: int) -> Parts:
    """Latent attention: queries through a low rank (or directly), keys and values through the cached latent."""
    h, query = f.number("hidden_size"), f.number("num_attention_heads")
    rank, rope, nope = f.number("kv_lora_rank"), f.number("qk_rope_head_dim"), f.number("qk_nope_head_dim")
    value, q_rank = f.number("v_head_dim"), f.number("q_lora_rank", 0, least=0)
    if q_rank:
        yield linear("self_attn.q_a_proj", h, q_rank)
        yield linear("self_attn.q_b_proj", q_rank, query * (nope + rope))
    else:
        yield linear("self_attn.q_proj", h, query * (nope + rope))
    yield linear("self_attn.kv_a_proj_with_mqa", h, rank + rope)
    yield linear("self_attn.kv_b_proj", rank, query * (nope + value))
    yield linear("self_attn.o_proj", query * value, h)
    yield rest("self_attn.norms", q_rank + rank)
    yield from norms(f, 2)
    dense_until = f.number("first_k_dense_replace", 0, least=0)
    if dense_until > f.number("num_hidden_layers"):
        raise f.error(f"first_k_dense_replace {dense_until} is beyond num_hidden_layers")
    count = f.number("n_routed_experts", 0, least=0)
    if layer < dense_until or not count or layer % f.number("moe_layer_freq", 1):
        yield from gated(f, f.number("intermediate_size"))
        return
    width = f.number("moe_intermediate_size")
    yield from gated(f, width * f.number("n_shared_experts", 0, least=0), "mlp.shared_experts")
    yield from experts(f, count, width)
    yield rest("mlp.gate.bias", count * (f.values.get("topk_method") == "noaux_tc"))


def gpt_oss(f: Fields, layer: int) -> Parts:
    """Biases everywhere, one sink a query head, experts with biases."""
    h, count, width = f.number("hidden_size"), f.number("num_local_experts"), f.number("intermediate_size")
    bias = f.flag("attention_bias", True)
    yield from attention(f, bias, bias)
    yield from norms(f, 2)
    yield from experts(f, count, width)
    yield rest("self_attn.sinks", heads(f)[0] + count + count * (2 * width + h))


def _blocks(f: Fields) -> list[tuple[int, int]]:
    """KV heads and feed-forward width of each layer of a searched Llama, 0 for what a layer is without."""
    blocks, query = f.values.get("block_configs"), f.number("num_attention_heads")
    if not isinstance(blocks, list) or len(blocks) != f.number("num_hidden_layers"):
        raise f.error("block_configs must describe all layers (num_hidden_layers)")
    found = []
    for block in blocks:
        one = Fields(f.path, block if isinstance(block, Mapping) else {})
        attending, feeding = one.part("attention"), one.part("ffn")
        for part in (attending, feeding):
            if part.values.get("replace_with_linear"):
                raise f.error("block_configs replace parts by linear layers, which is not planned")
        group = 0 if attending.values.get("no_op") else attending.number("n_heads_in_group")
        factor = 0.0 if feeding.values.get("no_op") else float(feeding.values.get("ffn_mult") or 0)
        width = int(2 * factor * f.number("hidden_size") / 3)
        found.append((query // group if group else 0, -(-width // 256) * 256))
    return found


def searched(f: Fields, layer: int) -> Parts:
    """Nemotron's Llamas found by search: layers without attention or feed-forward, and of several widths."""
    kv, width = _blocks(f)[layer]
    if kv:
        yield from attention(Fields(f.path, {**f.values, "num_key_value_heads": kv}))
    if width:
        yield from gated(f, width)
    yield from norms(f, bool(kv) + bool(width))


def searched_cache(f: Fields) -> tuple[CachedLayers, ...]:
    by_heads: dict[int, list[int]] = {}
    for layer, (kv, _) in enumerate(_blocks(f)):
        by_heads.setdefault(kv, []).append(layer)
    dim = f.number("head_dim", f.number("hidden_size") // f.number("num_attention_heads"))
    return tuple(CachedLayers(tuple(layers), kv, dim, dim) for kv, layers in by_heads.items() if kv)


@dataclass(frozen=True)
class Architecture:
    """`defaults` are fields that published configs leave out; `part` the nested config of the text model, if any."""

    layer: Layer
    windowed: Windowed = never
    latent: bool = False
    head_bias: bool = False
    part: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    cache: Callable[[Fields], tuple[CachedLayers, ...]] | None = None

    def modules(self, f: Fields) -> Parts:
        """All layers, embeddings, final norm and output head."""
        h, words = f.number("hidden_size"), f.number("vocab_size")
        yield Module("model.embed_tokens", Kind.embedding, words * h, h)
        for layer in range(f.number("num_hidden_layers")):
            for module in self.layer(f, layer):
                yield module._replace(name=f"model.layers.{layer}.{module.name}")
        yield rest("model.norm", h + (words + h) * self.head_bias)
        if not f.flag("tie_word_embeddings", False):
            yield Module("lm_head", Kind.head, words * h, h)

    def weights(self, f: Fields) -> Weights:
        return Weights.of(self.modules(f))

    def cached(self, f: Fields) -> tuple[CachedLayers, ...]:
        """What layers keep of a token, those with a window apart; `layer_types` says which have where it is given."""
        if self.cache is not None:
            return self.cache(f)
        layers, types = f.number("num_hidden_layers"), f.values.get("layer_types")
        if types is not None and (not isinstance(types, list) or len(types) != layers):
            raise f.error(f"layer_types must name all {layers} layers (num_hidden_layers), got {types!r}")
        sliding = [self.windowed(f, i) if types is None else types[i] == "sliding_attention" for i in range(layers)]
        if self.latent:
            query, rope = f.number("num_attention_heads"), f.number("qk_rope_head_dim")
            widest = max(f.number("qk_nope_head_dim") + rope, f.number("v_head_dim"))
            size = f.number("kv_lora_rank") + rope
            return (CachedLayers(tuple(range(layers)), 1, size, 0, True, expanded=(query, widest)),)
        _, kv, dim = heads(f)
        window = f.number("sliding_window") if any(sliding) else None
        plain = CachedLayers((), kv, dim, dim)
        split = [(tuple(i for i in range(layers) if sliding[i] == s), window if s else None) for s in (False, True)]
        return tuple(plain._replace(layers=numbers, window=size) for numbers, size in split if numbers)


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
    "DeciLMForCausalLM": Architecture(searched, cache=searched_cache),
    "GptOssForCausalLM": Architecture(gpt_oss, every_other, defaults={"sliding_window": 128}),
}
MODEL_TYPES = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma3_text": "Gemma3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    **{
        n.removesuffix("ForCausalLM").lower(): n
        for n in ARCHITECTURES
        if not n.startswith(("Gemma3", "Deep", "GptO")) and "Moe" not in n
    },
}


def vision_tower(f: Fields, text_hidden: int) -> Module:
    """A SigLIP encoder and its projection into the text model, as in Gemma 3; never quantized."""
    h, width = f.number("hidden_size"), f.number("intermediate_size")
    patch, image = f.number("patch_size"), f.number("image_size")
    layer = 4 * (h * h + h) + 2 * h * width + width + h + 4 * h
    ends = 3 * patch * patch * h + h + (image // patch) ** 2 * h + 2 * h
    count = f.number("num_hidden_layers") * layer + ends + h * text_hidden + h
    return Module("vision_tower", Kind.rest, count)
