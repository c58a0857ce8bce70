"""From covariance to spectrum: the one expensive call of a record, on whichever device the matrix lies.

torch and not numpy: its MKL was 10–20 times faster than numpy's OpenBLAS at D = 3072 on a 2-core machine.
"""

import torch
from torch import Tensor


def eigenvalues(covariance: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Eigenvalues of a covariance, descending, with what rounding pushed below zero put back to zero.

    The matrix is symmetrised, and scaled to trace 1 while it is solved, so that its scale costs no accuracy.

    Args:
        covariance: (..., D, D), symmetric and positive semidefinite up to rounding; a scatter will do.
        dtype: what is computed and returned.

    Returns:
        (..., D), at least 0, on the matrix's scale; zeros for a zero matrix. Differentiable.

    Raises:
        ValueError: the matrix is not finite.
        torch.linalg.LinAlgError: the solver did not converge.
    """
    symmetric = covariance.to(dtype)
    symmetric = symmetric + symmetric.mT
    if not torch.isfinite(symmetric).all():
        raise ValueError("the covariance holds NaN or Inf and has no eigenvalues; check `finite` first")
    twice_trace = symmetric.detach().diagonal(dim1=-2, dim2=-1).sum(-1)[..., None]
    scale = torch.where(twice_trace > 0, twice_trace, 1.0)
    ascending: Tensor = torch.linalg.eigvalsh(symmetric.div_(scale[..., None]))
    return ascending.flip(-1).clamp(min=0) * (scale / 2)


def eigenvalues_of_lower(lower: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same of a matrix of which only the lower triangle holds anything: no pass over it but the solver's own.

    Args:
        lower: (..., n, n) float64, as `Group.lower` or `Gram.products`; it is scaled in place.
        dtype: what is computed in.

    Returns:
        (..., n) float64 on the CPU, descending, at least 0, on the matrix's scale.

    Raises:
        ValueError: the matrix, or what was found, is not finite.
        torch.linalg.LinAlgError: the solver did not converge.
    """
    trace = lower.diagonal(dim1=-2, dim2=-1).sum(-1)
    if not torch.isfinite(trace).all():
        raise ValueError("the matrix holds NaN or Inf and has no eigenvalues")
    scale = torch.where(trace > 0, trace, 1.0)
    ascending = torch.linalg.eigvalsh(lower.div_(scale[..., None, None]).to(dtype)).to(torch.float64)
    found: Tensor = (ascending.flip(-1).clamp(min=0) * scale[..., None]).cpu()
    if not torch.isfinite(found).all():
        raise ValueError("what the solver found is not finite")
    return found
