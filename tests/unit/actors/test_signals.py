"""Whose handler of SIGTERM a process has after Ray started."""

import signal
from types import SimpleNamespace

import pytest

from rayk.actors.signals import own_sigterm


@pytest.mark.parametrize("own", [True, False])
def test_a_handler_of_sigterm_that_a_process_has_is_kept(own: bool) -> None:
    """Ray's takes the place of the default alone."""
    put = list[str]()
    utils = SimpleNamespace(set_sigterm_handler=put.append)
    theirs = utils.set_sigterm_handler
    before = signal.signal(signal.SIGTERM, (lambda number, frame: None) if own else signal.SIG_DFL)
    try:
        with own_sigterm(SimpleNamespace(_private=SimpleNamespace(utils=utils))):
            utils.set_sigterm_handler("Ray's")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert put == ([] if own else ["Ray's"]) and utils.set_sigterm_handler is theirs
