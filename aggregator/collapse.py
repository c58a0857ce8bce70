"""The collapse detector: has a layer's variance funnelled into one or two directions, and stayed there?

A sample that is neither collapsed nor healthy again keeps the alert as it is; it changes after `window_samples` that
agree, so neither one odd batch nor a value that hovers at a threshold moves it. Source of the thresholds: Jha & Reagen
2025.
"""

from __future__ import annotations

from typing import ClassVar

from ..schemas import CollapseThresholds
from .detector import Detector, Observation


class CollapseDetector(Detector):
    """Follows one layer."""

    kind: ClassVar[str] = "collapse"
    severity: ClassVar[str] = "critical"

    def __init__(self, thresholds: CollapseThresholds) -> None:
        super().__init__(thresholds.window_samples)
        self._thresholds = thresholds

    def _started(self) -> list[Observation]:
        return self._newest(self._thresholds.window_samples, self._collapsed)

    def _ended(self) -> list[Observation]:
        return self._newest(self._thresholds.window_samples, self._healthy)

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
