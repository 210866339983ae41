"""The verify model fills and checks slots bit by bit, and notices every kind of wrong content."""

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rayk.bench.verify import Verified, forward, verify_forward

PAGE = 8
DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"]


class Rig:
    """Two requests on one replica: 'a' on pages 0..4, 'b' on pages 5..9; 'n' is the null page 20."""

    def __init__(self, dtype: str = "float32", shards: int = 2, head_dim: int = 4, page_major: bool = True) -> None:
        shape = (21, 3, 2, PAGE, 2, head_dim) if page_major else (21, 2, 3, PAGE, 2, head_dim)
        kind = getattr(torch, dtype)
        blocks = [torch.zeros(shape, dtype=kind) for _ in range(shards)]
        self.blocks = [b.transpose(1, 2) if page_major else b for b in blocks]
        self.table = np.full((2, 16), 20, np.int32)
        self.table[0, :5], self.table[1, :5] = range(5), range(5, 10)
        self.tokens = [np.arange(40, dtype=np.int32), np.arange(1000, 1040, dtype=np.int32)]

    def run(self, windows: list[tuple[int, int]], whole: tuple[str, ...] = ()) -> Verified:
        shards = [SimpleNamespace(kv_blocks=b, kv_scales=None, lookup_table=self.table) for b in self.blocks]
        batch: list[Any] = [
            SimpleNamespace(
                request_id="ab"[row],
                tokens=SimpleNamespace(all=self.tokens[row], processed_length=start, active_length=end - start),
            )
            for row, (start, end) in enumerate(windows)
        ]
        return verify_forward(SimpleNamespace(shards=shards), batch, whole=whole)

    def raw(self, shard: int) -> torch.Tensor:
        """The shard's bytes as they lie in memory, [pages, ..]."""
        lying = self.blocks[shard]
        lying = lying if lying.is_contiguous() else lying.transpose(1, 2)
        return lying.view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_major", [True, False])
@pytest.mark.parametrize("head_dim", [1, 3, 4])
def test_written_in_pieces_checked_as_a_whole(dtype: str, page_major: bool, head_dim: int) -> None:
    rig = Rig(dtype, head_dim=head_dim, page_major=page_major)
    assert rig.run([(0, 3), (0, 21)]) == Verified(3 + 5)  # the page that holds the end of the window
    assert rig.run([(3, 30), (21, 22)]) == Verified(6 + 6)
    assert rig.run([(30, 31), (22, 24)], whole=("a", "b")) == Verified(31 + 24)
    assert rig.run([(31, 40)], whole=("a",)) == Verified(40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slot", [0, 5, 8, 23])
def test_one_changed_byte_is_found(dtype: str, slot: int) -> None:
    rig = Rig(dtype)
    rig.run([(0, 24), (0, 24)])
    rig.raw(1)[slot // PAGE, 2, 1, slot % PAGE, 1, -1] ^= 1  # layer 2, kv 1
    found = rig.run([(24, 25), (24, 25)], whole=("a", "b"))
    assert found.mismatches == 1 and found.slots_checked == 50
    assert found.first == (
        f"request 'a', slot {slot}: kv shard 1, layer 2, kv 1, page {slot // PAGE} holds other bytes"
    )


def test_other_content_is_found() -> None:
    def mismatches(damage: Any) -> int:
        rig = Rig()
        rig.run([(0, 24), (0, 24)])
        damage(rig)
        return rig.run([(24, 25), (24, 25)], whole=("a", "b")).mismatches

    def change_token(rig: Rig) -> None:
        rig.tokens[0] = rig.tokens[0].copy()
        rig.tokens[0][2] = 99  # everything from slot 2 on follows from another prefix

    def swap_layers(rig: Rig) -> None:
        rig.raw(0)[3, [0, 1]] = rig.raw(0)[3, [1, 0]].clone()  # page 3 is beyond what was written
        rig.raw(0)[1, [0, 1]] = rig.raw(0)[1, [1, 0]].clone()

    def swap_shards(rig: Rig) -> None:
        rig.raw(0)[5], rig.raw(1)[5] = rig.raw(1)[5].clone(), rig.raw(0)[5].clone()

    def steal_page(rig: Rig) -> None:
        rig.table[0, 1] = 6

    def lose_page(rig: Rig) -> None:
        rig.table[0, 1] = 20

    def shift(rig: Rig) -> None:
        rig.raw(0)[0] = rig.raw(0)[0].roll(1, dims=2)

    assert mismatches(lambda rig: None) == 0
    assert mismatches(change_token) == 22
    assert [mismatches(d) for d in (swap_layers, swap_shards, steal_page, lose_page, shift)] == [8] * 5


def test_two_rows_on_one_page_are_found_at_once() -> None:
    rig = Rig()
    rig.table[1, 0] = 0
    assert rig.run([(0, 4), (0, 4)]).mismatches == 4


def test_the_null_page_is_never_right() -> None:
    rig = Rig()
    rig.table[:] = 20
    found = rig.run([(0, 4)])
    assert found.mismatches == 1 and found.first is not None and "null page" in found.first


def test_scales_and_several_caches_are_covered() -> None:
    rig = Rig("int8", shards=1)
    scales = torch.zeros((21, 2, 3, PAGE, 2, 1))
    shard = SimpleNamespace(kv_blocks=rig.blocks[0], kv_scales=scales, lookup_table=torch.from_numpy(rig.table))
    batch: Any = [
        SimpleNamespace(request_id="a", tokens=SimpleNamespace(all=rig.tokens[0], processed_length=0, active_length=10))
    ]
    leaves = {"target": SimpleNamespace(shards=[shard])}
    assert verify_forward(leaves, batch, whole=("a",)) == Verified(10)
    batch[0].tokens.processed_length, batch[0].tokens.active_length = 10, 1
    scales[0, 1, 2, 3] += 1
    found = verify_forward(leaves, batch, whole=("a",))
    assert found.first == "request 'a', slot 3: target scales of shard 0, layer 2, kv 1, page 0 holds other bytes"


def test_an_empty_batch_and_a_pickled_forward() -> None:
    assert verify_forward(None, []) == Verified()
    assert forward(()) is verify_forward
    assert len(pickle.dumps(forward(["a", "b"]))) < 200
