"""Whether a model can run on pages: by its class and config before its weights are read, by a trial after.

A model can if all that it remembers of earlier tokens are the keys and values of causal attention. Best is if that
attention goes through transformers' registry, where rayk's stands in for it; if not, the model attends by itself over
what is gathered for it (rayk.models.own_attention). MLA (DeepSeek) is kept as its latent (rayk.models.latent).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch

from rayk.attention import PagedPool, choose, pack
from rayk.attention.backend import Needs
from rayk.errors import ArchitectureError, RaykError
from rayk.models.bridge import NAME, ByRegistry, LayerShape, NotCausal, Recorder, Way, attending
from rayk.models.fused import fuse, part_again
from rayk.models.latent import expand_again, keep_latents

log = logging.getLogger("rayk.models")

CHUNKED = "chunked_attention"
KNOWN_LAYERS = ("full_attention", "sliding_attention", "attention", CHUNKED)
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
        (not getattr(config, "is_causal", True), "its attention is not causal"),
        (getattr(config, "use_bidirectional_attention", None) in (True, "all"), "its attention looks ahead"),
        (getattr(config, "add_cross_attention", None), "it attends to an encoder"),
    ):
        if wrong:
            raise ArchitectureError(name, reason)
    if other:
        raise ArchitectureError(name, f"it has layers of type {', '.join(other)}; known are {', '.join(KNOWN_LAYERS)}")


def beyond_registry(config: Any, model_class: Any) -> str | None:
    """Why rayk's attention cannot stand in for the model's own, as far as class and config say; None if it may."""
    kinds = set(getattr(config, "layer_types", None) or ())
    for wrong, reason in (
        (not model_class._supports_attention_backend, "its attention is not routed through transformers' registry"),
        (getattr(config, "attention_chunk_size", None), "its attention is cut into chunks of tokens"),
        (getattr(config, "num_kv_shared_layers", None), "some of its layers use the keys and values of others"),
        (CHUNKED in kinds, "its attention is cut into chunks of tokens"),
    ):
        if wrong:
            return reason
    return None


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


@torch.inference_mode()
def way_of(model: Any, config: Any) -> tuple[Way, int]:
    """How the model runs on pages, and the width of its logits. ArchitectureError where no way gives what it gives
    without a cache.

    Its attention through transformers' registry is the first choice; else it attends by itself. config: the text
    model's. The model is left set for that way.
    """
    name, tokens = type(model).__name__, trial_tokens(model.get_input_embeddings().weight.shape[0], model.device)
    offset = position_offset(model)
    reason = beyond_registry(config, type(model))
    if reason is None:
        try:
            if keep_latents(model):
                try:
                    return _by_registry(model, tokens, config.num_hidden_layers, offset)
                except Exception:  # of whatever kind: then it is expanded
                    expand_again(model)
            return _by_registry(model, tokens, config.num_hidden_layers, offset)
        except ArchitectureError as error:
            reason = error.message if error.architecture == name else f"{error.architecture}: {error.message}"
            if isinstance(error, NotCausal):
                raise ArchitectureError(name, reason) from None
        except (RaykError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # foreign code over a foreign config
            reason = _raised(error)
    try:
        found = _by_itself(model, tokens, offset)
        log.warning("%s attends by itself, over keys and values that are gathered for it: %s", name, reason)
        return found
    except ArchitectureError as error:
        also = error.message
    except (RaykError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # as above
        also = _raised(error)
    raise ArchitectureError(name, f"{reason}; and attending by itself over pages, {also}")


def _by_registry(model: Any, tokens: torch.Tensor, layers: int, offset: int) -> tuple[Way, int]:
    model.set_attn_implementation(NAME)
    way = ByRegistry(model, layer_shapes(model, tokens, layers), offset)
    with _small_windows(model):
        want = _dense(model, tokens)
        model.set_attn_implementation(NAME)
        _compare(model, _chunked(model, way, tokens), want)
        if model.device.type == "cuda" and fuse(model):
            try:
                _compare(model, _chunked(model, way, tokens), want)
            except ArchitectureError:
                part_again(model)
    return way, int(want.shape[1])


def _by_itself(model: Any, tokens: torch.Tensor, offset: int) -> tuple[Way, int]:
    """Rows together if that is right, else one by one; with torch's attention if that is right, else with the plain
    one, which all models have and which is always given a mask."""
    from rayk.models.own_attention import OwnAttention, cached_shapes

    model.set_attn_implementation("eager")
    shapes = cached_shapes(model, tokens)
    with _small_windows(model):
        want = _dense(model, tokens), _dense(model, tokens[:, 2:7])
        kinds = ["sdpa", "eager"] if model._supports_sdpa else ["eager"]
        problem: Exception | None = None
        for alone, kind in product((False, True), kinds):
            way = OwnAttention(model, shapes, alone, offset)
            model.set_attn_implementation(kind)
            try:
                _compare(model, _two_rows(model, way, tokens), torch.cat([logits[-1:] for logits in want]))
                _compare(model, _chunked(model, way, tokens), want[0])
            except Exception as error:  # of foreign code, too, where it takes no rows of several lengths
                problem = error
            else:
                return way, int(want[0].shape[1])
    assert problem is not None
    raise problem


def position_offset(model: Any) -> int:
    """What its embedding of positions adds to them: RoBERTa and its kin count from behind the padding."""
    for module in model.modules():
        places = getattr(module, "position_embeddings", None)
        if isinstance(places, torch.nn.Embedding) and places.padding_idx is not None:
            return places.padding_idx + 1
    return 0


def layer_shapes(model: Any, tokens: torch.Tensor, layers: int) -> dict[int, LayerShape]:
    """What each layer asks of the cache, by the model's layer number in the order of the calls.

    ArchitectureError unless each of the `layers` layers calls the registry once.
    """
    name, recorder = type(model).__name__, Recorder()
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    with attending(recorder):
        model(input_ids=tokens, position_ids=positions, use_cache=False)
    shapes = dict(recorder.calls)
    if len({shape.latent for shape in shapes.values()}) > 1:
        raise ArchitectureError(name, "some of its layers keep a latent, others keys and values")
    if len(recorder.calls) != layers or len(shapes) != layers:
        raise ArchitectureError(
            name,
            f"its {layers} layers must each attend once through transformers' registry; {len(shapes)} do, "
            f"{len(recorder.calls)} times in all",
        )
    return shapes


def _dense(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits `[tokens, vocab]` without a cache."""
    model.set_attn_implementation("eager")
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits[0]
    return logits.float()


def _compare(model: Any, got: torch.Tensor, want: torch.Tensor) -> None:
    """ArchitectureError unless they are the same.

    This is about the architecture (biases by distance, positions of its own, windows that only a mask knows), not
    about rounding: in half precision, and where quantised layers round what they are given, a fifth of the logits'
    norm is allowed. Windows are made small for it.
    """
    apart = float((got - want).norm() / want.norm().clamp(min=1e-9))
    most = 1e-3 if _exact(model) else 0.2
    if not apart <= most and bool(want.isfinite().all()):
        name = type(model).__name__
        raise ArchitectureError(name, f"its logits differ from those without a cache by {apart:.1e} of their norm")


def _raised(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"a trial of {TRIAL_TOKENS} tokens raised {what}"


def _exact(model: Any) -> bool:
    """Whether all of it is computed in float32: no weights of another type, which would round what they are given."""
    return all(tensor.dtype == torch.float32 for tensor in model.parameters())


@contextmanager
def _small_windows(model: Any) -> Iterator[None]:
    """Windows and chunks of TRIAL_WINDOW tokens wherever the model has them, in its layers and configs."""
    owners: dict[int, Any] = {
        id(owner): owner for module in model.modules() for owner in (module, getattr(module, "config", None))
    }
    before = [
        (owner, name, window)
        for owner in owners.values()
        for name in ("sliding_window", "attention_chunk_size")
        if isinstance(window := getattr(owner, name, None), int) and window > TRIAL_WINDOW
    ]
    try:
        for owner, name, _ in before:
            setattr(owner, name, TRIAL_WINDOW)
        yield
    finally:
        for owner, name, window in before:
            setattr(owner, name, window)


class _Trial:
    """A pool of two pages a row for a few rows, and forwards over them."""

    def __init__(self, model: Any, way: Way, rows: int) -> None:
        shapes = list(way.shapes.values())
        heads, dim = max(shape.kv_heads for shape in shapes), max(shape.head_dim for shape in shapes)
        dims = (2 * rows + 1, len(shapes), 1 if shapes[0].latent else 2, TRIAL_PAGE, heads, dim)
        device = model.device
        self._pool = PagedPool(torch.zeros(dims, dtype=model.dtype, device=device).transpose(1, 2))
        self._way = way
        self._table = torch.arange(1, 2 * rows + 1, dtype=torch.int32, device=device).view(rows, 2)
        self._backend = None
        if isinstance(way, ByRegistry):
            self._backend = choose(needs(way.shapes, device, model.dtype, model.dtype, TRIAL_PAGE), "torch-sdpa")

    def step(self, rows: Sequence[int], before: Sequence[int], parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits of every token of the parts, which follow the `before` tokens of these rows."""
        device, counts = self._table.device, [len(part) for part in parts]
        longest = max(start + count for start, count in zip(before, counts, strict=True))
        cached = torch.tensor(before, dtype=torch.int32, device=device)
        batch = pack(self._table[list(rows)], cached, counts, TRIAL_PAGE, longest)
        return self._way.logits(self._pool, batch, self._backend, torch.cat(list(parts)), every_token=True).float()


def _chunked(model: Any, way: Way, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of every token of one row, in two chunks."""
    trial, row = _Trial(model, way, 1), tokens[0]
    first = trial.step([0], [0], [row[:FIRST_CHUNK]])
    return torch.cat([first, trial.step([0], [FIRST_CHUNK], [row[FIRST_CHUNK:]])])


def _two_rows(model: Any, way: Way, tokens: torch.Tensor) -> torch.Tensor:
    """Logits after the last of all tokens and of the third to the seventh, from one batch of a token of each."""
    trial, long, short = _Trial(model, way, 2), tokens[0], tokens[0, 2:7]
    trial.step([0, 1], [0, 0], [long[:-1], short[:-1]])
    return trial.step([0, 1], [len(long) - 1, len(short) - 1], [long[-1:], short[-1:]])


def needs(
    shapes: dict[int, LayerShape], device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype, page_size: int
) -> Needs:
    """What all layers together ask of a backend."""
    asked: Sequence[LayerShape] = list(shapes.values())
    return Needs(
        device,
        dtype,
        cache_dtype,
        max(shape.head_dim for shape in asked),
        page_size,
        any(shape.softcap for shape in asked),
        any(shape.sinks for shape in asked),
    )
