"""Ranks without their finite-sample bias.

The covariance of N tokens has rank N−1 at most, so raw ranks fall with the batch: an alert on them would fire
when somebody halves the batch size. The hard rank has an exact remedy, a ratio of unbiased estimates; the
soft rank one of first order in 1/N. Both may leave [1, D] by their own noise and are not clipped, which would
bias them again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .shares import entropy, variance_shares

CHUNK_PAIRS = 1 << 16
"""Pairs of eigenvalues in memory at a time: two buffers of 512 KiB each."""
CHUNK_ROWS = 64
"""At most: half of the square at the head of a block is computed for nothing."""
TINY = 1e-300
"""Stands for 0 where 0/0 would be 1."""


class Correction(NamedTuple):
    """A corrected rank and how it was found; null where the sample does not determine it."""

    value: float | None
    method: str | None
    """"pairs" or "gaussian"."""


class Sample(Protocol):
    """One share: tokens that are independent of the others'."""

    @property
    def tokens(self) -> int: ...
    @property
    def trace(self) -> float: ...
    @property
    def frobenius_sq(self) -> float: ...


class Merged(Protocol):
    """What a record's metrics need besides its eigenvalues; a `Group` has it, and so has a `Gram`."""

    @property
    def width(self) -> int: ...
    @property
    def finite(self) -> bool: ...
    @property
    def tokens(self) -> int: ...
    @property
    def contributing(self) -> Sequence[Sample]: ...
    @property
    def within_frobenius_sq(self) -> float: ...
    @property
    def total_variance(self) -> float: ...


def hard_rank_corrected(group: Merged) -> Correction:
    """The hard rank of the covariance that the tokens were drawn from.

    Two or more shares are independent samples, and products across them are unbiased whatever the
    distribution: "pairs". One share alone takes the closed form for Gaussian tokens: "gaussian".
    """
    shares = group.contributing
    if not group.finite or not shares:
        return Correction(None, None)
    nu_K = [share.tokens - 1 for share in shares]
    trace_K = [share.trace for share in shares]
    frobenius_sq_K = [share.frobenius_sq for share in shares]
    if len(shares) >= 2:
        value, method = hard_rank_from_pairs(nu_K, trace_K, frobenius_sq_K, group.within_frobenius_sq), "pairs"
    else:
        value, method = hard_rank_gaussian(nu_K[0], trace_K[0], frobenius_sq_K[0]), "gaussian"
    return Correction(value, method if value is not None else None)


def hard_rank_from_pairs(
    nu_K: Sequence[int], trace_K: Sequence[float], frobenius_sq_K: Sequence[float], within_frobenius_sq: float
) -> float | None:
    """â/b̂ over the pairs j≠k of shares: E tr S_j·tr S_k = ν_jν_k (tr Σ)² and E⟨S_j, S_k⟩ = ν_jν_k ‖Σ‖²_F.

    Args:
        nu_K: tokens − 1 of each of two or more disjoint shares.
        trace_K: tr scatter_k.
        frobenius_sq_K: ‖scatter_k‖²_F.
        within_frobenius_sq: ‖Σ_k scatter_k‖²_F.

    Returns:
        the rank; None where no pair has degrees of freedom or the estimate of ‖Σ‖²_F is not positive.
    """
    pairs = sum(nu_K) ** 2 - sum(nu * nu for nu in nu_K)
    if pairs <= 0:
        return None
    trace_products = sum(trace_K) ** 2 - sum(trace * trace for trace in trace_K)
    return _ratio(trace_products / pairs, (within_frobenius_sq - sum(frobenius_sq_K)) / pairs)


def hard_rank_gaussian(nu: int, trace: float, frobenius_sq: float) -> float | None:
    """a/b of one sample of Gaussian tokens, with unbiased a for (tr Σ)² and b for ‖Σ‖²_F.

    With S = scatter/ν: b = ν²/((ν−1)(ν+2))·(tr S² − (tr S)²/ν), a = (tr S)² − 2b/ν.

    Args:
        nu: tokens − 1.
        trace: tr scatter.
        frobenius_sq: ‖scatter‖²_F.

    Returns:
        the rank; None for ν ≤ 1 or where b is not positive.

    Source: moments of the Wishart distribution; Srivastava 2005.
    """
    if nu <= 1:
        return None
    trace_sq, norm_sq = (trace / nu) ** 2, frobenius_sq / nu**2
    b = nu**2 / ((nu - 1) * (nu + 2)) * (norm_sq - trace_sq / nu)
    return _ratio(trace_sq - 2 * b / nu, b)


def soft_rank_corrected(eigenvalues: Tensor, tokens: int) -> float | None:
    """The soft rank with the entropy's bias of order 1/ν removed, ν = tokens − 1.

    With p the shares and H their entropy,

        H + (1/ν)·[Σ_{i<j} p_i p_j ln(p_i/p_j)/(p_i−p_j) + 1 − 2·Σ p_i² (H + ½ + ln p_i)]

    The last sum comes from the fluctuation of the trace that normalises the shares. It is small in a wide
    spectrum; without it one single direction would have a soft rank above 1.

    Args:
        eigenvalues: (D,), non-negative, descending, any scale.
        tokens: rows that the covariance was computed from, N.

    Returns:
        the rank; None where N < 2D, since the first order is not safe there, or where it is not finite.

    Source: second-order perturbation of the Wishart distribution, as Miller 1955 for counts.
    """
    width = eigenvalues.shape[-1]
    if tokens < max(2 * width, 2):
        return None
    share = variance_shares(eigenvalues.detach())
    plain = entropy(share)
    log_share = torch.where(share == 0, 1.0, share).log()
    trace_term = 2 * (share.square() * (plain + 0.5 + log_share)).sum()
    corrected = float((plain + (_pair_sum(share) + 1 - trace_term) / (tokens - 1)).exp())
    return corrected if math.isfinite(corrected) else None


def _pair_sum(share: Tensor) -> Tensor:
    """Σ_{i<j} p_i p_j ln(p_i/p_j)/(p_i−p_j) of descending shares, a block of rows at a time, in the cache.

    With a = ln(p_j/p_i) ≤ 0 a term is p_j·a/(eᵃ−1): p_j for a → 0, and no difference of nearly equal numbers.
    """
    share = share[share > 0]
    log_share, width = share.log(), share.shape[0]
    rows = min(max(1, CHUNK_PAIRS // width), CHUNK_ROWS)
    total = share.new_zeros(())
    buffers = share.new_empty(2, rows * width)
    for start in range(0, width, rows):
        stop = min(start + rows, width)
        a, e = (one[: (stop - start) * (width - start)].view(stop - start, -1) for one in buffers)
        torch.sub(log_share[None, start:], log_share[start:stop, None], out=a)
        a.clamp_(max=-TINY)
        torch.expm1(a, out=e)
        total += (a.div_(e).triu_(1) @ share[start:]).sum()
    return total


def _ratio(a: float, b: float) -> float | None:
    if not b > 0:
        return None
    ratio = a / b
    return ratio if math.isfinite(ratio) else None
