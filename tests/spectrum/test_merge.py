import copy
import dataclasses
import math
import pickle
import warnings
from collections import deque

import numpy as np
import pytest
import torch
from eigenwatch.schemas import packed_length
from eigenwatch.spectrum import Group, hard_rank_corrected, merge, unpack
from eigenwatch.spectrum.merge import PIECE
from hypothesis import given
from hypothesis import strategies as st

from .cases import KEY, blocks_of, partial_of, property_test, samples, two_pass_covariance, two_pass_scatter

rank_samples = st.lists(samples(width=6, max_tokens=12), min_size=1, max_size=6)


@st.composite
def dealt(draw, width=6, min_tokens=0):
    """Rows of some shares, and their partials in any order, some shares dealt out to a tensor-parallel group."""
    shares, partials = [], []
    rank = 0
    for tokens in draw(st.lists(st.integers(min_tokens, 12), min_size=1, max_size=4)):
        x_ND = draw(samples(width, min_tokens=tokens, max_tokens=tokens)) if tokens else torch.empty(0, width)
        parallel = draw(st.integers(1, 4))
        ranks = draw(st.permutations(range(rank, rank + parallel)))
        shares.append(x_ND)
        partials += blocks_of(partial_of(x_ND), ranks)
        rank += parallel
    return shares, draw(st.permutations(partials))


def partials_of(ranks):
    return [partial_of(x_ND, rank=rank) for rank, x_ND in enumerate(ranks)]


def not_finite(rank=9, tokens=5, width=6):
    return partial_of(torch.full((tokens, width), math.nan), rank=rank)


def assert_same(group, other, reference):
    """Equal up to rounding in float64, measured against the deviations of the features."""
    assert group.tokens == other.tokens
    assert group.ranks == other.ranks
    assert group.shares.keys() == other.shares.keys()
    for number, share in group.shares.items():
        same = other.shares[number]
        assert (share.tokens, share.rows, share.finished) == (same.tokens, same.rows, same.finished)
        assert share.trace == pytest.approx(same.trace, rel=1e-12)
        assert share.frobenius_sq == pytest.approx(same.frobenius_sq, rel=1e-12)
    scale = reference.diagonal().max()
    assert (group.scatter() - other.scatter()).abs().max() <= 1e-12 * scale


def assert_covariance_of(x_ND, covariance):
    """Up to float32's rounding, of the scatter relative to the deviations, of a mean relative to itself."""
    reference = two_pass_covariance(x_ND)
    deviation, of_mean = reference.diagonal().sqrt(), 1e-7 * x_ND.double().abs().amax(0)
    cross = torch.outer(of_mean, deviation + of_mean)
    error = (covariance - reference).abs()
    assert (error <= 3e-6 * torch.outer(deviation, deviation) + cross + cross.T).all()


@property_test
@given(rank_samples)
def test_merging_gives_the_covariance_of_all_tokens(ranks):
    group = merge(partials_of(ranks))
    assert group.tokens == sum(map(len, ranks))
    assert_covariance_of(torch.cat(ranks), group.covariance())
    assert group.total_variance == pytest.approx(group.covariance().trace().item(), rel=1e-12, abs=1e-300)


@property_test
@given(rank_samples, st.randoms())
def test_merging_gives_the_same_covariance_in_any_order(ranks, random):
    partials = partials_of(ranks)
    shuffled = random.sample(partials, len(partials))
    assert_same(merge(shuffled), merge(partials), two_pass_scatter(torch.cat(ranks)))


@property_test
@given(rank_samples, st.data())
def test_groups_may_be_merged_before_they_are_merged(ranks, data):
    partials = partials_of(ranks)
    cut = data.draw(st.integers(1, len(partials)))
    left, right = partials[:cut], partials[cut:]
    group = merge(left)
    if right:
        group.add_(merge(right))
    assert_same(group, merge(partials), two_pass_scatter(torch.cat(ranks)))


@property_test
@given(dealt())
def test_blocks_and_shares_in_any_order_give_the_covariance_of_all_tokens(dealt):
    shares, partials = dealt
    group = merge(partials)
    x_ND = torch.cat(shares)
    assert group.tokens == len(x_ND)
    assert group.ranks == {partial.rank for partial in partials}
    if len(x_ND):
        assert_covariance_of(x_ND, group.covariance())
        assert group.total_variance == pytest.approx(group.covariance().trace().item(), rel=1e-6, abs=1e-300)
        whole = merge(partial_of(rows, rank=rank) for rank, rows in enumerate(shares))
        assert hard_rank_corrected(group).method == hard_rank_corrected(whole).method
    for share in group.shares.values():
        assert share.finished
        assert not share.blocks, "nothing waits any more"


@property_test
@given(dealt(min_tokens=1), st.data())
def test_blocks_of_one_share_may_come_in_several_groups(dealt, data):
    shares, partials = dealt
    dealt_to = [data.draw(st.integers(0, 2)) for _ in partials]
    groups = [merge(p for p, to in zip(partials, dealt_to, strict=True) if to == g) for g in sorted(set(dealt_to))]
    before = [copy.deepcopy(group) for group in groups[1:]]
    group = groups[0]
    for other in groups[1:]:
        group.add_(other)
    assert_same(group, merge(partials), two_pass_scatter(torch.cat(shares)))
    for other, old in zip(groups[1:], before, strict=True):
        assert other.ranks == old.ranks
        assert torch.equal(other.within, old.within), "what is added stays as it was"


@property_test
@given(dealt(), st.data())
def test_what_was_taken_may_be_folded_at_any_time(dealt, data):
    shares, partials = dealt
    group = Group(width=6)
    for partial in partials:
        group.take_(partial)
        if data.draw(st.booleans()):
            group.fold_()
    group.fold_()
    if group.tokens:
        assert_same(group, merge(partials), two_pass_scatter(torch.cat(shares)))


def test_what_is_folded_together_is_the_sum_in_every_piece():
    x_ND = torch.randn(4, 400, 400)
    blocks = blocks_of(partial_of(x_ND[3]), [3, 4, 5])
    group, together = Group(width=400), [*partials_of(x_ND[:3]), *blocks]
    for one in together:
        group.take_(one)
    held = group.nbytes
    group.fold_()
    assert group.within.numel() > PIECE
    assert group.nbytes == held, "what waits counts as what it will be"
    expected = sum(two_pass_scatter(x) for x in x_ND)
    torch.testing.assert_close(unpack(group.within, 400), expected, rtol=1e-4, atol=1e-3)
    assert_same(group, merge(together), expected)


def test_what_comes_while_another_folds_is_not_lost():
    """A rank without tokens folds nothing; the other's scatter comes between its look and its sum."""
    late = partial_of(torch.randn(4, 6), rank=1)

    class Waiting(deque):
        def __len__(self) -> int:
            length = super().__len__()
            if late.rank not in group.ranks:
                group.take_(late)
            return length

    group = Group(width=6, _waiting=Waiting())
    group.take_(partial_of(torch.empty(0, 6), rank=0))
    group.fold_()
    group.fold_()
    assert_same(group, merge([partial_of(torch.empty(0, 6), rank=0), late]), torch.eye(6))


def test_without_memory_for_the_sum_what_was_taken_waits_on(monkeypatch):
    partials = partials_of([torch.randn(4, 6), torch.randn(4, 6)])
    group = Group(width=6)
    for one in partials:
        group.take_(one)

    def full(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(np, "zeros", full)
        with pytest.raises(MemoryError):
            group.fold_()
    group.fold_()
    assert_same(group, merge(partials), torch.eye(6))


def test_what_is_not_finite_ends_a_sum_that_others_still_fold():
    group = merge([partial_of(torch.randn(4, 6), rank=0)])
    group.take_(partial_of(torch.randn(4, 6), rank=1))
    group.take_(not_finite(rank=2))
    group.fold_()
    assert (group.finite, group.within.numel(), group.ranks) == (False, 0, {0, 1, 2})


def test_a_share_counts_once_all_of_its_rows_are_there():
    whole, shared = torch.randn(20, 300), 3 + torch.randn(30, 300)
    group = merge([partial_of(whole, rank=9)])
    *first, last = blocks_of(partial_of(shared), (0, 1, 2))
    for block in first:
        group.add_(block)
        assert group.tokens == 20
        assert_covariance_of(whole, group.covariance())
    assert group.ranks == {0, 1, 9}
    group.add_(last)
    assert group.tokens == 50
    assert_covariance_of(torch.cat([whole, shared]), group.covariance())


def test_what_waits_for_other_blocks_takes_memory_and_is_let_go_when_they_have_come():
    upper, lower = blocks_of(partial_of(torch.randn(20, 300)), (0, 1))
    group = Group.of(upper)
    assert group.tokens == 0
    assert group.finished == []
    assert group.nbytes == upper.scatter.nbytes + 8 * 300
    group.add_(lower)
    assert group.nbytes == 8 * packed_length(300) + 8 * 300


def test_a_share_without_tokens_has_come_and_changes_nothing():
    nothing = partial_of(torch.empty(0, 6), rank=1)
    group = merge([nothing])
    assert (group.tokens, len(group.finished), group.finite) == (0, 1, True)
    assert hard_rank_corrected(group) == (None, None)
    x_ND = torch.randn(20, 6)
    group.add_(partial_of(x_ND, rank=0))
    assert group.ranks == {0, 1}
    alone = merge([partial_of(x_ND, rank=0)])
    assert torch.equal(group.covariance(), alone.covariance())
    assert group.total_variance == alone.total_variance
    assert hard_rank_corrected(group) == hard_rank_corrected(alone), "no second sample"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_block_that_is_not_finite_makes_the_group_so_before_its_share_is_finished(order):
    x_ND = torch.randn(20, 6)
    blocks = [blocks_of(partial_of(x_ND), (0, 1))[0], blocks_of(not_finite(tokens=20), (0, 1))[1]]
    assert not Group.of(blocks[1]).finite
    group = merge(blocks[index] for index in order)
    group.add_(partial_of(torch.randn(4, 6), rank=7))
    assert not group.finite
    assert group.tokens == 24
    assert group.within.numel() == 0
    assert all(not share.blocks for share in group.shares.values())


@property_test
@given(samples(width=6, min_tokens=2, max_tokens=40), st.data())
def test_how_tokens_are_dealt_to_ranks_does_not_matter(x_ND, data):
    cut = data.draw(st.integers(1, len(x_ND) - 1))
    assert_covariance_of(x_ND, merge(partials_of([x_ND[:cut], x_ND[cut:]])).covariance())


@property_test
@given(rank_samples, st.booleans(), st.randoms())
def test_a_partial_that_is_not_finite_marks_the_group_and_poisons_nothing(ranks, first, random):
    partials = [*partials_of(ranks), not_finite()]
    random.shuffle(partials)
    group = merge(partials)
    assert not group.finite
    assert group.tokens == sum(map(len, ranks)) + 5
    assert group.ranks == {*range(len(ranks)), 9}
    assert group.within.numel() == 0


def test_a_group_that_is_not_finite_stays_so_and_spreads_as_a_group():
    group = Group.of(partial_of(torch.randn(4, 6), rank=1)).add_(Group.of(not_finite()))
    group.add_(partial_of(torch.randn(4, 6), rank=2))
    assert not group.finite
    assert group.tokens == 13


def test_one_token_in_all_has_a_covariance_of_zeros():
    group = merge([partial_of(torch.randn(1, 6))])
    assert torch.equal(group.covariance(), torch.zeros(6, 6, dtype=torch.float64))
    assert group.total_variance == 0


def test_one_token_on_each_rank_still_has_a_covariance():
    x_ND = torch.randn(5, 6)
    group = merge(partials_of(x_ND.split(1)))
    torch.testing.assert_close(group.covariance(), two_pass_covariance(x_ND), rtol=1e-6, atol=1e-7)


def test_width_1():
    x_ND = torch.randn(9, 1)
    group = merge(partials_of(x_ND.split(3)))
    torch.testing.assert_close(group.covariance(), two_pass_covariance(x_ND), rtol=1e-6, atol=0)


def test_fewer_tokens_than_the_width_give_the_rank_that_they_have():
    x_ND = torch.randn(7, 300)
    group = merge(partials_of(x_ND.split(3)))
    assert torch.linalg.matrix_rank(group.covariance(), rtol=1e-6).item() == 6


def test_the_mean_is_that_of_all_tokens():
    x_ND = torch.randn(12, 6)
    group = merge(partials_of([x_ND[:1], x_ND[1:]]))
    torch.testing.assert_close(group.mean, x_ND.double().mean(0), rtol=0, atol=1e-7)


def test_merging_leaves_the_partials_as_they_were():
    partials = partials_of([torch.randn(4, 6), torch.randn(4, 6)])
    before = copy.deepcopy(partials)
    group = merge(partials)
    group.within.zero_()
    for partial, old in zip(partials, before, strict=True):
        assert (partial.scatter == old.scatter).all()
        assert (partial.mean == old.mean).all()


def test_read_only_arrays_merge_without_a_warning():
    partials = partials_of([torch.randn(4, 6), torch.randn(4, 6)])
    for partial in partials:
        partial.mean.flags.writeable = partial.scatter.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert merge(partials).tokens == 8


def test_a_group_travels_between_processes():
    group = merge(partials_of([torch.randn(4, 6), torch.randn(4, 6)]))
    arrived = pickle.loads(pickle.dumps(group))
    assert torch.equal(arrived.covariance(), group.covariance())
    arrived.add_(partial_of(torch.randn(4, 6), rank=7))
    assert arrived.tokens == 12


def test_a_groups_size_is_its_triangle_and_its_means():
    group = merge(partials_of([torch.randn(4, 300), torch.randn(4, 300)]))
    assert group.nbytes == 8 * packed_length(300) + 2 * 8 * 300


def test_within_is_the_sum_of_scatters_each_around_its_own_mean():
    ranks = [torch.randn(20, 6), 5 + torch.randn(30, 6)]
    group = merge(partials_of(ranks))
    expected = sum(two_pass_scatter(x_ND) for x_ND in ranks)
    torch.testing.assert_close(unpack(group.within, 6), expected, rtol=1e-6, atol=1e-5)


def test_what_does_not_belong_together_is_refused_and_nothing_is_added():
    partial = partial_of(torch.randn(4, 6), rank=3)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge([])
    with pytest.raises(ValueError, match="one record"):
        merge([partial, partial_of(torch.randn(4, 6), rank=4, key=KEY._replace(step=101))])
    group = merge([partial])
    for other, message in (
        (partial, "rank 3"),
        (partial_of(torch.randn(4, 5), rank=4), "one width, got 6 and 5"),
    ):
        with pytest.raises(ValueError, match=message):
            group.add_(other)
        with pytest.raises(ValueError, match=message):
            group.add_(Group.of(other))
    assert group.tokens == 4
    assert torch.equal(group.covariance(), merge([partial]).covariance())


def test_a_block_that_contradicts_its_share_is_refused_and_nothing_is_added():
    x_ND = torch.randn(9, 6)
    first, second, third = blocks_of(partial_of(x_ND), (4, 5, 6))
    group = merge([first, second])
    for other, message in (
        (dataclasses.replace(third, tokens=8), "share 4 speak of 9 and of 8 tokens"),
        (dataclasses.replace(first, rank=7), r"rows \[0, 2\) of share 4"),
        (dataclasses.replace(third, rows=(3, 5), rank=7), r"rows \[3, 5\) of share 4"),
        (second, "rank 5"),
    ):
        with pytest.raises(ValueError, match=message):
            group.add_(other)
        with pytest.raises(ValueError, match=message):
            group.add_(Group.of(other))
    assert group.ranks == {4, 5}
    assert_covariance_of(x_ND, group.add_(third).covariance())
