"""The collapse detector: has a layer's variance funnelled into one or two directions, and stayed there?

A pure function of one layer's records, in the order of their steps. A sample that is neither collapsed
nor healthy again keeps the alert as it is; it changes after `window_samples` that agree, so neither one odd
batch nor a value that hovers at a threshold moves it. Source of the thresholds: Jha & Reagen 2025.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from ..schemas import CollapseThresholds


class Observation(NamedTuple):
    """What the detector reads of a record."""

    step: int
    hard_rank: float
    hard_utilization: float
    spectral_concentration: float
    width: int


class Transition(NamedTuple):
    """The alert starts or ends."""

    firing: bool
    step: int
    since_step: int
    """First of the samples that made the alert."""
    reason: str
    evidence_steps: list[int]


class CollapseDetector:
    """Follows one layer. `update` with each record returns what changed."""

    kind = "collapse"
    severity = "critical"

    def __init__(self, thresholds: CollapseThresholds) -> None:
        self._thresholds = thresholds
        self._window: deque[Observation] = deque(maxlen=thresholds.window_samples)
        self._firing = False
        self._since_step = 0

    def recall(self, window: Iterable[Observation]) -> None:
        """Takes up what was seen before a restart, oldest first, and says nothing of it."""
        self._window.extend(window)

    def recall_firing(self, since_step: int) -> None:
        """Takes up that the alert fires."""
        self._firing, self._since_step = True, since_step

    def update(self, seen: Observation) -> Transition | None:
        self._window.append(seen)
        if len(self._window) < self._thresholds.window_samples:
            return None
        agrees = self._healthy if self._firing else self._collapsed
        if not all(agrees(one) for one in self._window):
            return None
        self._firing = not self._firing
        if self._firing:
            self._since_step = self._window[0].step
        steps = [one.step for one in self._window]
        return Transition(self._firing, seen.step, self._since_step, self._reason(seen), steps)

    def _collapsed(self, seen: Observation) -> bool:
        limits = self._thresholds
        few = seen.hard_utilization <= limits.hard_utilization_enter or seen.hard_rank <= limits.directions_enter
        return few and seen.spectral_concentration >= limits.concentration_enter

    def _healthy(self, seen: Observation) -> bool:
        limits = self._thresholds
        many = seen.hard_utilization > limits.hard_utilization_leave and seen.hard_rank > limits.directions_leave
        return many or seen.spectral_concentration < limits.concentration_leave

    def _reason(self, seen: Observation) -> str:
        limits = self._thresholds
        numbers = (
            f"hard rank {seen.hard_rank:.2f} of {seen.width}, hard utilization {seen.hard_utilization:.2g}, "
            f"concentration {seen.spectral_concentration:.3f}"
        )
        if self._firing:
            return (
                f"variance has sat in one or two directions for {limits.window_samples} samples, since step "
                f"{self._since_step}: {numbers} (limits: hard utilization <= {limits.hard_utilization_enter:g} or "
                f"hard rank <= {limits.directions_enter:g}, and concentration >= {limits.concentration_enter:g})"
            )
        return f"variance has spread again over {limits.window_samples} samples: {numbers}"
