import math

import pytest
import torch
from eigenwatch.spectrum import (
    effective_dimension,
    hard_rank,
    hard_utilization,
    soft_rank,
    soft_utilization,
    utilization_index,
)
from hypothesis import given
from hypothesis import strategies as st

from .cases import power_spectrum, property_test, spectra

RANKS = (hard_rank, soft_rank, effective_dimension)
UTILIZATIONS = (hard_utilization, soft_utilization, utilization_index)


@pytest.mark.parametrize("rank", RANKS)
@property_test
@given(eigenvalues=spectra())
def test_ranks_lie_between_1_and_the_width(rank, eigenvalues):
    assert 1 <= rank(eigenvalues).item() <= len(eigenvalues) * (1 + 1e-14)


@pytest.mark.parametrize("utilization", UTILIZATIONS)
@property_test
@given(eigenvalues=spectra())
def test_utilizations_lie_between_0_and_1(utilization, eigenvalues):
    assert 0 <= utilization(eigenvalues).item() <= 1 + 1e-14


@property_test
@given(spectra())
def test_the_hard_rank_never_exceeds_the_soft_rank(eigenvalues):
    assert hard_rank(eigenvalues).item() <= soft_rank(eigenvalues).item() * (1 + 1e-12)


@pytest.mark.parametrize("metric", [*RANKS, *UTILIZATIONS])
@property_test
@given(eigenvalues=spectra(), scale=st.floats(1e-6, 1e6))
def test_scale_and_order_do_not_matter(metric, eigenvalues, scale):
    expected = metric(eigenvalues)
    torch.testing.assert_close(metric(eigenvalues * scale), expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(metric(eigenvalues.flip(0)), expected, rtol=1e-10, atol=1e-13)


def test_known_spectra():
    eigenvalues = torch.tensor([4.0, 2.0, 1.0, 1.0])
    assert hard_rank(eigenvalues).item() == pytest.approx(64 / 22)
    assert soft_rank(eigenvalues).item() == pytest.approx(2**1.75)  # half 1 bit, a quarter 2, two eighths 3
    hard, soft = (64 / 22 - 1) / 3, (2**1.75 - 1) / 3
    assert hard_utilization(eigenvalues).item() == pytest.approx(hard)
    assert soft_utilization(eigenvalues).item() == pytest.approx(soft)
    assert utilization_index(eigenvalues).item() == pytest.approx(2 / (1 / hard + 1 / soft))
    assert effective_dimension(eigenvalues).item() == pytest.approx(1 + 3 * 2 / (1 / hard + 1 / soft))


@pytest.mark.parametrize("width", [2, 7, 768, 11008])
def test_a_flat_spectrum_uses_the_whole_width(width):
    for rank in RANKS:
        assert rank(torch.full((width,), 0.3)).item() == pytest.approx(width, rel=1e-12)
    for utilization in UTILIZATIONS:
        assert utilization(torch.full((width,), 0.3)).item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(
    "eigenvalues",
    [[5.0], [0.0], [0.0, 0.0, 0.0], [5.0, 0.0, 0.0], [1.0, 1e-300]],
    ids=["width 1", "width 1, no variance", "no variance", "one direction", "almost one direction"],
)
def test_one_direction_and_no_variance_have_rank_1_and_utilization_0(eigenvalues):
    for rank in RANKS:
        assert rank(torch.tensor(eigenvalues, dtype=torch.float64)).item() == 1
    for utilization in UTILIZATIONS:
        assert utilization(torch.tensor(eigenvalues, dtype=torch.float64)).item() == 0


@pytest.mark.parametrize("metric", [*RANKS, *UTILIZATIONS])
def test_a_batch_is_measured_row_by_row(metric):
    batch = torch.stack([power_spectrum(9, alpha) for alpha in (0.0, 0.7, 2.0)] + [torch.zeros(9)]).view(2, 2, 9)
    single = torch.stack([metric(row) for row in batch.view(4, 9)]).view(2, 2)
    assert torch.equal(metric(batch), single)


@pytest.mark.parametrize("metric", [*RANKS, *UTILIZATIONS])
def test_gradients_hold_away_from_degenerate_points(metric):
    eigenvalues = torch.stack([power_spectrum(5, 0.5), 7 * power_spectrum(5, 1.5)]).requires_grad_()
    assert torch.autograd.gradcheck(metric, eigenvalues)


@pytest.mark.parametrize("metric", [*RANKS, *UTILIZATIONS])
def test_gradients_stay_finite_for_a_rank_deficient_layer(metric):
    eigenvalues = torch.tensor([3.0, 1.0, 0.0, 0.0], requires_grad=True)
    metric(eigenvalues).backward()
    assert eigenvalues.grad.isfinite().all()


@pytest.mark.parametrize("metric", [*RANKS, *UTILIZATIONS])
def test_nan_stays_nan(metric):
    assert math.isnan(metric(torch.tensor([1.0, math.nan])).item())
