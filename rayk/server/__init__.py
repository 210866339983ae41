"""A Cluster behind the OpenAI API: routes, streams, errors, limits (docs/serving.md). Needs the extra `server`.

`application(cluster, settings)` is an ASGI application, `deployment(..)` one of Ray Serve's.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayk.server.app import application
    from rayk.server.ingress import deployment
    from rayk.server.settings import Limits, ServerSettings

_HOMES = {"application": "app", "deployment": "ingress", "Limits": "settings", "ServerSettings": "settings"}

__all__ = ["Limits", "ServerSettings", "application", "deployment"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
