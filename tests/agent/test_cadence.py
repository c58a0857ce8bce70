"""A change of cadence holds on all ranks from the same step, or on none."""

import random
import threading

import pytest
import torch.distributed as dist
from eigenwatch.agent.cadence import LEAD_SECONDS, Cadence
from eigenwatch.agent.ranks import Ranks


@pytest.fixture(scope="module", autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


_launches = iter(range(1_000_000))


def cadences(ranks: int = 2, decider: int = 0) -> list[Cadence]:
    launch = f"launch-{next(_launches)}"
    return [Cadence(Ranks(rank, ranks), launch, decider) for rank in range(ranks)]


def test_one_rank_alone_changes_at_once():
    cadence = Cadence(Ranks(0, 1), "alone", 0)
    cadence.propose(99, 4, step_seconds=1.0)
    assert [cadence.stretch_at(step) for step in (0, 99, 100, 500)] == [1, 1, 4, 4]
    cadence.propose(299, 2, step_seconds=1.0)
    assert [cadence.stretch_at(step) for step in (100, 299, 300)] == [4, 4, 2]


@pytest.mark.parametrize("decider", [0, 2])
def test_what_all_heard_in_time_holds_on_all_from_its_step_on(decider):
    all_ranks = cadences(3, decider)
    first = all_ranks[decider]
    first.propose(100, 8, step_seconds=0.5, stride=10)
    start = 100 + 10 * (int(LEAD_SECONDS / 0.5) + 2)
    for _ in range(3):
        for one in (first, *all_ranks):
            one.exchange()
    for one in all_ranks:
        one.settle(start)
        assert not one.is_open
        assert [one.stretch_at(step) for step in (100, start - 1, start)] == [1, 1, 8]


def test_what_one_rank_heard_too_late_holds_on_none_and_the_next_proposal_leaves_more_time():
    first, second, third = cadences(3)
    first.propose(0, 8, step_seconds=LEAD_SECONDS)
    first.exchange()
    second.exchange()
    third.settle(3)
    third.exchange()
    first.exchange()
    assert second.is_open
    for one in (first, second):
        one.settle(3)
    assert [one.stretch_at(3) for one in (first, second, third)] == [1, 1, 1]
    first.propose(3, 8, step_seconds=LEAD_SECONDS)
    for one in (first, second, third, first, second, third):
        one.exchange()
    for one in (first, second, third):
        one.settle(7)
    assert {(one.stretch_at(6), one.stretch_at(7)) for one in (first, second, third)} == {(1, 8)}


@pytest.mark.parametrize("first_there", [0, 1])
def test_a_rank_that_comes_to_the_step_before_all_have_consented_withdraws_the_change_for_all(first_there):
    both = first, second = cadences()
    first.propose(0, 2, step_seconds=LEAD_SECONDS)
    first.exchange()
    second.exchange()
    both[first_there].settle(3)
    first.exchange()  # finds the consent, and the verdict
    both[1 - first_there].settle(3)
    assert (first.stretch_at(3), second.stretch_at(3)) == (1, 1)


def test_a_rank_that_has_ended_keeps_nobody_waiting():
    first, second = cadences()
    first.propose(0, 2, step_seconds=LEAD_SECONDS)
    first.exchange()
    second.exchange()
    second.settle(3)
    assert second.stretch_at(3) == 1


def test_a_prediction_that_went_too_far_is_not_taken_back():
    """Steps 90, 100, 103: the rank has begun what it took for step 110, and must not consent to a change at 108."""
    first, second = cadences()
    first.propose(100, 8, step_seconds=LEAD_SECONDS / 6)
    assert first._proposal.change.from_step == 108
    second.settle(110)
    second.settle(106)
    for one in (first, second, first, second):
        one.exchange()
    for one in (first, second):
        one.settle(108)
    assert (first.stretch_at(108), second.stretch_at(108)) == (1, 1)


def test_a_store_that_hangs_holds_up_no_step_but_that_of_the_change():
    first, _ = cadences()
    first.propose(0, 8, step_seconds=LEAD_SECONDS / 100)
    asked, goes_on = threading.Event(), threading.Event()
    store = first._store

    class Hanging:
        def set(self, *arguments):
            asked.set()
            goes_on.wait(60)
            store.set(*arguments)

    first._store = Hanging()
    outbox = threading.Thread(target=first.exchange)
    outbox.start()
    assert asked.wait(60)
    for step in range(1, 50):
        first.settle(step)
    assert outbox.is_alive()
    goes_on.set()
    outbox.join(60)


@pytest.mark.parametrize("decider", range(3))
def test_whatever_the_order_in_which_threads_come_to_run_every_step_has_one_stretch(decider):
    """Each turn one rank ends a step or its outbox's thread looks; a rank may run ahead of others by a few steps."""
    stretched = sum(max(steps_of_three_ranks(random.Random(seed), decider).values()) > 1 for seed in range(150))
    assert stretched > 15


def steps_of_three_ranks(draws: random.Random, decider: int) -> dict[int, int]:
    """Stretch by step, the same on every rank."""
    all_ranks = cadences(3, decider)
    at, seen = [0, 0, 0], {}

    def step(rank: int) -> None:
        cadence, following = all_ranks[rank], at[rank] + 1
        cadence.settle(following)
        at[rank] = following
        assert seen.setdefault(following, cadence.stretch_at(following)) == cadence.stretch_at(following)
        if rank == decider and not cadence.is_open and following > cadence.newest.from_step:
            cadence.propose(following, 2 if cadence.newest.stretch == 1 else 1, step_seconds=LEAD_SECONDS)

    weights = [draws.random() for _ in range(6)]
    for turn in draws.choices(range(6), weights, k=300):
        rank, ends_a_step = divmod(turn, 2)
        if not ends_a_step:
            all_ranks[rank].exchange()
        elif at[rank] <= min(at) + 3:
            step(rank)
    return seen
