"""The detector of what is not finite: a NaN or an infinity among a layer's post-activations.

One sample is enough, since there is no such batch in a healthy run; the alert ends after `leave_samples` finite ones.
"""

from __future__ import annotations

from typing import ClassVar

from ..schemas import NonFiniteThresholds
from .detector import Detector, Observation


class NonFiniteDetector(Detector):
    """Follows one layer."""

    kind: ClassVar[str] = "non_finite"
    severity: ClassVar[str] = "critical"

    def __init__(self, thresholds: NonFiniteThresholds) -> None:
        super().__init__(thresholds.leave_samples)
        self._thresholds = thresholds

    def _reads(self, seen: Observation) -> bool:
        return True

    def _started(self) -> list[Observation]:
        return self._newest(1, lambda one: not one.finite)

    def _ended(self) -> list[Observation]:
        return self._newest(self._thresholds.leave_samples, lambda one: one.finite)

    def _reason(self, seen: Observation) -> str:
        if self._firing:
            return (
                f"NaN or infinite post-activations in the sample of step {seen.step}: no metric can be computed of it"
            )
        return f"finite again over {self._thresholds.leave_samples} samples"
