"""A spectrum by quadrature, against the spectrum: within the error that it states, and always the same."""

import math

import pytest
import torch
import torch.nn.functional as F
from eigenwatch.schemas import METRIC_NAMES
from eigenwatch.spectrum import (
    eigenvalues,
    estimate,
    hard_rank,
    measure,
    measure_estimate,
    merge,
    soft_rank,
    spectral_concentration,
    top1_share,
    variance_share,
)
from eigenwatch.spectrum.lanczos import leading, quadrature
from torch import nn

from .cases import partial_of, power_spectrum, rotation

WIDTH = 512
FLOOR = 1e-3
"""What a finite number of steps leaves out."""

SPECTRA = {
    "flat": power_spectrum(WIDTH, 0),
    **{f"power law {alpha}": power_spectrum(WIDTH, alpha) for alpha in (0.5, 1.0, 1.5, 2.5)},
    "collapsed": torch.cat([torch.tensor([1e4]), torch.full((WIDTH - 1,), 1e-2)]).double(),
    "low rank": torch.cat([torch.ones(50), torch.zeros(WIDTH - 50)]).double(),
    "one direction": torch.cat([torch.ones(1), torch.zeros(WIDTH - 1)]).double(),
    "two levels": torch.cat([torch.full((100,), 10.0), torch.full((WIDTH - 100,), 0.1)]).double(),
    "exponential": torch.exp(-torch.arange(WIDTH, dtype=torch.float64) / 20),
}


def matrix_of(spectrum):
    turn = rotation(WIDTH)
    return (turn * spectrum) @ turn.T


@pytest.fixture(scope="module")
def activations():
    """What a small feed-forward network has learned to send into its down-projection."""
    torch.manual_seed(0)
    gate, up, down = nn.Linear(64, WIDTH), nn.Linear(64, WIDTH), nn.Linear(WIDTH, 64)
    optimizer = torch.optim.Adam([*gate.parameters(), *up.parameters(), *down.parameters()], lr=1e-3)
    teacher = torch.randn(64, 64) / 8
    for _ in range(100):
        x = torch.randn(256, 64)
        loss = F.mse_loss(down(F.silu(gate(x)) * up(x)), torch.sin(3 * x @ teacher))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x = torch.randn(3 * WIDTH, 64)
        return F.silu(gate(x)) * up(x)


def within_its_error(found, true_D):
    off = abs(found.soft_rank / float(soft_rank(true_D)) - 1)
    return off <= 3 * found.soft_rank_error + FLOOR


@pytest.mark.parametrize("name", SPECTRA)
def test_the_soft_rank_lies_within_the_error_and_the_hard_rank_is_exact(name):
    true_D = SPECTRA[name]
    found = estimate(matrix_of(true_D), seed=1)
    assert within_its_error(found, true_D)
    assert found.soft_rank_error < 0.01
    assert found.hard_rank == pytest.approx(float(hard_rank(true_D)), rel=1e-9)


@pytest.mark.parametrize("name", SPECTRA)
def test_the_spectrum_has_the_shape_the_sum_and_the_first_eigenvalues_of_the_true_one(name):
    true_D = SPECTRA[name]
    found_D = estimate(matrix_of(true_D), seed=1).eigenvalues
    assert found_D.shape == true_D.shape
    assert torch.equal(found_D, found_D.sort(descending=True).values)
    assert float(found_D.sum()) == pytest.approx(float(true_D.sum()), rel=1e-9)
    assert float(found_D[0]) == pytest.approx(float(true_D[0]), rel=1e-4)
    assert float(top1_share(found_D)) == pytest.approx(float(top1_share(true_D)), abs=1e-4)
    for fraction in (0.1, 0.25, 0.5):
        true = float(variance_share(true_D, fraction))
        assert float(variance_share(found_D, fraction)) == pytest.approx(true, abs=0.01)
    true = float(spectral_concentration(true_D))
    assert float(spectral_concentration(found_D)) == pytest.approx(true, abs=0.01)


def test_activations_of_a_trained_network_are_estimated_within_the_error(activations):
    group = merge([partial_of(activations[:500], rank=0), partial_of(activations[500:], rank=1)])
    exact = measure(group, eigenvalues(group.covariance()))
    found = estimate(group.covariance(), seed=2)
    values = measure_estimate(group, found)
    assert within_its_error(found, eigenvalues(group.covariance()))
    for name in METRIC_NAMES:
        if name in ("soft_rank_corrected", "js_divergence"):
            assert values[name] is None
        elif name in ("hard_rank", "hard_utilization", "hard_rank_corrected", "total_variance"):
            assert values[name] == pytest.approx(exact[name], rel=1e-6), name
        else:
            assert values[name] == pytest.approx(exact[name], rel=0.05, abs=0.01), name
    assert values["effective_dimension"] == pytest.approx(1 + (WIDTH - 1) * values["utilization_index"])


def test_the_stated_error_is_that_of_many_estimates():
    true_D = SPECTRA["power law 1.0"]
    matrix = matrix_of(true_D)
    found = [estimate(matrix, seed) for seed in range(24)]
    off = torch.tensor([one.soft_rank / float(soft_rank(true_D)) - 1 for one in found])
    stated = torch.tensor([one.soft_rank_error for one in found]).square().mean().sqrt()
    assert 0.5 < float(off.square().mean().sqrt() / stated) < 2


def test_the_same_seed_gives_the_same_estimate_and_another_one_another():
    matrix = matrix_of(SPECTRA["power law 1.0"])
    first, again, other = (estimate(matrix, seed) for seed in (5, 5, 6))
    assert first.soft_rank == again.soft_rank
    assert torch.equal(first.eigenvalues, again.eigenvalues)
    assert first.soft_rank != other.soft_rank


def test_a_matrix_without_variance_has_rank_1():
    found = estimate(torch.zeros(WIDTH, WIDTH, dtype=torch.float64), seed=0)
    assert (found.hard_rank, found.soft_rank, found.soft_rank_error) == (1, 1, 0)
    assert not found.eigenvalues.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad):
    matrix = matrix_of(SPECTRA["flat"])
    matrix[3, 4] = matrix[4, 3] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        estimate(matrix, seed=0)


def test_what_is_small_is_solved():
    with pytest.raises(ValueError, match="width 255 is solved exactly: quadrature is for 256 and more"):
        estimate(torch.eye(255, dtype=torch.float64), seed=0)


def test_copies_of_a_leading_eigenvalue_are_all_found():
    spectrum = torch.cat([torch.full((5,), 7.0), 0.01 * power_spectrum(WIDTH - 5, 1)]).double()
    found = leading(matrix_of(spectrum), torch.randn(WIDTH, 8, dtype=torch.float64), steps=12)
    torch.testing.assert_close(found.values[:6], spectrum[:6], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(len(found.values), dtype=torch.float64))


def test_a_quadrature_is_exact_for_polynomials_of_the_rest():
    spectrum = power_spectrum(WIDTH, 1)
    matrix, turn = matrix_of(spectrum), rotation(WIDTH)
    probes = torch.randn(WIDTH, 3, dtype=torch.float64)
    seen = quadrature(matrix, probes, 4, without=turn[:, :2])
    rest = probes - turn[:, :2] @ (turn[:, :2].T @ probes)
    rest = rest / torch.linalg.vector_norm(rest, dim=0)
    for power in range(8):  # up to 2·4 − 1
        image = rest
        for _ in range(power):
            image = matrix @ image
        torch.testing.assert_close((seen.weights * seen.nodes**power).sum(1), (rest * image).sum(0))
