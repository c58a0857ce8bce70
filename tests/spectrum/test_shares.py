import math

import pytest
import torch
from eigenwatch.spectrum import entropy, variance_shares
from hypothesis import given
from hypothesis import strategies as st

from .cases import property_test, spectra


@property_test
@given(spectra())
def test_shares_lie_between_0_and_1_and_sum_to_1(eigenvalues):
    share = variance_shares(eigenvalues)
    assert share.dtype == torch.float64
    assert ((share >= 0) & (share <= 1)).all()
    assert share.sum().item() == pytest.approx(1, rel=1e-14)


@property_test
@given(spectra(), st.sampled_from([1e-300, 1e-30, 1e30, 1e300]))
def test_shares_do_not_change_with_scale(eigenvalues, scale):
    torch.testing.assert_close(variance_shares(eigenvalues * scale), variance_shares(eigenvalues), rtol=1e-12, atol=0)


def test_shares_hold_where_the_sum_would_overflow_and_at_the_bottom_of_float64():
    assert variance_shares(torch.tensor([1.5e308, 1.5e308], dtype=torch.float64)).tolist() == [0.5, 0.5]
    assert variance_shares(torch.tensor([5e-324, 5e-324], dtype=torch.float64)).tolist() == [0.5, 0.5]


def test_no_variance_counts_as_one_direction():
    assert variance_shares(torch.zeros(2, 3)).tolist() == [[1, 0, 0], [1, 0, 0]]


def test_only_the_rows_of_a_batch_without_variance_count_as_one_direction():
    assert variance_shares(torch.tensor([[0.0, 0.0], [3.0, 1.0]])).tolist() == [[1, 0], [0.75, 0.25]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_does_not_pass_for_a_collapse(bad):
    assert variance_shares(torch.tensor([bad, 1.0])).isnan().any()
    assert variance_shares(torch.tensor([bad, 0.0])).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_any_dtype_is_computed_in_float64(dtype):
    share = variance_shares(torch.tensor([2, 1], dtype=dtype))
    assert share.dtype == torch.float64
    assert share[0].item() == 2 / 3


def test_a_share_of_zero_leaves_the_other_gradients_alone():
    eigenvalues = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(entropy(variance_shares(eigenvalues)), eigenvalues)
    two = eigenvalues.detach()[:2].requires_grad_()
    (without_it,) = torch.autograd.grad(entropy(variance_shares(two)), two)
    assert whole.isfinite().all()
    torch.testing.assert_close(whole[:2], without_it)


def test_gradients_hold_and_are_finite_even_without_variance():
    eigenvalues = torch.tensor([[3.0, 2.0, 0.5], [1.0, 0.3, 0.2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(variance_shares, eigenvalues)
    assert torch.autograd.gradcheck(lambda x: entropy(variance_shares(x)), eigenvalues)
    nothing = torch.zeros(3, requires_grad=True)
    variance_shares(nothing).square().sum().backward()
    assert nothing.grad.isfinite().all()
