"""A preview of a spectrum that is too wide to be solved: stochastic Lanczos quadrature, with its own error.

The directions that carry most variance are found exactly, by Rayleigh–Ritz; random probes see the rest. What is known
exactly, the trace and the Frobenius norm, is used twice: the hard rank follows from it, and it takes most of the noise
out of the entropy, since −p ln p is nearly a parabola where the probes look. About a thousand products with a vector,
in blocks, where an exact solve is worth 2D/3 of them, and slow ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .lanczos import Quadrature, leading, quadrature

BLOCK, BLOCK_STEPS = 8, 12
PROBES, PROBE_STEPS = 16, 48
LEAST_WIDTH = 256
"""Below it the subspaces would be no smaller than the matrix."""


class Estimate(NamedTuple):
    """A spectrum by quadrature."""

    eigenvalues: Tensor
    """(D,) float64 on the CPU, descending: the converged ones, then quantiles of the density that the probes saw, with
    the exact trace."""
    hard_rank: float
    """Exact: of trace and Frobenius norm."""
    soft_rank: float
    soft_rank_error: float
    """Relative standard error of `soft_rank`, from how far the probes disagree. What a finite number of Lanczos steps
    leaves out is not in it: below 1e-3 on all spectra that were tried."""


def estimate(matrix: Tensor, seed: int) -> Estimate:
    """The spectrum of a large positive semidefinite matrix.

    Args:
        matrix: (D, D) float64, symmetric, on any device; D ≥ 256. float64, since what the leading part leaves of
            the trace is a difference.
        seed: of the probes; the same one gives the same estimate.

    Raises:
        ValueError: the matrix is not finite, or too small.

    Source: Ubaru, Chen & Saad 2017; the exact leading part as in Hutch++, Meyer et al. 2021.
    """
    width = matrix.shape[0]
    if width < LEAST_WIDTH:
        raise ValueError(f"a matrix of width {width} is solved exactly: quadrature is for {LEAST_WIDTH} and more")
    trace = float(matrix.diagonal().sum())
    frobenius = float(torch.linalg.matrix_norm(matrix))
    if not (math.isfinite(trace) and math.isfinite(frobenius)):
        raise ValueError("the matrix holds NaN or Inf and has no eigenvalues")
    if trace <= 0:
        return Estimate(torch.zeros(width, dtype=torch.float64), 1.0, 1.0, 0.0)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(width, BLOCK + PROBES, generator=generator, dtype=torch.float64).to(matrix)
    top = leading(matrix, random[:, :BLOCK], BLOCK_STEPS)
    seen = quadrature(matrix, random[:, BLOCK:], PROBE_STEPS, top.vectors)
    top_share = (top.values / trace).cpu()
    rest = Quadrature((seen.nodes / trace).clamp(min=0).cpu(), seen.weights.cpu())
    rest_width = width - len(top_share)
    rest_trace = max(1.0 - float(top_share.sum()), 0.0)
    rest_square = max((frobenius / trace) ** 2 - float(top_share.square().sum()), 0.0)
    known_3 = torch.tensor([1.0, rest_trace / rest_width, rest_square / rest_width], dtype=torch.float64)
    entropy_m = _entropy_by_probe(rest, known_3)
    entropy = float(_entropy(top_share).sum() + rest_width * entropy_m.mean())
    error = rest_width * float(entropy_m.std()) / PROBES**0.5
    spectrum = torch.cat((top_share, _quantiles(rest, known_3, rest_width))).sort(descending=True).values
    hard_rank = min(max((trace / frobenius) ** 2, 1.0), float(width))
    soft_rank = min(max(math.exp(entropy), 1.0), float(width))
    return Estimate(spectrum * trace, hard_rank, soft_rank, error)


def _entropy(share: Tensor) -> Tensor:
    logarithm: Tensor = torch.special.xlogy(share, share)
    return -logarithm


def _powers(seen: Quadrature) -> Tensor:
    """(m, k, 3): 1, p and p² of each node, whose means over the spectrum are known."""
    return torch.stack((torch.ones_like(seen.nodes), seen.nodes, seen.nodes.square()), -1)


def _entropy_by_probe(seen: Quadrature, known_3: Tensor) -> Tensor:
    """(m,): what each probe says −p ln p is on average, without the noise that it shows in p and p².

    A parabola is fitted to −p ln p over what all probes saw; a probe's noise is that of what the parabola leaves.
    """
    powers_mk3, values_mk, root = _powers(seen), _entropy(seen.nodes), seen.weights.sqrt()
    scale_3 = powers_mk3.flatten(0, 1).amax(0).clamp(min=1e-300)
    design = (powers_mk3 / scale_3 * root[..., None]).flatten(0, 1)
    fit_3: Tensor = (
        torch.linalg.lstsq(design, (values_mk * root).flatten()[:, None], driver="gelsd").solution[:, 0] / scale_3
    )
    left_mk = values_mk - powers_mk3 @ fit_3
    return (seen.weights * left_mk).sum(-1) + known_3 @ fit_3


def _quantiles(seen: Quadrature, known_3: Tensor, count: int) -> Tensor:
    """(count,): as many values as there are eigenvalues, with the distribution that all probes saw together.

    Its weights are tilted until the means of p and p² are the known ones. A staircase: between nodes there may be
    nothing at all, as between the parts of a spectrum with a gap.
    """
    nodes, order = seen.nodes.flatten().sort()
    weights = seen.weights.flatten()[order] / seen.weights.sum()
    powers_n3 = _powers(seen).flatten(0, 1)[order]
    scale_3 = powers_n3.amax(0).clamp(min=1e-300)
    powers_n3 = powers_n3 / scale_3
    missing_3 = known_3 / scale_3 - weights @ powers_n3
    moments_33 = (powers_n3 * weights[:, None]).T @ powers_n3
    tilt_3: Tensor = torch.linalg.lstsq(moments_33, missing_3[:, None], driver="gelsd").solution[:, 0]
    below = (weights * (1 + powers_n3 @ tilt_3)).clamp(min=0).cumsum(0)
    at = (torch.arange(count, dtype=torch.float64) + 0.5) / count * below[-1]
    values = nodes[torch.searchsorted(below, at).clamp(max=len(nodes) - 1)]
    found = float(values.sum())
    return values * (float(known_3[1]) * count / found) if found > 0 else values
