"""The other ranks of a replica whose model is split over processes, as rank 0 commands them.

Rank 0 has the engine: it alone decides, has the clock, owns the pages and samples. The others (rayk.engine.rank) have
their parts of the model and of every page, and do what they are told in the order in which they are told: the same
forwards, and the same copies of pages. Rank 0 tells them of a forward before it begins its own, in which they meet.

A rank that ends, or fails where the others do not, takes the replica with it: its share cannot be had elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from threading import Condition, Lock, Thread, Timer
from typing import Any

import torch

from rayk.engine.forward import Model
from rayk.errors import RankLostError, RaykError
from rayk.kvcache.replica import ReplicaCore
from rayk.kvcache.runtime_inputs import ShardInputs

log = logging.getLogger("rayk.engine")

FAIL_SECONDS = 5.0  # for the others to fail in a forward in which one has failed
ANSWER_SECONDS = 600.0  # for what is asked: copies, and graphs to be captured

Told = tuple[int, str, tuple[Any, ...]]  # the number of a call (0: the end), a method of RankWorker, its arguments
Answer = tuple[int, Any, BaseException | None]  # to the call of that number; 0 is none: the rank can do no more


class Asked:
    """Answers that are waited for, one of each other rank."""

    def __init__(self, ranks: Ranks, count: int) -> None:
        self._ranks = ranks
        self.answers: list[Any] = [None] * count
        self.left = count
        self.error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether wait() would not wait."""
        return not self.left or self._ranks.lost is not None

    def wait(self) -> list[Any]:
        """What the ranks answer, rank 1's first. What one raised; RankLostError when one is gone."""
        self._ranks.await_(lambda: self.done, ANSWER_SECONDS)
        if self.left:
            raise self._ranks.lost or RankLostError(self._ranks.replica, -1, f"no answer within {ANSWER_SECONDS:.0f} s")
        if self.error is not None:
            raise self.error
        return self.answers


class Ranks:
    """Ranks 1, 2, .. of a replica by their connections, in that order. Calls may come from any thread.

    `on_loss` is called once, from any thread, when the replica cannot go on.
    """

    def __init__(self, replica: int, connections: Sequence[Connection]) -> None:
        self.replica = replica
        self.lost: RankLostError | None = None
        self.on_loss: Callable[[RankLostError], None] = lambda error: None
        self._connections = list(connections)
        self._sending = Lock()
        self._changed = Condition()
        self._calls = 0
        self._asked: dict[int, Asked] = {}
        self._forward = 0  # the call of the forward that rank 0 is in
        self._failed: dict[int, dict[int, BaseException]] = {}  # forwards: by call, then rank
        self._closed = False
        for number, connection in enumerate(connections, 1):
            Thread(target=self._read, args=(number, connection), name=f"rayk-rank-{number}", daemon=True).start()

    @property
    def size(self) -> int:
        """How many ranks there are, rank 0 included."""
        return len(self._connections) + 1

    def tell(self, method: str, *arguments: Any) -> None:
        """Have all other ranks do something. RankLostError."""
        self._send(method, arguments, None)

    def ask(self, method: str, *arguments: Any) -> Asked:
        """The same, of which the answers are wanted."""
        asked = Asked(self, len(self._connections))
        self._send(method, arguments, asked)
        return asked

    def _send(self, method: str, arguments: tuple[Any, ...], asked: Asked | None, forward: bool = False) -> None:
        with self._sending:
            if self.lost is not None:
                raise self.lost
            self._calls += 1
            if forward:
                self._forward = self._calls
            if asked is not None:
                self._asked[self._calls] = asked
            told: Told = (self._calls, method, arguments)
            for number, connection in enumerate(self._connections, 1):
                try:
                    connection.send(told)
                except OSError as error:
                    raise self._lose(number, f"its process ended ({error.strerror or error})") from None

    # -- forwards ----------------------------------------------------------------------------------------

    def begin_forward(self, *arguments: Any) -> None:
        """Have the others begin a forward; rank 0 follows with its own, and says how it went."""
        self._send("logits", arguments, None, forward=True)

    def end_forward(self) -> None:
        """Rank 0's part went well. RankLostError where another's did not."""
        call, self._forward = self._forward, 0
        with self._changed:
            failed = self._failed.pop(call, None)
        if failed:
            number, error = next(iter(failed.items()))
            raise self._lose(number, f"it alone failed in a forward: {type(error).__name__}: {error}")

    def fail_forward(self, error: Exception) -> None:
        """Rank 0's part raised that. Returns if all ranks failed, as for a bad batch; else RankLostError."""
        call, others = self._forward, len(self._connections)
        self.await_(lambda: self.lost is not None or len(self._failed.get(call, ())) == others, FAIL_SECONDS)
        with self._changed:
            failed, self._forward = self._failed.pop(call, {}), 0
        if self.lost is not None:
            raise self.lost from error
        if len(failed) < others:
            raise self._lose(0, f"it alone failed in a forward: {type(error).__name__}: {error}") from error

    # -- answers -----------------------------------------------------------------------------------------

    def await_(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait until that holds of what came, or time is up."""
        with self._changed:
            self._changed.wait_for(condition, seconds)

    def _read(self, number: int, connection: Connection) -> None:
        try:
            while True:
                answer: Answer = connection.recv()
                self._take(number, *answer)
        except (EOFError, OSError):
            self._lose(number, "its process ended")
        finally:
            connection.close()

    def _take(self, number: int, call: int, result: Any, error: BaseException | None) -> None:
        with self._changed:
            asked = self._asked.get(call)
            if asked is not None and (error is None or isinstance(error, RaykError)):
                asked.answers[number - 1] = result
                asked.error = asked.error or error
                asked.left -= 1
                if not asked.left:
                    del self._asked[call]
                self._changed.notify_all()
                return
            in_forward = asked is None and call == self._forward != 0
            if in_forward:
                assert error is not None
                self._failed.setdefault(call, {})[number] = error
                self._changed.notify_all()
        why = f"{type(error).__name__}: {error}"
        if not in_forward:
            self._lose(number, why)
            return
        timer = Timer(FAIL_SECONDS, lambda: self._forward == call and self._lose(number, why))  # rank 0 waits for it
        timer.daemon = True
        timer.start()

    def _lose(self, number: int, reason: str) -> RankLostError:
        with self._changed:
            first = self.lost is None and not self._closed
            if self.lost is None:
                self.lost = RankLostError(self.replica, number, reason)
            self._changed.notify_all()
        if first:
            self.on_loss(self.lost)
        return self.lost

    def close(self) -> None:
        """Have the others end when they have done what came before."""
        with self._sending:
            self._closed = True
            for connection in self._connections:
                with suppress(OSError):
                    connection.send((0, "", ()))


class RankedModel:
    """Rank 0's part of a model as an engine's whole model: each forward begins on all ranks, over the same pages."""

    def __init__(self, model: Model, core: ReplicaCore, ranks: Ranks) -> None:
        self.vocab_size = model.vocab_size
        self.max_length = model.max_length
        self.eos_token_ids = model.eos_token_ids
        self.tokenizer = model.tokenizer
        self.backend = str(getattr(model, "backend", ""))
        self.num_bytes = getattr(model, "num_bytes", None)
        self._model: Any = model
        self._stage = core.stage
        self._ranks = ranks

    def logits(self, inputs: ShardInputs, tokens: torch.Tensor, counts: Sequence[int], **more: bool) -> torch.Tensor:
        """As the model's. RankLostError when a rank is gone."""
        rows, width = inputs.lookup_table.shape
        self._ranks.begin_forward(
            self._stage.table[: rows * width].reshape(rows, width),
            self._stage.lengths[:rows],
            int(inputs.max_prompt_length),
            int(inputs.max_cache_length),
            tokens.numpy(),
            list(counts),
            more,
        )
        try:
            logits: torch.Tensor = self._model.logits(inputs, tokens, counts, **more)
        except Exception as error:
            self._ranks.fail_forward(error)
            raise
        self._ranks.end_forward()
        return logits
