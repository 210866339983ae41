"""Which errors leave a replica unfit: nothing that it computes afterwards can be trusted, or can succeed.

An error of CUDA stays in its context; a core that contradicts itself may give a page to two requests; a rank that is
lost had a part of every page. Memory that ran out may be there again for the next call, so only OUT_OF_MEMORY times in
a row count, with nothing computed in between.
"""

from __future__ import annotations

from rayk.errors import IntegrityError, RankLostError

OUT_OF_MEMORY = 3
CUDA_ERRORS = ("CUDA error", "CUDA driver error")  # how their texts begin; torch has had several classes for them
MEMORY_ERRORS = ("OutOfMemoryError", "MemoryError")


class Poison:
    """What went wrong in one replica so far. `reason` is empty while it is fit."""

    def __init__(self) -> None:
        self.reason = ""
        self._out_of_memory = 0

    def note(self, error: BaseException) -> bool:
        """Something was not computed; whether the replica is unfit."""
        if any(cls.__name__ in MEMORY_ERRORS for cls in type(error).__mro__):
            self._out_of_memory += 1
            unfit = self._out_of_memory >= OUT_OF_MEMORY
        else:
            accelerator = type(error).__name__ == "AcceleratorError" or str(error).startswith(CUDA_ERRORS)
            unfit = isinstance(error, (IntegrityError, RankLostError)) or accelerator
        if unfit and not self.reason:
            self.reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        return bool(self.reason)

    def clear(self) -> None:
        """Something was computed."""
        self._out_of_memory = 0
