"""What an engine counts: its work since the start, and how fast it computes prompts."""

from __future__ import annotations

from rayk.engine.settings import Times


class PrefillRate:
    """How fast prompts are computed: what the last forwards took, each counting a tenth less than the next one."""

    FORGET = 0.9

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def record(self, tokens: int, seconds: float) -> None:
        """A forward of so many tokens of prompts."""
        if tokens and seconds > 0:
            self._tokens = self.FORGET * self._tokens + tokens
            self._seconds = self.FORGET * self._seconds + seconds

    @property
    def rate(self) -> float:
        """Tokens a second, 0 before the first forward."""
        return self._tokens / self._seconds if self._seconds else 0.0


class EngineCounters:
    """Since the start. Tokens of prompts count at first admissions, `recomputed_tokens` at later ones."""

    def __init__(self) -> None:
        self.steps = self.finished = self.failed = self.preemptions = self.peak_used_pages = 0
        self.prompt_tokens = self.generated_tokens = self.recomputed_tokens = 0
        self.prefill = PrefillRate()
        self.times = Times.none()

    def record_use(self, pages: int) -> None:
        """So many pages are in use. They are at their most after an admission, or when a request ends."""
        self.peak_used_pages = max(self.peak_used_pages, pages)
