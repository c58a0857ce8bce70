"""The group on the wire: what several ranks contribute to one record, summed on their host.

A node combiner makes it, so that what enters the network for a record depends on the nodes and not on the ranks. It
says which ranks are in the sum, since a sum cannot be taken apart again, and keeps each share's mean, trace and norm,
since merging and the bias correction of the hard rank need them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .forms import GROUP, MIXED, SAMPLES, SCATTER
from .tiles import packed_length
from .wire import (
    MAX_TOKENS,
    MAX_TRACE,
    MAX_WIDTH,
    Origin,
    PartialRefused,
    WirePartial,
    check_array,
    check_size,
    integer,
    number,
    read_origin,
    shown,
)

MAX_PARTS = 1 << 12
"""Shares in one group: more than any host has processes."""


class Part(NamedTuple):
    """A whole share of the sum: a set of tokens."""

    ranks: tuple[int, ...]
    """That hold it, ascending; the first is the share's number."""
    tokens: int
    trace: float
    frobenius_sq: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PartialGroup(Origin):
    """Σ scatter_k of whole shares k = 1…K, each around its own mean, and what the merge law keeps of each.

    Always finite: what is not travels alone. `rank` and `share` are the lowest there are.
    """

    form: ClassVar[str] = GROUP

    parts: tuple[Part, ...]
    means: NDArray[np.float64]
    """(K, D), in the order of `parts`."""
    scatter: NDArray[np.float32]
    """The packed sum; see `tiles`. Empty where no share has tokens."""
    forms: str
    """In which form its partials were given: "scatter", "samples" or "mixed"."""

    @property
    def ranks(self) -> frozenset[int]:
        return frozenset(rank for part in self.parts for rank in part.ranks)

    @property
    def finite(self) -> bool:
        return True

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @property
    def width(self) -> int:
        return int(self.means.shape[1])

    @property
    def nbytes(self) -> int:
        return int(self.means.nbytes + self.scatter.nbytes)

    def to_wire(self) -> WirePartial:
        header = self.origin_header() | {
            "form": self.form,
            "width": self.width,
            "parts": [[list(part.ranks), *part[1:]] for part in self.parts],
            "forms": self.forms,
        }
        return WirePartial(header, self.means.reshape(-1), self.scatter)

    @classmethod
    def from_wire(cls, wire: WirePartial) -> PartialGroup:
        """The group that was sent.

        Raises:
            PartialRefused: `reason` is "version" for a newer sender and "malformed" for anything else.
        """
        header, means, scatter = wire
        origin = read_origin(header, GROUP)
        width = integer(header, "width", least=1, most=MAX_WIDTH)
        parts = _parts(header)
        lowest = min(part.ranks[0] for part in parts)
        if (origin["rank"], origin["share"]) != (lowest, lowest):
            raise PartialRefused("malformed", "rank and share of a group are not the lowest that it has")
        forms = header.get("forms")
        if forms not in (SCATTER, SAMPLES, MIXED):
            raise PartialRefused("malformed", f"a group of partials of form {shown(forms)} is not known")
        check_size(packed_length(width), np.float32)
        check_array("means", means, np.float64, len(parts) * width)
        check_array("scatter", scatter, np.float32, packed_length(width) if any(one.tokens for one in parts) else 0)
        if not np.isfinite(means).all():
            raise PartialRefused("malformed", "a mean of a group is not finite")
        means_KD = means.reshape(len(parts), width)
        if any(not part.tokens and mean_D.any() for part, mean_D in zip(parts, means_KD, strict=True)):
            raise PartialRefused("malformed", "no tokens, but a mean")
        return cls(**origin, parts=parts, means=means_KD, scatter=scatter, forms=forms)


def _parts(header: dict[str, Any]) -> tuple[Part, ...]:
    listed = header.get("parts")
    if type(listed) is not list or not 1 <= len(listed) <= MAX_PARTS:
        raise PartialRefused("malformed", f"parts must be a list of 1 to {MAX_PARTS}, got {shown(listed)}")
    parts = tuple(_part(one) for one in listed)
    ranks = [rank for part in parts for rank in part.ranks]
    if len(set(ranks)) != len(ranks):
        raise PartialRefused("malformed", "a rank is in the group twice")
    return parts


def _part(listed: Any) -> Part:
    if type(listed) is not list or len(listed) != len(Part._fields):
        raise PartialRefused("malformed", f"a part must be a list of {len(Part._fields)}, got {shown(listed)}")
    fields = dict(zip(Part._fields, listed, strict=True))
    ranks = fields["ranks"]
    if type(ranks) is not list or not ranks:
        raise PartialRefused("malformed", f"ranks of a part must be a list, got {shown(ranks)}")
    ascending = sorted(integer({"rank": rank}, "rank") for rank in ranks)
    tokens = integer(fields, "tokens", most=MAX_TOKENS)
    most = MAX_TRACE if tokens else 0.0
    return Part(
        ranks=tuple(ascending),
        tokens=tokens,
        trace=number(fields, "trace", most),
        frobenius_sq=number(fields, "frobenius_sq", most**2),
    )
