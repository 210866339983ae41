"""Random histories of an engine on few pages: whatever happens to the others, a request gets its own tokens."""

from __future__ import annotations

from functools import cache

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ..unit.engine.fake import POISON, Bench, Shelf, expected  # noqa: TID252  # tests/ is no package that has an absolute name

HEADS = (tuple(range(20)), tuple(range(10)), (1, 2), ())


@cache
def answer(prompt: tuple[int, ...], count: int) -> list[int]:
    return expected(prompt, count)


class Engines(RuleBasedStateMachine):
    """`want` has the prompt and the number of tokens of each request; the model reads them back from its pages."""

    @initialize(
        spare=st.integers(0, 6),
        page_size=st.sampled_from([1, 3, 4]),
        rows=st.integers(2, 8),
        chunk=st.sampled_from([1, 6, 20, 60]),
        watermark=st.sampled_from([0.0, 0.2]),
        caching=st.booleans(),
        reports=st.booleans(),
        tiers=st.booleans(),
    )
    def start(
        self,
        spare: int,
        page_size: int,
        rows: int,
        chunk: int,
        watermark: float,
        caching: bool,
        reports: bool,
        tiers: bool,
    ) -> None:
        self.shelf = Shelf() if tiers and caching else None
        self.bench = Bench(
            -(-48 // page_size) + spare,  # the longest request needs that without the spare ones
            page_size,
            rows=rows,
            chunk_size=chunk,
            watermark=watermark,
            caching=caching,
            report_pages=reports,
            shelf=self.shelf,
        )
        self.bench.model.broken = POISON
        self.want: dict[int, tuple[tuple[int, ...], int]] = {}
        self.cancelled: set[int] = set()
        self.paused: set[int] = set()

    @rule(
        head=st.sampled_from(HEADS),
        tails=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=5),
        count=st.integers(1, 16),
        poison=st.booleans(),
        timeout=st.sampled_from([None, None, None, 20, 3]),
        salt=st.sampled_from([None, None, "x"]),
    )
    def submit(
        self,
        head: tuple[int, ...],
        tails: list[list[int]],
        count: int,
        poison: bool,
        timeout: int | None,
        salt: str | None,
    ) -> None:
        for tail in tails:
            prompt = (*head, *tail, *((POISON,) if poison and count % 4 == 0 else ()))
            number = self.bench.submit(prompt, count, timeout=timeout, cache_salt=salt)
            self.want[number] = (prompt, count)

    @property
    def open(self) -> list[int]:
        return [number for number in self.want if number not in self.bench.ended]

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.open))
        self.bench.engine.cancel(number)
        self.cancelled.add(number)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.open))
        self.bench.engine.pause(number)
        self.paused.add(number)

    @precondition(lambda self: self.paused)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.paused)))
        self.bench.engine.resume(number)
        self.paused.discard(number)

    @rule(steps=st.integers(1, 8))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            self.bench.step()

    @precondition(lambda self: self.shelf is not None)
    @rule(open_=st.booleans(), lost=st.sampled_from([0, 0, 0, 1, 3, 99]), forgets=st.integers(0, 6))
    def tier(self, open_: bool, lost: int, forgets: int) -> None:
        """It is slow or quick, finds what it cannot load, or has lost some pages."""
        assert self.shelf is not None
        self.shelf.open, self.shelf.lost = open_, lost
        for key in list(self.shelf.pages)[:: max(1, 7 - forgets)] if forgets else ():
            del self.shelf.pages[key]

    @rule()
    def the_device_forgets(self) -> None:
        self.bench.core.tree.reset()

    @rule(seconds=st.floats(0.1, 8))
    def time_passes(self, seconds: float) -> None:
        self.bench.clock.now += seconds

    @invariant()
    def every_token_is_the_models(self) -> None:
        for number, (prompt, count) in getattr(self, "want", {}).items():
            got = self.bench.tokens[number]
            assert len(got) <= count
            if POISON not in prompt:
                assert got == answer(prompt, count)[: len(got)]

    def teardown(self) -> None:
        if not hasattr(self, "want"):
            return
        for number in sorted(self.paused):
            self.bench.engine.resume(number)
        if self.shelf is not None:
            self.shelf.open = True
        self.bench.run()
        assert self.shelf is None or not self.shelf.under_way
        for number, (prompt, count) in self.want.items():
            end = self.bench.ended[number]
            if end.reason == "length":
                assert self.bench.tokens[number] == answer(prompt, count)
            elif end.reason == "cancelled":
                assert number in self.cancelled
            elif end.reason == "error":
                assert POISON in prompt and not self.bench.tokens[number]
            else:
                assert end.reason == "timeout" and "was not finished" in str(end.error)


TestEngines = Engines.TestCase
TestEngines.settings = settings.get_profile("rayk-machines")
