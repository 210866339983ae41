"""`rayk plan`: flags to a question, and its answer printed. What a plan is, is in plan.py, nodes.py and remedies.py."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rayk.errors import ConfigError

if TYPE_CHECKING:
    from rayk.memory.model import Model
    from rayk.memory.settings import PlanSettings
    from rayk.planning import DeviceMemory, NodeMemory

PLAN_EPILOG = "Example: rayk plan --config Llama-3.1-8B/config.json --gpu h100 --sweep kv-dtype=bfloat16,float8_e4m3fn"
_MODEL, _MACHINE, _SETTINGS, _OUTPUT = "Model", "Machine", "Settings", "Output"


class PlanFormat(StrEnum):
    """How the plan is printed."""

    table = "table"
    json = "json"


def plan(
    config: Annotated[
        Path | None,
        typer.Option(
            help="config.json of a Hugging Face model, or its folder; the checkpoint beside it is not loaded.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    params: Annotated[
        list[str] | None,
        typer.Option(
            help="The model by hand: layers=32,kv-heads=8,head-dim=128,weights=15GiB,max-length=131072. Also "
            "query-heads, parameters=8.03B, dtype; latent-dim=576 instead of heads for MLA.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    weights_dtype: Annotated[
        str | None,
        typer.Option(help="Plan the weights in another dtype: float8_e4m3fn, int4, ..", rich_help_panel=_MODEL),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="h200, h100, a100-80, l40s, b200, mi300x, .. or a size such as 141GiB; this machine's otherwise.",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    from_cluster: Annotated[
        bool, typer.Option("--from-cluster", help="The nodes of a running Ray cluster.", rich_help_panel=_MACHINE)
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="With --from-cluster: which cluster.", rich_help_panel=_MACHINE)
    ] = None,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="The same pages on all replicas.", rich_help_panel=_MACHINE)
    ] = False,
    utilization: Annotated[
        float, typer.Option(help="Share of a GPU's memory to use, above 0 and at most 1.", rich_help_panel=_MACHINE)
    ] = 0.9,
    largest_allocation: Annotated[
        str | None, typer.Option(help="Limit of one buffer on the device, if it has one.", rich_help_panel=_MACHINE)
    ] = None,
    tp: Annotated[int, typer.Option(help="Tensor-parallel shards of a replica.", rich_help_panel=_SETTINGS)] = 1,
    dp: Annotated[int, typer.Option(help="Data-parallel replicas.", rich_help_panel=_SETTINGS)] = 1,
    page_size: Annotated[int, typer.Option(help="Tokens of a page.", rich_help_panel=_SETTINGS)] = 128,
    kv_dtype: Annotated[str, typer.Option(help="Dtype of the cache.", rich_help_panel=_SETTINGS)] = "bfloat16",
    max_length: Annotated[
        int | None, typer.Option(help="Tokens that a request must be able to have.", rich_help_panel=_SETTINGS)
    ] = None,
    max_batch_size: Annotated[
        int | None,
        typer.Option(
            help="Requests that run at once; with a length it caps the pages to what they can use.",
            rich_help_panel=_SETTINGS,
        ),
    ] = None,
    activation_reserve: Annotated[
        str | None,
        typer.Option(help="Memory of each GPU kept for activations: 4GiB, bytes, 0.05.", rich_help_panel=_SETTINGS),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help='Compare variants: "tp=1,2,4 page-size=16,128".', rich_help_panel=_OUTPUT),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    form: Annotated[
        PlanFormat, typer.Option("--format", help="json: one object on stdout.", rich_help_panel=_OUTPUT)
    ] = PlanFormat.table,
) -> int:
    """The memory plan of a model on a machine, before anything starts: exit code 1 when it does not fit."""
    from rich.console import Console

    from rayk.memory.question import PlanQuestion
    from rayk.memory.settings import PlanSettings
    from rayk.memory.sweep import parse_sweep
    from rayk.memory.sweep import sweep as plan_variants
    from rayk.memory.view import as_json, show

    if more and not sweep:
        raise ConfigError(f"{more[0]!r} belongs to no flag; --sweep takes name=value,value pairs")
    variants = parse_sweep([*sweep, *(more or [])]) if sweep else []
    device, nodes = _machine(gpu, from_cluster, address)
    free = min((g.free for node in nodes for g in node.gpus), default=0) if device is None else device.free
    settings = PlanSettings(
        tp=tp,
        dp=dp,
        page_size=page_size,
        kv_dtype=kv_dtype,
        weights_dtype=weights_dtype,
        utilization=utilization,
        max_length=max_length,
        max_batch_size=max_batch_size,
        activation_reserve=_size(activation_reserve, free) or 0,
        largest_allocation=_size(largest_allocation, free),
    )
    question = PlanQuestion(_model(config, params or [], settings), settings, device, nodes, uniform)
    answer = question.answer()
    compared = plan_variants(question, variants)
    if form is PlanFormat.json:
        typer.echo(json.dumps(as_json(answer, compared)))
    else:
        show(answer, compared, Console())
    return 0 if answer.fits else 1


def _machine(
    gpu: str | None, from_cluster: bool, address: str | None
) -> tuple[DeviceMemory | None, tuple[NodeMemory, ...]]:
    """A GPU to imagine, or nodes as measured."""
    from rayk.memory.gpus import parse_gpu

    if gpu is not None and from_cluster:
        raise ConfigError("--gpu and --from-cluster exclude each other")
    if address is not None and not from_cluster:
        raise ConfigError("--address is for --from-cluster")
    if gpu is not None:
        return parse_gpu(gpu), ()
    return None, measured_nodes(from_cluster, address)


def measured_nodes(from_cluster: bool, address: str | None) -> tuple[NodeMemory, ...]:
    """This machine, or the nodes of a Ray cluster. ConfigError when this machine has no GPU to plan for."""
    from rayk.planning import measure_node

    if from_cluster:
        from rayk.session import InferenceSession

        with InferenceSession("ray", address or "auto", log_to_driver=False, logging_level="error") as session:
            from rayk.scheduler.cluster import measure_nodes

            nodes = tuple(measure_nodes(session.ray))
        if not any(node.gpus for node in nodes):
            raise ConfigError(f"none of the cluster's {len(nodes)} node(s) has a GPU; name one, such as --gpu h100")
        return nodes
    here = measure_node()
    if not here.gpus:
        raise ConfigError("this machine has no GPU; name one to plan for, such as --gpu h100 or --gpu 80GiB")
    return (here,)


def _model(config: Path | None, params: list[str], settings: PlanSettings) -> Model:
    from rayk.memory.by_hand import model_by_hand
    from rayk.memory.checkpoint import read_model

    if (config is None) == (not params):
        raise ConfigError("name the model with --config config.json, or with --params layers=.. ; one of them")
    model = read_model(config) if config is not None else model_by_hand(params)
    model.check_tp(settings.tp)
    return model


def _size(text: str | None, free: int) -> int | None:
    from rayk.bench.quantity import parse_size

    if text is None or text.strip() == "0":
        return None
    return parse_size(text, free)
