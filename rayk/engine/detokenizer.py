"""Tokens to text, a token at a time: characters of several tokens, and strings that end an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

RUN = 8  # tokens that are decoded with each new one, at most, before the run begins anew
UNFINISHED = "�"  # what a tokenizer shows for bytes that are no whole character (yet)


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids without special ones, as UTF-8 can carry it: a tokenizer may make lone surrogates."""
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


class Detokenizer:
    """The text of one answer while it grows. `tokenizer.decode(ids, skip_special_tokens=True)` is all it needs.

    A token's text may depend on the tokens before it, so a short run of them is decoded with each new one, and the
    difference to what it was is new text; it waits while it ends in the middle of a character.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.text = ""  # all of it, up to a stop string
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest = max((len(each) for each in stop), default=0)
        self._ids: list[int] = []
        self._start = self._read = 0  # ids[start:read] are shown, and decide how the next ones look
        self._shown = ""  # their text
        self._sent = 0
        self._free = 0  # characters of the text in which no stop string counts

    def add(self, token: int, may_stop: bool = True) -> None:
        """One more token. `stopped` tells whether it completed a stop string; `text` then ends before that. What is
        complete before it `may_stop` ends nothing."""
        self._ids.append(token)
        new = self._decode(self._start)
        if len(new) > len(self._shown) and not new.endswith(UNFINISHED):
            self._grow(new[len(self._shown) :], may_stop)
            before, self._read, self._shown = self._read, len(self._ids), new
            if self._read - self._start > RUN:
                self._start, self._shown = before, self._decode(before)

    def finish(self) -> None:
        """There will be no more tokens: what waited for the rest of a character is shown as it is."""
        if self._read < len(self._ids) and not self.stopped:
            self._grow(self._decode(self._start)[len(self._shown) :])
            self._start, self._read, self._shown = len(self._ids), len(self._ids), ""
        self._stop = ()

    def piece(self) -> str:
        """The text since the last call, without what may turn out to be the beginning of a stop string."""
        end = len(self.text) - self._held_back()
        piece, self._sent = self.text[self._sent : end], max(self._sent, end)
        return piece

    def _decode(self, start: int) -> str:
        return text_of(self._tokenizer, self._ids[start:])

    def _grow(self, more: str, may_stop: bool = True) -> None:
        if not self._stop:
            self.text += more
            return
        begin = max(self._free, len(self.text) - self._longest + 1)
        self.text += more
        if not may_stop:
            self._free = len(self.text)
            return
        found = [at for at in (self.text.find(each, begin) for each in self._stop) if at >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held_back(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        if self.stopped or not self._stop:
            return 0
        for length in range(min(self._longest - 1, len(self.text)), 0, -1):
            if any(each.startswith(self.text[-length:]) for each in self._stop):
                return length
        return 0
