"""The line over the network: a torch.distributed group of two processes for each source and target.

The group is made when the source first offers something: it listens on a port of its own, its offer says which, and it
waits on a thread for the target to come. It has a store of its own too, so no process group of the rest of the program
is touched, nor made a default. Sending is posting: gloo moves the bytes when the target asks for them, on its own
thread, out of the pages themselves where they lie side by side, out of a copy otherwise. So pages stay pinned until
the target has them. end() takes the posting back: gloo reads the memory no more when a posted message is dropped, and
a target that waits for the rest of it waits in vain. A fetch that fails closes the target's end; its source is told to
drop() the line, and makes a new one for the next offer. So nothing is taken for what it is not.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from time import monotonic
from typing import Any

import msgspec
import numpy as np
import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore

from rayk.errors import LineError
from rayk.kvcache import progress
from rayk.kvcache.page_pool import Pages
from rayk.params import GROUP
from rayk.transport.choice import Peer
from rayk.transport.line import PageExportRef

OPEN_SECONDS = 5.0  # for the other side to come
MESSAGE_BYTES = 2 << 20  # pages that are smaller travel several to a message
SLOWEST = 50e6  # bytes a second; a line that carries less is taken for a broken one
TAGS = 1 << 30

Group = Any  # ProcessGroupGloo, which has no types


class _Offer(msgspec.Struct, frozen=True, array_like=True):
    """Where the source waits, and the word that both have to know."""

    address: str
    port: int
    token: str
    widths: list[int]


class GroupLine:
    """See Line. `buffers` are uint8 `[pages, bytes per page]`; `address` is where other machines reach this one.

    `seconds` bounds the opening of a group; a transfer may take as much and what its bytes take at SLOWEST.
    """

    kind = GROUP

    def __init__(
        self, buffers: Sequence[torch.Tensor], address: str = "127.0.0.1", seconds: float = OPEN_SECONDS
    ) -> None:
        self._buffers = list(buffers)
        self._widths = [b.shape[1] for b in buffers]
        self._address = address
        self._seconds = seconds
        self._out: dict[int, _Outgoing] = {}
        self._in: dict[int, tuple[Peer, _Offer, Group]] = {}

    # -- the source's end --------------------------------------------------------------------------

    def offer(self, to: Peer, export_id: int, pages: Pages) -> bytes:
        out = self._out.get(to.replica)
        if out is None or out.to != to or out.broken:
            out = self._outgoing(to)
        messages = [part for chunk in _chunks(self._widths, pages) for part in self._read(chunk)]
        if not out.post(export_id, messages):  # the target has closed its end
            out = self._outgoing(to)
            out.post(export_id, messages)
        return out.offer

    def _outgoing(self, to: Peer) -> _Outgoing:
        self._close_outgoing(to.replica)
        try:
            out = self._out[to.replica] = _Outgoing(to, self._address, self._seconds, self._widths)
        except (OSError, RuntimeError) as error:
            raise LineError(self.kind, to.replica, f"no port at {self._address}: {error}") from None
        return out

    def _read(self, pages: Pages) -> Iterator[torch.Tensor]:
        first = int(pages[0])
        for buffer in self._buffers:
            if not buffer.is_cuda and _side_by_side(pages):
                yield buffer[first : first + len(pages)]
            else:
                yield buffer[torch.from_numpy(pages.astype(np.int64)).to(buffer.device)].cpu()

    def end(self, export_id: int) -> None:
        for out in self._out.values():
            out.end(export_id)

    # -- the target's end ----------------------------------------------------------------------------

    def fetch(self, export: PageExportRef, first: int, pages: Pages) -> None:
        source = export.source
        try:
            group = self._joined(export)
            self._receive(group, export, first, pages)
        except (OSError, RuntimeError, ValueError, msgspec.MsgspecError) as error:
            self._close_incoming(source.replica)
            raise LineError(self.kind, source.replica, str(error).splitlines()[0][:300]) from None

    def _joined(self, export: PageExportRef) -> Group:
        told = msgspec.msgpack.decode(export.offer, type=_Offer)
        if told.widths != self._widths:
            raise ValueError(f"its pages have buffers of {told.widths} bytes, here they have {self._widths}")
        known = self._in.get(export.source.replica)
        if known is None or known[:2] != (export.source, told):
            self._close_incoming(export.source.replica)
            with progress.waiting():
                group = _join(1, told.address, told.port, told.token, self._seconds, None)
            self._in[export.source.replica] = known = export.source, told, group
        return known[2]

    def _receive(self, group: Group, export: PageExportRef, first: int, pages: Pages) -> None:
        """All of the export's messages, in their order; what is not wanted of them lands nowhere."""
        waiting: list[Any] = []
        scattered: list[tuple[torch.Tensor, Pages, torch.Tensor]] = []
        try:
            self._post_receives(group, export, first, pages, waiting, scattered)
            deadline = monotonic() + self._seconds + len(export.pages) * sum(self._widths) / SLOWEST
            for work in waiting:
                with progress.waiting():
                    work.wait(timedelta(seconds=max(1e-3, deadline - monotonic())))
        finally:
            waiting.clear()  # or an error's traceback would keep them, and gloo their memory
        for buffer, mine, rows in scattered:
            buffer[torch.from_numpy(mine.astype(np.int64)).to(buffer.device)] = rows.to(buffer.device)

    def _post_receives(
        self, group: Group, export: PageExportRef, first: int, pages: Pages, waiting: list[Any], scattered: list[Any]
    ) -> None:
        at = 0
        for chunk in _chunks(self._widths, export.pages):
            low, high = max(0, first - at), max(0, min(len(chunk), first + len(pages) - at))
            mine = pages[max(0, at - first) : max(0, at + len(chunk) - first)] if low < high else pages[:0]
            whole = high - low == len(chunk)
            for buffer, width in zip(self._buffers, self._widths, strict=True):
                if whole and not buffer.is_cuda and _side_by_side(mine):
                    into = buffer[int(mine[0]) : int(mine[0]) + len(mine)]
                else:
                    into = torch.empty(len(chunk), width, dtype=torch.uint8)
                    if low < high:
                        scattered.append((buffer, mine, into[low:high]))
                waiting.append(group.recv([into], 0, export.export_id % TAGS))
            at += len(chunk)

    # -- ends ------------------------------------------------------------------------------------------

    def drop(self, replica: int) -> None:
        self._close_outgoing(replica)
        self._close_incoming(replica)

    def _close_outgoing(self, replica: int) -> None:
        out = self._out.pop(replica, None)
        if out is not None:
            out.close()

    def _close_incoming(self, replica: int) -> None:
        known = self._in.pop(replica, None)
        if known is not None:
            _let_go(known[2])

    def close(self) -> None:
        for replica in {*self._out, *self._in}:
            self.drop(replica)


class _Outgoing:
    """The line to one target. `post` and `end` are called by the replica's thread; another one waits for the target."""

    def __init__(self, to: Peer, address: str, seconds: float, widths: list[int]) -> None:
        self.to = to
        self.broken = False
        self._lock = threading.Lock()
        self._group: Group = None
        self._closed = False
        self._posted: dict[int, tuple[list[torch.Tensor], list[Any]]] = {}  # export -> messages, and their sending
        listener = socket.create_server((address, 0), family=_family(address))
        port, token = listener.getsockname()[1], os.urandom(16).hex()
        self.offer = msgspec.msgpack.encode(_Offer(address, port, token, widths))
        self._thread = threading.Thread(
            target=self._open,
            args=(address, port, token, seconds, listener),
            name=f"rayk-line-{to.replica}",
        )  # no daemon: a process that ends while torch waits in it would abort; the wait has a limit
        self._thread.start()

    def _open(self, address: str, port: int, token: str, seconds: float, listener: socket.socket) -> None:
        try:
            group = _join(0, address, port, token, seconds, listener.detach())
            with self._lock:
                if not self._closed:
                    self._group = group
                    for export_id in self._posted:
                        self._send(export_id)
                    return
        except (OSError, RuntimeError):  # the target did not come, and tells so itself
            self.broken = True

    def post(self, export_id: int, messages: list[torch.Tensor]) -> bool:
        """Send when the target has come; False when it has left."""
        with self._lock:
            self._posted[export_id] = messages, []
            if self._group is not None:
                try:
                    self._send(export_id)
                except RuntimeError:
                    self.broken = True
            return not self.broken

    def _send(self, export_id: int) -> None:
        messages, works = self._posted[export_id]
        works += [self._group.send([message], 1, export_id % TAGS) for message in messages]

    def end(self, export_id: int) -> None:
        """Take an export's messages back, whatever has been sent of them."""
        with self._lock:
            self._posted.pop(export_id, None)

    def close(self) -> None:
        with self._lock:
            self._closed = self.broken = True
            group, self._group = self._group, None
            self._posted.clear()
        if group is not None:
            _let_go(group)


def _join(rank: int, address: str, port: int, token: str, seconds: float, listener: int | None) -> Group:
    """The group of both, rank 0 the source; RuntimeError (also of torch's kinds) when the other does not come."""
    limit = timedelta(seconds=seconds)
    store = TCPStore(address, port, 2, rank == 0, limit, wait_for_workers=False, master_listen_fd=listener)
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs leave it out
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = limit
    options._threads = 1
    return ProcessGroupGloo(PrefixStore(token, store), rank, 2, options)


def _let_go(group: Group) -> None:
    """Close a group, whose messages were dropped. Its threads may take a while to end: that is not waited for."""
    holder = [group]
    threading.Thread(target=holder.clear, name="rayk-line-end").start()  # no daemon, see above


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _chunks(widths: Sequence[int], pages: Pages) -> Iterator[Pages]:
    """The pages of each message, which both sides reckon alike."""
    step = max(1, MESSAGE_BYTES // max(1, sum(widths)))
    for at in range(0, len(pages), step):
        yield pages[at : at + step]


def _side_by_side(pages: Pages) -> bool:
    return int(pages[-1]) - int(pages[0]) == len(pages) - 1 and bool((np.diff(pages) == 1).all())
