"""When to sample: a pure function of step numbers, so that ranks that step together sample together.

Nothing here looks at a clock or at another rank. What depends on time, the overhead contract, comes in as `stretch`, a
factor that all ranks learn ahead of the step from which it holds.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple


class Point(NamedTuple):
    """One scheduled sample: the nominal step, and which of the rotating layer groups it is for."""

    step: int
    turns: range | None
    """Layers with `layer % rotate == turn % rotate` for one of these are sampled; None: all of them."""

    def is_for(self, layer: int, rotate: int) -> bool:
        return self.turns is None or any((layer - turn) % rotate == 0 for turn in self.turns[-rotate:])


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Samples the first step seen, then the first step at or after each scheduled point.

    A trainer's steps may rise by more than one (one that counts micro-steps): no point is missed by it.
    """

    every: int = 100
    """Steps between samples."""
    start: int = 0
    """First step that may be sampled."""
    end: int | None = None
    """Last step that may be sampled; None: no end."""
    dense_start: bool = False
    """Also sample at `start` + 0, 1, 2, 4, 8 … up to `every`: spectra move most in the first steps."""
    rotate: int = 1
    """Share the layers out over so many samples: each sample takes one layer in `rotate`, so that a layer's own
    cadence is `every * rotate`."""
    max_overhead: float | None = None
    """The overhead contract: the stall of a sampled step, spread over the steps up to the next, must not exceed this
    share of their time, such as 0.01; the cadence is stretched until it does not. None: no contract."""

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("start", 0), ("rotate", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                kind = "a positive" if least else "a non-negative"
                raise ValueError(f"{name} must be {kind} integer number of steps, got {value!r}")
        if self.end is not None and (not isinstance(self.end, int) or self.end < self.start):
            raise ValueError(f"end must be None or a step not before start={self.start}, got {self.end!r}")
        if self.max_overhead is not None and not 0 < self.max_overhead <= 1:
            raise ValueError(f"max_overhead must be None or a share of time in (0, 1], got {self.max_overhead}")

    def allows(self, step: int) -> bool:
        """Whether `step` lies between start and end."""
        return self.start <= step and (self.end is None or step <= self.end)

    def due(self, before: int, step: int, stretch: int = 1) -> Point | None:
        """The newest point in (before, step] under a cadence of `every * stretch`; None where there is none.

        Where steps rise by more than the cadence it is for the layers of all the points that lie there.
        """
        if not self.allows(step):
            return None
        since_start = step - self.start
        cadence = self.every * stretch
        newest, last = since_start // cadence, (before - self.start) // cadence
        if newest > last:
            return Point(self.start + newest * cadence, range(max(last + 1, 0), newest + 1))
        if self.dense_start and since_start < self.every:
            dense = self.start + (1 << since_start.bit_length() - 1)
            if dense > before:
                return Point(dense, None)
        return None

    def samples_as(self, other: "Schedule") -> bool:
        """Whether the same steps are sampled; one contract stretches all schedules alike."""
        return replace(self, max_overhead=None) == replace(other, max_overhead=None)

    def sampling_steps(self, stretch: int = 1) -> int:
        """Steps between two samples of one layer."""
        return self.every * self.rotate * stretch
