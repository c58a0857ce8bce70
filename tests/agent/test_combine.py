"""The node combiner's arithmetic: the group of a host's partials stands for them exactly, whatever came."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from eigenwatch.agent.combine import combine
from eigenwatch.schemas import (
    MIXED,
    SAMPLES,
    SCATTER,
    Origin,
    Partial,
    PartialCovariance,
    PartialGroup,
    PartialRefused,
    PartialSamples,
    WirePartial,
    arrived_from_wire,
)
from eigenwatch.spectrum import Group, covariance_of, merge, samples_of
from hypothesis import given
from hypothesis import strategies as st

from tests.spectrum.cases import KEY, blocks_of, partial_of, property_test, samples, seeds

WIDTH = 7


def merged(packets) -> Group:
    """What a shard makes of them."""
    group = Group(width=WIDTH)
    for packet in packets:
        arrived = arrived_from_wire(packet.wire)
        group.add_(covariance_of(arrived) if isinstance(arrived, PartialSamples) else arrived)
    return group


def packets_of(*partials: Partial):
    return combine([one.to_wire() for one in partials])


def rows(rank: int, tokens: int = 30, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(rank)) + rank


def rows_as_they_are(rank: int, tokens: int) -> PartialSamples:
    return samples_of(rows(rank, tokens), Origin(key=KEY, rank=rank, share=rank, captured_at=1.0))


@st.composite
def hosts(draw) -> list[PartialCovariance]:
    """Partials of whole shares, some of them dealt out to tensor-parallel ranks, some without tokens."""
    partials: list[PartialCovariance] = []
    for _ in range(draw(st.integers(1, 5))):
        whole = partial_of(draw(samples(WIDTH, min_tokens=0)))
        ranks = [len(partials) + place for place in range(draw(st.integers(1, 3)))]
        partials += blocks_of(whole, ranks)
    order = draw(st.permutations(partials))
    return list(order)


@property_test
@given(hosts())
def test_the_group_stands_for_its_partials(partials):
    packets = packets_of(*partials)
    assert len(packets) == 1
    assert packets[0].ranks == tuple(sorted(one.rank for one in partials))
    here, there = merge(partials), merged(packets)
    assert there.ranks == here.ranks
    assert there.tokens == here.tokens
    assert [(s.tokens, s.trace) for _, s in sorted(there.shares.items())] == [
        (s.tokens, pytest.approx(s.trace)) for _, s in sorted(here.shares.items())
    ]
    if here.tokens:
        scale = here.scatter().abs().max()
        assert (there.scatter() - here.scatter()).abs().max() <= 1e-6 * scale
        assert there.total_variance == pytest.approx(here.total_variance)


@property_test
@given(hosts(), seeds)
def test_groups_of_two_hosts_and_single_partials_merge_to_the_same(partials, seed):
    shares = sorted({one.share for one in partials})
    cut = shares[seed % len(shares)]
    one, other = ([p for p in partials if (p.share < cut) == side] for side in (True, False))
    packets = [packet for host in (one, other) if host for packet in packets_of(*host)]
    here, there = merge(partials), merged(packets)
    assert there.ranks == here.ranks
    if here.tokens:
        assert (there.scatter() - here.scatter()).abs().max() <= 1e-6 * here.scatter().abs().max()


def test_what_is_alone_travels_as_it_is():
    wire = partial_of(rows(0)).to_wire()
    (packet,) = combine([wire])
    assert packet.wire is wire


def test_a_block_whose_share_is_not_here_stays_out_of_the_sum():
    upper, _ = blocks_of(partial_of(rows(2)), [2, 5])
    packets = packets_of(partial_of(rows(0), rank=0), partial_of(rows(1), rank=1), upper)
    assert [packet.ranks for packet in packets] == [(0, 1), (2,)]
    assert len(merged(packets).finished) == 2


def test_what_is_not_finite_poisons_nothing():
    bad = dataclasses.replace(
        partial_of(rows(2), rank=2), mean=np.full(WIDTH, np.nan), scatter=np.empty(0, np.float32),
        trace=math.nan, frobenius_sq=math.nan,
    )  # fmt: skip
    packets = packets_of(partial_of(rows(0), rank=0), bad, partial_of(rows(1), rank=1))
    assert [packet.ranks for packet in packets] == [(0, 1), (2,)]


def test_a_rank_of_another_width_is_left_for_the_shard_to_refuse():
    packets = packets_of(
        *(partial_of(rows(rank), rank=rank) for rank in range(2)), partial_of(rows(2, width=4), rank=2)
    )
    assert [packet.ranks for packet in packets] == [(0, 1), (2,)]


def test_few_rows_stay_rows_and_many_become_one_scatter():
    few = [rows_as_they_are(rank, tokens=2) for rank in range(3)]
    assert [packet.ranks for packet in packets_of(*few)] == [(0,), (1,), (2,)]
    many = [rows_as_they_are(rank, tokens=5) for rank in range(3)]
    (packet,) = packets_of(*many)
    group = arrived_from_wire(packet.wire)
    assert isinstance(group, PartialGroup)
    assert group.forms == SAMPLES
    here = merge([covariance_of(one) for one in many])
    assert (merged([packet]).scatter() - here.scatter()).abs().max() <= 1e-5


def test_the_group_says_the_last_capture_the_widest_cadence_and_both_forms():
    first = dataclasses.replace(partial_of(rows(0), rank=0), captured_at=5.0, sampling_steps=10, overhead_ratio=0.1)
    second = dataclasses.replace(partial_of(rows(1), rank=1), captured_at=3.0, sampling_steps=20)
    (packet,) = packets_of(first, second)
    group = arrived_from_wire(packet.wire)
    assert (group.captured_at, group.sampling_steps, group.overhead_ratio) == (5.0, 20, 0.1)
    assert group.forms == SCATTER
    mixed = [first, *(rows_as_they_are(rank, tokens=15) for rank in (1, 2))]
    (packet,) = packets_of(*mixed)
    assert arrived_from_wire(packet.wire).forms == MIXED


def test_sums_that_float32_cannot_hold_travel_apart():
    huge = [partial_of(rows(rank) * 1e18, rank=rank) for rank in range(2)]
    big = [dataclasses.replace(one, trace=2e38) for one in huge]
    assert [packet.ranks for packet in packets_of(*big)] == [(0,), (1,)]


GOOD = combine([partial_of(rows(rank), rank=rank).to_wire() for rank in range(2)])[0].wire


@pytest.mark.parametrize(
    "changes",
    [
        {"parts": []},
        {"parts": None},
        {"parts": [[[0, 0], 30, 1.0, 1.0]]},
        {"parts": [[[0], 30, 1.0, 1.0], [[0], 30, 1.0, 1.0]]},
        {"parts": [[[0], -1, 1.0, 1.0], [[1], 30, 1.0, 1.0]]},
        {"parts": [[[0], 30, math.nan, 1.0], [[1], 30, 1.0, 1.0]]},
        {"parts": [[[0], 30, 1.0], [[1], 30, 1.0, 1.0]]},
        {"parts": [["0", 30, 1.0, 1.0], [[1], 30, 1.0, 1.0]]},
        {"parts": [[[], 30, 1.0, 1.0], [[1], 30, 1.0, 1.0]]},
        {"parts": [[[0], 30, 1.0, 1.0]]},
        {"parts": [[[0], 0, 0.0, 0.0], [[1], 30, 1.0, 1.0]]},
        {"rank": 1, "share": 1},
        {"forms": "group"},
        {"width": WIDTH + 1},
        {"version": 99},
    ],
)
def test_a_group_that_contradicts_itself_is_refused(changes):
    with pytest.raises(PartialRefused):
        arrived_from_wire(WirePartial(GOOD.header | changes, GOOD.mean, GOOD.payload))


def test_a_group_passes_the_wire_to_the_last_bit():
    group = arrived_from_wire(GOOD)
    again = arrived_from_wire(group.to_wire())
    assert again.parts == group.parts
    assert np.array_equal(again.means, group.means)
    assert np.array_equal(again.scatter, group.scatter)
