import math

import pytest
import torch
from eigenwatch.spectrum import eigenvalues
from hypothesis import given
from hypothesis import strategies as st

from .cases import power_spectrum, property_test, rotation, seeds, spectra


@property_test
@given(spectra(max_width=12), seeds, st.sampled_from([1e-300, 1e-20, 1.0, 1e20, 1e300]))
def test_a_spectrum_is_found_whatever_its_basis_and_scale(spectrum, seed, scale):
    basis = rotation(len(spectrum), seed)
    found = eigenvalues(basis @ torch.diag(spectrum * scale) @ basis.T)
    assert (found >= 0).all()
    assert (found.diff() <= 0).all()
    assert (found / scale - spectrum).abs().max() <= 1e-13 * max(spectrum.sum().item(), 1e-300)


def test_what_rounding_pushes_below_zero_is_zero():
    x_ND = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = eigenvalues(x_ND.T @ x_ND)
    assert (found[5:] < 1e-13 * found[0]).all()
    assert (found >= 0).all()
    assert (found == 0).any()


def test_a_zero_matrix_has_eigenvalues_of_zero():
    assert torch.equal(eigenvalues(torch.zeros(3, 4, 4)), torch.zeros(3, 4, dtype=torch.float64))


def test_width_1():
    assert eigenvalues(torch.tensor([[7.0]])).tolist() == [7]


def test_both_triangles_count():
    matrix = torch.tensor([[2.0, 0.4], [0.6, 2.0]])
    torch.testing.assert_close(eigenvalues(matrix), torch.tensor([2.5, 1.5], dtype=torch.float64))


def test_a_batch_is_solved_matrix_by_matrix_each_on_its_scale():
    matrices = [scale * torch.diag(power_spectrum(5, 1)) for scale in (1e-200, 1.0, 0.0, 1e200)]
    found = eigenvalues(torch.stack(matrices).view(2, 2, 5, 5)).view(4, 5)
    for row, matrix in zip(found, matrices, strict=True):
        torch.testing.assert_close(row, matrix.diagonal(), rtol=1e-14, atol=0)


def test_float64_unless_told_otherwise():
    matrix = torch.eye(3)
    assert eigenvalues(matrix).dtype == torch.float64
    assert eigenvalues(matrix.double(), dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad):
    matrix = torch.eye(3)
    matrix[2, 0] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        eigenvalues(matrix)


def test_the_covariance_is_left_alone():
    matrix = torch.eye(3, dtype=torch.float64) * 3
    eigenvalues(matrix)
    assert torch.equal(matrix, torch.eye(3, dtype=torch.float64) * 3)


def test_gradients_hold():
    basis = rotation(4)
    matrices = torch.stack([basis @ torch.diag(power_spectrum(4, alpha)) @ basis.T for alpha in (0.5, 2)])
    assert torch.autograd.gradcheck(eigenvalues, matrices.requires_grad_())
