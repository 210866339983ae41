"""The flags of `rayk plan`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from rayk.cli.flags import FORMAT, Format, group

PLAN_EPILOG = "Example: rayk plan Llama-3.1-8B --gpu 8xh100 --max-length 128k --sweep kv-dtype=bfloat16,float8_e4m3fn"

of_model, machine, sized, output = group("Model"), group("Machine"), group("Settings"), group("Output")


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


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """The memory plan of a model on a machine, before anything starts: exit code 1 when it does not fit."""

    model: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL_DIR]",
            help="Folder of a checkpoint, or a config.json; the weights in it are not loaded.",
            show_default=False,
        ),
    ] = None
    config: Annotated[
        Path | None, of_model("The same by a flag: config.json of a Hugging Face model, or its folder.")
    ] = None
    params: Annotated[
        list[str] | None,
        of_model(
            "The model by hand: layers=32,kv-heads=8,head-dim=128,weights=15GiB,max-length=128k. Also "
            "query-heads, parameters=8.03B, dtype; latent-dim=576 instead of heads for MLA."
        ),
    ] = None
    weights_dtype: Annotated[
        str | None,
        of_model("Plan the weights in another dtype: float8_e4m3fn, int4, ..", autocompletion=_weight_dtypes),
    ] = None
    draft: Annotated[Path | None, of_model("A draft model beside it: folder or config.json.")] = None
    gpu: Annotated[
        str | None,
        machine(
            "h200, 8xh200, a100-80, mi300x, a name as nvidia-smi prints it, or a size such as 141GiB; this "
            "machine's otherwise.",
            autocompletion=_gpu_names,
        ),
    ] = None
    from_cluster: Annotated[bool, machine("The nodes of a running Ray cluster.", "--from-cluster")] = False
    address: Annotated[str | None, machine("With --from-cluster: which cluster.")] = None
    uniform: Annotated[bool, machine("The same pages on all replicas.", "--uniform")] = False
    utilization: Annotated[float, machine("Share of a GPU's memory to use, above 0 and at most 1.")] = 0.9
    largest_allocation: Annotated[str | None, machine("Limit of one buffer on the device, if it has one.")] = None
    tp: Annotated[int, sized("Tensor-parallel shards of a replica.")] = 1
    pp: Annotated[int, sized("Pipeline stages of a replica, each of tp GPUs.")] = 1
    dp: Annotated[int | None, sized("Data-parallel replicas; as many as 8xh200 has room for, or 1.")] = None
    attention_dp: Annotated[
        int, sized("Groups within tp with attention and a cache of their own, experts spread over all of tp.")
    ] = 1
    page_size: Annotated[int, sized("Tokens of a page.")] = 128
    kv_dtype: Annotated[
        str, sized("Dtype of the cache; auto is the checkpoint's own.", autocompletion=_cache_dtypes)
    ] = "auto"
    mla: Annotated[str, sized("latent, or expanded to keys and values of every head.")] = "latent"
    max_length: Annotated[str | None, sized("Tokens that a request must be able to have: 131072 or 128k.")] = None
    max_batch_size: Annotated[
        int | None, sized("Requests that run at once; with a length it caps the pages to what they can use.")
    ] = None
    max_batch_tokens: Annotated[str, sized("Tokens of the largest forward, for its activations.")] = "8192"
    activation_reserve: Annotated[
        str | None,
        sized(
            "Memory of each GPU kept for activations and context: 4GiB, bytes, 0.05; static leaves activations to "
            "what is kept free. Estimated otherwise."
        ),
    ] = None
    measure: Annotated[bool, sized("Measure the activations by a forward on this machine's GPU.", "--measure")] = False
    sweep: Annotated[list[str] | None, output('Compare variants: "tp=1,2,4 page-size=16,128".')] = None
    form: Annotated[Format, FORMAT] = Format.table
