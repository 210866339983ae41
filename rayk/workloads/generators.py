"""Seeded generators of requests: chat, agent, documents, random. They ship with rayk and copy nothing from any trace.

All lengths are in tokens before `scale` is applied; [median, p90] name a log-normal distribution. Requests arrive at
random, `rate` a second on average, and `arrival_s` is in seconds.

chat       It continues a conversation that is due, or starts one: cold (a system block that all share, then a first
           message [6000, 24000]) or, for 1 start in 11, as a branch: a cut of an earlier conversation's prompt, then
           something new. 80 % of conversations end after their first turn, the others have 2 + geometric(0.4) turns,
           so about a third of the requests continue, 61 % are cold, 6 % branch. A turn adds [728, 4816]; the pause
           before it is [123, 474] seconds; the answer is normal(343, 200), at least 16.
agent      Coding agents, `sessions` at a time, each on its own long context: tools and system prompt (16384) shared by
           all, a first task [8000, 24000], then turns that add tool output [900, 8000] and an answer [200, 900] until
           the context reaches 180,000 or the session ends (1 turn in 60). The pause before a turn is log-normal with
           median 17 and 99th percentile 1,819 seconds, stretched or shrunk to meet `rate` if one is given. Almost all
           of a prompt was seen before.
documents  Questions about `documents` documents [20000, 60000], document k asked for in proportion to 1 / (k + 4). A
           system block (512) comes first, a question is [120, 600], an answer [250, 700]. Half of the questions are
           followed by another one on the same document, which quotes all before it, [30, 120] seconds later.
random     Prompts without anything in common, uniform in 256..8192, answers uniform in 32..512: the worst case.

A turn's prompt is the whole conversation so far, answers included, so that generated pages are reused.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

import numpy as np

from rayk.workloads.request import BenchRequest, Runs, TokenSpace, Workload, joined

SYSTEM_CHAT = 512
SYSTEM_AGENT = 16_384
AGENT_CONTEXT = 180_000
BRANCH_SHARE = 6 / 67
Z90, Z99 = 1.2816, 2.3263
AGENT_PAUSE, AGENT_PAUSE_P99 = 17.0, 1819.0
AGENT_PAUSE_SIGMA = math.log(AGENT_PAUSE_P99 / AGENT_PAUSE) / Z99
AGENT_PAUSE_P90 = AGENT_PAUSE * math.exp(Z90 * AGENT_PAUSE_SIGMA)
AGENT_PAUSE_MEAN = AGENT_PAUSE * math.exp(AGENT_PAUSE_SIGMA**2 / 2)


class _Source:
    """Random lengths and fresh tokens of one workload; deterministic by seed."""

    def __init__(self, name: str, seed: int, scale: float) -> None:
        self.random = np.random.default_rng([seed, sum(name.encode())])
        self.space = TokenSpace(f"workload {name}")
        self.scale = scale

    def lognormal(self, median: float, p90: float) -> int:
        sigma = math.log(p90 / median) / Z90
        return max(1, round(self.scale * median * math.exp(sigma * self.random.standard_normal())))

    def seconds(self, median: float, p90: float) -> float:
        """A pause of a user or a tool; not scaled."""
        return median * math.exp(math.log(p90 / median) / Z90 * self.random.standard_normal())

    def pause(self, rate: float) -> float:
        """Seconds between two of `rate` independent arrivals a second."""
        return float(self.random.exponential(1 / rate))

    def scaled(self, tokens: float, least: int = 1) -> int:
        return max(least, round(self.scale * tokens))

    def text(self, tokens: int) -> tuple[int, int]:
        return self.space.slots(tokens), tokens


class _Session:
    """A conversation so far: the runs of its text, its number of turns, and its last request."""

    __slots__ = ("last", "name", "runs", "turns")

    def __init__(self, name: str, runs: list[tuple[int, int]], turns: int = 0) -> None:
        self.name, self.runs, self.turns = name, runs, turns
        self.last: int | None = None

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.runs)

    def ask(self, source: _Source, index: int, arrival_s: float, message: int, answer: int) -> BenchRequest:
        """The next turn: `message` new tokens after all there is; its `answer` joins the conversation."""
        self.runs.append(source.text(message))
        first = source.space.generated(answer)
        runs: Runs = joined(np.array(self.runs, np.int64))
        request = BenchRequest(
            index, f"r{index}", arrival_s, self.name, self.tokens, answer, runs, first, after=self.last
        )
        self.runs.append((first, answer))
        self.last = index
        return request


def chat(requests: int, seed: int = 0, scale: float = 0.25, rate: float = 0.2) -> Workload:
    """`requests` chat requests; see the module."""
    source = _Source("chat", seed, scale)
    random = source.random
    system = source.text(source.scaled(SYSTEM_CHAT))
    due: list[tuple[float, int, _Session]] = []
    prompts: list[list[tuple[int, int]]] = []
    made: list[BenchRequest] = []
    now = 0.0
    for index in range(requests):
        now += source.pause(rate)
        if due and due[0][0] <= now:
            session = heapq.heappop(due)[2]
            message = source.lognormal(728, 4816)
        else:
            turns = 1 if random.random() < 0.8 else 1 + int(random.geometric(0.4))
            if prompts and random.random() < BRANCH_SHARE:
                runs = _cut(prompts[int(random.integers(len(prompts)))], 0.2 + 0.7 * float(random.random()))
                message = source.lognormal(728, 4816)
            else:
                runs = [system]
                message = source.lognormal(6000, 24000)
            session = _Session(f"c{index}", runs, turns)
        answer = source.scaled(max(16.0, random.normal(343, 200)), 2)
        made.append(session.ask(source, index, now, message, answer))
        prompts.append(session.runs[:-1])
        session.turns -= 1
        if session.turns > 0:
            heapq.heappush(due, (now + source.seconds(123, 474), index, session))
    return Workload("workload chat", "chat", made, {"seed": seed, "scale": scale, "rate": rate})


def _cut(runs: list[tuple[int, int]], share: float) -> list[tuple[int, int]]:
    """The leading `share` of the tokens of `runs`, at least one."""
    left = max(1, int(share * sum(count for _, count in runs)))
    out = []
    for first, count in runs:
        out.append((first, min(count, left)))
        left -= count
        if left <= 0:
            break
    return out


def agent(requests: int, seed: int = 0, scale: float = 0.05, rate: float | None = None, sessions: int = 8) -> Workload:
    """`requests` requests of coding agents, `sessions` at a time; see the module."""
    source = _Source("agent", seed, scale)
    system = source.text(source.scaled(SYSTEM_AGENT))
    stretch = 1.0 if rate is None else sessions / rate / AGENT_PAUSE_MEAN
    due = [(source.pause(1.0), index, None) for index in range(sessions)]
    waiting: list[tuple[float, int, _Session | None]] = sorted(due)
    made: list[BenchRequest] = []
    for index in range(requests):
        now, place, session = heapq.heappop(waiting)
        if session is None:
            session = _Session(f"a{index}", [system])
            message = source.lognormal(8000, 24000)
        else:
            message = source.lognormal(900, 8000)
        answer = max(2, source.lognormal(200, 900))
        made.append(session.ask(source, index, now, message, answer))
        ends = session.tokens >= scale * AGENT_CONTEXT or source.random.random() < 1 / 60
        pause = stretch * source.seconds(AGENT_PAUSE, AGENT_PAUSE_P90)
        heapq.heappush(waiting, (now + pause, place, None if ends else session))
    shape: dict[str, float | int | str] = {"seed": seed, "scale": scale, "sessions": sessions}
    return Workload("workload agent", "agent", made, shape if rate is None else shape | {"rate": rate})


def documents(requests: int, seed: int = 0, scale: float = 0.05, rate: float = 0.5, documents: int = 200) -> Workload:
    """`requests` questions about `documents` documents; see the module."""
    source = _Source("documents", seed, scale)
    random = source.random
    system = source.text(source.scaled(SYSTEM_CHAT))
    texts = [source.text(source.lognormal(20_000, 60_000)) for _ in range(documents)]
    share = 1 / (np.arange(documents) + 4.0)
    share /= share.sum()
    due: list[tuple[float, int, _Session]] = []
    made: list[BenchRequest] = []
    now = 0.0
    for index in range(requests):
        now += source.pause(rate)
        if due and due[0][0] <= now:
            session = heapq.heappop(due)[2]
        else:
            session = _Session(f"d{index}", [system, texts[int(random.choice(documents, p=share))]])
        made.append(session.ask(source, index, now, source.lognormal(120, 600), max(2, source.lognormal(250, 700))))
        if random.random() < 0.5:
            heapq.heappush(due, (now + source.seconds(30, 120), index, session))
    shape: dict[str, float | int | str] = {"seed": seed, "scale": scale, "rate": rate, "documents": documents}
    return Workload("workload documents", "documents", made, shape)


def random(requests: int, seed: int = 0, scale: float = 0.25, rate: float = 1.0) -> Workload:
    """`requests` requests that share nothing; see the module."""
    source = _Source("random", seed, scale)
    made = []
    now = 0.0
    for index in range(requests):
        now += source.pause(rate)
        prompt = source.scaled(int(source.random.integers(256, 8193)))
        answer = source.scaled(int(source.random.integers(32, 513)), 2)
        runs = np.array([source.text(prompt)], np.int64)
        first = source.space.generated(answer)
        made.append(BenchRequest(index, f"r{index}", now, None, prompt, answer, runs, first))
    return Workload("workload random", "random", made, {"seed": seed, "scale": scale, "rate": rate})


GENERATORS: dict[str, Callable[..., Workload]] = {
    "chat": chat,
    "agent": agent,
    "documents": documents,
    "random": random,
}
"""Generators by the name that `--workload` takes."""
