"""Pairs of sites: who waits for whom, for how long, and what both know then."""

import numpy as np
import pytest
import torch
from eigenwatch.aggregator.site_pairs import SitePairs, sibling_of
from eigenwatch.aggregator.solved_record import SolvedRecord
from eigenwatch.schemas import RecordKey
from eigenwatch.spectrum import js_divergence

DEADLINE = 60.0
POST = RecordKey("run", 0, 100, 3, "post", None)
PRE = POST._replace(site="pre")
SPECTRA = {"post": [4.0, 2.0, 1.0], "pre": [3.0, 3.0, 3.0]}


def solved(key: RecordKey, eigenvalues: list[float] | None = None) -> SolvedRecord:
    spectrum = np.array(eigenvalues or SPECTRA[key.site], dtype=np.float32)
    return SolvedRecord(key, {"js_divergence": None, "hard_rank": 2.0}, spectrum, ({"kind": "collapse"},))


def divergences(records: list[SolvedRecord]) -> dict[RecordKey, float | None]:
    return {one.key: one.row["js_divergence"] for one in records}


@pytest.fixture
def pairs():
    return SitePairs(DEADLINE)


@pytest.mark.parametrize("first", [POST, PRE])
def test_the_divergence_stands_in_both_rows_whoever_came_first(pairs, first):
    assert pairs.join(solved(first), True, 0.0) == []
    together = pairs.join(solved(sibling_of(first)), False, 1.0)
    expected = js_divergence(torch.tensor(SPECTRA["pre"]), torch.tensor(SPECTRA["post"])).item()
    assert divergences(together) == {first: pytest.approx(expected), sibling_of(first): pytest.approx(expected)}
    assert all(one.row["hard_rank"] == 2.0 and one.alerts for one in together), "the rest is as it was"
    assert pairs.overdue(1e9) == []


def test_a_record_whose_sibling_does_not_come_does_not_wait(pairs):
    assert divergences(pairs.join(solved(POST), False, 0.0)) == {POST: None}


@pytest.mark.parametrize("change", [{"step": 101}, {"layer": 4}, {"expert": 0}, {"attempt": 1}, {"run_id": "other"}])
def test_only_the_other_site_of_the_same_record_is_a_sibling(pairs, change):
    pairs.join(solved(POST), True, 0.0)
    other = PRE._replace(**change)
    assert pairs.join(solved(other), True, 0.0) == []
    assert divergences(pairs.overdue(0.0, everything=True)) == {POST: None, other: None}


def test_nobody_waits_longer_than_the_deadline(pairs):
    pairs.join(solved(POST), True, 10.0)
    pairs.join(solved(POST._replace(step=200)), True, 20.0)
    assert pairs.overdue(10.0 + DEADLINE - 0.001) == []
    assert divergences(pairs.overdue(10.0 + DEADLINE)) == {POST: None}
    assert divergences(pairs.join(solved(PRE), False, 80.0)) == {PRE: None}


def test_a_sibling_that_will_not_be_solved_lets_the_other_go(pairs):
    pairs.join(solved(POST), True, 0.0)
    assert pairs.give_up(POST) == []
    assert divergences(pairs.give_up(PRE)) == {POST: None}
    assert pairs.give_up(PRE) == []


def test_spectra_that_cannot_be_compared_have_no_divergence(pairs):
    for other in (solved(PRE, [1.0, 1.0]), solved(PRE)._replace(eigenvalues=None)):
        pairs.join(solved(POST), True, 0.0)
        assert divergences(pairs.join(other, False, 0.0)) == {POST: None, PRE: None}
