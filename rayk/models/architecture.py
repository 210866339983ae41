"""Whether a model can run on pages: by its class and config before its weights are read, by a trial after.

A model can if all that it remembers of earlier tokens are the keys and values of causal attention, and if that
attention goes through transformers' registry. MLA (DeepSeek) passes: without a cache of its own, transformers expands
the latent to keys and values for every head before the registry is asked, and those are what the pages hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rayk.attention import PagedPool, choose, pack
from rayk.attention.backend import Needs
from rayk.errors import ArchitectureError, RaykError
from rayk.models.bridge import NAME, LayerShape, PagedAttention, Recorder

KNOWN_LAYERS = ("full_attention", "sliding_attention", "attention")
TRIAL_TOKENS = 8
FIRST_CHUNK = 5
TRIAL_PAGE = 16
TRIAL_WINDOW = 3


def refuse_by_config(config: Any, model_class: Any) -> None:
    """ArchitectureError for what the class or the config says cannot work. `config` is the text model's."""
    name = model_class.__name__
    kinds = set(getattr(config, "layer_types", None) or ())
    other = sorted(kinds.difference(KNOWN_LAYERS))
    # The flag is of the class, which may have recurrent layers; the config says whether this model has any.
    stateful = model_class._is_stateful and not (kinds and not other)
    for wrong, reason in (
        (config.is_encoder_decoder, "it has an encoder"),
        (stateful, "it keeps a recurrent state, which is not made of keys and values of tokens"),
        (not model_class._supports_attention_backend, "its attention is not routed through transformers' registry"),
        (not getattr(config, "is_causal", True), "its attention is not causal"),
        (getattr(config, "use_bidirectional_attention", None), "its attention looks ahead"),
        (getattr(config, "attention_chunk_size", None), "its attention is cut into chunks of tokens"),
        (getattr(config, "num_kv_shared_layers", None), "some of its layers use the keys and values of others"),
        (getattr(config, "add_cross_attention", None), "it attends to an encoder"),
    ):
        if wrong:
            raise ArchitectureError(name, reason)
    if other:
        raise ArchitectureError(name, f"it has layers of type {', '.join(other)}; known are {', '.join(KNOWN_LAYERS)}")


def refuse_unread_rope(model: Any, text: Any) -> None:
    """ArchitectureError for a scaling of positions that the config asks for and no layer of the model reads."""
    asked = getattr(text, "rope_parameters", None) or {}
    parts = asked.values() if all(isinstance(part, dict) for part in asked.values()) else [asked]
    wanted = {str(part["rope_type"]) for part in parts if part.get("rope_type")} - {"default"}
    read: set[Any] = set()
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        read.update(kinds.values() if isinstance(kinds, dict) else [kinds])
    if lost := sorted(wanted - read):
        reason = f"its positions do not read rope_type {', '.join(lost)}, which its config asks for"
        raise ArchitectureError(type(model).__name__, reason)
    part = asked.get("partial_rotary_factor") or 1.0
    turned = {2 * module.inv_freq.numel() for module in model.modules() if hasattr(module, "inv_freq")}
    if isinstance(part, float) and part < 1 and "default" in read and _head_dim(text) in turned:
        reason = f"it turns all of a head by its position, and its config asks for {part:g} of it"
        raise ArchitectureError(type(model).__name__, reason)


def _head_dim(text: Any) -> int:
    own: int | None = getattr(text, "head_dim", None)
    return own or int(text.hidden_size) // int(text.num_attention_heads)


def freeze_rope(model: Any) -> int | None:
    """Stop frequencies from depending on the longest row of a batch; the length up to which that changes nothing.

    `dynamic` and `longrope` choose one set of frequencies per call: with the rows of others in the batch, and with
    keys from the cache that another call has rotated, a row's result would depend on its company. Up to its original
    length a model uses the first set only; that one is kept. None where no frequencies change.
    """
    limits: list[int] = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
        changing = {key for key, kind in by_layer.items() if kind and ("dynamic" in kind or kind == "longrope")}
        if not changing:
            continue
        for key in changing:
            parameters = module.config.rope_parameters if key is None else module.config.rope_parameters[key]
            limits.append(parameters.get("original_max_position_embeddings") or module.config.max_position_embeddings)
        if isinstance(kinds, dict):
            module.rope_type = {key: "default" if key in changing else kind for key, kind in kinds.items()}
        else:
            module.rope_type = "default"
    return min(limits, default=None)


def trial_tokens(vocab_size: int, device: torch.device) -> torch.Tensor:
    """int64 `[1, TRIAL_TOKENS]`, spread over the vocabulary."""
    return (torch.arange(1, TRIAL_TOKENS + 1, device=device) * 7919 % vocab_size)[None]


def layer_shapes(model: Any, tokens: torch.Tensor, layers: int) -> dict[int, LayerShape]:
    """What each layer asks of the cache, by the model's layer number in the order of the calls.

    ArchitectureError unless each of the `layers` layers calls the registry once, for the same heads.
    """
    name, recorder = type(model).__name__, Recorder()
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    try:
        model(input_ids=tokens, position_ids=positions, use_cache=False, paged=recorder)
    except ArchitectureError as error:
        raise ArchitectureError(name, f"{error.architecture}: {error.message}") from None
    except TypeError as error:
        raise ArchitectureError(name, f"its forward does not take what rayk passes: {error}") from error
    except Exception as error:  # foreign code over a foreign config
        raise _raised(name, error) from error
    shapes = dict(recorder.calls)
    if len(recorder.calls) != layers or len(shapes) != layers:
        raise ArchitectureError(
            name,
            f"its {layers} layers must each attend once through transformers' registry; {len(shapes)} do, "
            f"{len(recorder.calls)} times in all",
        )
    kinds = sorted({(shape.kv_heads, shape.head_dim) for shape in shapes.values()})
    if len(kinds) > 1:
        raise ArchitectureError(name, f"its layers have different KV heads and head sizes: {kinds}; pages have one")
    return shapes


@torch.inference_mode()
def try_out(model: Any, tokens: torch.Tensor, shapes: dict[int, LayerShape]) -> int:
    """The width of the logits; ArchitectureError unless a few tokens give, in two chunks on pages, what they give
    without a cache.

    This is about the architecture (biases by distance, positions of its own, windows that only a mask knows), not
    about rounding: in half precision, and where quantised layers round what they are given, a fifth of the logits'
    norm is allowed. Windows are made small for it.
    """
    with _small_windows(model):
        try:
            model.set_attn_implementation("eager")
            want = model(input_ids=tokens, use_cache=False).logits[0].float()
        except Exception as error:  # foreign code over a foreign config
            raise _raised(type(model).__name__, error) from error
        finally:
            model.set_attn_implementation(NAME)
        try:
            got = _paged(model, tokens, shapes)
        except RaykError:
            raise
        except Exception as error:  # as above
            raise _raised(type(model).__name__, error) from error
    apart = float((got - want).norm() / want.norm().clamp(min=1e-9))
    most = 1e-3 if _exact(model) else 0.2
    if not apart <= most and bool(want.isfinite().all()):
        raise ArchitectureError(
            type(model).__name__,
            f"its logits on pages differ from those without a cache by {apart:.1e} of their norm",
        )
    return int(want.shape[1])


def _raised(name: str, error: Exception) -> ArchitectureError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return ArchitectureError(name, f"a trial of {TRIAL_TOKENS} tokens raised {what}")


def _exact(model: Any) -> bool:
    """Whether all of it is computed in float32: no weights of another type, which would round what they are given."""
    return all(tensor.dtype == torch.float32 for tensor in model.parameters())


@contextmanager
def _small_windows(model: Any) -> Iterator[None]:
    """Windows of TRIAL_WINDOW tokens wherever the model has windows, in its layers and configs."""
    owners: dict[int, Any] = {
        id(owner): owner for module in model.modules() for owner in (module, getattr(module, "config", None))
    }
    before = [
        (owner, window)
        for owner in owners.values()
        if isinstance(window := getattr(owner, "sliding_window", None), int) and window > TRIAL_WINDOW
    ]
    try:
        for owner, _ in before:
            owner.sliding_window = TRIAL_WINDOW
        yield
    finally:
        for owner, window in before:
            owner.sliding_window = window


def _paged(model: Any, tokens: torch.Tensor, shapes: dict[int, LayerShape]) -> torch.Tensor:
    """Logits of every token, by way of a pool of two pages and the null page."""
    shape, device = next(iter(shapes.values())), tokens.device
    dims = (3, len(shapes), 2, TRIAL_PAGE, shape.kv_heads, shape.head_dim)
    pool = PagedPool(torch.zeros(dims, dtype=model.dtype, device=device).transpose(1, 2))
    backend = choose(needs(shapes, device, model.dtype, model.dtype, TRIAL_PAGE), "torch-sdpa")
    table = torch.tensor([[1, 0]], dtype=torch.int32, device=device)
    layers = {layer: at for at, layer in enumerate(shapes)}
    found = []
    for start, end in ((0, FIRST_CHUNK), (FIRST_CHUNK, tokens.shape[1])):
        before = torch.tensor([start], dtype=torch.int32, device=device)
        batch = pack(table, before, [end - start], TRIAL_PAGE, end)
        attention = PagedAttention(pool, batch, backend, layers)
        out = model(
            input_ids=tokens[:, start:end], position_ids=batch.positions[None], use_cache=False, paged=attention
        )
        found.append(out.logits[0])
    return torch.cat(found).float()


def needs(
    shapes: dict[int, LayerShape], device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype, page_size: int
) -> Needs:
    """What all layers together ask of a backend."""
    asked: Sequence[LayerShape] = list(shapes.values())
    return Needs(
        device,
        dtype,
        cache_dtype,
        asked[0].head_dim,
        page_size,
        any(shape.softcap for shape in asked),
        any(shape.sinks for shape in asked),
    )
