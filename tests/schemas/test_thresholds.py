"""Thresholds: defaults of the paper, and hysteresis by construction."""

import math

import pytest
from eigenwatch.schemas import COLLAPSE, CollapseThresholds


def test_the_defaults_are_the_papers():
    assert COLLAPSE.hard_utilization_enter == 1e-3
    assert COLLAPSE.concentration_enter == 0.97
    assert CollapseThresholds() == COLLAPSE


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hard_utilization_enter": 3e-3}, "hard_utilization_enter"),
        ({"hard_utilization_enter": -1e-3}, "hard_utilization_enter"),
        ({"hard_utilization_leave": 1.1}, "hard_utilization_leave"),
        ({"hard_utilization_leave": math.nan}, "hard_utilization_leave"),
        ({"directions_enter": 3.0}, "directions_enter"),
        ({"directions_enter": 0.5}, "directions_enter"),
        ({"directions_leave": math.nan}, "directions_leave"),
        ({"concentration_leave": 0.97}, "concentration_leave"),
        ({"concentration_enter": 1.01}, "concentration_enter"),
        ({"concentration_leave": -0.1}, "concentration_leave"),
        ({"concentration_enter": math.nan}, "concentration_enter"),
        ({"window_samples": 0}, "window_samples"),
    ],
)
def test_thresholds_without_room_between_entering_and_leaving_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        CollapseThresholds(**changes)


def test_thresholds_cannot_be_changed_while_they_are_in_use():
    with pytest.raises(AttributeError):
        COLLAPSE.window_samples = 1  # type: ignore[misc]
