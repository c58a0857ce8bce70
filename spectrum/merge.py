"""The merge law: partials of one record, and groups of them, become one covariance, exactly and in any order.

The aggregator keeps one `Group` for each open record and adds what arrives. Adding is elementwise; the one
product of matrices, which brings in how far the ranks' means lie apart, is K×D and waits until the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..schemas import PartialCovariance
from .triangle import unpack


class RankMean(NamedTuple):
    """What one rank says of where its tokens lie."""

    rank: int
    tokens: int
    mean: Tensor
    """(D,) float64, a copy: it does not hold on to the memory that the partial came in."""

    @classmethod
    def of(cls, partial: PartialCovariance) -> RankMean:
        return cls(partial.rank, partial.tokens, torch.from_numpy(partial.mean.astype(np.float64)))


class Sums(NamedTuple):
    """Sums over the finite partials of a group, ν = tokens − 1: what the hard rank's corrections need."""

    nu: int = 0
    nu_sq: int = 0
    trace: float = 0.0
    trace_sq: float = 0.0
    frobenius_sq: float = 0.0

    @classmethod
    def of(cls, partial: PartialCovariance) -> Sums:
        if not partial.finite:
            return cls()
        nu = partial.tokens - 1
        return cls(nu, nu * nu, partial.trace, partial.trace**2, partial.frobenius_sq)

    def plus(self, other: Sums) -> Sums:
        return Sums(
            self.nu + other.nu,
            self.nu_sq + other.nu_sq,
            self.trace + other.trace,
            self.trace_sq + other.trace_sq,
            self.frobenius_sq + other.frobenius_sq,
        )


@dataclass(kw_only=True, slots=True, eq=False)
class Group:
    """The merged partials of one record, on the CPU.

    One partial that is not finite makes the group so: it keeps tokens and ranks and lets the scatter go, and
    whatever is added later changes that no more.
    """

    width: int
    within: Tensor
    """(packed_length(D),) float64, the sum of the partials' scatters, each around its own mean; empty if not
    finite."""
    means: list[RankMean]
    sums: Sums
    finite: bool

    @classmethod
    def of(cls, partial: PartialCovariance) -> Group:
        """The group of one partial, whose arrays are copied."""
        return cls(
            width=partial.width,
            within=torch.from_numpy(partial.scatter.astype(np.float64)),
            means=[RankMean.of(partial)],
            sums=Sums.of(partial),
            finite=partial.finite,
        )

    def add_(self, other: Group | PartialCovariance) -> Group:
        """Adds a group or a partial in place; float32 is added to float64 without a second matrix.

        Returns:
            this group.

        Raises:
            ValueError: the widths differ, or a rank is already there; nothing was added then.
        """
        if isinstance(other, PartialCovariance):
            means, sums, scatter = [RankMean.of(other)], Sums.of(other), other.scatter
        else:
            means, sums, scatter = other.means, other.sums, other.within.numpy()
        if other.width != self.width:
            raise ValueError(f"partials of one record have one width, got {self.width} and {other.width}")
        twice = self.ranks & {mean.rank for mean in means}
        if twice:
            raise ValueError(f"rank {min(twice)} is in the group already; its tokens would count twice")
        self.means.extend(means)
        self.sums = self.sums.plus(sums)
        self.finite = self.finite and other.finite
        if self.finite:
            # numpy and not torch: it converts in small pieces, and takes read-only shared memory.
            total = self.within.numpy()
            np.add(total, scatter, out=total)
        else:
            self.within = torch.empty(0, dtype=torch.float64)
        return self

    @property
    def tokens(self) -> int:
        """Activation rows of all partials, N."""
        return sum(mean.tokens for mean in self.means)

    @property
    def ranks(self) -> frozenset[int]:
        return frozenset(mean.rank for mean in self.means)

    @property
    def nbytes(self) -> int:
        return self.within.nbytes + sum(mean.mean.nbytes for mean in self.means)

    @property
    def mean(self) -> Tensor:
        """(D,) float64, the mean of all tokens."""
        tokens_K, mean_KD = self._tokens_and_means()
        return tokens_K @ mean_KD / self.tokens

    def scatter(self) -> Tensor:
        """(D, D) float64: within + Σ n_k (mean_k − mean)(mean_k − mean)ᵀ, around the mean of all tokens."""
        assert self.finite, "a group with a partial that is not finite has no scatter"
        matrix = unpack(self.within, self.width)
        between_KD = self._between()
        return matrix.addmm_(between_KD.T, between_KD)

    def covariance(self) -> Tensor:
        """(D, D) float64: scatter/(N − 1); zeros for one token."""
        return self.scatter().div_(max(self.tokens - 1, 1))

    @property
    def total_variance(self) -> float:
        """tr covariance, from the partials' traces."""
        between = float(self._between().square().sum())
        return (self.sums.trace + between) / max(self.tokens - 1, 1)

    def _tokens_and_means(self) -> tuple[Tensor, Tensor]:
        tokens_K = torch.tensor([mean.tokens for mean in self.means], dtype=torch.float64)
        return tokens_K, torch.stack([mean.mean for mean in self.means])

    def _between(self) -> Tensor:
        """(K, D) float64: √n_k·(mean_k − mean)."""
        tokens_K, mean_KD = self._tokens_and_means()
        return (mean_KD - self.mean) * tokens_K.sqrt()[:, None]


def merge(partials: Iterable[PartialCovariance]) -> Group:
    """All partials of one record as a group; in any order the same but for rounding in float64.

    Raises:
        ValueError: there is none, two have different keys or widths, or two come from one rank.
    """
    group: Group | None = None
    for partial in partials:
        if group is None:
            key, group = partial.key, Group.of(partial)
        elif partial.key != key:
            raise ValueError(f"only partials of one record merge, got {key} and {partial.key}")
        else:
            group.add_(partial)
    if group is None:
        raise ValueError("there is nothing to merge: partials is empty")
    return group
