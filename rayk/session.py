"""Where replicas run: in this process, or as actors on a Ray cluster.

A session owns what it started. close() (also the end of a `with` block, and atexit) shuts its managers down
and ends the local Ray that it started itself; a cluster that it only joined is left running.
"""

from __future__ import annotations

import atexit
from collections.abc import MutableSet
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

from rayk.errors import ClosedError, ConfigError

if TYPE_CHECKING:
    from rayk.actors.interface import Runtime

RUNTIMES = ("inline", "ray")


class _Closable(Protocol):
    def shutdown(self) -> None: ...
    def leave(self) -> None: ...


class InferenceSession:
    """`runtime="inline"`: everything in this process. `runtime="ray"`: replica actors and a scheduler actor.

    `address=None` joins the Ray that this process is connected to, or one that runs on this machine or that
    RAY_ADDRESS names, and starts an embedded one otherwise; "local" always starts an embedded one. With `name=`
    actors are detached: they outlive this driver, and another session of that name uses them. Messages to actors go
    by sockets where they can, and by Ray's calls otherwise; `sockets=False`: by calls only. With a `secret` what is
    started under the name can be attached to with that secret only (SECURITY.md says what that is good for).
    """

    def __init__(
        self,
        runtime: str = "inline",
        address: str | None = None,
        name: str | None = None,
        *,
        sockets: bool = True,
        secret: str | bytes | None = None,
        **ray_options: Any,
    ) -> None:
        if runtime not in RUNTIMES:
            raise ConfigError(f"runtime {runtime!r} is not one of {RUNTIMES}")
        if runtime == "inline" and (address is not None or name is not None or ray_options):
            raise ConfigError("address, name and Ray options need runtime='ray'")
        if secret is not None and name is None:
            raise ConfigError("a secret is for a session with a name, to which others can attach")
        self.runtime = runtime
        self.name = name
        self._ray: Runtime | None = None
        self._closed = False
        # A manager on Ray must be shut down; one in this process ends with its last reference.
        self._managers: MutableSet[_Closable] = WeakSet() if runtime == "inline" else set()
        self.managers_made = 0
        if runtime == "ray":
            from rayk.actors.runtime import RayRuntime
            from rayk.actors.secret import Secret

            known = Secret(secret) if secret is not None else None
            self._ray = RayRuntime.connect(address, f"rayk-{name}" if name else None, sockets, **ray_options)
            self._ray.secret = known
        atexit.register(self.close)

    @property
    def ray(self) -> Runtime:
        """The Ray calls of this session; ConfigError for an inline one."""
        self.check_open()
        if self._ray is None:
            raise ConfigError("this session runs inline; use InferenceSession(runtime='ray')")
        return self._ray

    def check_open(self) -> None:
        """ClosedError after close()."""
        if self._closed:
            raise ClosedError("this session")

    def adopt(self, manager: _Closable, counts: bool = True) -> None:
        """End `manager` with this session. The n-th manager that `counts` of one named session is the n-th of all of
        that name."""
        self._managers.add(manager)
        self.managers_made += counts

    def dismiss(self, manager: _Closable) -> None:
        """`manager` was shut down."""
        self._managers.discard(manager)

    def close(self) -> None:
        """Shut down what this session started; managers of a named session stay. Safe to call twice."""
        if self._closed:
            return
        atexit.unregister(self.close)
        try:
            for manager in list(self._managers):
                manager.shutdown() if self.name is None else manager.leave()
        finally:
            self._closed = True
            if self._ray is not None:
                self._ray.disconnect()

    def __enter__(self) -> InferenceSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
