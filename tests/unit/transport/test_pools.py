"""Lines that read the source's pool: mapped once, believed only while the pages are pinned."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import msgspec
import numpy as np
import pytest
import torch

from rayk.errors import LineError, PagesGoneError
from rayk.kvcache.shared_memory import host_identity, map_shared, shared_zeros
from rayk.transport.choice import Peer
from rayk.transport.direct import DirectLine
from rayk.transport.line import PageExportRef
from rayk.transport.pools import SEALS, HostMemory, PoolLine

from .ends import FOREVER, SOURCE, TARGET, blank, buffers, content, exported, ids


class Counting(HostMemory):
    """How often a pool was mapped."""

    maps = 0

    def map(self, offer: bytes):
        self.maps += 1
        return super().map(offer)


def line_of(made, clock=lambda: 0.0) -> PoolLine:
    return PoolLine(Counting(made.all_bytes, made.files), clock)


@pytest.fixture
def ends():
    source, target = buffers(shared=True), blank(shared=True)
    return source, target, line_of(source), line_of(target)


def test_pages_arrive_where_they_are_wanted(ends) -> None:
    _, target, out, into = ends
    sent = exported(out, [4, 5, 2, 7])
    into.fetch(sent, 0, ids([1, 2, 0]))
    assert content(target) == [3, 5, 6, 0, 0, 0, 0, 0, 0]
    into.fetch(sent, 3, ids([6]))
    assert content(target)[6] == 8


def test_a_pool_is_mapped_once_for_each_start_of_its_source(ends) -> None:
    _, _, out, into = ends
    sent = exported(out, [1])
    for _ in range(3):
        into.fetch(sent, 0, ids([0]))
    assert into._memory.maps == 1
    into.fetch(sent._replace(source=Peer(0, 999)), 0, ids([0]))
    assert into._memory.maps == 2
    into.drop(0)
    into.fetch(sent, 0, ids([0]))
    assert into._memory.maps == 3
    out.end(1)
    out.end(77)


def test_what_its_source_took_back_is_not_believed(ends) -> None:
    """Before a copy, or while it goes on; the line is good for the next one, also when numbers come round."""
    _, target, out, into = ends
    first, second = exported(out, [1], 1), exported(out, [2], 2)
    out.end(1)
    with pytest.raises(PagesGoneError, match="needed the pages"):
        into.fetch(first, 0, ids([0]))
    assert content(target)[0] == 0, "it was not even copied"
    into.fetch(second, 0, ids([1]))
    copy = into._memory.copy

    def slow(*given) -> None:
        copy(*given)
        out.end(2)

    into._memory.copy = slow
    with pytest.raises(PagesGoneError):
        into.fetch(second, 0, ids([2]))
    into._memory.copy = copy
    old, young = exported(out, [3], 5), exported(out, [4], 5 + SEALS)
    with pytest.raises(PagesGoneError):
        into.fetch(old, 0, ids([3]))
    out.end(5)
    into.fetch(young, 0, ids([4]))
    assert into._memory.maps == 1


def test_the_same_within_a_process() -> None:
    source, target = buffers(), blank()
    pools = {SOURCE: source, TARGET: target}
    out, into = DirectLine(source, pools), DirectLine(target, pools)
    first, second = exported(out, [1], 1), exported(out, [2], 2)
    into.fetch(first, 0, ids([0]))
    out.end(1)
    with pytest.raises(PagesGoneError):
        into.fetch(first, 0, ids([0]))
    into.fetch(second, 0, ids([1]))
    out.close()
    with pytest.raises(PagesGoneError):
        into.fetch(second, 0, ids([1]))


def test_what_was_read_after_the_pages_were_unpinned_is_not_believed() -> None:
    source, target, now = buffers(shared=True), blank(shared=True), [0.0]
    out, into = line_of(source), line_of(target, lambda: now[0])
    sent = exported(out, [1, 2], expires=10.0)
    into.fetch(sent, 0, ids([0, 1]))
    now[0] = 10.0
    with pytest.raises(LineError, match="pinned for a shorter time"):
        into.fetch(sent, 0, ids([0, 1]))


def test_other_layouts_pools_and_pages_are_refused(ends) -> None:
    _, target, out, into = ends
    sent = exported(out, [1])
    other = line_of(blank(shared=True, heads=2))
    with pytest.raises(LineError, match="buffers of"):
        other.fetch(sent, 0, ids([0]))
    for wrong in ([9], [-1], [1 << 30]):
        with pytest.raises(LineError, match="of a pool of 9"):
            into.fetch(sent._replace(pages=ids(wrong)), 0, ids([0]))
    for offer in (b"", b"nonsense", msgspec.msgpack.encode([1, 2])):
        into.drop(0)
        with pytest.raises(LineError):
            into.fetch(sent._replace(offer=offer), 0, ids([0]))
    assert content(target) == [0] * 9


def test_memory_is_mapped_read_only_and_goes_with_its_tensor() -> None:
    tensor, file = shared_zeros((2, 3), torch.float32)
    assert os.fstat(file.descriptor).st_mode & 0o777 == 0o600
    tensor.fill_(1.5)
    seen = map_shared(file)
    assert seen.view(np.float32).tolist() == [1.5] * 6
    tensor[0, 0] = 2.0
    assert seen.view(np.float32)[0] == 2.0
    with pytest.raises(ValueError, match="read-only"):
        seen[0] = 1
    del tensor
    gc.collect()
    assert seen.view(np.float32)[0] == 2.0  # what is mapped stays
    with pytest.raises(OSError, match=r"has ended|No such file"):
        map_shared(file)


def test_a_descriptor_that_became_another_file_is_noticed() -> None:
    tensor, file = shared_zeros((4,), torch.uint8)
    other, another = shared_zeros((4,), torch.uint8)
    with pytest.raises(OSError, match="has ended"):
        map_shared(msgspec.structs.replace(file, descriptor=another.descriptor))
    with pytest.raises(OSError, match="has ended"):
        map_shared(msgspec.structs.replace(file, num_bytes=5))
    del tensor, other


OWNER = """
from tests.unit.transport.ends import buffers, exported
from rayk.kvcache.shared_memory import host_identity
from rayk.transport.pools import HostMemory, PoolLine
source = buffers(shared=True)
line = PoolLine(HostMemory(source.all_bytes, source.files))
sent = exported(line, [4, 5])
print(sent.offer.hex(), host_identity(), flush=True)
input()
"""


def test_pages_of_another_process_that_is_killed(repo) -> None:
    """What is mapped stays readable; a pool that was not mapped in time is a line that does not carry."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=repo, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        try:
            assert owner.stdout is not None
            offer, host = owner.stdout.readline().split()
            assert host == host_identity()
            target = blank(shared=True)
            into, late = line_of(target), line_of(blank(shared=True))
            sent = PageExportRef(SOURCE, 1, ids([4, 5]), bytes.fromhex(offer), FOREVER)
            into.fetch(sent, 0, ids([0, 1]))
            assert content(target)[:2] == [5, 6]
        finally:
            owner.kill()
    into.fetch(sent, 0, ids([2, 3]))
    assert content(target)[2:4] == [5, 6]
    with pytest.raises(LineError, match="cannot be read"):
        late.fetch(sent, 0, ids([0, 1]))


def test_a_pool_that_cannot_be_shared_says_so(ends) -> None:
    source, _, _, _ = ends

    class Broken(HostMemory):
        def share(self) -> bytes:
            raise RuntimeError("no handle")

    with pytest.raises(LineError, match="no handle"):
        PoolLine(Broken(source.all_bytes, source.files)).offer(TARGET, 1, ids([0]))
