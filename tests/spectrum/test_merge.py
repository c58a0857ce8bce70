import copy
import math
import pickle
import warnings

import pytest
import torch
from eigenwatch.schemas import packed_length
from eigenwatch.spectrum import Group, merge, unpack
from hypothesis import given
from hypothesis import strategies as st

from .cases import KEY, partial_of, property_test, samples, two_pass_covariance, two_pass_scatter

rank_samples = st.lists(samples(width=6, max_tokens=12), min_size=1, max_size=6)


def partials_of(ranks):
    return [partial_of(x_ND, rank=rank) for rank, x_ND in enumerate(ranks)]


def not_finite(rank=9, tokens=5, width=6):
    return partial_of(torch.full((tokens, width), math.nan), rank=rank)


def assert_same(group, other, reference):
    """Equal up to rounding in float64, measured against the deviations of the features."""
    assert group.tokens == other.tokens
    assert group.ranks == other.ranks
    assert (group.sums.nu, group.sums.nu_sq) == (other.sums.nu, other.sums.nu_sq)
    assert group.sums.trace_sq == pytest.approx(other.sums.trace_sq, rel=1e-12)
    assert group.sums.frobenius_sq == pytest.approx(other.sums.frobenius_sq, rel=1e-12)
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
    assert math.isfinite(group.sums.trace)
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
