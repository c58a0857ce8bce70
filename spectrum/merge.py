"""The merge law: partials of one record, and groups of them, become one covariance, exactly and in any order.

The aggregator keeps one `Group` for each open record and adds what arrives. Adding is elementwise; the one
product of matrices, which brings in how far the shares' means lie apart, is K×D and waits until the end.

A tensor-parallel group sends one scatter in blocks of rows. Until all rows are there its share is no covariance,
and a sum cannot be taken apart again, so blocks wait beside the sum: a record that closes without them is that of
fewer tokens, and not of a matrix that lacks some of its rows.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..schemas import PartialCovariance, PartialGroup, packed_length, packed_offset
from .triangle import block_views, lower_of, unpack

Rows = tuple[int, int]
"""[start, stop)"""
PIECE = 1 << 16
"""Numbers of the sum that stay in the cache while everything that waits is added to them."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Share:
    """A set of tokens, and what has come of it."""

    tokens: int
    mean: Tensor
    """(D,) float64, a copy: it does not hold on to the memory that the partial came in."""
    rows: dict[int, Rows]
    """By the rank that sent them."""
    trace: float
    """Of the rows that have come, and so is `frobenius_sq`; NaN where a block is not finite."""
    frobenius_sq: float
    blocks: dict[Rows, NDArray[np.float32]] = field(default_factory=dict)
    """Slices of the packed scatter that wait for the others; copies."""

    @classmethod
    def of(cls, partial: PartialCovariance) -> Share:
        waits = partial.rows != (0, partial.width) and partial.scatter.size
        return cls(
            tokens=partial.tokens,
            mean=torch.from_numpy(partial.mean.astype(np.float64)),
            rows={partial.rank: partial.rows},
            trace=partial.trace,
            frobenius_sq=partial.frobenius_sq,
            blocks={partial.rows: partial.scatter.copy()} if waits else {},
        )

    @classmethod
    def of_group(cls, group: PartialGroup) -> dict[int, Share]:
        """The shares of a group that was summed elsewhere, by number. Their rows all stand at the first rank."""
        nobody = (group.width, group.width)
        return {
            part.ranks[0]: cls(
                tokens=part.tokens,
                mean=torch.from_numpy(mean_D.astype(np.float64)),
                rows=dict.fromkeys(part.ranks, nobody) | {part.ranks[0]: (0, group.width)},
                trace=part.trace,
                frobenius_sq=part.frobenius_sq,
            )
            for part, mean_D in zip(group.parts, group.means, strict=True)
        }

    @property
    def finished(self) -> bool:
        """Whether all rows have come."""
        return sum(stop - start for start, stop in self.rows.values()) == self.mean.shape[0]

    @property
    def nbytes(self) -> int:
        return self.mean.nbytes + sum(block.nbytes for block in self.blocks.values())

    def plus(self, other: Share) -> Share:
        """With what has come of the same share elsewhere."""
        return dataclasses.replace(
            self,
            rows=self.rows | other.rows,
            trace=self.trace + other.trace,
            frobenius_sq=self.frobenius_sq + other.frobenius_sq,
            blocks=self.blocks | other.blocks,
        )

    def without_blocks(self) -> Share:
        return dataclasses.replace(self, blocks={})


@dataclass(kw_only=True, slots=True, eq=False)
class Group:
    """The merged partials of one record, on the CPU.

    One partial that is not finite makes the group so: it keeps tokens and ranks and lets the scatter go, and
    whatever is added later changes that no more.
    """

    width: int
    within: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    """(packed_length(D),) float64, the sum of the finished shares' scatters, each around its own mean; empty if
    there is none with tokens, or if not finite."""
    shares: dict[int, Share] = field(default_factory=dict)
    """By their lowest rank."""
    finite: bool = True
    _waiting: deque[tuple[int, NDArray[np.floating]]] = field(default_factory=deque, repr=False)
    """What was taken and is not in `within` yet: where it begins there, and a slice of a packed scatter."""

    @classmethod
    def of(cls, partial: PartialCovariance) -> Group:
        """The group of one partial, whose arrays are copied."""
        return cls(width=partial.width).add_(partial)

    def add_(self, other: Group | PartialGroup | PartialCovariance) -> Group:
        """Adds a group or a partial in place; float32 is added to float64 without a second matrix.

        Returns:
            this group.

        Raises:
            ValueError: as `take_`.
        """
        self.take_(other)
        self.fold_()
        return self

    def take_(self, other: Group | PartialGroup | PartialCovariance) -> None:
        """Adds a group or a partial, but for the numbers of its scatter: `fold_` adds them, and must do so before
        anything is asked of `within` and before the scatter's memory changes. One thread at a time takes.

        Raises:
            ValueError: the widths differ, a rank or its rows are already there, or blocks of one share speak of
                different numbers of tokens; nothing was added then.
        """
        within: NDArray[np.floating]
        if isinstance(other, PartialCovariance):
            share = Share.of(other)
            shares, within = {other.share: share}, other.scatter if share.finished else other.scatter[:0]
        elif isinstance(other, PartialGroup):
            shares, within = Share.of_group(other), other.scatter
        else:
            other.fold_()
            shares, within = other.shares, other.within.numpy()
        self._check(other.width, shares)
        for number, share in shares.items():
            mine = self.shares.get(number)
            self.shares[number] = share if mine is None else mine.plus(share)
        self.finite = self.finite and other.finite
        if not self.finite:
            self.within = torch.empty(0, dtype=torch.float64)
            self.shares = {number: share.without_blocks() for number, share in self.shares.items()}
            return
        if within.size:
            self._waiting.append((0, within))
        for number in shares:
            share = self.shares[number]
            if share.finished and share.blocks:
                for (start, _), block in share.blocks.items():
                    self._waiting.append((packed_offset(self.width, start), block))
                self.shares[number] = share.without_blocks()

    def fold_(self) -> None:
        """Adds to `within` all that has been taken, in one pass. One thread at a time; another may take meanwhile.

        Raises:
            MemoryError: there is no room for the sum; what was taken waits on.
        """
        taken = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if taken and self.finite and not self.within.numel():
            try:
                self.within = torch.from_numpy(np.zeros(packed_length(self.width)))
            except MemoryError:
                self._waiting.extendleft(reversed(taken))
                raise
        total = self.within.numpy()
        for start in range(0, total.size if taken else 0, PIECE):
            piece = total[start : start + PIECE]
            for offset, packed in taken:
                first, last = max(offset, start), min(offset + packed.size, start + piece.size)
                if first < last:
                    # numpy and not torch: it converts in small pieces, and takes read-only shared memory.
                    part = piece[first - start : last - start]
                    np.add(part, packed[first - offset : last - offset], out=part)
        if not self.finite:  # somebody has taken that, meanwhile
            self.within = torch.empty(0, dtype=torch.float64)

    @property
    def finished(self) -> list[Share]:
        """The shares all of whose rows have come; the others are left out of everything below but `ranks`."""
        return [share for share in self.shares.values() if share.finished]

    @property
    def contributing(self) -> list[Share]:
        """The finished shares that saw a token: K independent samples."""
        return [share for share in self.finished if share.tokens]

    @property
    def tokens(self) -> int:
        """Activation rows of all finished shares, N."""
        return sum(share.tokens for share in self.finished)

    @property
    def ranks(self) -> frozenset[int]:
        """All ranks of which something has come."""
        return frozenset(rank for share in self.shares.values() for rank in share.rows)

    @property
    def nbytes(self) -> int:
        within = 8 * packed_length(self.width) if self._waiting and self.finite else self.within.nbytes
        return within + sum(share.nbytes for share in self.shares.values())

    @property
    def mean(self) -> Tensor:
        """(D,) float64, the mean of all tokens."""
        tokens_K, mean_KD = self._tokens_and_means()
        return tokens_K @ mean_KD / self.tokens

    def scatter(self, device: torch.device | str = "cpu") -> Tensor:
        """(D, D) float64 on a device: within + Σ n_k (mean_k − mean)(mean_k − mean)ᵀ, around the mean of all tokens."""
        assert self.finite, "a group with a partial that is not finite has no scatter"
        assert self.tokens, "a group without tokens has no scatter"
        matrix = unpack(self.within.to(device), self.width)
        between_KD = self._between().to(device)
        return matrix.addmm_(between_KD.T, between_KD)

    def lower(self, device: torch.device | str = "cpu") -> Tensor:
        """(D, D) float64 on a device: the scatter's lower triangle, all that a solver reads, and anything above."""
        assert self.finite, "a group with a partial that is not finite has no scatter"
        assert self.tokens, "a group without tokens has no scatter"
        matrix = lower_of(self.within.to(device), self.width)
        if len(self.contributing) > 1:
            between_KD = self._between().to(device)
            matrix.addmm_(between_KD.T, between_KD)
        return matrix

    def covariance(self) -> Tensor:
        """(D, D) float64: scatter/(N − 1); zeros for one token."""
        return self.scatter().div_(max(self.tokens - 1, 1))

    @property
    def within_frobenius_sq(self) -> float:
        """‖within‖²_F."""
        twice = 2 * float(self.within.dot(self.within))  # what is packed outside the diagonal's squares counts twice
        for block, view in block_views(self.within, self.width, (0, self.width)) if twice else ():
            twice -= float(view[:, : block.stop - block.start].square().sum())
        return twice

    @property
    def total_variance(self) -> float:
        """tr covariance, from the shares' traces."""
        within = sum(share.trace for share in self.contributing)
        between = float(self._between().square().sum())
        return (within + between) / max(self.tokens - 1, 1)

    def _check(self, width: int, shares: dict[int, Share]) -> None:
        if width != self.width:
            raise ValueError(f"partials of one record have one width, got {self.width} and {width}")
        twice = self.ranks & {rank for share in shares.values() for rank in share.rows}
        if twice:
            raise ValueError(f"rank {min(twice)} is in the group already; its tokens would count twice")
        for number in self.shares.keys() & shares.keys():
            mine, other = self.shares[number], shares[number]
            if mine.tokens != other.tokens:
                raise ValueError(f"blocks of share {number} speak of {mine.tokens} and of {other.tokens} tokens")
            for start, stop in other.rows.values():
                if any(start < its_stop and its_start < stop for its_start, its_stop in mine.rows.values()):
                    raise ValueError(f"rows [{start}, {stop}) of share {number} are in the group already")

    def _tokens_and_means(self) -> tuple[Tensor, Tensor]:
        shares = self.contributing
        tokens_K = torch.tensor([share.tokens for share in shares], dtype=torch.float64)
        return tokens_K, torch.stack([share.mean for share in shares])

    def _between(self) -> Tensor:
        """(K, D) float64: √n_k·(mean_k − mean)."""
        tokens_K, mean_KD = self._tokens_and_means()
        return (mean_KD - self.mean) * tokens_K.sqrt()[:, None]


def merge(partials: Iterable[PartialCovariance]) -> Group:
    """All partials of one record as a group; in any order the same but for rounding in float64.

    Raises:
        ValueError: there is none, two have different keys, or `Group.add_` refuses one.
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
