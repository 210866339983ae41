"""A driver that is frozen for longer than its lease, and wakes while another one has its request's id."""

from __future__ import annotations

import os
import signal

from .heads import Start, said, stderr, tell

SHARED = """
def stamp(inputs, batch):
    import torch
    [shard] = inputs.shards
    size = shard.kv_blocks.shape[3]
    for row, ctx in enumerate(batch):
        w, values, value = ctx.tokens, [], 1
        for token in w.all.tolist():
            value = (31 * value + token + 7) % 1_000_003
            values.append(float(value))
        at = torch.arange(w.processed_length, w.processed_length + w.active_length)
        pages = shard.lookup_table[row][at // size].long()
        rows = torch.tensor(values[w.processed_length : w.processed_length + w.active_length])
        shard.kv_blocks[pages, :, :, at % size] = rows[:, None, None, None, None]
    return len(batch)

def right(ctx):
    [pages] = manager.read_pages(manager.get_req_blocks(ctx.request_id, 0), 0)
    got, value, want = pages[:, 0, 0, :, 0, 0].flatten().tolist(), 1, []
    for token in ctx.tokens.all.tolist():
        value = (31 * value + token + 7) % 1_000_003
        want.append(float(value))
    n = ctx.tokens.processed_length
    return n > 0 and got[:n] == want[:n]

def began(name, tokens):
    ctx = TextContext(name, tokens, 100)
    [placed] = manager.try_admit([ctx], [0])
    assert placed.error is None, placed.error
    manager.execute([[ctx], []], stamp)
    ctx.update(7)
    manager.step([[ctx], []])
    return ctx

manager = manage(join())
"""
FROZEN = """
ctx = began("r", list(range(9)))
say(pid=os.getpid(), client=manager._calls.client)
sys.stdin.readline()
calls = {
    "alloc": lambda: manager.alloc(ctx, 0),
    "alloc_many": lambda: manager.alloc_many([[ctx], []]),
    "step": lambda: manager.step([[ctx], []]),
    "execute": lambda: manager.execute([[ctx], []], stamp),
    "runtime_inputs": lambda: manager.runtime_inputs([[ctx], []]),
    "tick": lambda: manager.tick([Tick(step=[ctx], alloc=[ctx], execute=[ctx]), Tick()], stamp),
    "tick-release": lambda: manager.tick([Tick(release=["r"]), Tick()]),
    "release": lambda: manager.release("r", 0),
}
told = {}
for name, call in calls.items():
    try:
        told[name] = repr(call())
    except RaykError as error:
        told[name] = [type(error).__name__, getattr(error, "client", ""), getattr(error, "owner", "")]
say(told=told)
sys.stdin.readline()
manager.shutdown(force=True)
"""
OTHER = """
deadline = time.monotonic() + 30 * SCALE
while manager.contains("r", 0) and time.monotonic() < deadline:
    time.sleep(.05)
prompt = [50 + i for i in range(9)]
ctx = began("r", prompt)
say(client=manager._calls.client)
sys.stdin.readline()
manager.alloc(ctx, 0)
manager.execute([[ctx], []], stamp)
third = began("third", prompt + [1, 2])
manager.check_integrity()
say(right=[right(ctx), right(third)], reused=third.cached_prefix_length)
sys.stdin.readline()
"""


def test_a_frozen_driver_cannot_touch_what_another_one_has_now(start: Start) -> None:
    frozen = start(SHARED + FROZEN, "fenced")
    mine = said(frozen)
    os.kill(mine["pid"], signal.SIGSTOP)
    try:
        other = start(SHARED + OTHER, "fenced")
        theirs = said(other)
    finally:
        os.kill(mine["pid"], signal.SIGCONT)
    tell(frozen)
    told = said(frozen)["told"]
    assert told == {call: ["LeaseLostError", mine["client"], theirs["client"]] for call in told}
    assert len(told) == 8
    tell(other)
    assert said(other) == {"right": [True, True], "reused": 8}
    tell(other)
    assert other.wait(20) == 0
    tell(frozen)
    assert frozen.wait(20) == 0
    assert "Traceback" not in stderr(frozen) + stderr(other)
