"""From a checkpoint folder to a model on pages. Nothing is downloaded, and no code of the checkpoint is run."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rayk.errors import ArchitectureError, CheckpointError, ConfigError, PlanError
from rayk.models import architecture, towers
from rayk.models.bridge import NAME, register
from rayk.models.checkpoint import CONFIG, TOKENIZERS, check_folder, has_tokenizer, other_copies, stored_tensors
from rayk.models.fields import refuse_unread
from rayk.models.model import PagedModel
from rayk.models.quantization import quant_method
from rayk.models.tensor_parallel import Rank, check_split, distribution, settle
from rayk.models.tensors import check_taken

log = logging.getLogger("rayk.models")

DTYPES = ("auto", "float32", "bfloat16", "float16")
POSITIONS = ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions", "max_target_positions")


def load_model(
    folder: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    attention: str | None = None,
    rank: Rank | None = None,
) -> PagedModel:
    """The causal language model in `folder`, with its tokenizer if there is one.

    dtype: of weights and arithmetic, "auto" is what the checkpoint has. attention: a backend by name
    (rayk.attention.BACKENDS), else the fastest that can. rank: of this process, which has joined the group of all
    ranks; it gets its part of the model, and from here on all ranks make the same calls. CheckpointError names the
    folder and file that is missing or damaged, ArchitectureError the model that cannot run on pages, AttentionError why
    the backend cannot be used.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    where = _device(device)
    folder = Path(folder)
    raw = check_folder(folder)
    config, model_class = config_of(folder, raw)
    text = config.get_text_config(decoder=True)
    architecture.refuse_by_config(text, model_class)
    if rank is not None:
        check_split(text, model_class.__name__, rank.ranks, quant_method(raw))
    refuse_unread(folder, CONFIG, raw, text, model_class)
    register()
    if others := other_copies(folder):
        log.warning("%s: not read: %s; the safetensors are served", folder, ", ".join(others))
    if dtype == "auto" and config.dtype is not None:
        _check_dtype(folder, config.dtype)
    more = {} if rank is None else {"distributed_config": distribution(model_class, config, rank)}
    model = _weights(folder, model_class, config, dtype, quant_method(raw), **more)
    if rank is not None:
        settle(model, text, rank)
    _check_dtype(folder, model.dtype)
    if text is not config:
        towers.drop(model)
    model = _placed(model, where).eval().requires_grad_(False)
    architecture.refuse_unread_rope(model, text)
    limit = architecture.freeze_rope(model)
    way, vocab_size = architecture.way_of(model, text)
    length = _max_length(folder, text, limit, model_class.__name__) - architecture.position_offset(model)
    return PagedModel(model, way, vocab_size, length, _eos(model), _tokenizer(folder), attention)


def check_folder_split(folder: Path, ranks: int) -> None:
    """ConfigError or ArchitectureError for a checkpoint that cannot be split over so many ranks."""
    raw = check_folder(folder)
    config, model_class = config_of(folder, raw)
    check_split(config.get_text_config(decoder=True), model_class.__name__, ranks, quant_method(raw))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: this process sees {torch.cuda.device_count()} CUDA device(s)")
    return device


def config_of(folder: Path, raw: dict[str, Any]) -> tuple[Any, Any]:
    """transformers' config and model class for what config.json says."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    named = raw.get("architectures") or [raw.get("model_type") or "a model without model_type"]
    name = str(named[0] if isinstance(named, list) else named)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each config class checks its fields in its own way
        if raw.get("model_type") not in _model_types():
            raise ArchitectureError(name, f"model_type {raw.get('model_type')!r} is unknown to transformers") from None
        raise CheckpointError(str(folder), CONFIG, f"is refused by transformers: {_line(error)}") from None
    causal: Any = AutoModelForCausalLM._model_mapping
    whole: Any = AutoModelForImageTextToText._model_mapping
    # A causal class may be of the text part alone, and then finds no tensors under the names of the whole model.
    if type(config) in causal and causal[type(config)].config_class is type(config):
        return config, causal[type(config)]
    if type(config) in whole:
        return config, whole[type(config)]
    raise ArchitectureError(name, f"model_type {config.model_type!r} is no causal language model in transformers")


def _model_types() -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING


def _weights(folder: Path, model_class: Any, config: Any, dtype: str, quantised: str | None = None, **more: Any) -> Any:
    """The model with all its weights, and all weights of the files in it. transformers would fill in missing ones at
    random, and drop those that it has no place for."""
    text = config.get_text_config(decoder=True)
    attention = NAME if architecture.beyond_registry(text, model_class) is None else "eager"
    said: list[str] = []
    try:
        with _progress_on_terminals(), _listening(said):
            model, report = model_class.from_pretrained(
                folder,
                config=config,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                attn_implementation=attention,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are in the report, which is clearer
                output_loading_info=True,
                **more,
            )
    except Exception as error:  # foreign code over foreign files
        what = f"quant_method {quantised!r} cannot be loaded here" if quantised else "cannot be loaded"
        if broken := [line.split("|")[0].strip() for line in said if "| CONVERSION" in line]:
            why = f"what {', '.join(broken[:3])} is made of is not whole, such as the scales of quantised weights"
        else:
            why = _line(error)
        raise CheckpointError(str(folder), "", f"{what}: {why}") from error
    check_taken(folder, stored_tensors(folder), model, report, text, quantised is not None)
    return model


def _placed(model: Any, device: torch.device) -> Any:
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        raise PlanError(f"{type(model).__name__} does not fit on {device}: {_line(error)}") from error


def _check_dtype(folder: Path, dtype: Any) -> None:
    """CheckpointError for a model that would compute in a dtype that nobody chose."""
    if str(dtype).removeprefix("torch.") not in DTYPES:
        reason = f"asks for {dtype}; a model computes in {', '.join(DTYPES[1:])}: pass one of them as dtype"
        raise CheckpointError(str(folder), CONFIG, reason)


@contextmanager
def _progress_on_terminals() -> Iterator[None]:
    """transformers' progress bars are for people: none in the log of a replica or a job."""
    from transformers.utils import logging as bars

    quiet = bars.is_progress_bar_enabled() and not sys.stderr.isatty()
    if quiet:
        bars.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    try:
        yield
    finally:
        if quiet:
            bars.enable_progress_bar()  # type: ignore[no-untyped-call]  # as above


@contextmanager
def _listening(said: list[str]) -> Iterator[None]:
    """transformers says what went wrong with which tensor to its log alone; its lines, without colours."""
    heard = logging.Handler(logging.WARNING)
    heard.emit = lambda record: said.extend(re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage()).splitlines())  # type: ignore[method-assign]  # a handler is no more than this
    log = logging.getLogger("transformers.modeling_utils")
    level, propagate = log.level, log.propagate
    if not log.isEnabledFor(logging.WARNING):  # whoever wants to see none of it still sees none
        log.setLevel(logging.WARNING)
        log.propagate = False
    log.addHandler(heard)
    try:
        yield
    finally:
        log.removeHandler(heard)
        log.setLevel(level)
        log.propagate = propagate


def _max_length(folder: Path, text: Any, limit: int | None, name: str) -> int:
    positions = next((found for name in POSITIONS if (found := getattr(text, name, None)) is not None), None)
    if not isinstance(positions, int) or positions < 1:
        reason = f"max_position_embeddings must be a number, got {positions!r}"
        raise CheckpointError(str(folder), CONFIG, f"{reason}; add the length that it was trained with")
    if limit is not None and limit < positions:
        log.warning(
            "%s is served up to %d of its %d positions: beyond, its rotary frequencies depend on the longest row of a "
            "batch",
            name,
            limit,
            positions,
        )
        return limit
    return positions


def _eos(model: Any) -> tuple[int, ...]:
    """Of the generation config, else of the config."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config(decoder=True)):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
    return ()


def _tokenizer(folder: Path) -> Any:
    """None without files of a tokenizer; CheckpointError when they are there and cannot be loaded."""
    if not has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception for a damaged file
        name = next(name for name in TOKENIZERS if (folder / name).is_file())
        raise CheckpointError(str(folder), name, f"no tokenizer can be made of it: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """The first two lines of a message: what, and often why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, KeyError):
        return f"transformers looks for {error} in vain"
    return " ".join(lines[:2]) or type(error).__name__
