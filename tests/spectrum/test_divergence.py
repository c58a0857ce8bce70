import math

import pytest
import torch
from eigenwatch.spectrum import js_divergence
from hypothesis import given

from .cases import power_spectrum, property_test, spectra


@property_test
@given(spectra(min_width=6, max_width=6), spectra(min_width=6, max_width=6))
def test_divergence_is_symmetric_and_lies_between_0_and_ln_2(pre, post):
    divergence = js_divergence(pre, post).item()
    assert 0 <= divergence <= math.log(2)
    assert js_divergence(post, pre).item() == pytest.approx(divergence, abs=1e-15)


@property_test
@given(spectra())
def test_a_spectrum_does_not_diverge_from_itself_at_another_scale(eigenvalues):
    assert 0 <= js_divergence(eigenvalues, 1e9 * eigenvalues).item() <= 1e-14


def test_known_divergences():
    assert js_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).item() == pytest.approx(math.log(2))
    one, both = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    expected = 0.5 * math.log(1 / 0.75) + 0.25 * math.log(0.5 / 0.75) + 0.25 * math.log(0.5 / 0.25)
    assert js_divergence(one, both).item() == pytest.approx(expected)


def test_leading_dimensions_broadcast():
    post = torch.stack([power_spectrum(5, alpha) for alpha in (0.0, 1.0, 2.0)])
    divergence = js_divergence(power_spectrum(5, 1.0), post)
    assert divergence.shape == (3,)
    assert divergence.argmin().item() == 1


def test_different_widths_are_refused():
    with pytest.raises(ValueError, match="one width, got 3 and 4"):
        js_divergence(torch.ones(3), torch.ones(4))


def test_gradients_hold():
    pre, post = power_spectrum(5, 0.4).requires_grad_(), power_spectrum(5, 1.3).requires_grad_()
    assert torch.autograd.gradcheck(js_divergence, (pre, post))
