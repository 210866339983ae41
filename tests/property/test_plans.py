"""500 random plans: within the memory, as large as possible, with overhead and layouts; and advice that holds."""

from hypothesis import given, settings
from hypothesis import strategies as st

from rayk.params import DTYPE_BYTES
from rayk.planning.gpus import GPU_MIB, parse_gpu
from rayk.planning.model import CachedLayers, Model, State
from rayk.planning.overhead import estimate
from rayk.planning.plan import ALLOCATION, BATCH, MEMORY, MemoryPlan
from rayk.planning.plan_request import PlanQuestion
from rayk.planning.settings import STATIC, PlanSettings
from rayk.planning.weights import Kind, Module, Weights

GIB = 1 << 30


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Of one kind of layers or two, latent or with heads, some with a state; the weights in layers and beside them."""
    latent = draw(st.booleans())
    layers, heads = draw(st.integers(1, 128)), 1 if latent else draw(st.sampled_from([1, 2, 4, 8, 16]))
    dim, words, width = (
        576 if latent else draw(st.sampled_from([64, 80, 128, 256])),
        1 << 15,
        draw(st.integers(8, 4096)),
    )
    chosen = draw(st.integers(0, (1 << layers) - 1))  # one draw for all layers, which would take longer than a plan
    attending = tuple(n for n in range(layers) if n % 4 == 0 or chosen >> n & 1)
    cached = [CachedLayers(attending, heads, dim, 0 if latent else dim, latent)]
    if draw(st.booleans()) and not latent:
        cached.append(CachedLayers((0,), 2 * heads, dim // 2, dim))
    modules = [
        Module("embed", Kind.embedding, words * width, width),
        Module("lm_head", Kind.head, words * width, width),
    ]
    modules += [Module(f"layers.{n}.self_attn.q_proj", Kind.linear, 4 * width * width, width) for n in range(layers)]
    modules += [Module(f"layers.{n}.mlp.down_proj", Kind.linear, 12 * width * width, 4 * width) for n in range(layers)]
    weights = Weights(tuple(modules))
    return Model(
        name="random",
        cached=tuple(cached),
        num_layers=layers,
        query_heads=4 * 16 * heads,
        max_length=draw(st.none() | st.integers(1, 1 << 20)),
        weights=weights,
        stored_bytes=2 * weights.total,
        state=draw(st.sampled_from([State(), State(1000, 1 << 18)])),
    )


@st.composite
def questions(draw: st.DrawFn) -> PlanQuestion:
    model = draw(models())
    tp = draw(st.sampled_from([n for n in (1, 2, 3, 4, 8, 16, 32) if model.splits_over(n)]))
    size = draw(st.sampled_from([f"{n}" for n in GPU_MIB]) | st.integers(1, 300).map(lambda n: f"{n}GiB"))
    return PlanQuestion(
        model,
        PlanSettings(
            tp=tp,
            dp=draw(st.integers(1, 3)),
            pp=draw(st.sampled_from([n for n in (1, 1, 2, 3) if n <= model.num_layers])),
            attention_dp=draw(st.sampled_from([n for n in (1, 1, 2, 8) if tp % n == 0])),
            page_size=draw(st.sampled_from([1, 7, 16, 64, 128, 1000, 1 << 20])),
            kv_dtype=draw(st.sampled_from([None, "bfloat16", "float32", "float8_e4m3fn"])),
            weights_dtype=draw(st.sampled_from([None, "float8_e4m3fn", "int4"])),
            utilization=draw(st.floats(0.05, 1.0)),
            max_length=draw(st.none() | st.integers(1, 1 << 20)),
            max_batch_size=draw(st.none() | st.integers(1, 4096)),
            max_batch_tokens=draw(st.sampled_from([1, 512, 8192, 1 << 17])),
            activation_reserve=draw(st.sampled_from([None, STATIC, 0, 1, GIB, 20 * GIB])),
            largest_allocation=draw(st.none() | st.integers(1 << 20, 200 * GIB)),
        ),
        parse_gpu(size),
        count=draw(st.sampled_from([None, None, 1, 8, 24])),
    )


@settings(max_examples=500)
@given(questions())
def test_a_plan_is_within_the_memory_and_as_large_as_it_can_be(question: PlanQuestion) -> None:
    answer = question.answer()
    plan, s = answer.plan.typical, question.settings
    assert answer.fits == (not answer.plan.problems) and (len(answer.plan.replicas) == s.dp) == answer.fits
    if answer.fits:
        _check_size(plan, question)
        assert not answer.suggestions
    for remedy in answer.suggestions:
        changed = question.changed(remedy.changes)
        tried = changed.answer()
        assert tried.fits, remedy.flags
        assert tried.plan.typical.pages == remedy.pages
        assert sum(len(r.gpus) for r in tried.plan.replicas) == remedy.gpus == changed.settings.devices
        _check_size(tried.plan.typical, changed)


def _check_size(plan: MemoryPlan, question: PlanQuestion) -> None:
    """Against sums made anew: weights and cache of all GPUs together, and of each what the question allows."""
    s, gpu, model = question.settings, question.gpu, question.model
    assert gpu is not None and len(plan.devices) == s.gpus and plan.pages >= 1
    own = plan.pages // s.attention_dp
    element = DTYPE_BYTES[plan.cache_dtype]
    copies = [max(1, s.attention_tp // c.heads) if not c.latent else s.attention_tp for c in model.cached]
    token = sum(
        element * len(c.layers) * c.heads * (c.key_dim + c.value_dim) * n
        for c, n in zip(model.cached, copies, strict=True)
    )
    assert plan.page_bytes == token * s.page_size
    assert sum(d.kv_cache for d in plan.devices) == (own + 1) * s.attention_dp * plan.page_bytes  # and null pages
    weights = model.loaded_bytes(s.weights_dtype)
    held = sum(d.weights for d in plan.devices)
    assert weights <= held <= s.attention_dp * weights + 2 * s.gpus and (
        s.attention_dp > 1 or held <= weights + 2 * s.gpus
    )
    full = 0
    for device in plan.devices:
        assert device.used <= gpu.free * s.utilization and device.free >= 0 and device.memory == gpu.free
        assert device.activations == estimate(model, s, gpu.total).total
        assert device.activations > 0 or s.activation_reserve == 0
        page = device.kv_cache // (own + 1)
        full += page > 0 and device.used + page > int(gpu.free * s.utilization)
        if s.largest_allocation is not None:
            assert device.kv_cache <= s.largest_allocation
    if plan.bound == MEMORY:
        assert full >= 1
    if plan.bound == ALLOCATION:
        assert s.largest_allocation is not None
        assert any(d.kv_cache // (own + 1) * (own + 2) > s.largest_allocation for d in plan.devices)
    length = s.max_length or model.max_length
    if plan.bound == BATCH:
        assert s.max_batch_size is not None and length is not None
        assert plan.requests_of(length) >= s.max_batch_size
    assert s.max_length is None or plan.max_sequence_length == s.max_length <= plan.tokens
    assert s.max_batch_size is None or plan.max_batch_size == s.max_batch_size <= plan.pages
