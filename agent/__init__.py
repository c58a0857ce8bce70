"""What runs beside the training: finding layers, observing them, handing partials over.

`attach` is the door. Names are imported on first use, because the courier process lives in this package too and must
start without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attachment import attach
    from .discovery import FoundLayer, find_layers
    from .handle import Agent
    from .outbox import OutboxLimits
    from .schedule import Schedule
    from .topology import Declared, Parallelism, Watch

__all__ = [
    "Agent",
    "Declared",
    "FoundLayer",
    "OutboxLimits",
    "Parallelism",
    "Schedule",
    "Watch",
    "attach",
    "find_layers",
]

_MODULES = {
    "Agent": "handle",
    "Declared": "topology",
    "FoundLayer": "discovery",
    "OutboxLimits": "outbox",
    "Parallelism": "topology",
    "Schedule": "schedule",
    "Watch": "topology",
    "attach": "attachment",
    "find_layers": "discovery",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
