"""What Ray says of a failure, made short: one line, without the colours of a terminal."""

from __future__ import annotations

import re

REASON_LENGTH = 300


def why_gone(error: BaseException) -> str:
    """What Ray says about a dead actor, in one sentence."""
    text = one_line(str(error))
    found = re.search(r"Worker exit type: (\w+) Worker exit detail: (.*?)(?:\. |$)", text)
    if found:
        return f"its process ended ({found[1]}: {found[2]})"
    for marker in ("The actor died because", "The actor is dead because", "The actor died unexpectedly"):
        if marker in text:
            text = text[text.index(marker) :]
            break
    if len(text) > REASON_LENGTH and "raised in its creation task" in text:  # the cause is the traceback's last line
        return f"its constructor failed: {one_line(str(error).strip().splitlines()[-1])}"[:REASON_LENGTH]
    return text[:REASON_LENGTH].rstrip(".")


def one_line(text: str) -> str:
    """The text, every run of white space a blank."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())
