import math

import pytest
import torch
from eigenwatch.spectrum import spectral_concentration, top1_share, variance_share, variance_shares
from hypothesis import given
from hypothesis import strategies as st

from .cases import power_spectrum, property_test, spectra

METRICS = (spectral_concentration, top1_share, lambda x: variance_share(x, 0.25))


@property_test
@given(spectra())
def test_concentration_is_the_papers_sum(eigenvalues):
    width = len(eigenvalues)
    cumulative = variance_shares(eigenvalues).cumsum(0)
    papers = 2 / width * sum(cumulative[k - 1].item() - k / width for k in range(1, width + 1))
    assert spectral_concentration(eigenvalues).item() == pytest.approx(papers, abs=1e-13)


@property_test
@given(spectra())
def test_bounds(eigenvalues):
    width = len(eigenvalues)
    assert -1e-15 <= spectral_concentration(eigenvalues).item() <= (width - 1) / width + 1e-15
    assert (1 - 1e-14) / width <= top1_share(eigenvalues).item() <= 1
    for fraction in (0.1, 0.25, 0.5, 1.0):
        assert fraction * (1 - 1e-13) <= variance_share(eigenvalues, fraction).item() <= 1 + 1e-14


@property_test
@given(spectra(), st.floats(1e-6, 1e6))
def test_scale_does_not_matter(eigenvalues, scale):
    for metric in METRICS:
        torch.testing.assert_close(metric(eigenvalues * scale), metric(eigenvalues), rtol=1e-12, atol=1e-14)


def test_a_flat_spectrum_has_no_concentration():
    assert spectral_concentration(torch.full((11008,), 0.7)).item() == pytest.approx(0, abs=1e-15)
    assert top1_share(torch.full((8,), 0.7)).item() == 1 / 8


@pytest.mark.parametrize("eigenvalues", [[2.0, 0, 0, 0], [0.0, 0, 0, 0]], ids=["one direction", "no variance"])
def test_one_direction_has_the_formulas_limit(eigenvalues):
    assert spectral_concentration(torch.tensor(eigenvalues)).item() == 3 / 4
    assert top1_share(torch.tensor(eigenvalues)).item() == 1
    assert variance_share(torch.tensor(eigenvalues), 0.1).item() == 1


def test_width_1_has_no_concentration():
    assert spectral_concentration(torch.tensor([3.0])).item() == 0
    assert variance_share(torch.tensor([3.0]), 0.1).item() == 1


@pytest.mark.parametrize(
    ("fraction", "width", "directions"),
    [
        (0.1, 30, 3),
        (0.1, 10, 1),
        (0.1, 11, 2),
        (0.07, 100, 7),
        (0.25, 10, 3),
        (0.5, 2048, 1024),
        (1, 7, 7),
        (1e-9, 7, 1),
    ],
)
def test_the_first_directions_are_counted_by_exact_ceiling(fraction, width, directions):
    assert variance_share(torch.ones(width), fraction).item() == pytest.approx(directions / width)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, math.nan, math.inf])
def test_a_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction"):
        variance_share(torch.ones(3), fraction)


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_hold_and_batches_go_row_by_row(metric):
    batch = torch.stack([power_spectrum(5, 0.5), 7 * power_spectrum(5, 1.5)])
    assert torch.autograd.gradcheck(metric, batch.clone().requires_grad_())
    assert torch.equal(metric(batch), torch.stack([metric(row) for row in batch]))
