"""Fewer tokens than directions: the spectrum from the N×N products of the rows, never from a matrix D×D.

With Y the N rows around the mean of all tokens, YᵀY and YYᵀ have the same eigenvalues but for zeros, and the solve
costs (N/D)³. What the bias corrections need of each share comes from the same products, so a record does not show by
which way it was found. The aggregator's solver calls this where every partial of a record came as rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class ShareMoments(NamedTuple):
    """What the corrections ask of one share."""

    tokens: int
    trace: float
    """Of its scatter, and so is `frobenius_sq`."""
    frobenius_sq: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Gram:
    """The merged rows of one record, in place of a `Group`."""

    width: int
    products: Tensor
    """(N, N) float64: inner products of the rows around the mean of all tokens; as many non-zero eigenvalues as the
    scatter, and the same."""
    trace: float
    """Of the products and of the scatter alike."""
    contributing: list[ShareMoments]
    """The shares that saw a token: K independent samples."""
    within_frobenius_sq: float
    """‖Σ_k scatter_k‖²_F."""

    @classmethod
    def of(cls, rows: Sequence[Tensor]) -> Gram:
        """The products of all shares' rows.

        Each share is centred on its own mean first and the means' distances are added to the products, as the merge
        law adds them to the scatter: no mean's square is ever taken from raw products.

        Args:
            rows: (N_k, D) of each share with at least one row, in any floating dtype, on one device.
        """
        assert rows
        assert all(len(one) for one in rows)
        centred, means = [], []
        for one in rows:
            x_ND = one.to(torch.float64)
            means.append(x_ND.mean(0))
            centred.append(x_ND - means[-1])
        y_ND, mean_KD = torch.cat(centred), torch.stack(means)
        tokens_K = [len(one) for one in rows]
        within_NN = y_ND @ y_ND.T
        shares = [
            ShareMoments(block.shape[0], float(block.trace()), float(block.square().sum()))
            for block in _diagonal_blocks(within_NN, tokens_K)
        ]
        frobenius_sq = float(torch.linalg.vector_norm(within_NN).square())
        if len(rows) > 1:
            counts_K = mean_KD.new_tensor(tokens_K)
            apart_KD = mean_KD - counts_K @ mean_KD / counts_K.sum()
            share_N = torch.repeat_interleave(torch.arange(len(rows), device=y_ND.device), counts_K.long())
            cross_NN = (y_ND @ apart_KD.T)[:, share_N]
            within_NN += cross_NN
            within_NN += cross_NN.T
            within_NN += (apart_KD @ apart_KD.T)[share_N][:, share_N]
        return cls(
            width=y_ND.shape[1],
            products=within_NN,
            trace=float(within_NN.trace()),
            contributing=shares,
            within_frobenius_sq=frobenius_sq,
        )

    @property
    def finite(self) -> bool:
        """Whether all rows are: one NaN or Inf makes its share's mean, and so the trace, NaN."""
        return math.isfinite(self.trace)

    @property
    def tokens(self) -> int:
        return self.products.shape[0]

    @property
    def total_variance(self) -> float:
        """tr covariance."""
        return self.trace / max(self.tokens - 1, 1)


def _diagonal_blocks(matrix: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    blocks, start = [], 0
    for size in sizes:
        blocks.append(matrix[start : start + size, start : start + size])
        start += size
    return blocks
