"""Two drivers ask real replicas for more than they can do, for seconds. The whole proof is `rayk bench overload`."""

from __future__ import annotations

import pytest

from rayk.bench.overload import FLOOD, POLITE, Overload, OverloadSettings


@pytest.mark.usefixtures("session")
def test_an_overload_is_turned_away_and_what_is_let_in_is_served() -> None:
    """What holds however busy this machine is; how fast it all goes is for the command to judge."""
    settings = OverloadSettings(alone=2.0, capacity=3.0, once=2.0, seconds=5.0, max_waiting=16, address="auto")
    overload = Overload(settings)
    try:
        result = overload.measure()
        overload._manager.check_integrity()
        left = [overload._manager.get_num_used_pages(r) for r in range(settings.replicas)]
    finally:
        overload.close()
    assert left == [0, 0], "everything was given back"
    ok = {line.what: line.ok for line in result.verdicts}
    assert ok["rejections are typed, with a time"], result.verdicts
    assert ok["longest wait, s"] and ok["most that waited"], result.verdicts
    assert ok["growth of any process, MiB"], result.verdicts
    over = result.phases["over"]
    assert over[FLOOD].refused > over[FLOOD].done > 0, "it is too much"
    assert over[POLITE].done, "and yet the polite one is served"
