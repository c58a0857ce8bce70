"""What an agent announces about its run before the first partial: the layers, and which ranks contribute to each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .keys import SITES, check_run_id


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerDescription:
    """One observed place of the model."""

    layer: int
    """Global decoder-layer index."""
    site: str
    expert: int | None = None
    name: str
    """Module path in the model."""
    width: int
    """D."""
    ranks: tuple[int, ...]
    """The ranks whose partials make this layer's record complete."""

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise ValueError(f"site must be one of {SITES}, got {self.site!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDescription:
    """One launch of a training job, the same on all of its ranks."""

    run_id: str
    launch_id: str
    """Drawn anew each time the job starts; the aggregator gives each launch its attempt."""
    world_size: int
    layers: tuple[LayerDescription, ...]
    tags: dict[str, str] = field(default_factory=dict)
    """Whatever the user wants to group runs by: norm, family, seed."""

    def __post_init__(self) -> None:
        check_run_id(self.run_id)

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> RunDescription:
        """Raises ValueError or TypeError where the wire form is not a description."""
        layers = tuple(LayerDescription(**(layer | {"ranks": tuple(layer["ranks"])})) for layer in wire["layers"])
        return cls(**(wire | {"layers": layers}))
