"""`rayk plan`: flags to a question, and its answer printed. What a plan is, is in plan.py, nodes.py and remedies.py."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import typer
from rich.console import Console

from rayk.actors.launch import measure_nodes
from rayk.cli.flags import Format
from rayk.cli.plan_flags import PlanFlags
from rayk.errors import ConfigError
from rayk.planning.gpus import parse_gpus
from rayk.planning.manual_model import model_by_hand, parse_tokens
from rayk.planning.measure import Measurements, measure_activations
from rayk.planning.model import Model
from rayk.planning.node_plan import DeviceMemory, NodeMemory, measure_node
from rayk.planning.plan_request import PlanQuestion
from rayk.planning.reading import read_model
from rayk.planning.settings import STATIC, PlanSettings
from rayk.planning.sweep import parse_sweep
from rayk.planning.sweep import sweep as plan_variants
from rayk.planning.view import as_json, show
from rayk.quantity import parse_size
from rayk.session import InferenceSession

AS_GIVEN = (
    *("tp", "pp", "attention_dp", "page_size", "kv_dtype", "weights_dtype", "mla", "utilization", "max_batch_size"),
)
"""Flags that are settings of the plan."""


def plan(flags: PlanFlags) -> int:
    """Answer the question of the flags: 1 when the model does not fit."""
    folder, more = _positional(flags.model or [], flags.sweep is not None)
    variants = parse_sweep([*(flags.sweep or []), *more]) if flags.sweep else []
    device, count, nodes = _machine(flags.gpu, flags.from_cluster, flags.address)
    free = min((g.free for node in nodes for g in node.gpus), default=0) if device is None else device.free
    fitting = (count or 1) // max(1, flags.tp * flags.pp)
    settings = PlanSettings(
        dp=max(1, fitting) if flags.dp is None else flags.dp,
        max_length=None if flags.max_length is None else parse_tokens(flags.max_length, "--max-length"),
        max_batch_tokens=parse_tokens(flags.max_batch_tokens, "--max-batch-tokens"),
        activation_reserve=_reserve(flags.activation_reserve, free),
        largest_allocation=_size(flags.largest_allocation, free),
        **{name: getattr(flags, name) for name in AS_GIVEN},
    )
    params = flags.params or []
    path = _one(flags.config, folder, params)
    planned = _model(path, params, flags.draft, settings)
    if flags.measure:
        settings = _measured(path, settings)
    question = PlanQuestion(planned, settings, device, nodes, flags.uniform, count)
    answer = question.answer()
    compared = plan_variants(question, variants)
    if flags.form is Format.json:
        typer.echo(json.dumps(as_json(answer, compared)))
    else:
        show(answer, compared, Console())
    return 0 if answer.fits else 1


def _positional(words: list[str], swept: bool) -> tuple[Path | None, list[str]]:
    """The model's folder, and name=values that belong to --sweep."""
    more = [word for word in words if "=" in word and not Path(word).exists()]
    folders = [word for word in words if word not in more]
    wrong = folders[1:] or ([] if swept else more)
    if wrong:
        raise ConfigError(f"{wrong[0]!r} belongs to no flag; --sweep takes name=value,value pairs")
    return (Path(folders[0]) if folders else None), more


def _one(config: Path | None, folder: Path | None, params: list[str]) -> Path | None:
    """The path of the model, None for one by hand; ConfigError unless it is named in one way."""
    if (config is not None) + (folder is not None) + bool(params) != 1:
        raise ConfigError(
            "name the model: rayk plan MODEL_DIR, or --config config.json, or --params layers=.. ; one of them"
        )
    return config or folder


def _machine(
    gpu: str | None, from_cluster: bool, address: str | None
) -> tuple[DeviceMemory | None, int | None, tuple[NodeMemory, ...]]:
    """A GPU to imagine and how many of it there are, or nodes as measured."""
    if gpu is not None and from_cluster:
        raise ConfigError("--gpu and --from-cluster exclude each other")
    if address is not None and not from_cluster:
        raise ConfigError("--address is for --from-cluster")
    if gpu is not None:
        return *parse_gpus(gpu), ()
    return None, None, measured_nodes(from_cluster, address)


def measured_nodes(from_cluster: bool, address: str | None) -> tuple[NodeMemory, ...]:
    """This machine, or the nodes of a Ray cluster. ConfigError when this machine has no GPU to plan for."""
    if from_cluster:
        with InferenceSession("ray", address or "auto", log_to_driver=False, logging_level="error") as session:
            nodes = tuple(measure_nodes(session.ray))
        if not any(node.gpus for node in nodes):
            raise ConfigError(f"none of the cluster's {len(nodes)} node(s) has a GPU; name one, such as --gpu h100")
        return nodes
    here = measure_node()
    if not here.gpus:
        raise ConfigError("this machine has no GPU; name one to plan for, such as --gpu h100 or --gpu 80GiB")
    return (here,)


def _model(path: Path | None, params: list[str], draft: Path | None, settings: PlanSettings) -> Model:
    model = read_model(path) if path is not None else model_by_hand(params)
    if draft is not None:
        model = replace(model, draft=read_model(draft))
    model.check_tp(settings.attention_tp)
    return model


def _measured(path: Path | None, settings: PlanSettings) -> PlanSettings:
    """With the activations that a forward on this machine takes."""
    if path is None:
        raise ConfigError("--measure needs the model's config.json: a model by hand cannot be run")
    found = Measurements(_cache_folder() / "activations.json")
    measured = measure_activations(path, settings, found)
    return replace(settings, measured_activations=measured)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rayk"


def _reserve(text: str | None, free: int) -> int | None:
    if text is None or text.strip() == "auto":
        return None
    if text.strip() == "static":
        return STATIC
    return _size(text, free) or 0


def _size(text: str | None, free: int) -> int | None:
    if text is None or text.strip() == "0":
        return None
    return parse_size(text, free)
