"""A rank of a replica other than rank 0: a part of the model and of every page. It decides nothing; see ranks.py."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rayk.engine.graphs import with_graphs
from rayk.engine.ranked_pages import row_copier
from rayk.engine.ranks import Answer, Told
from rayk.engine.replicas import ServeSettings, page_params, plan_pages
from rayk.kvcache.block_table import Int32Array
from rayk.kvcache.page_copies import Numbers, PageCopier, Rows, Ticket
from rayk.kvcache.page_pool import Pages
from rayk.kvcache.replica import ReplicaCore
from rayk.kvcache.runtime_inputs import BatchShape, InputStage, LeafInputs
from rayk.params import KVCacheParams
from rayk.planning.node_plan import NodeMemory, measure_node
from rayk.tiers.pool import map_rows
from rayk.transport.choice import Peer
from rayk.transport.line import Line, PageExportRef
from rayk.transport.port import open_lines

COPY_SECONDS = 0.0005  # between looks at copies that are under way
UNANSWERED = ("logits", "fence")  # unless they fail


class RankWorker:
    """Rank `number` of `ranks` of that replica, with its part of the model on that device."""

    def __init__(self, number: int, ranks: int, model: Any, settings: ServeSettings, replica: int, device: str) -> None:
        self._number = number
        self._ranks = ranks
        self._model = model
        self._settings = settings
        self._replica = replica
        self._device = device
        self._params: KVCacheParams = page_params(model, settings, device)
        self._core: ReplicaCore
        self._stage: InputStage
        self._copier: PageCopier
        self._pool: Rows
        self._lines: dict[str, Line] = {}
        self._copies: list[tuple[int, Ticket]] = []  # under way, by the call that asked for them

    def serve(self, connection: Connection) -> None:
        """Do what rank 0 says until it ends."""
        with suppress(EOFError, OSError):
            while True:
                call, method, arguments = self._next(connection)
                if not call:
                    break
                result, problem = None, None
                try:
                    result = getattr(self, method)(*arguments)
                except Exception as error:
                    problem = error
                if problem is None and method in ("store", "load") and result is not None:
                    self._copies.append((call, result))
                elif problem is not None or method not in UNANSWERED:
                    _answer(connection, call, result, problem)
        for line in self._lines.values():
            line.close()
        connection.close()

    def _next(self, connection: Connection) -> Told:
        while self._copies and not connection.poll(COPY_SECONDS):
            for copy in [each for each in self._copies if each[1].poll()]:
                self._copies.remove(copy)
                _answer(connection, copy[0], None, None)
        told: Told = connection.recv()
        return told

    # -- what rank 0 calls: the start -----------------------------------------------------------------------

    def plan(self, sharing: int, node: NodeMemory | None) -> int:
        """Pages that fit here. PlanError."""
        return plan_pages(self._model, self._params, self._settings, sharing, node or measure_node())

    def open(self, pages: int, address: str) -> list[str]:
        """Make so many pages, and capture decode steps with the other ranks; the kinds of lines that there are."""
        settings, devices = self._settings, [self._device]
        self._core = ReplicaCore(
            self._params, self._replica, pages, settings.max_batch_size, devices, shared_memory=settings.peer_copies
        )
        buffers = self._core.buffers
        if settings.peer_copies:
            self._lines = {line.kind: line for line in open_lines(buffers, address)}
        self._stage = InputStage(buffers, tuple(devices), settings.max_batch_size)
        if settings.graphs:
            self._model = with_graphs(self._model, self._core)
        return list(self._lines)

    # -- forwards -------------------------------------------------------------------------------------------

    def logits(
        self,
        table: Int32Array,
        lengths: Int32Array,
        longest_prompt: int,
        longest: int,
        tokens: npt.NDArray[np.int64],
        counts: Sequence[int],
        more: dict[str, bool],
    ) -> None:
        """This rank's part of a forward. Its logits are those of all ranks, and rank 0 samples."""
        rows, width = table.shape
        own_table, own_lengths = self._stage.host_views(rows, width)
        own_table[:], own_lengths[:] = table, lengths
        inputs = self._stage.build(rows, width, BatchShape(rows, longest_prompt, longest))
        assert isinstance(inputs, LeafInputs)
        self._model.logits(inputs.shards[0], torch.from_numpy(tokens), counts, **more)

    # -- pages to and from the tiers ------------------------------------------------------------------------

    def attach(self, pool: str, pages: int, row_bytes: int) -> str:
        """Open the node's host pool, of whose rows each rank has a part."""
        self._copier = row_copier(self._core, self._number, row_bytes)
        self._pool = map_rows(pool, pages, row_bytes)
        return self._copier.attach(self._pool)

    def store(self, pages: Pages, rows: Numbers) -> Ticket | None:
        """This rank's part of device pages -> rows of the pool."""
        return self._copier.store(pages, self._pool, rows)

    def load(self, rows: Numbers, pages: Pages) -> Ticket | None:
        """.. and back. Forwards come after it."""
        ticket = self._copier.load(self._pool, rows, pages)
        if ticket is not None:
            ticket.order()
        return ticket

    def fence(self, pages: Pages) -> None:
        """See PageCopier."""
        self._copier.fence(pages)

    def read(self, pages: Pages) -> Rows:
        """This rank's part of pages that have no row in the pool, `[pages, bytes]`."""
        rows = self._row_parts(len(pages))
        if (ticket := self._copier.store(pages, rows, range(len(pages)))) is not None:
            ticket.wait()
        return rows[:, self._part]

    def write(self, pages: Pages, parts: Sequence[Rows]) -> None:
        """.. and back; a part for each other rank."""
        rows = self._row_parts(len(pages))
        rows[:, self._part] = parts[self._number - 1]
        if (ticket := self._copier.load(rows, range(len(pages)), pages)) is not None:
            ticket.wait()

    def _row_parts(self, count: int) -> Rows:
        return np.empty((count, self._copier.page_bytes), np.uint8)

    @property
    def _part(self) -> slice:
        own = self._params.bytes_per_page
        return slice(self._number * own, (self._number + 1) * own)

    # -- pages to and from the same rank of another replica -------------------------------------------------

    def offer(self, kind: str, to: Peer, export_id: int, pages: Pages) -> bytes:
        """See Line."""
        return self._lines[kind].offer(to, export_id, pages)

    def end(self, kind: str, export_id: int) -> None:
        """See Line."""
        self._lines[kind].end(export_id)

    def fetch(self, kind: str, exports: Sequence[PageExportRef], first: int, pages: Pages) -> None:
        """See Line; an export for each rank."""
        self._lines[kind].fetch(exports[self._number], first, pages)

    def drop(self, kind: str, replica: int) -> None:
        """See Line."""
        self._lines[kind].drop(replica)


def _answer(connection: Connection, call: int, result: Any, problem: BaseException | None) -> None:
    answer: Answer = (call, result, problem)
    try:
        connection.send(answer)
    except (TypeError, AttributeError, pickle.PicklingError):  # an error that cannot travel
        connection.send((call, None, RuntimeError(f"{type(problem).__name__}: {problem}")))
