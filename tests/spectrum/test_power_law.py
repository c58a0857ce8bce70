import math

import numpy as np
import pytest
import torch
from eigenwatch.spectrum import power_law
from hypothesis import given
from hypothesis import strategies as st

from .cases import power_spectrum, property_test, seeds


@property_test
@given(st.floats(0.05, 2.0), st.floats(1e-12, 1e12), st.integers(2, 500))
def test_an_exact_power_law_is_recovered_at_any_scale(alpha, scale, width):
    fit = power_law(scale * power_spectrum(width, alpha))
    assert fit.alpha.item() == pytest.approx(alpha, rel=1e-9)
    assert fit.r2.item() == pytest.approx(1, abs=1e-9)


@property_test
@given(seeds)
def test_the_fit_is_ordinary_least_squares(seed):
    values = np.sort(10 ** np.random.default_rng(seed).uniform(-5, 0, 40))[::-1].copy()
    x, y = np.log(np.arange(1, 41)), np.log(values)
    fit = power_law(torch.from_numpy(values))
    assert fit.alpha.item() == pytest.approx(-np.polyfit(x, y, 1)[0])
    assert fit.r2.item() == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)


def test_eigenvalues_in_the_rounding_noise_do_not_count():
    eigenvalues = power_spectrum(100, 1.2)
    noise = torch.tensor([1e-6, 3e-7, 1e-16, 0.0, 0.0])
    fit = power_law(torch.cat([eigenvalues, noise]))
    assert fit.alpha.item() == pytest.approx(1.2)
    assert fit.r2.item() == pytest.approx(1)


@pytest.mark.parametrize("value", [1.0, 0.1, 1e-20])
def test_a_flat_spectrum_is_the_power_law_of_exponent_0(value):
    fit = power_law(torch.full((300,), value, dtype=torch.float64))
    assert (fit.alpha.item(), fit.r2.item()) == (0, 1)


def test_flat_but_for_rounding_is_flat():
    eigenvalues = torch.ones(100, dtype=torch.float64) + 1e-15 * power_spectrum(100, 1)
    assert power_law(eigenvalues).r2.item() == 1


@pytest.mark.parametrize("eigenvalues", [[1.0], [0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1e-7], [math.nan, 1.0]])
def test_fewer_than_two_eigenvalues_have_no_power_law(eigenvalues):
    fit = power_law(torch.tensor(eigenvalues, dtype=torch.float64))
    assert math.isnan(fit.alpha.item())
    assert math.isnan(fit.r2.item())


def test_a_batch_is_fitted_row_by_row():
    rows = [power_spectrum(6, 0.8), torch.ones(6), torch.zeros(6), torch.tensor([1, 0.9, 0.1, 0.01, 1e-9, 0])]
    batch = torch.stack([row.double() for row in rows])
    together = power_law(batch.view(2, 2, 6))
    for index, row in enumerate(batch):
        alone = power_law(row)
        torch.testing.assert_close(together.alpha.flatten()[index], alone.alpha, equal_nan=True)
        torch.testing.assert_close(together.r2.flatten()[index], alone.r2, equal_nan=True)


def test_gradients_hold_and_are_finite_beside_a_row_without_a_fit():
    eigenvalues = torch.tensor([[3.0, 1.4, 1.1, 0.2], [2.0, 1.0, 0.9, 0.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: tuple(power_law(x)), eigenvalues.clone().requires_grad_())
    with_an_empty_row = torch.cat([eigenvalues, torch.zeros(1, 4)]).requires_grad_()
    fit = power_law(with_an_empty_row)
    (fit.alpha + fit.r2)[:2].sum().backward()
    assert with_an_empty_row.grad.isfinite().all()
