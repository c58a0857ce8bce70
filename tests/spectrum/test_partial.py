"""The two forms say the same, and what is not finite says so in both."""

import math

import numpy as np
import pytest
import torch
from eigenwatch.schemas import Origin, PartialSamples
from eigenwatch.spectrum import Moments, covariance_of, partial_of, trace_and_frobenius_sq

from .cases import KEY

WIDTH = 300
ORIGIN = Origin(key=KEY, rank=3, share=2, captured_at=7.0, sampling_steps=50, overhead_ratio=0.01)


def moments_of(x_ND, rows=None):
    moments = Moments(x_ND.shape[1], rows=rows)
    moments.add(x_ND)
    return moments


def samples_of(x_ND):
    bits = x_ND.view(torch.uint16) if x_ND.dtype == torch.bfloat16 else x_ND
    return PartialSamples(**ORIGIN.fields(), samples=bits.numpy())


def assert_says_where_it_comes_from(partial):
    assert partial.fields() == ORIGIN.fields()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_and_their_scatter_are_the_same_partial_to_the_last_bit(dtype):
    x_ND = (torch.randn(40, WIDTH) + 3).to(dtype)
    sent, formed = partial_of(moments_of(x_ND), ORIGIN), covariance_of(samples_of(x_ND))
    for partial in (sent, formed):
        assert_says_where_it_comes_from(partial)
        assert (partial.tokens, partial.rows, partial.width) == (40, (0, WIDTH), WIDTH)
    assert np.array_equal(formed.scatter, sent.scatter)
    assert np.array_equal(formed.mean, sent.mean)
    assert (formed.trace, formed.frobenius_sq) == (sent.trace, sent.frobenius_sq)


def test_rows_may_lie_in_memory_that_is_read_only(recwarn):
    samples = samples_of(torch.randn(4, WIDTH))
    samples.samples.flags.writeable = False
    assert covariance_of(samples).tokens == 4
    assert list(recwarn) == []


def test_a_block_carries_its_rows_and_their_part_of_the_sums():
    x_ND = torch.randn(40, WIDTH)
    rows = (200, 290)
    moments = moments_of(x_ND, rows)
    partial = partial_of(moments, ORIGIN)
    assert partial.rows == rows
    assert np.array_equal(partial.scatter, moments.scatter.numpy())
    assert (partial.trace, partial.frobenius_sq) == trace_and_frobenius_sq(moments.scatter, WIDTH, rows)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_activations_that_are_not_finite_or_overflow_carry_no_scatter(bad):
    x_ND = torch.randn(10, WIDTH)
    x_ND[3, 2] = bad
    for partial in (partial_of(moments_of(x_ND), ORIGIN), covariance_of(samples_of(x_ND))):
        assert not partial.finite
        assert partial.scatter.size == 0
        assert partial.tokens == 10


@pytest.mark.parametrize("feature", [0, 299])
def test_a_bad_feature_above_or_beside_a_block_makes_it_not_finite(feature):
    x_ND = torch.randn(10, WIDTH)
    x_ND[3, feature] = math.nan
    assert not partial_of(moments_of(x_ND, (256, 290)), ORIGIN).finite


def test_no_tokens_are_a_partial_without_a_scatter():
    nothing = torch.empty(0, WIDTH)
    for partial in (partial_of(moments_of(nothing), ORIGIN), covariance_of(samples_of(nothing))):
        assert (partial.tokens, partial.trace, partial.frobenius_sq, partial.finite) == (0, 0.0, 0.0, True)
        assert partial.scatter.size == 0
        assert np.array_equal(partial.mean, np.zeros(WIDTH))
