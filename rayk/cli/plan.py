"""`rayk plan`: flags to a question, and its answer printed. What a plan is, is in plan.py, nodes.py and remedies.py."""

from __future__ import annotations

import json
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rayk.errors import ConfigError

if TYPE_CHECKING:
    from rayk.planning.model import Model
    from rayk.planning.node_plan import DeviceMemory, NodeMemory
    from rayk.planning.settings import PlanSettings

PLAN_EPILOG = "Example: rayk plan Llama-3.1-8B --gpu 8xh100 --max-length 128k --sweep kv-dtype=bfloat16,float8_e4m3fn"
_MODEL, _MACHINE, _SETTINGS, _OUTPUT = "Model", "Machine", "Settings", "Output"


class PlanFormat(StrEnum):
    """How the plan is printed."""

    table = "table"
    json = "json"


def _gpu_names(incomplete: str) -> list[str]:
    """For a shell that completes --gpu."""
    from rayk.planning.gpus import GPU_MIB

    return [name for name in GPU_MIB if name.startswith(incomplete.lower())]


def _weight_dtypes(incomplete: str) -> list[str]:
    from rayk.planning.weights import WEIGHT_BITS

    return [name for name in WEIGHT_BITS if name.startswith(incomplete)]


def _cache_dtypes(incomplete: str) -> list[str]:
    names = ("auto", "bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2")
    return [name for name in names if name.startswith(incomplete)]


def plan(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL_DIR]",
            help="Folder of a checkpoint, or a config.json; the weights in it are not loaded.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="The same by a flag: config.json of a Hugging Face model, or its folder.", rich_help_panel=_MODEL
        ),
    ] = None,
    params: Annotated[
        list[str] | None,
        typer.Option(
            help="The model by hand: layers=32,kv-heads=8,head-dim=128,weights=15GiB,max-length=128k. Also "
            "query-heads, parameters=8.03B, dtype; latent-dim=576 instead of heads for MLA.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    weights_dtype: Annotated[
        str | None,
        typer.Option(
            help="Plan the weights in another dtype: float8_e4m3fn, int4, ..",
            rich_help_panel=_MODEL,
            autocompletion=_weight_dtypes,
        ),
    ] = None,
    draft: Annotated[
        Path | None,
        typer.Option(help="A draft model beside it: folder or config.json.", rich_help_panel=_MODEL),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="h200, 8xh200, a100-80, mi300x, a name as nvidia-smi prints it, or a size such as 141GiB; this "
            "machine's otherwise.",
            rich_help_panel=_MACHINE,
            autocompletion=_gpu_names,
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
    pp: Annotated[
        int, typer.Option(help="Pipeline stages of a replica, each of tp GPUs.", rich_help_panel=_SETTINGS)
    ] = 1,
    dp: Annotated[
        int | None,
        typer.Option(help="Data-parallel replicas; as many as 8xh200 has room for, or 1.", rich_help_panel=_SETTINGS),
    ] = None,
    attention_dp: Annotated[
        int,
        typer.Option(
            help="Groups within tp with attention and a cache of their own, experts spread over all of tp.",
            rich_help_panel=_SETTINGS,
        ),
    ] = 1,
    page_size: Annotated[int, typer.Option(help="Tokens of a page.", rich_help_panel=_SETTINGS)] = 128,
    kv_dtype: Annotated[
        str,
        typer.Option(
            help="Dtype of the cache; auto is the checkpoint's own.",
            rich_help_panel=_SETTINGS,
            autocompletion=_cache_dtypes,
        ),
    ] = "auto",
    mla: Annotated[
        str,
        typer.Option(
            help="latent, or expanded to keys and values as rayk's own runner has it.", rich_help_panel=_SETTINGS
        ),
    ] = "latent",
    max_length: Annotated[
        str | None,
        typer.Option(help="Tokens that a request must be able to have: 131072 or 128k.", rich_help_panel=_SETTINGS),
    ] = None,
    max_batch_size: Annotated[
        int | None,
        typer.Option(
            help="Requests that run at once; with a length it caps the pages to what they can use.",
            rich_help_panel=_SETTINGS,
        ),
    ] = None,
    max_batch_tokens: Annotated[
        str, typer.Option(help="Tokens of the largest forward, for its activations.", rich_help_panel=_SETTINGS)
    ] = "8192",
    activation_reserve: Annotated[
        str | None,
        typer.Option(
            help="Memory of each GPU kept for activations and context: 4GiB, bytes, 0.05; static leaves activations to "
            "what is kept free. Estimated otherwise.",
            rich_help_panel=_SETTINGS,
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Measure the activations by a forward on this machine's GPU.", rich_help_panel=_SETTINGS
        ),
    ] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help='Compare variants: "tp=1,2,4 page-size=16,128".', rich_help_panel=_OUTPUT),
    ] = None,
    form: Annotated[
        PlanFormat, typer.Option("--format", help="json: one object on stdout.", rich_help_panel=_OUTPUT)
    ] = PlanFormat.table,
) -> int:
    """The memory plan of a model on a machine, before anything starts: exit code 1 when it does not fit."""
    from rich.console import Console

    from rayk.planning.manual_model import parse_tokens
    from rayk.planning.plan_request import PlanQuestion
    from rayk.planning.settings import PlanSettings
    from rayk.planning.sweep import parse_sweep
    from rayk.planning.sweep import sweep as plan_variants
    from rayk.planning.view import as_json, show

    folder, more = _positional(model or [], sweep is not None)
    variants = parse_sweep([*(sweep or []), *more]) if sweep else []
    device, count, nodes = _machine(gpu, from_cluster, address)
    free = min((g.free for node in nodes for g in node.gpus), default=0) if device is None else device.free
    settings = PlanSettings(
        tp=tp,
        pp=pp,
        dp=max(1, (count or 1) // max(1, tp * pp)) if dp is None else dp,
        attention_dp=attention_dp,
        page_size=page_size,
        kv_dtype=kv_dtype,
        weights_dtype=weights_dtype,
        mla=mla,
        utilization=utilization,
        max_length=None if max_length is None else parse_tokens(max_length, "--max-length"),
        max_batch_size=max_batch_size,
        max_batch_tokens=parse_tokens(max_batch_tokens, "--max-batch-tokens"),
        activation_reserve=_reserve(activation_reserve, free),
        largest_allocation=_size(largest_allocation, free),
    )
    path = _one(config, folder, params or [])
    planned = _model(path, params or [], draft, settings)
    if measure:
        settings = _measured(path, settings)
    question = PlanQuestion(planned, settings, device, nodes, uniform, count)
    answer = question.answer()
    compared = plan_variants(question, variants)
    if form is PlanFormat.json:
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
    from rayk.planning.gpus import parse_gpus

    if gpu is not None and from_cluster:
        raise ConfigError("--gpu and --from-cluster exclude each other")
    if address is not None and not from_cluster:
        raise ConfigError("--address is for --from-cluster")
    if gpu is not None:
        return *parse_gpus(gpu), ()
    return None, None, measured_nodes(from_cluster, address)


def measured_nodes(from_cluster: bool, address: str | None) -> tuple[NodeMemory, ...]:
    """This machine, or the nodes of a Ray cluster. ConfigError when this machine has no GPU to plan for."""
    from rayk.planning.node_plan import measure_node

    if from_cluster:
        from rayk.session import InferenceSession

        with InferenceSession("ray", address or "auto", log_to_driver=False, logging_level="error") as session:
            from rayk.actors.launch import measure_nodes

            nodes = tuple(measure_nodes(session.ray))
        if not any(node.gpus for node in nodes):
            raise ConfigError(f"none of the cluster's {len(nodes)} node(s) has a GPU; name one, such as --gpu h100")
        return nodes
    here = measure_node()
    if not here.gpus:
        raise ConfigError("this machine has no GPU; name one to plan for, such as --gpu h100 or --gpu 80GiB")
    return (here,)


def _model(path: Path | None, params: list[str], draft: Path | None, settings: PlanSettings) -> Model:
    from rayk.planning.manual_model import model_by_hand
    from rayk.planning.reading import read_model

    model = read_model(path) if path is not None else model_by_hand(params)
    if draft is not None:
        model = replace(model, draft=read_model(draft))
    model.check_tp(settings.attention_tp)
    return model


def _measured(path: Path | None, settings: PlanSettings) -> PlanSettings:
    """With the activations that a forward on this machine takes."""
    from rayk.planning.measure import Measurements, measure_activations

    if path is None:
        raise ConfigError("--measure needs the model's config.json: a model by hand cannot be run")
    found = Measurements(_cache_folder() / "activations.json")
    measured = measure_activations(path, settings, found)
    return replace(settings, measured_activations=measured)


def _cache_folder() -> Path:
    import os

    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rayk"


def _reserve(text: str | None, free: int) -> int | None:
    from rayk.planning.settings import STATIC

    if text is None or text.strip() == "auto":
        return None
    if text.strip() == "static":
        return STATIC
    return _size(text, free) or 0


def _size(text: str | None, free: int) -> int | None:
    from rayk.quantity import parse_size

    if text is None or text.strip() == "0":
        return None
    return parse_size(text, free)
