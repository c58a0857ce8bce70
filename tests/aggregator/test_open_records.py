"""The rules of merging: once a rank, closed when complete or overdue, open again for whom comes late, bounded."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from eigenwatch.agent.combine import combine
from eigenwatch.aggregator.open_records import ClosedRecord, OpenRecords
from eigenwatch.schemas import PartialCovariance, RecordKey, arrived_from_wire
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.spectrum.cases import blocks_of, partial_of, two_pass_covariance

WIDTH, DEADLINE = 6, 60.0
GROUP_BYTES = 8 * (WIDTH * WIDTH + WIDTH)
"""Of a group of one partial."""
KEY = RecordKey("run", 0, 100, 3, "post", None)


def rows(rank: int, step: int = 100) -> torch.Tensor:
    return torch.randn(9 + rank, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank)) + rank


def partial(rank: int, step: int = 100, **changes) -> PartialCovariance:
    return partial_of(rows(rank, step), rank=rank, key=KEY._replace(step=step, **changes))


def not_finite(rank: int) -> PartialCovariance:
    return PartialCovariance(
        key=KEY,
        rank=rank,
        share=rank,
        rows=(0, WIDTH),
        tokens=5,
        mean=np.full(WIDTH, np.nan),
        scatter=np.empty(0, np.float32),
        trace=math.nan,
        frobenius_sq=math.nan,
        captured_at=1.0,
    )


@pytest.fixture
def records():
    return OpenRecords(DEADLINE, 1 << 20)


def ranks(closed: list[ClosedRecord]) -> list[tuple[int, set[int]]]:
    return [(one.key.step, set(one.group.ranks)) for one in closed]


def test_a_record_closes_when_its_last_rank_has_come(records):
    for rank in (2, 0):
        assert records.merge(partial(rank), range(3), now=0.0) == "merged"
        assert records.close_due(1.0) == []
    assert records.merge(partial(1), range(3), now=2.0) == "merged"
    (closed,) = records.close_due(2.0)
    assert closed.key == KEY
    assert closed.complete
    assert closed.ranks_expected == range(3)
    whole = two_pass_covariance(torch.cat([rows(rank) for rank in range(3)]))
    closed.fold()
    torch.testing.assert_close(closed.group.covariance(), whole, rtol=1e-5, atol=1e-5)
    assert records.close_due(1e9) == []
    records.settled(KEY)
    assert len(records) == 0


def test_a_record_closes_incomplete_at_its_deadline_counted_from_the_first_rank(records):
    records.merge(partial(0), range(3), now=10.0)
    records.merge(partial(1), range(3), now=10.0 + DEADLINE - 1)
    assert records.close_due(10.0 + DEADLINE - 0.001) == []
    (closed,) = records.close_due(10.0 + DEADLINE)
    assert not closed.complete
    assert closed.group.ranks == {0, 1}


def test_a_record_says_when_its_last_rank_captured_it(records):
    for rank, captured_at in ((0, 5.0), (1, 9.0), (2, 7.0)):
        records.merge(dataclasses.replace(partial(rank), captured_at=captured_at), range(3), 0.0)
    assert records.close_due(0.0)[0].captured_at == 9.0


def test_the_same_rank_twice_counts_once(records):
    records.merge(partial(0), range(2), 0.0)
    assert records.merge(partial(0), range(2), 0.0) == "duplicate"
    records.merge(partial(1), range(2), 0.0)
    (closed,) = records.close_due(0.0)
    assert closed.group.tokens == len(rows(0)) + len(rows(1))
    assert records.merge(partial(1), range(2), 0.0) == "duplicate"


def test_records_differ_by_every_part_of_their_key(records):
    changes = [{}, {"run_id": "other"}, {"attempt": 1}, {"layer": 4}, {"site": "pre"}, {"expert": 0}]
    for change in changes:
        assert records.merge(partial(0, **change), range(1), 0.0) == "merged"
    assert records.merge(partial(0, step=101), range(1), 0.0) == "merged"
    assert {one.key for one in records.close_due(0.0)} == {
        *(KEY._replace(**change) for change in changes),
        KEY._replace(step=101),
    }


def test_the_oldest_step_is_solved_first(records):
    for step, layer in ((200, 0), (100, 1), (300, 0), (100, 0)):
        records.merge(partial(0, step=step, layer=layer), range(1), 0.0)
    assert [(one.key.step, one.key.layer) for one in records.close_due(0.0)] == [(100, 0), (100, 1), (200, 0), (300, 0)]


def test_everything_can_be_closed_before_its_time(records):
    records.merge(partial(0), range(2), 0.0)
    records.merge(partial(0, step=200), range(1), 0.0)
    assert ranks(records.close_due(0.0, everything=True)) == [(100, {0}), (200, {0})]
    assert records.close_due(0.0, everything=True) == []
    assert len(records) == 2, "until they are durable"


def test_a_record_that_is_being_written_takes_no_other_rank(records):
    records.merge(partial(0), range(2), 0.0)
    (closed,) = records.close_due(DEADLINE)
    assert records.merge(partial(1), range(2), DEADLINE) == "busy"
    assert closed.group.ranks == {0}


def test_a_late_rank_opens_an_incomplete_record_again_and_completes_it(records):
    records.merge(partial(0), range(2), 0.0)
    records.close_due(DEADLINE)
    records.settled(KEY)
    assert len(records) == 0
    assert records.merge(partial(0), range(2), 100.0) == "duplicate"
    assert records.merge(partial(1), range(2), 100.0) == "merged"
    (closed,) = records.close_due(100.0)
    assert closed.complete
    whole = two_pass_covariance(torch.cat([rows(0), rows(1)]))
    closed.fold()
    torch.testing.assert_close(closed.group.covariance(), whole, rtol=1e-5, atol=1e-5)


def test_a_record_that_was_opened_again_has_a_deadline_of_its_own(records):
    records.merge(partial(0), range(3), 0.0)
    records.close_due(DEADLINE)
    records.settled(KEY)
    records.merge(partial(1), range(3), 100.0)
    assert records.close_due(100.0 + DEADLINE - 0.001) == []
    assert ranks(records.close_due(100.0 + DEADLINE)) == [(100, {0, 1})]


def test_a_rank_that_is_not_finite_makes_the_record_so_and_poisons_no_other(records):
    records.merge(partial(0), range(3), 0.0)
    records.merge(not_finite(1), range(3), 0.0)
    records.merge(partial(2), range(3), 0.0)
    records.merge(partial(0, step=101), range(1), 0.0)
    broken, healthy = records.close_due(0.0)
    assert broken.complete
    assert not broken.group.finite
    assert broken.group.tokens == len(rows(0)) + 5 + len(rows(2))
    assert healthy.group.finite


def test_when_memory_is_full_a_new_record_must_wait_and_an_open_one_goes_on():
    records = OpenRecords(DEADLINE, 2 * GROUP_BYTES + 200)
    assert records.merge(partial(0, step=1), range(2), 0.0) == "merged"
    assert records.merge(partial(0, step=2), range(2), 0.0) == "merged"
    assert records.merge(partial(0, step=3), range(2), 0.0) == "busy"
    assert records.merge(partial(1, step=1), range(2), 0.0) == "merged"
    assert len(records) == 2
    (closed,) = records.close_due(0.0)
    assert records.merge(partial(0, step=3), range(2), 0.0) == "busy", "what is being written still takes memory"
    records.settled(closed.key)
    assert records.merge(partial(0, step=3), range(2), 0.0) == "merged"


def test_one_record_is_merged_however_little_memory_there_is():
    records = OpenRecords(DEADLINE, 1)
    for step in range(3):
        assert records.merge(partial(0, step=step), range(2), 0.0) == "merged"
        assert records.merge(partial(0, step=step + 1), range(2), 0.0) == "busy"
        assert records.merge(partial(1, step=step), range(2), 0.0) == "merged"
        (closed,) = records.close_due(0.0)
        records.settled(closed.key)


def test_what_is_kept_for_late_ranks_gives_way_to_what_is_new():
    records = OpenRecords(DEADLINE, 2 * GROUP_BYTES)
    for step in (1, 2):
        records.merge(partial(0, step=step), range(2), 0.0)
    for closed in records.close_due(DEADLINE):
        records.settled(closed.key)
    assert records.merge(partial(0, step=3), range(2), DEADLINE) == "merged"
    assert records.merge(partial(0, step=2), range(2), DEADLINE) == "duplicate", "the newer one is kept"
    assert records.merge(partial(1, step=1), range(2), DEADLINE) == "merged", (
        "the older one is forgotten: this opens a new one"
    )
    assert ranks(records.close_due(1e9)) == [(1, {1}), (3, {0})]


def test_what_is_kept_for_late_ranks_goes_when_its_launch_ends():
    records = OpenRecords(DEADLINE, 1 << 20)
    for attempt in (0, 1):
        records.merge(partial(0, attempt=attempt), range(2), 0.0)
    for closed in records.close_due(DEADLINE):
        records.settled(closed.key)
    records.forget({("run", 0), ("other", 1)})
    assert records.merge(partial(0, attempt=0), range(2), 100.0) == "merged"
    assert records.merge(partial(0, attempt=1), range(2), 100.0) == "duplicate"


def blocks(*ranks: int, step: int = 100) -> list[PartialCovariance]:
    return blocks_of(partial(min(ranks), step), ranks)


def test_a_record_of_blocks_closes_when_the_last_rank_has_come(records):
    upper, lower = blocks(0, 1)
    for one in (lower, partial(2)):
        records.merge(one, range(3), 0.0)
        assert records.close_due(0.0) == []
    records.merge(upper, range(3), 0.0)
    (closed,) = records.close_due(0.0)
    assert closed.complete
    assert closed.group.tokens == len(rows(0)) + len(rows(2))


def test_an_unfinished_share_is_left_out_and_counts_when_the_rest_has_come_late(records):
    upper, lower = blocks(0, 1)
    records.merge(upper, range(3), 0.0)
    records.merge(partial(2), range(3), 0.0)
    (early,) = records.close_due(DEADLINE)
    assert (early.complete, early.group.tokens) == (False, len(rows(2)))
    early.fold()
    torch.testing.assert_close(early.group.covariance(), two_pass_covariance(rows(2)), rtol=1e-5, atol=1e-5)
    records.solved(KEY)
    records.settled(KEY)
    assert records.merge(lower, range(3), 100.0) == "merged"
    (late,) = records.close_due(100.0)
    assert (late.complete, late.group.tokens) == (True, len(rows(0)) + len(rows(2)))


def test_a_block_that_contradicts_its_share_leaves_the_record_as_it_was(records):
    upper, lower = blocks(0, 1)
    records.merge(upper, range(2), 0.0)
    records.close_due(DEADLINE)
    records.settled(KEY)
    with pytest.raises(ValueError, match="tokens"):
        records.merge(dataclasses.replace(lower, tokens=3), range(2), DEADLINE)
    assert len(records) == 0, "it was not opened again"
    records.merge(lower, range(2), DEADLINE)
    assert records.close_due(DEADLINE)[0].complete


def test_a_rank_without_tokens_has_come(records):
    records.merge(partial_of(torch.empty(0, WIDTH), rank=1, key=KEY), range(2), 0.0)
    assert records.close_due(0.0) == []
    records.merge(partial(0), range(2), 0.0)
    (closed,) = records.close_due(0.0)
    assert (closed.complete, closed.group.tokens) == (True, len(rows(0)))


@pytest.mark.parametrize(
    ("forms", "said"),
    [
        (["scatter", "scatter"], "scatter"),
        (["samples", "samples"], "samples"),
        (["scatter", "samples"], "mixed"),
        (["samples", "nothing"], "samples"),
        (["nothing", "nothing"], "scatter"),
    ],
)
def test_a_record_says_in_which_form_its_tokens_came(records, forms, said):
    for rank, form in enumerate(forms):
        nothing = partial_of(torch.empty(0, WIDTH), rank=rank, key=KEY)
        records.merge(
            nothing if form == "nothing" else partial(rank), range(2), 0.0, form.replace("nothing", "scatter")
        )
    assert records.close_due(0.0)[0].form == said


def test_a_record_says_the_schedule_and_the_cost_of_its_slowest_rank(records):
    for rank, cost in enumerate((0.01, None, 0.03, 0.02)):
        one = dataclasses.replace(partial(rank), overhead_ratio=cost, sampling_steps=None if cost is None else 50)
        records.merge(one, range(4), 0.0)
    records.merge(partial(0, step=200), range(1), 0.0)
    with_cost, without = records.close_due(0.0)
    assert (with_cost.sampling_steps, with_cost.overhead_ratio) == (50, 0.03)
    assert (without.sampling_steps, without.overhead_ratio) == (None, None)


def test_a_complete_record_that_is_solved_takes_that_of_its_spectrum_and_still_knows_its_ranks():
    records = OpenRecords(DEADLINE, GROUP_BYTES + 4 * WIDTH)
    records.merge(partial(0), range(1), 0.0)
    records.close_due(0.0)
    assert records.unsolved(KEY)
    assert records.merge(partial(0, step=200), range(1), 0.0) == "busy"
    records.solved(KEY)
    assert not records.unsolved(KEY)
    assert records.merge(partial(0, step=200), range(1), 0.0) == "merged"
    assert records.merge(partial(0), range(1), 0.0) == "duplicate"
    assert KEY in records


def test_an_incomplete_record_that_is_solved_keeps_what_a_late_rank_is_added_to():
    records = OpenRecords(DEADLINE, GROUP_BYTES)
    records.merge(partial(0), range(2), 0.0)
    records.close_due(DEADLINE)
    records.solved(KEY)
    assert records.merge(partial(0, step=200), range(1), 0.0) == "busy"
    records.settled(KEY)
    records.merge(partial(1), range(2), 100.0)
    assert records.unsolved(KEY)
    assert records.close_due(100.0)[0].group.tokens == len(rows(0)) + len(rows(1))


def test_who_would_be_turned_away_can_be_asked_before_and_changes_nothing():
    records = OpenRecords(DEADLINE, 2 * GROUP_BYTES)
    for step in (1, 2):
        records.merge(partial(0, step=step), range(2), 0.0)

    def away(rank: int, step: int) -> str | None:
        return records.turned_away(partial(rank, step=step), 0.0)

    first, second = (KEY._replace(step=step) for step in (1, 2))
    assert away(0, first.step) == "duplicate"
    assert away(1, first.step) is None
    assert away(0, KEY.step) == "busy"
    for closed in records.close_due(DEADLINE):
        assert away(1, closed.key.step) == "busy"
        records.settled(closed.key)
    assert away(0, KEY.step) is None, "late ones would give way"
    assert away(0, first.step) == away(0, second.step) == "duplicate"


events = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(0, 3), st.integers(0, 2)),
        st.tuples(st.just("wait"), st.sampled_from([1.0, DEADLINE]), st.just(0)),
        st.tuples(st.sampled_from(["solve", "settle"]), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@given(events, st.sampled_from([1, 3 * GROUP_BYTES, 1 << 20]))
@settings(deadline=None, max_examples=150)
def test_whatever_comes_in_whatever_order_no_rank_counts_twice_and_no_record_closes_early(events, memory_bytes):
    records, now, being_written = OpenRecords(DEADLINE, memory_bytes), 0.0, []
    merged: dict[int, set[int]] = {}
    for what, first, rank in events:
        if what == "push":
            answer = records.merge(partial(rank, step=first), range(3), now)
            assert answer in ("merged", "duplicate", "busy")
            if answer == "merged":
                merged.setdefault(first, set()).add(rank)
            elif answer == "duplicate":
                assert rank in merged[first]
        elif what == "wait":
            now += first
        elif what == "solve":
            for closed in being_written:
                if records.unsolved(closed.key):
                    records.solved(closed.key)
        else:
            for closed in being_written:
                records.settled(closed.key)
            being_written = []
        for closed in records.close_due(now):
            assert closed.group.ranks <= merged[closed.key.step]
            assert closed.group.tokens == sum(len(rows(one)) for one in closed.group.ranks)
            assert closed.key not in [other.key for other in being_written]
            being_written.append(closed)
    assert len(records) <= 4


def test_a_run_that_floods_leaves_another_its_part_of_the_memory():
    records = OpenRecords(DEADLINE, 4 * GROUP_BYTES)
    for step in (1, 2, 3, 4):
        assert records.merge(partial(0, step=step), range(1), 0.0) == "merged", "alone it has all"
    assert records.merge(partial(0, step=5), range(1), 0.0) == "busy"
    assert records.merge(partial(0, run_id="other"), range(1), 0.0) == "busy", "what is there stays"
    records.close_due(0.0)
    for step in (1, 2):
        records.settled(KEY._replace(step=step))
    assert records.merge(partial(0, run_id="other"), range(1), 0.0) == "merged"
    assert records.merge(partial(0, step=5), range(1), 0.0) == "busy", "it has its half, and the other may want its own"
    assert records.merge(partial(0, step=6, run_id="other"), range(1), 0.0) == "merged"


def test_a_run_that_has_nothing_open_yet_gets_its_part_of_the_memory_too():
    records = OpenRecords(DEADLINE, 4 * GROUP_BYTES)
    for step in (1, 2, 3, 4):
        records.merge(partial(0, step=step), range(1), 0.0)
    assert records.merge(partial(0, run_id="other"), range(1), 0.0) == "busy"
    records.close_due(0.0)
    records.settled(KEY._replace(step=1))
    assert records.merge(partial(0, step=5), range(1), 1.0) == "busy", "another run asks for what is free now"
    assert records.merge(partial(0, run_id="other"), range(1), 1.0) == "merged"


def test_a_run_that_waits_for_room_is_behind_as_one_that_waits_for_the_solver():
    records = OpenRecords(DEADLINE, GROUP_BYTES)
    records.merge(partial(0), range(2), 0.0)
    for now in (1.0, 4.0, 8.0):
        assert records.merge(partial(0, step=200), range(2), now) == "busy"
        assert records.behind_seconds("run", now) == now - 1.0
    assert records.behind_seconds("run", 30.0) == 0.0, "nobody has asked any more"
    records.close_due(DEADLINE)
    assert records.behind_seconds("run", DEADLINE + 3.0) == 3.0


def test_blocks_whose_shares_lack_others_do_not_grow_beyond_the_memory():
    shares = [blocks_of(partial(4 * share), [4 * share + rank for rank in range(2)]) for share in range(9)]
    records = OpenRecords(DEADLINE, 3 * GROUP_BYTES)
    ranks_expected = [one.rank for share in shares for one in share]
    records.merge(partial(0, step=300), range(2), 0.0)
    answers = [records.merge(first, ranks_expected, 0.0) for first, _ in shares]
    assert "busy" in answers
    assert records.held_bytes <= 3 * GROUP_BYTES


def test_a_group_of_which_some_ranks_are_there_is_told_and_not_merged():
    records = OpenRecords(DEADLINE, 1 << 20)
    records.merge(partial(0), range(3), 0.0)
    group = arrived_from_wire(combine([partial(rank).to_wire() for rank in (0, 1)])[0].wire)
    assert records.merge(group, range(3), 0.0) == "overlap"
    assert records.ranks(KEY) == {0}
    other = arrived_from_wire(combine([partial(rank).to_wire() for rank in (1, 2)])[0].wire)
    assert records.merge(other, range(3), 0.0) == "merged"
    assert records.merge(group, range(3), 0.0) == "duplicate"
    (closed,) = records.close_due(0.0)
    whole = two_pass_covariance(torch.cat([rows(rank) for rank in range(3)]))
    closed.fold()
    torch.testing.assert_close(closed.group.covariance(), whole, rtol=1e-5, atol=1e-5)


def test_ranks_whose_share_lacks_others_are_not_in_the_record():
    upper, _ = blocks_of(partial(1), [1, 2])
    records = OpenRecords(DEADLINE, 1 << 20)
    records.merge(partial(0), range(3), 0.0)
    records.merge(upper, range(3), 0.0)
    (closed,) = records.close_due(DEADLINE)
    assert closed.missing == {1, 2}
