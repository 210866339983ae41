"""A model from a config.json: by transformers where it knows the model, by the rules of architectures.py elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from rayk.planning.architectures import ARCHITECTURES, MODEL_TYPES, vision_tower
from rayk.planning.checkpoint import Folder, read_folder
from rayk.planning.config_fields import LARGEST, Fields
from rayk.planning.encoders import named_encoder, with_encoder
from rayk.planning.model import CachedLayers, Model, Split, State, dtype_or_none
from rayk.planning.quantization import Storage, UnknownQuantization, storage
from rayk.planning.stand_ins import TEXT_ONLY, misnamed, stand_in, text_part
from rayk.planning.weights import WEIGHT_BITS, Weights, plain_bits
from rayk.quantity import show_bytes

MOST_LAYERS = 10_000
AGREE = 0.05  # files and shapes may differ so much: tied copies, buffers, layers that predict further tokens
POSITIVE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
OPTIONAL = ("num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings", "moe_intermediate_size")
SYNONYMS = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"),
    "hidden_size": ("n_embd", "d_model", "n_embed", "dim", "word_embed_proj_dim"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
}
LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")
PLACES = (  # fields that say which layers attend and which keep a state
    "layer_types",
    "layers_block_type",
    "hybrid_override_pattern",
    "attn_layer_period",
    "attn_layer_indices",
    "attn_type_list",
    "full_attention_interval",
    "full_attn_idxs",
    "linear_attn_config",
    "block_types",
    "_block_types",
    "layer_group_size",
    "hybrid_layer_ids",
    "fla_config",
)
MTP = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "n_predict")


class _Facts:
    """What either source says of a model."""

    def __init__(
        self, name: str, text: Callable[[str], Any], weights: Weights, cached: tuple[CachedLayers, ...]
    ) -> None:
        self.name, self.text, self.weights, self.cached = name, text, weights, cached
        self.state: State | None = None
        self.refused: str | None = None
        self.split: Split | None = None


def read_model(path: Path) -> Model:
    """The model of a config.json, or of a folder with one. ModelConfigError when it cannot be understood."""
    folder = read_folder(path)
    notes: list[str] = []
    f = Fields(str(folder.path), folder.config, notes)
    facts = _facts(f, notes)
    dtype = _dtype(f, folder, notes)
    kept, unknown = _storage(f, folder, dtype, notes)
    stored = None if folder.stored is None else folder.stored.num_bytes
    if kept is not None and stored is not None:
        computed = facts.weights.num_bytes(kept.bits)
        if abs(stored - computed) > AGREE * computed:
            notes.append(f"the checkpoint has {show_bytes(stored)} of weights, the shapes give {show_bytes(computed)}")
    more = next((n for name in MTP if isinstance(n := facts.text(name), int) and n > 0), 0)
    if more and stored is None:
        notes.append(f"{more} layer(s) that predict further tokens are not counted")
    return _noted(
        Model(
            name=facts.name,
            cached=facts.cached,
            num_layers=_count(facts),
            query_heads=_whole(facts.text("num_attention_heads")),
            max_length=_max_length(facts.text),
            weights=facts.weights,
            storage=kept,
            stored_bytes=stored,
            unknown=unknown,
            dtype=dtype,
            state=facts.state or State(),
            experts_per_token=next((n for name in EXPERTS if (n := _whole(facts.text(name)))), 0),
            refused=facts.refused,
            split=facts.split,
        ),
        notes,
    )


EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "experts_per_token")


def _count(facts: _Facts) -> int:
    last = max(n for c in facts.cached for n in c.layers)
    return max(_whole(facts.text("num_hidden_layers")) or 0, last + 1)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _facts(f: Fields, notes: list[str]) -> _Facts:
    """From transformers if it is there and knows the model, else from the rules."""
    named = f.values.get("architectures") or []
    named = [named] if isinstance(named, str) else named
    names = [n for n in named if isinstance(n, str)] if isinstance(named, list) else []
    what = ", ".join(names) or f.values.get("model_type") or "no architecture"
    if f.values.get("is_encoder_decoder"):
        raise f.error(
            f"{what} has an encoder: it keeps keys and values of the encoder's tokens too, which is not planned"
        )
    library = _library()
    if library is not None:
        raw, part = _known_fields(f, library)
        if raw is not None:
            return _from_library(f, library, raw, part, notes)
    for name in [*names, MODEL_TYPES.get(str(f.values.get("model_type")), "")]:
        if name in ARCHITECTURES:
            return _from_rules(f, name, notes)
    known = "those of transformers" if library is not None else ", ".join(ARCHITECTURES)
    raise f.error(f"{what} is not known; known are {known}")


def _library() -> Any:
    """rayk.planning.library, None where transformers is not installed."""
    try:
        import_module("transformers")
        return import_module("rayk.planning.library")
    except ImportError:
        return None


def _known_fields(f: Fields, library: Any) -> tuple[dict[str, Any] | None, str | None]:
    """The fields of a model that transformers knows: this one, its stand-in, or its text part by name."""
    raw = dict(f.values)
    if misnamed(raw) or not library.knows(raw.get("model_type")):
        named = raw.get("architectures")
        by_class = MODEL_TYPES_OF.get(named[0] if isinstance(named, list) and named else "")
        if by_class is not None and "model_type" not in raw:
            return {**raw, "model_type": by_class}, None
        found = _stand_in(f, raw)
        if found is not None:
            return found, None
        part = text_part(raw)
        if part is None:
            return None, None
        name, nested = part
        known = library.knows(nested.get("model_type")) and not misnamed(nested)
        nested = nested if known else (_stand_in(f, nested) or {})
        return (nested, name) if nested else (None, None)
    return dict(f.given), None


MODEL_TYPES_OF = {name: kind for kind, name in MODEL_TYPES.items()}


def _stand_in(f: Fields, raw: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        return stand_in(raw)
    except (KeyError, TypeError) as error:
        raise f.error(f"{error} is missing or no number") from None


def _from_library(f: Fields, library: Any, raw: dict[str, Any], part: str | None, notes: list[str]) -> _Facts:
    nested = raw.get("text_config") if isinstance(raw.get("text_config"), Mapping) else None
    text = nested if nested is not None else raw
    if text.get("model_type", raw["model_type"]) in library.MIXED and not any(
        text.get(name) is not None for name in PLACES
    ):
        raise f.error(
            f"{raw['model_type']} keeps a recurrent state in some of its layers, and the file does not say in which; "
            "by hand, layers= are those that attend"
        )
    place = f"{f.path}: {part}" if part else f.path
    _check(Fields(place, raw), required=nested is None)
    if nested is not None:
        _check(Fields(f"{f.path}: text_config", nested), required=False)
    try:
        known = _made(library, raw)
    except library.Unbuildable as error:
        raise f.error(str(error)) from None
    if nested is None:
        _compare(f, raw, library, known)
    for name in POSITIVE:
        value = library.field(known.text, name)
        if _first(text, name) is None and _whole(value):
            notes.append(f"{name} is not in {place}; transformers assumes {value}")
    notes += known.notes
    hidden = _whole(library.field(known.text, "hidden_size")) or 1
    encoder = named_encoder(f, hidden)
    if f.values.get("model_type") in TEXT_ONLY and encoder is None:
        notes.append("only the text model's weights are counted; an encoder beside it is not")
    facts = _Facts(known.class_name, lambda name: library.field(known.text, name), known.weights, known.layers)
    if f.values.get("model_type") in TEXT_ONLY and encoder is not None:
        facts.weights = Weights.of([*facts.weights.modules, encoder])
    if part is not None:
        facts.weights = with_encoder(f, facts.weights, hidden, notes)
        notes.append(f"{f.values.get('model_type')} is planned by its {part}, a {known.class_name}")
    facts.state, facts.refused, facts.split = known.state, known.refused, known.split
    return facts


def _made(library: Any, raw: Mapping[str, Any]) -> Any:
    """The model of these fields; without those that are null where the class takes no null."""
    try:
        return library.known_model(raw)
    except library.Unbuildable:
        return library.known_model({name: value for name, value in raw.items() if value is not None})


def _compare(f: Fields, raw: Mapping[str, Any], library: Any, known: Any) -> None:
    """Refuse what a class of several parts did not read, because it looks for it in a part of its own."""
    for name in COMPARED:
        given, made = _first(raw, name), library.field(known.text, name)
        if name not in raw and any(given == library.field(known.text, other) for other in SYNONYMS.get(name, ())):
            continue  # read under its own name, from which the class derives the other (LongCat-Flash: two a layer)
        if isinstance(given, int) and isinstance(made, int) and given != made:
            raise f.error(f"{name} is {given}, but transformers makes a {known.class_name} of it with {made}")


COMPARED = ("num_hidden_layers", "hidden_size", "vocab_size", "num_experts", "num_local_experts", "n_routed_experts")


def _first(fields: Mapping[str, Any], name: str) -> Any:
    return next((fields[n] for n in (name, *SYNONYMS.get(name, ())) if fields.get(n) is not None), None)


def _check(f: Fields, required: bool) -> None:
    """Refuse numbers that cannot be, before anything is built with them."""
    for name in (*POSITIVE, *OPTIONAL):
        value = _first(f.values, name)
        if value is None:
            if required and name in ("num_hidden_layers", "hidden_size", "vocab_size"):
                raise f.error(f"{name} is missing")
            continue
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int):
                raise f.error(f"{name} must be an integer, got {number!r}")
            if not (0 if name in OPTIONAL else 1) <= number < LARGEST:
                raise f.error(f"{name} must be at least 1 and no absurd number, got {number}")
    layers, query, kv = (
        _first(f.values, n) for n in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    )
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise f.error(f"num_hidden_layers {layers} is absurd")
    types = f.values.get("layer_types")
    if types is not None and isinstance(layers, int) and (not isinstance(types, list) or len(types) != layers):
        raise f.error(f"layer_types must name all {layers} layers (num_hidden_layers), got {types!r}")
    if isinstance(query, int) and isinstance(kv, int) and kv and query % kv:
        raise f.error(f"num_attention_heads {query} is no multiple of num_key_value_heads {kv}: a contradiction")
    hidden = _first(f.values, "hidden_size")
    if isinstance(query, int) and isinstance(hidden, int) and hidden % query and not _has_head_size(f):
        raise f.error(f"hidden_size {hidden} is no multiple of num_attention_heads {query}, and head_dim is missing")


def _has_head_size(f: Fields) -> bool:
    return any(f.has(n) for n in ("head_dim", "kv_lora_rank", "qk_nope_head_dim", "kv_channels", "attention_head_dim"))


def _from_rules(f: Fields, name: str, notes: list[str]) -> _Facts:
    architecture = ARCHITECTURES[name]
    text = f.part(architecture.part) if architecture.part else f
    text = Fields(text.path, {**architecture.defaults, **text.values}, notes)
    if text.number("num_hidden_layers") > MOST_LAYERS:
        raise text.error(f"num_hidden_layers {text.number('num_hidden_layers')} is absurd")
    weights = architecture.weights(text)
    if f.has("vision_config") and architecture.part:
        weights = Weights.of([*weights.modules, vision_tower(f.part("vision_config"), text.number("hidden_size"))])
    text.number("max_position_embeddings")
    return _Facts(name, text.values.get, weights, architecture.cached(text))


def _dtype(f: Fields, folder: Folder, notes: list[str]) -> str:
    """The dtype of the arithmetic and of what is not quantized."""
    parts = [
        f.values,
        *(v for k, v in f.values.items() if isinstance(v, Mapping) and k in ("text_config", "llm_config")),
    ]
    found = next((p[n] for p in parts for n in ("dtype", "torch_dtype") if p.get(n) is not None), None)
    if found is None or found == "auto":
        by_files = folder.stored.dtype if folder.stored is not None else None
        if by_files is None:
            notes.append("the file names no dtype; bfloat16 is assumed")
        return by_files or "bfloat16"
    name = str(found).removeprefix("torch.")
    if name not in WEIGHT_BITS:
        raise f.error(f"dtype {name!r} is not one of {', '.join(WEIGHT_BITS)}")
    return dtype_or_none(name) or "bfloat16"


def _storage(f: Fields, folder: Folder, dtype: str, notes: list[str]) -> tuple[Storage | None, str | None]:
    """How the weights are stored, or why that is unknown."""
    named = str(f.values.get("dtype") or f.values.get("torch_dtype") or dtype).removeprefix("torch.")
    if not folder.quantization and named in WEIGHT_BITS and dtype_or_none(named) is None:
        return Storage(named, plain_bits(named)), None
    try:
        found = storage(folder.quantization, dtype)
    except UnknownQuantization as error:
        return None, f"the size of {error}"
    notes += found.notes
    return found, None


def _max_length(text: Callable[[str], Any]) -> int | None:
    """Tokens that the model was made for; with YaRN what its factor makes of the original length."""
    longest = next((n for name in LENGTHS if (n := _whole(text(name)))), None)
    for name in ("rope_scaling", "rope_parameters"):
        rope = text(name)
        if not isinstance(rope, Mapping) or str(rope.get("rope_type", rope.get("type"))) != "yarn":
            continue
        factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
        if isinstance(factor, (int, float)) and (start := _whole(original) or longest):
            longest = max(longest or 0, int(start * factor)) if original else longest
    return longest


def _noted(model: Model, notes: list[str]) -> Model:
    """With remarks on windows, states, latents and rayk's own runner."""
    if (window := model.window) is not None:
        share = f"{window.layers} of {model.num_layers} layers"
        notes.append(
            f"{share} attend to the last {window.tokens} tokens only; the cache keeps all tokens of all layers"
        )
    if model.state != State():
        size = show_bytes(model.state.num_bytes(model.dtype))
        notes.append(
            f"{model.num_layers - model.cached_layers} of {model.num_layers} layers keep no keys and values; recurrent "
            f"layers keep a state of {size} a sequence, planned as pages"
        )
    extra = sum(c.extra_bytes * len(c.layers) for c in model.cached)
    if extra:
        notes.append(f"{extra:,} bytes of a token are the indexer's keys (8 bits and a scale each 128)")
    if any(c.expanded for c in model.cached):
        own = model.expanded().token_bytes()
        if any(c.latent for c in model.cached):
            what = "a token is its latent (MLA); rayk's own runner keeps that, but where its expansion is quantised"
            notes.append(f"{what}: then keys and values of every head, {own:,} bytes (--mla expanded)")
        else:
            notes.append(f"a token is what the model itself keeps; rayk's own runner keeps {own:,} bytes of it")
    if model.refused is not None:
        notes.append(
            f"rayk's own runner does not take it ({model.refused}); the plan is for another engine on its pages"
        )
    return replace(model, notes=tuple(dict.fromkeys(notes)))
