"""The solver: eigenvalues of one covariance, by the first rung of a ladder that succeeds.

Runs on the shard's worker thread; torch releases the interpreter lock while it works, so pushes go on.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..spectrum import eigenvalues
from .config import SolverConfig


class Solved(NamedTuple):
    """A spectrum and how it was found."""

    eigenvalues: Tensor
    """(D,) float64 on the CPU, descending."""
    path: str
    """The rung that succeeded, such as "cpu-float64"."""


class SolveFailed(RuntimeError):
    """No rung of the ladder found the eigenvalues."""


class Solver:
    """Solves in float64 on the GPU if there is one, else, or when that fails, on the CPU."""

    def __init__(self, config: SolverConfig) -> None:
        gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        self._ladder = ("cuda", "cpu") if gpu else ("cpu",)

    def solve(self, covariance: Tensor) -> Solved:
        """Eigenvalues of a finite (D, D) covariance.

        Raises:
            SolveFailed: every rung failed; the message says how.
        """
        failures = []
        for device in self._ladder:
            try:
                found = eigenvalues(covariance.to(device)).cpu()
            except (RuntimeError, ValueError, AssertionError) as error:  # the last: a torch without CUDA
                failures.append(f"{device}: {error}")
                continue
            if bool(torch.isfinite(found).all()):
                return Solved(found, f"{device}-float64")
            failures.append(f"{device}: not finite")
        raise SolveFailed("; ".join(failures))
