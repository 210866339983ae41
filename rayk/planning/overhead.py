"""What a GPU holds beside weights and cache, estimated: context, libraries, activations and logits of a forward.

Bytes of one GPU. All but the last two parts are there while nothing runs:

    driver       0.45 GiB: an H200 of 140.4 GiB offers 139.8, an H100 of 79.65 79.2, a 3090 of 24.0 23.6
    context      0.35 GiB: CUDA context and kernels (vllm#10517 logs 0.35 GiB on one GPU)
    collectives  where GPUs work together: 1.8 GiB on GPUs with NVLink (vllm#10511: one more GPU adds 1.79), else 0.2
    activations  tokens x 2 bytes x (3 x hidden + 3 x widest / tp): residual, normed input and attention's output; gate,
                 up and their product (vllm#10517: 20,000 and 29,000 tokens of an 8B model take 2.07 and 2.99 GiB, this
                 gives 2.06 and 2.99); experts add tokens x experts a token x 2 bytes x (hidden + 3 x their width / tp)
    logits       requests x vocabulary x 38 bytes: in 16 bits and float32, sorted with indices, summed and masked by the
                 sampler (vllm#10511: 256 requests of 128,256 words take 1.26 GiB, this gives 1.16)

Activations of the layers are gone when the logits come, so the larger of the two counts. CUDA graphs are captured after
the cache is made and share the activations of a decode batch; what the utilization keeps free holds them.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayk.planning.model import Model
from rayk.planning.settings import STATIC, PlanSettings
from rayk.planning.weights import Kind, in_tower, layer_of

DRIVER = 460 << 20
CONTEXT = 350 << 20
NVLINK_MEMORY = 70 << 30  # GPUs of this size have it
NVLINK_COLLECTIVES = 1830 << 20
COLLECTIVES = 200 << 20
LOGIT_BYTES = 38
SAMPLED = 256  # requests that sample at once where no batch size is set


@dataclass(frozen=True)
class Overhead:
    """Bytes of one GPU, by what takes them; `reason` is for people."""

    static: int
    working: int
    reason: str

    @property
    def total(self) -> int:
        return self.static + self.working


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model that its activations depend on; widths are elements, 0 where unknown."""

    hidden: int
    widest: int
    vocabulary: int
    expert_width: int
    experts: int

    @classmethod
    def of(cls, model: Model) -> Sizes:
        """From the modules; of a model by hand from its number of layers and parameters, as if it were a dense one."""
        modules = model.weights.modules if model.weights is not None else ()
        embedding = next((m for m in modules if m.kind is Kind.embedding and not in_tower(m) and m.fan_in), None)
        if embedding is None:
            size = model.weights.total if model.weights is not None else (model.stored_bytes or 0) // 2
            hidden = max(1, round((size / max(1, model.num_layers) / 12) ** 0.5))  # 12 h^2 parameters a layer
            return cls(hidden, 4 * hidden, 128 << 10, 0, 0)
        inside = [m for m in modules if layer_of(m) is not None and m.fan_in]
        hidden = embedding.fan_in
        widest = max((m.fan_in for m in inside if m.kind is Kind.linear), default=hidden)
        expert = max((m.fan_in for m in inside if m.kind is Kind.expert and "down" in m.name), default=0)
        return cls(hidden, widest, embedding.size // hidden, expert, model.experts_per_token if expert else 0)


def estimate(model: Model, settings: PlanSettings, memory: int, measured: bool = False) -> Overhead:
    """The overhead of one GPU with that memory; free memory that was `measured` is without what the driver keeps.

    What the settings ask for is taken as it is.
    """
    asked = settings.activation_reserve
    if asked is not None and asked != STATIC:
        return Overhead(0, asked, "as asked for")
    together = settings.gpus > 1
    static = CONTEXT if measured else DRIVER + CONTEXT
    if together:
        static += NVLINK_COLLECTIVES if memory >= NVLINK_MEMORY else COLLECTIVES
    what = ("" if measured else "driver, ") + "CUDA context" + (", NCCL" if together else "")
    if asked == STATIC:
        return Overhead(static, 0, f"{what}; activations come from what is kept free")
    if settings.measured_activations is not None:
        forward = f"a forward of {settings.max_batch_tokens:,} tokens (measured)"
        return Overhead(static, settings.measured_activations, f"{what}; {forward}")
    sizes, tp = Sizes.of(model), settings.tp
    tokens = settings.max_batch_tokens
    layer = tokens * 2 * (3 * sizes.hidden + 3 * sizes.widest // tp)
    layer += tokens * sizes.experts * 2 * (sizes.hidden + 3 * sizes.expert_width // tp)
    requests = min(settings.max_batch_size or SAMPLED, tokens)
    logits = requests * sizes.vocabulary * LOGIT_BYTES
    label = f"{what}; a forward of {tokens:,} tokens" if layer >= logits else f"{what}; logits of {requests:,} requests"
    return Overhead(static, max(layer, logits), f"{label} (estimated)")
