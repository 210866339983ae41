"""FlexAttention over pages: uncompiled by its mask function, and compiled for the CPU by its lists of blocks."""

import shutil
import warnings

import pytest
import torch

from rayk.attention.flex import TorchFlex

from ..unit.attention.cases import BATCHES, RULES, make_case, rules_of  # noqa: TID252  # tests are no package

pytestmark = [
    pytest.mark.slow,
    # Said once when FlexAttention runs uncompiled, which only tests do.
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    # torch's compiler imports a deprecated module of torch's own; on Python 3.13 and below only the category differs.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def compiled() -> TorchFlex:
    """The backend as it runs on CUDA, with the kernel that torch writes for the CPU."""
    if shutil.which("g++") is None or "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("no C++ compiler, or a processor without AVX: FlexAttention cannot be compiled for the CPU")
    return TorchFlex()


@pytest.mark.parametrize("rules", ["plain", "window", "window of one", "softcap", "sinks", "window, softcap and sinks"])
@pytest.mark.parametrize("batch", BATCHES)
def test_the_mask_function(batch: str, rules: str) -> None:
    case = make_case(**BATCHES[batch])
    case.stored.nan_to_num_(0.0)  # uncompiled, it multiplies every slot of the pool by a weight, most by zero
    chosen = rules_of(**RULES[rules])
    got = TorchFlex(compiled=False).attend(case.query, *case.views, case.batch, chosen)
    torch.testing.assert_close(got.double(), case.expected(chosen), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("batch", "rules"),  # each is compiled, which takes seconds; the CPU's kernel gives no sums for sinks
    [("decode", "plain"), ("decode", "softcap"), ("chunks", "window"), ("shared prefix", "plain")],
)
def test_the_blocks(compiled: TorchFlex, batch: str, rules: str) -> None:
    """What stands in foreign slots is large: a block that is read without need shows."""
    case = make_case(**BATCHES[batch])
    case.stored.nan_to_num_(1e4)
    chosen = rules_of(**RULES[rules])
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch's compiler warns about this and that, differently in each release
        got = compiled.attend(case.query, *case.views, case.batch, chosen)
    torch.testing.assert_close(got.double(), case.expected(chosen), rtol=2e-6, atol=2e-6)


def test_pools_of_too_many_elements_are_left_to_sdpa() -> None:
    case = make_case(**BATCHES["mixed"])
    got = TorchFlex(most_elements=case.stored.numel() - 1).attend(case.query, *case.views, case.batch, rules_of())
    torch.testing.assert_close(got.double(), case.expected(rules_of()), rtol=2e-6, atol=2e-6)
