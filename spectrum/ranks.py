"""Ranks of a spectrum: how many directions carry the variance.

Hard rank listens to the dominant eigenvalues, soft rank to the tail; a layer that collapses loses the first
at once and the second slowly (Jha & Reagen 2025, Table 1). Pure, batched, differentiable, invariant to scale.
A rank is held in [1, D], from which rounding alone could move it.
"""

from torch import Tensor

from .shares import entropy, variance_shares


def hard_rank(eigenvalues: Tensor) -> Tensor:
    """Participation ratio (Σλ)²/Σλ²: 1 for one direction, D for a flat spectrum.

    Args:
        eigenvalues: (..., D), non-negative, any order and any scale.

    Returns:
        (...), between 1 and D; 1 where all variance is zero.

    Source: Gao et al. 2017; Jha & Reagen 2025, Table 1.
    """
    share = variance_shares(eigenvalues)
    return share.square().sum(-1).reciprocal().clamp(1.0, share.shape[-1])


def soft_rank(eigenvalues: Tensor) -> Tensor:
    """Shannon rank, the exponential of the spectrum's entropy: 1 for one direction, D for a flat spectrum.

    Args:
        eigenvalues: (..., D), non-negative, any order and any scale.

    Returns:
        (...), between 1 and D; 1 where all variance is zero.

    Source: Roy & Vetterli 2007; Jha & Reagen 2025, Table 1.
    """
    share = variance_shares(eigenvalues)
    return entropy(share).exp().clamp(1.0, share.shape[-1])


def hard_utilization(eigenvalues: Tensor) -> Tensor:
    """Hard rank on a scale from 0 (one direction) to 1 (all of the width): (hard rank − 1)/(D − 1).

    Args:
        eigenvalues: (..., D), non-negative, any order and any scale.

    Returns:
        (...), between 0 and 1; 0 where D = 1 or all variance is zero.

    Source: Jha & Reagen 2025, Table 1.
    """
    return _utilization(hard_rank(eigenvalues), eigenvalues.shape[-1])


def soft_utilization(eigenvalues: Tensor) -> Tensor:
    """Soft rank on a scale from 0 (one direction) to 1 (all of the width): (soft rank − 1)/(D − 1).

    Args:
        eigenvalues: (..., D), non-negative, any order and any scale.

    Returns:
        (...), between 0 and 1; 0 where D = 1 or all variance is zero.

    Source: Jha & Reagen 2025, Table 1.
    """
    return _utilization(soft_rank(eigenvalues), eigenvalues.shape[-1])


def utilization_index(eigenvalues: Tensor) -> Tensor:
    """Spectral utilization index, the harmonic mean of the two utilizations: high only where both are.

    Args:
        eigenvalues: (..., D), non-negative, any order and any scale.

    Returns:
        (...), between 0 and 1; 0 where both utilizations are 0.

    Source: Jha & Reagen 2025, Table 1.
    """
    hard, soft = hard_utilization(eigenvalues), soft_utilization(eigenvalues)
    total = hard + soft
    return 2 * hard * soft / total.masked_fill(total == 0, 1.0)


def effective_dimension(eigenvalues: Tensor) -> Tensor:
    """Directions in use, 1 + (D − 1)·SUI: the utilization index on the scale of the width.

    Args:
        eigenvalues: (..., D), non-negative, any order and any scale.

    Returns:
        (...), between 1 and D; 1 where all variance is zero. A float: round it where it is shown.

    Source: Jha & Reagen 2025, Table 1.
    """
    return 1 + (eigenvalues.shape[-1] - 1) * utilization_index(eigenvalues)


def _utilization(rank: Tensor, width: int) -> Tensor:
    return (rank - 1) / max(width - 1, 1)
