"""The last answers to each sender's numbered mutations, so that one that arrives twice is done once."""

from __future__ import annotations

from typing import Generic, TypeVar

from rayk.errors import MessageError

SENDERS_REMEMBERED = 256  # beyond that the one that was silent for longest is forgotten

T = TypeVar("T")


class _Sender(Generic[T]):
    """`highest` is the largest number that was taken up; answers to the last few are there."""

    __slots__ = ("answers", "highest")

    def __init__(self) -> None:
        self.highest = 0
        self.answers: dict[int, T] = {}


class ReplyCache(Generic[T]):
    """Numbers grow from 1 for each sender. Of questions, which have none, nothing is remembered.

    A receiver that works on several messages of one sender at once needs a `window` of as many answers at least;
    within it numbers may overtake each other. `remembered`: answers to keep for messages that are sent again, if more.
    """

    def __init__(self, window: int = 1, remembered: int = 0) -> None:
        self._window = window
        self._remembered = max(window, remembered)
        self._senders: dict[str, _Sender[T]] = {}

    def repeated(self, sender: str, seq: int) -> T | None:
        """The answer that this very mutation had before, None for a new one; MessageError for one that is overtaken."""
        known = self._senders.get(sender)
        if known is None or seq > known.highest:
            return None
        answer = known.answers.get(seq)
        if answer is None and seq <= known.highest - self._window:
            raise MessageError(f"{sender} sent number {seq} after {known.highest}: a late duplicate, ignored")
        return answer

    def keep(self, sender: str, seq: int, answer: T, large: bool = False) -> None:
        """Remember the answer to a mutation in place of the oldest one; a `large` one in place of all."""
        known = self._senders.pop(sender, None) or _Sender()
        if large:
            known.answers.clear()
        self._senders[sender] = known
        known.highest = max(known.highest, seq)
        known.answers[seq] = answer
        while len(known.answers) > self._remembered:
            del known.answers[min(known.answers)]
        if len(self._senders) > SENDERS_REMEMBERED:
            del self._senders[next(iter(self._senders))]

    def forget(self, sender: str) -> None:
        """The sender left."""
        self._senders.pop(sender, None)
