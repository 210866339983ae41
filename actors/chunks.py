"""A message on its way into an actor, in pieces that Ray sends along with the call.

Ray puts an argument of more than 100 KiB into its object store, which takes a message of 140 to 260 kB twice the time
and twice to three times the CPU time of all processes together (tests/measure/message_pieces.py). Cut up it goes with
the call; from half a MB on copying it about costs as much, and it goes whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PIECE = 96_000  # bytes
LONGEST = 6 * PIECE  # of a message that is cut


def cut(wire: bytes) -> Sequence[Any]:
    """Arguments that stand for a message: itself, or how many pieces follow and these."""
    if not PIECE < len(wire) <= LONGEST:
        return (wire,)
    pieces = [wire[at : at + PIECE] for at in range(0, len(wire), PIECE)]
    return (len(pieces), *pieces)


def joined(first: bytes | int, rest: Sequence[Any] = ()) -> tuple[bytes, Sequence[Any]]:
    """The message that begins with the argument `first`, and what came after it."""
    if isinstance(first, int):
        return b"".join(rest[:first]), rest[first:]
    return first, rest
