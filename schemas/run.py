"""What an agent announces about its run before the first partial: the layers, and which ranks contribute to each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from .keys import SITES, check_run_id
from .tiles import row_blocks
from .wire import MAX_NUMBER, MAX_WIDTH


class Block(NamedTuple):
    """What one rank sends of a record's scatter."""

    share: int
    """The lowest rank of the rank's share."""
    rows: tuple[int, int]
    """[start, stop)"""


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
    shares: tuple[tuple[int, ...], ...]
    """The ranks whose partials make this layer's record complete. A share is a set of tokens, held by one rank, or by
    the ranks of a tensor-parallel group, which send blocks of rows of its scatter in this order."""

    paired: bool = False
    """Whether the layer's other site is sampled in the same steps, so that a record may wait for its sibling."""

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise ValueError(f"site must be one of {SITES}, got {self.site!r}")
        for name, value, least, most in (
            ("layer", self.layer, 0, MAX_NUMBER),
            ("width", self.width, 1, MAX_WIDTH),
            ("expert", self.expert or 0, 0, MAX_NUMBER),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name} must lie in [{least}, {most}], got {value} for {self.name}")
        if len(set(self.ranks)) != len(self.ranks):
            raise ValueError(f"a rank holds one share of a layer, got shares={self.shares}")

    @property
    def ranks(self) -> tuple[int, ...]:
        """All ranks of all shares, ascending."""
        return tuple(sorted(rank for share in self.shares for rank in share))

    def block_of(self, rank: int) -> Block | None:
        """What this rank sends; None for a rank that does not hold this layer."""
        for share in self.shares:
            if rank in share:
                return Block(min(share), row_blocks(self.width, len(share))[share.index(rank)])
        return None


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
    latest_only: bool = False
    """Whether a layer's step need not be solved once a newer one waits; its record says so and has no metrics."""

    def __post_init__(self) -> None:
        check_run_id(self.run_id)

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> RunDescription:
        """Raises ValueError where the wire form is not a description that this version understands."""
        try:
            layers = tuple(
                LayerDescription(**(layer | {"shares": tuple(map(tuple, layer["shares"]))})) for layer in wire["layers"]
            )
            return cls(**(wire | {"layers": layers}))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"this run's description is not understood ({error}): agent and aggregator are of different versions, "
                "install the same eigenwatch on both sides"
            ) from error
