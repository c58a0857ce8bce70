"""The overhead contract: what sampling costs this job, and how far the cadence must be stretched for it.

One rank measures and decides, since ranks of one job wait for each other in every step: its step is everybody's.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping

from .schedule import Schedule

WARM_UP_STEPS = 2
"""Steps whose time says nothing: compilation, first allocations."""
MAX_STRETCH = 1 << 30
LEAST_SAMPLES = 3
"""A single slow one shall not stretch the cadence far."""


class Meter:
    """The time of steps, sampled and not, and the stall that a sampled one has."""

    def __init__(self, asynchronous: bool = False) -> None:
        """`asynchronous`: an accelerator works on after our calls have returned."""
        self._asynchronous = asynchronous
        self._plain: deque[float] = deque(maxlen=50)
        self._sampled: deque[float] = deque(maxlen=9)
        self._timed: deque[float] = deque(maxlen=9)
        self._stalls: dict[Schedule, deque[float]] = {}
        """The part of the timed stall that its places have."""
        self._stride = 1
        self._seen = 0

    def ended(self, seconds: float, stalls: Mapping[Schedule, float], stride: int = 1) -> None:
        """A step ended: its time, and what of it was measured inside our own calls, by the schedule that it served;
        empty where the step was not sampled. `stride` is how much steps rise by.
        """
        self._seen += 1
        self._stride = stride
        if self._seen <= WARM_UP_STEPS:
            return
        if not stalls:
            self._plain.append(seconds)
            return
        self._sampled.append(seconds)
        self._timed.append(sum(stalls.values()))
        for schedule, stall in stalls.items():
            self._stalls.setdefault(schedule, deque(maxlen=9)).append(stall)

    @property
    def step_seconds(self) -> float | None:
        """Of a step that is not sampled, the median."""
        if self._plain:
            return statistics.median(self._plain)
        if self._sampled:
            pairs = zip(self._sampled, self._timed, strict=True)
            return max(statistics.median(whole - own for whole, own in pairs), 1e-9)
        return None

    @property
    def stall_seconds(self) -> float | None:
        """What sampling adds to a step: as timed in our calls, or, where an accelerator works on after these, by the
        difference of step times if that is more. None before there is a sample.
        """
        if not self._timed:
            return None
        timed = statistics.median(self._timed)
        if not self._asynchronous or len(self._plain) < 5 or len(self._sampled) < 3:
            return timed
        return max(timed, statistics.median(self._sampled) - statistics.median(self._plain))

    def ratio(self, stretch: int = 1, step: int = 0) -> float | None:
        """The stalls of all schedules that go on after `step`, each spread over its own steps between samples, as a
        share of the steps' time."""
        stall, seconds = self.stall_seconds, self.step_seconds
        if stall is None or seconds is None:
            return None
        spread = sum(
            statistics.median(stalls) / max(schedule.every * stretch / self._stride, 1.0)
            for schedule, stalls in self._stalls.items()
            if schedule.end is None or step < schedule.end
        )
        timed = statistics.median(self._timed)
        return spread * (stall / timed if timed > 0 else 1.0) / seconds

    @property
    def settled(self) -> bool:
        """Whether enough samples were seen to judge by."""
        return len(self._sampled) >= LEAST_SAMPLES


def wanted_stretch(meter: Meter, max_overhead: float, stretch: int, step: int = 0) -> int:
    """The stretch under which the contract is kept: a power of two, so that cadences nest.

    It rises at once, and falls only where half of it would cost half of what is allowed, so that it does not swing.
    """
    if meter.ratio() is None or not meter.settled:
        return stretch

    def cost(stretch: int) -> float:
        return meter.ratio(stretch, step) or 0.0

    if cost(stretch) > max_overhead:
        while cost(stretch) > max_overhead and stretch < MAX_STRETCH:
            stretch *= 2
        return stretch
    while stretch > 1 and cost(stretch // 2) <= max_overhead / 2:
        stretch //= 2
    return stretch
