"""The spectrum as a distribution: which share of the variance each direction carries.

Every metric of a spectrum starts here, so that this is the one place that decides on precision (float64,
whatever comes in), on scale (none: the largest eigenvalue is divided out before anything is summed, so 1e-300
and 1e300 are as good as 1) and on a layer without variance (all of it in the first direction).
"""

import torch
from torch import Tensor


def variance_shares(eigenvalues: Tensor) -> Tensor:
    """The share of the variance in each direction, p_i = λ_i/Σλ.

    Zero total variance has the shares of a spectrum with one direction, the limit of a layer that collapses:
    every rank is 1, every utilization 0, the concentration (D−1)/D and the top-1 share 1.

    Args:
        eigenvalues: (..., D), non-negative, any order, any scale and any real dtype.

    Returns:
        (..., D) in float64, between 0 and 1 with sum 1; NaN where an eigenvalue is NaN or infinite.

    Source: Roy & Vetterli 2007.
    """
    eigenvalues = eigenvalues.to(torch.float64)
    largest = eigenvalues.detach().amax(-1, keepdim=True)
    scaled = eigenvalues / torch.where(largest == 0, 1.0, largest)
    total = scaled.sum(-1, keepdim=True)
    empty = total == 0  # not `total > 0`: NaN must stay NaN, not pass for a collapsed layer
    first_direction = torch.zeros_like(scaled)
    first_direction[..., 0] = 1.0
    return torch.where(empty, first_direction, scaled / torch.where(empty, 1.0, total))


def entropy(share: Tensor) -> Tensor:
    """Shannon entropy −Σ p ln p in nats, with 0·ln 0 = 0.

    A share of exactly zero, as a rank-deficient covariance has, passes no gradient on: its derivative is
    infinite, and infinity times zero would make the gradient of every other eigenvalue NaN.

    Args:
        share: (..., D), non-negative with sum 1.

    Returns:
        (...), between 0 and ln D.
    """
    return -(share * torch.where(share == 0, 1.0, share).log()).sum(-1)
