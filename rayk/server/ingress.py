"""The server as a Ray Serve application: any number of ingress replicas over one Cluster.

Serve starts, probes, scales and replaces the ingress; requests are placed by rayk's own router, and tokens go from the
engines to an ingress replica without a Serve handle between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rayk.cluster import Cluster
from rayk.errors import NoReplicaError
from rayk.server.app import application
from rayk.server.service import Service
from rayk.server.settings import ServerSettings

ONGOING = 1024  # requests that Serve gives one ingress replica at a time

_services: dict[str, Service] = {}  # by application, in the process of an ingress replica


def deployment(
    cluster: Callable[[], Cluster],
    models: Sequence[str],
    *,
    name: str = "rayk",
    ingress: int = 2,
    autoscaling: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A serve.Application, for serve.run() or the `import_path` of a YAML.

    `cluster` is called in each ingress replica: it attaches to a Cluster that runs, or opens one of its own. `models`
    and `settings` are those of ServerSettings, `ingress` is how many there are, unless `autoscaling` says it (Serve's
    autoscaling_config), and `options` are others of serve.deployment(). Needs ray[serve].
    """
    from rayk.actors.runtime import serve_library

    serve = serve_library()
    made = ServerSettings(models=tuple(models), **(settings or {}))

    def build() -> Any:
        app = application(cluster(), made)
        _services[name] = app.state.service
        return app

    class Ingress:
        """One ingress replica."""

        def check_health(self) -> None:
            """Serve replaces a replica for which this raises: one that no replica of the Cluster can serve."""
            service = _services.get(name)
            if service is not None and not service.cluster.live:
                raise NoReplicaError("health")

        async def __del__(self) -> None:
            service = _services.pop(name, None)
            if service is not None:
                await service.drain()
                service.cluster.close()

    scaled = {"autoscaling_config": dict(autoscaling)} if autoscaling is not None else {"num_replicas": ingress}
    given: dict[str, Any] = {"name": f"{name}-ingress", "max_ongoing_requests": ONGOING, **scaled, **options}
    return serve.deployment(**given)(serve.ingress(build)(Ingress)).bind()
