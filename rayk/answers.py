"""The last answer to each sender's numbered mutations, so that one that arrives twice is done once."""

from __future__ import annotations

from typing import Generic, TypeVar

from rayk.errors import MessageError

SENDERS_REMEMBERED = 256  # beyond that the one that was silent for longest is forgotten

T = TypeVar("T")


class Answers(Generic[T]):
    """Numbers grow from 1 for each sender; 0 is a question, which changes nothing and is not remembered."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, T]] = {}

    def repeated(self, sender: str, seq: int) -> T | None:
        """The answer that this very mutation had before, None for a new one; MessageError for one that is overtaken."""
        last = self._last.get(sender)
        if not seq or last is None or seq > last[0]:
            return None
        if seq < last[0]:
            raise MessageError(f"{sender} sent number {seq} after {last[0]}: a late duplicate, ignored")
        return last[1]

    def keep(self, sender: str, seq: int, answer: T) -> None:
        """Remember the answer to a mutation in place of the one before it."""
        if seq:
            self._last.pop(sender, None)
            self._last[sender] = (seq, answer)
            if len(self._last) > SENDERS_REMEMBERED:
                del self._last[next(iter(self._last))]

    def forget(self, sender: str) -> None:
        """The sender left."""
        self._last.pop(sender, None)
