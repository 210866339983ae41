"""What a decode step and a prefill take on one device, against what its memory and its arithmetic allow.

    python -m tests.measure.decode_bound                                   # an 8B-shaped bfloat16 model on CUDA
    python -m tests.measure.decode_bound --device cpu --shape tiny         # the same, end to end, on a CPU

The model is random and made on the device. A decode step is one of rayk's engine: tables, forward, sampling, report.
Its bound is the time to read the weights and the batch's KV once (a shared prefix once for all rows) at the rate at
which the device was just measured to read; a prefill's is its floating-point operations at the rate of a large product.
For decode steps, contexts are pages of noise that nobody computed: a step takes as long.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from rayk.engine.engine import Engine
from rayk.engine.forward import Model
from rayk.engine.graphs import CudaRecorder, DecodeGraphs
from rayk.engine.settings import EngineSettings
from rayk.kvcache.replica import ReplicaCore
from rayk.models.fused import part_again
from rayk.protocol.engine_request import Request
from rayk.sampling import SamplingParams

GROUPS = {  # of kernels on a GPU and operations on a CPU, by parts of their names; the first that fits
    "attention": ("flash", "fmha", "attention", "attend"),
    "products": ("gemm", "nvjet", "cutlass", "::mm", "addmm", "::bmm", "matmul", "linear", "cublas"),
    "copies": ("memcpy", "memset", "copy", "::to", "index"),
    "sampling": ("argmax", "topk", "sort", "softmax", "multinomial", "aminmax", "isfinite"),
}
REST = "norm, rope, activation, ..."


@dataclass(frozen=True)
class Shape:
    """A dense Llama by its sizes. `element`: bytes of a weight and of an element of a page."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    element: int

    @property
    def linear(self) -> int:
        """Parameters of all layers' matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def weight_bytes(self) -> int:
        """What a step reads of the weights: matrices, norms and the head, and no row of the embedding but its own."""
        return self.element * (self.linear + self.vocab * self.hidden + (2 * self.layers + 1) * self.hidden)

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of a token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.element

    def decode_bytes(self, contexts: Sequence[int], shared: int = 0) -> int:
        """What a decode step has to read: the rows' contexts, whose first `shared` tokens are the same ones."""
        own = sum(context - shared for context in contexts)
        return self.weight_bytes + (own + shared) * self.token_bytes

    def prefill_flops(self, tokens: int, cached: int = 0) -> int:
        """Of a prompt's `tokens` after `cached` ones: 2 for each weight and token, 4 for each element of a head and
        pair of tokens, and the head for the last token alone."""
        pairs = tokens * cached + tokens * (tokens + 1) // 2
        attention = 4 * self.layers * self.heads * self.head_dim * pairs
        return 2 * self.linear * tokens + attention + 2 * self.vocab * self.hidden


SHAPES = {
    "8b": Shape(32, 4096, 14336, 32, 8, 128, 128_256, 2),
    "tiny": Shape(2, 64, 128, 4, 2, 16, 512, 4),
}


class Decode(NamedTuple):
    """A measured batch: seconds of a step, its bound, and the part of the device's time that each group took."""

    batch: int
    context: int
    shared: int
    step: float
    bound: float
    groups: dict[str, float]

    @property
    def ratio(self) -> float:
        return self.step / self.bound

    @property
    def rate(self) -> float:
        return self.batch / self.step


class Prefill(NamedTuple):
    """A prompt in chunks: tokens a second, and FLOP/s over the ceiling."""

    tokens: int
    chunk: int
    rate: float
    ratio: float


def group_of(name: str) -> str:
    """The group of a kernel or an operation."""
    lower = name.lower()
    return next((group for group, parts in GROUPS.items() if any(part in lower for part in parts)), REST)


class Switch:
    """A model that does nothing until it is `real`: contexts are there without being computed."""

    def __init__(self, model: Any) -> None:
        self.vocab_size, self.max_length = model.vocab_size, model.max_length
        self.eos_token_ids: tuple[int, ...] = ()
        self.tokenizer = None
        self.real: Any = None
        self._zeros = torch.zeros(1, model.vocab_size, device=model.device)

    def logits(self, inputs: Any, tokens: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        if self.real is None:
            return self._zeros.expand(len(counts), -1)
        found: torch.Tensor = self.real.logits(inputs, tokens, counts)
        return found


class Bench:
    """One model on one device, and what that device can do."""

    def __init__(
        self, shape: Shape, device: torch.device, longest: int, page_size: int = 128, separate: bool = False
    ) -> None:
        self.shape, self.device, self.page_size = shape, device, page_size
        self.model = random_model(shape, device, longest)
        if separate:
            part_again(self.model._model)
        self.read_rate = read_rate(device)
        self.flop_rate = flop_rate(device, self.model.dtype)

    def decode(self, batch: int, context: int, shared: int, steps: int) -> Decode | None:
        """A step of `batch` rows of `context` tokens; None where their pages do not fit."""
        size = self.page_size
        own = -(-(context + steps + 20) // size) - shared // size + 1
        engine = self._engine(batch * own + shared // size + 2, batch, 8192)
        if engine is None:
            return None
        switch = Switch(self.model)
        engine.model = switch
        random = np.random.default_rng(0)
        head = random.integers(0, self.shape.vocab, shared).tolist()
        for number in range(batch):
            prompt = head + random.integers(0, self.shape.vocab, context - shared).tolist()
            engine.submit(Request(number, str(number), prompt, SamplingParams(max_new_tokens=steps + 15)))
        while engine.stats().generated_tokens < batch * 2:
            engine.step()
        switch.real = self._captured(engine.core, batch)
        times = [self._timed(engine.step) for _ in range(steps)][3:]
        contexts = [context] * batch
        bound = self.shape.decode_bytes(contexts, shared) / self.read_rate
        return Decode(batch, context, shared, statistics.median(times), bound, self._groups(engine))

    def prefill(self, tokens: int, chunk: int) -> Prefill:
        """A prompt alone, in chunks."""
        times = list[float]()
        for _ in range(3):
            engine = self._engine(-(-tokens // self.page_size) + 2, 1, chunk)
            assert engine is not None, "one prompt has to fit"
            prompt = np.random.default_rng(0).integers(0, self.shape.vocab, tokens).tolist()
            engine.submit(Request(0, "0", prompt, SamplingParams(max_new_tokens=1)))
            times.append(self._timed(lambda e=engine: run(e)))  # type: ignore[misc]  # mypy does not infer defaults
        taken = min(times)
        return Prefill(tokens, chunk, tokens / taken, self.shape.prefill_flops(tokens) / taken / self.flop_rate)

    def _engine(self, pages: int, batch: int, chunk: int) -> Engine | None:
        params = self.model.cache_params(
            page_size=self.page_size, devices=[str(self.device)], enable_prefix_caching=True
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            if pages * params.bytes_per_page > 0.92 * torch.cuda.mem_get_info(self.device)[0]:
                return None
        core = ReplicaCore(params, 0, pages, batch, [str(self.device)])
        for buffer in core.buffers.all_buffers:
            buffer.normal_()
        return Engine(core, self.model, EngineSettings(chunk_size=chunk, watermark=0.0))

    def _captured(self, core: ReplicaCore, batch: int) -> Model:
        if self.device.type != "cuda":
            return self.model
        return DecodeGraphs(self.model, core, CudaRecorder(self.device), [batch])

    def _timed(self, work: Callable[[], object]) -> float:
        self._settle()
        began = perf_counter()
        work()
        self._settle()
        return perf_counter() - began

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _groups(self, engine: Engine, steps: int = 4) -> dict[str, float]:
        """The parts of a step's time by groups, and what is none of the device's."""
        on_gpu = self.device.type == "cuda"
        activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
        self._settle()
        with profile(activities=activities) as found:
            began = perf_counter()
            for _ in range(steps):
                engine.step()
            self._settle()
            whole = perf_counter() - began
        spent: dict[str, float] = defaultdict(float)
        for event in found.key_averages():
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            spent[group_of(event.key)] += microseconds / 1e6 / whole
        return {**spent, "idle and host": max(0.0, 1 - sum(spent.values()))}


def run(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def random_model(shape: Shape, device: torch.device, longest: int) -> Any:
    """A PagedModel with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from rayk.models import PagedModel, architecture
    from rayk.models.bridge import NAME, register

    register()
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=longest,
    )
    dtype = {2: torch.bfloat16, 4: torch.float32}[shape.element]
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME)
    model.eval().requires_grad_(False)
    way, vocab = architecture.way_of(model, config)
    return PagedModel(model, way, vocab, longest, (), None, None)


def _rate(work: Callable[[], object], amount: float, device: torch.device, repeats: int = 10) -> float:
    """`amount` a second at best."""
    times = list[float]()
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(perf_counter() - began)
    return amount / min(times[2:])


def read_rate(device: torch.device) -> float:
    """Bytes a second that a large sum reads."""
    size = (4 << 30) if device.type == "cuda" else (64 << 20)
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    return _rate(data.sum, size, device)


def flop_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product."""
    size = 8192 if device.type == "cuda" else 512
    one = torch.randn(size, size, dtype=dtype, device=device)
    return _rate(lambda: one @ one, 2 * size**3, device)


def report(bench: Bench, batches: Sequence[int], contexts: Sequence[int], steps: int = 20) -> Iterator[str]:
    """Lines of markdown, as they are measured."""
    shape, device = bench.shape, bench.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    weights = f"{shape.weight_bytes / 1e9:.2f} GB of weights"
    yield f"{name}, torch {torch.__version__}, attention {bench.model.backend}, {weights}"
    yield f"reads {bench.read_rate / 1e9:.0f} GB/s, products {bench.flop_rate / 1e12:.2f} TFLOP/s (both measured)"
    yield ""
    yield "| batch | context | shared | step ms | bound ms | step / bound | tokens/s | where a step goes |"
    yield "|---|---|---|---|---|---|---|---|"
    for context in contexts:
        for shared in (0, context * 7 // 8 // bench.page_size * bench.page_size):
            for batch in batches:
                found = bench.decode(batch, context, shared, steps)
                yield _row(found) if found is not None else f"| {batch} | {context} | {shared} | its pages do not fit |"
    yield ""
    yield "| prompt | chunk | tokens/s | FLOP/s over the ceiling |"
    yield "|---|---|---|---|"
    for tokens in contexts:
        for chunk in sorted({min(tokens, chunk) for chunk in (512, 2048, 8192)}):
            each = bench.prefill(tokens, chunk)
            yield f"| {each.tokens} | {each.chunk} | {each.rate:.0f} | {each.ratio:.2f} |"


def _row(found: Decode) -> str:
    groups = sorted(found.groups.items(), key=lambda each: -each[1])
    where = ", ".join(f"{name} {part:.0%}" for name, part in groups)
    first = f"| {found.batch} | {found.context} | {found.shared} | {found.step * 1e3:.2f} | {found.bound * 1e3:.2f}"
    return f"{first} | {found.ratio:.2f} | {found.rate:.0f} | {where} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--separate", action="store_true", help="do not fuse projections")
    given = parser.parse_args()
    longest = max(given.contexts) + 256
    bench = Bench(SHAPES[given.shape], torch.device(given.device), longest, separate=given.separate)
    for line in report(bench, given.batches, given.contexts):
        print(line, flush=True)


if __name__ == "__main__":
    main()
