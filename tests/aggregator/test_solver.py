"""The solver: it says which way it took, and falls back where that way is closed."""

import pytest
import torch
from eigenwatch.aggregator.config import SolverConfig
from eigenwatch.aggregator.solver import SolveFailed, Solver
from eigenwatch.spectrum import eigenvalues


def covariance(width: int = 20) -> torch.Tensor:
    x_ND = torch.randn(3 * width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.cov(x_ND.T)


def test_a_record_says_that_it_was_solved_on_the_cpu():
    solved = Solver(SolverConfig(device="cpu")).solve(covariance())
    assert solved.path == "cpu-float64"
    assert torch.equal(solved.eigenvalues, eigenvalues(covariance()))
    assert solved.eigenvalues.dtype == torch.float64
    assert list(solved.eigenvalues) == sorted(solved.eigenvalues, reverse=True)


def test_auto_takes_a_gpu_where_there_is_one():
    path = Solver(SolverConfig()).solve(covariance()).path
    assert path == ("cuda-float64" if torch.cuda.is_available() else "cpu-float64")


def test_a_covariance_that_is_not_finite_fails_on_every_rung_and_says_so():
    bad = covariance()
    bad[0, 1] = torch.nan
    with pytest.raises(SolveFailed, match=r"cpu: .*NaN"):
        Solver(SolverConfig(device="cpu")).solve(bad)


def test_a_layer_without_variance_is_solved():
    assert torch.equal(Solver(SolverConfig()).solve(torch.zeros(5, 5)).eigenvalues, torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("device", ["gpu", "", "cuda:0", "CPU"])
def test_a_device_that_is_not_known_is_refused(device):
    with pytest.raises(ValueError, match=f"device must be one of auto, cpu, cuda, got '{device}'"):
        SolverConfig(device=device)
