"""The collapse detector: what it calls a collapse, and what does not move it."""

import pytest
from eigenwatch.aggregator.collapse import CollapseDetector
from eigenwatch.aggregator.detector import Observation, Transition
from eigenwatch.schemas import CollapseThresholds
from hypothesis import given
from hypothesis import strategies as st

WIDTH = 2048
WINDOW = 3
THRESHOLDS = CollapseThresholds(window_samples=WINDOW)


def seen(step: int, hard_rank: float, concentration: float, width: int = WIDTH) -> Observation:
    return Observation(step, hard_rank, (hard_rank - 1) / max(width - 1, 1), concentration, width)


def collapsed(step: int) -> Observation:
    return seen(step, 1.4, 0.999)


def healthy(step: int) -> Observation:
    return seen(step, 400.0, 0.5)


def between(step: int) -> Observation:
    """Neither collapsed nor healthy again: hard rank 5 of 2048 is 0.2 % of the width."""
    return seen(step, 5.0, 0.99)


KINDS = {"c": collapsed, "h": healthy, "b": between}


def follow(story: str, thresholds: CollapseThresholds = THRESHOLDS) -> list[tuple[int, bool]]:
    """(step, firing) of each transition; a letter a sample."""
    detector = CollapseDetector(thresholds)
    changes = [detector.update(KINDS[letter](step)) for step, letter in enumerate(story)]
    return [(change.step, change.firing) for change in changes if change is not None]


@pytest.mark.parametrize(
    ("story", "changes"),
    [
        ("hhhhhh", []),
        ("cc", []),
        ("ccc", [(2, True)]),
        ("hhccc", [(4, True)]),
        ("cccccccc", [(2, True)]),
        ("hhchhchh", []),
        ("cchcchcc", []),
        ("ccbccbcc", []),
        ("bbbbbb", []),
        ("ccchh", [(2, True)]),
        ("ccchhh", [(2, True), (5, False)]),
        ("ccchhchhchh", [(2, True)]),
        ("cccbbbbbb", [(2, True)]),
        ("ccchhbhhb", [(2, True)]),
        ("ccchhhccc", [(2, True), (5, False), (8, True)]),
    ],
)
def test_an_alert_changes_after_a_window_of_samples_that_agree(story, changes):
    assert follow(story) == changes


def test_with_a_window_of_one_each_sample_decides():
    assert follow("chbc", CollapseThresholds(window_samples=1)) == [(0, True), (1, False), (3, True)]


@given(st.text("chb", max_size=60), st.integers(1, 5))
def test_alerts_start_and_end_in_turn_and_never_within_a_window(story, window):
    changes = follow(story, CollapseThresholds(window_samples=window))
    assert [firing for _, firing in changes] == [index % 2 == 0 for index in range(len(changes))]
    ends = [-1, *(step for step, _ in changes)]
    for (step, firing), before in zip(changes, ends, strict=False):
        assert step - before >= window
        assert set(story[step - window + 1 : step + 1]) == ({"c"} if firing else {"h"})


def test_a_value_that_hovers_at_a_threshold_fires_once():
    detector = CollapseDetector(THRESHOLDS)
    edge = THRESHOLDS.hard_utilization_enter
    changes = []
    for step in range(40):
        utilization = edge * (0.99 if step < 5 or step % 2 else 1.01)
        changes.append(detector.update(Observation(step, 1 + utilization * (WIDTH - 1), utilization, 0.985, WIDTH)))
    assert [change.firing for change in changes if change is not None] == [True]


@pytest.mark.parametrize(
    ("one", "fires"),
    [
        (seen(0, 1 + 1e-3 * 2047, 0.97), True),  # on both limits
        (seen(0, 1 + 1.01e-3 * 2047, 0.97), False),
        (seen(0, 1 + 1e-3 * 2047, 0.969), False),
        (seen(0, 2.0, 0.99, width=256), True),  # hard utilization 0.4 %: the number of directions decides
        (seen(0, 2.01, 0.99, width=256), False),
        (seen(0, 6.0, 0.977, width=256), False),  # a healthy narrow layer during warm-up
        (seen(0, 1.0, 0.0, width=1), False),  # a single direction is all there is
        (seen(0, 14000.0, 0.3, width=28672), False),
        (seen(0, 20.0, 0.99, width=28672), True),
    ],
)
def test_what_is_a_collapse(one, fires):
    detector = CollapseDetector(CollapseThresholds(window_samples=1))
    assert (detector.update(one) is not None) == fires


@pytest.mark.parametrize(
    ("one", "resolves"),
    [
        (seen(1, 1 + 3.1e-3 * 2047, 0.99), True),
        (seen(1, 1 + 2.9e-3 * 2047, 0.99), False),
        (seen(1, 2.9, 0.99, width=64), False),  # 3 % of the width, but not three directions
        (seen(1, 3.1, 0.99, width=64), True),
        (seen(1, 1.5, 0.949), True),
        (seen(1, 1.5, 0.95), False),
    ],
)
def test_what_ends_a_collapse(one, resolves):
    detector = CollapseDetector(CollapseThresholds(window_samples=1))
    assert detector.update(seen(0, 1.0, 1.0, one.width)).firing
    assert (detector.update(one) is not None) == resolves


def test_an_alert_names_its_reason_and_the_samples_that_made_it():
    detector = CollapseDetector(THRESHOLDS)
    for one in (healthy(0), collapsed(10), collapsed(20)):
        assert detector.update(one) is None
    firing = detector.update(collapsed(30))
    assert isinstance(firing, Transition)
    assert (firing.step, firing.since_step, firing.evidence_steps) == (30, 10, [10, 20, 30])
    for words in ("3 samples", "since step 10", "hard rank 1.40 of 2048", "concentration 0.999", "<= 0.001", ">= 0.97"):
        assert words in firing.reason
    detector.update(healthy(40))
    detector.update(healthy(50))
    resolved = detector.update(healthy(60))
    assert (resolved.step, resolved.since_step, resolved.evidence_steps) == (60, 10, [40, 50, 60])
    assert "spread again" in resolved.reason
