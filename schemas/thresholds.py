"""Every threshold that judges a layer, in one place: detectors, Prometheus rules and dashboards read them here.

Defaults come from Jha & Reagen 2025: collapse is hard utilization ≲1e−3 and concentration →1, that is, the variance in
one or two directions.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class CollapseThresholds:
    """A layer collapses when its variance funnels into one or two directions, and stays there.

    Both must hold. Concentration alone is no sign in a narrow layer: k equal directions of D give 1 − k/D, so that
    six of 256 reach 0.977, and healthy Pre-LN layers were seen there during warm-up.
    """

    hard_utilization_enter: float = 1e-3
    """Few directions: hard utilization at or below it,"""
    directions_enter: float = 2.0
    """or hard rank at or below it, which decides in layers narrower than about a thousand."""
    concentration_enter: float = 0.97
    """And concentration at or above it."""
    hard_utilization_leave: float = 3e-3
    """Healthy again: hard utilization above it,"""
    directions_leave: float = 3.0
    """and hard rank above it;"""
    concentration_leave: float = 0.95
    """or concentration below it."""
    window_samples: int = 3
    """Consecutive samples that must agree before the alert fires or resolves."""

    def __post_init__(self) -> None:
        if not 0 <= self.hard_utilization_enter < self.hard_utilization_leave <= 1:
            raise ValueError("hard_utilization_enter must lie below hard_utilization_leave, both in [0, 1]")
        if not 1 <= self.directions_enter < self.directions_leave:
            raise ValueError("directions_enter must lie below directions_leave, both at least 1")
        if not 0 <= self.concentration_leave < self.concentration_enter <= 1:
            raise ValueError("concentration_leave must lie below concentration_enter, both in [0, 1]")
        if self.window_samples < 1:
            raise ValueError(f"window_samples must be at least 1, got {self.window_samples}")


@dataclass(frozen=True, kw_only=True, slots=True)
class NonFiniteThresholds:
    """A layer is not finite from the first sample with a NaN or an infinity on."""

    leave_samples: int = 3
    """Consecutive finite samples before the alert resolves."""

    def __post_init__(self) -> None:
        if self.leave_samples < 1:
            raise ValueError(f"leave_samples must be at least 1, got {self.leave_samples}")


COLLAPSE = CollapseThresholds()
NON_FINITE = NonFiniteThresholds()

STALE_AFTER_SECONDS = 900
"""A running run without a new record for this long has stale telemetry."""
