"""The partial: what one rank contributes to one record, in one of two exact forms.

A scatter, or a block of its rows where a tensor-parallel group shares the work; or the activation rows themselves,
where they are fewer bytes than the scatter. Which form is cheaper is the sender's choice; the aggregator makes the
same record of both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .forms import GROUP, SAMPLES, SCATTER
from .group import PartialGroup
from .tiles import packed_offset
from .wire import (
    MAX_TOKENS,
    MAX_TRACE,
    MAX_WIDTH,
    ROWS_DTYPES,
    Origin,
    PartialRefused,
    WirePartial,
    check_array,
    check_size,
    integer,
    payload_dtype,
    read_origin,
    shown,
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PartialCovariance(Origin):
    """(tokens, mean, scatter) of one share, or a block of the scatter's rows.

    A partial whose activations held NaN or Inf, or whose scatter overflowed, has a non-finite `trace` and an
    empty `scatter`: it says that it happened and carries nothing that could poison a merge. A partial of no tokens
    has an empty `scatter` too: it says that the rank saw none, as happens to experts, and is not to be waited for.
    """

    form: ClassVar[str] = SCATTER

    rows: tuple[int, int]
    """Rows [start, stop) of the scatter that are here; (0, D) for the whole."""
    tokens: int
    """Activation rows summed, N; of the whole share, whichever block this is."""
    mean: NDArray[np.float64]
    """(D,) the mean of those rows. float64, since the rounding of a float32 mean would be the largest error of a merge
    where the means of ranks differ and are large against the deviation."""
    scatter: NDArray[np.float32]
    """Σ (x−mean)(x−mean)ᵀ, upper triangle by row tiles, the slice of these `rows`; see `tiles`."""
    trace: float
    """What these rows add to tr scatter."""
    frobenius_sq: float
    """What the numbers of these rows add to ‖scatter‖²_F of the whole symmetric matrix."""

    @property
    def ranks(self) -> frozenset[int]:
        return frozenset((self.rank,))

    @property
    def width(self) -> int:
        return int(self.mean.shape[0])

    @property
    def finite(self) -> bool:
        return math.isfinite(self.trace)

    @property
    def nbytes(self) -> int:
        return int(self.mean.nbytes + self.scatter.nbytes)

    def to_wire(self) -> WirePartial:
        header = self.origin_header() | {
            "form": self.form,
            "width": self.width,
            "rows": list(self.rows),
            "tokens": self.tokens,
            "trace": self.trace,
            "frobenius_sq": self.frobenius_sq,
        }
        return WirePartial(header, self.mean, self.scatter)

    @classmethod
    def from_wire(cls, wire: WirePartial) -> PartialCovariance:
        """The partial that was sent.

        Raises:
            PartialRefused: `reason` is one of `REFUSAL_REASONS`.
        """
        header, mean, scatter = wire
        origin = read_origin(header, SCATTER)
        width = integer(header, "width", least=1, most=MAX_WIDTH)
        start, stop = rows = _rows(header, width)
        tokens = integer(header, "tokens", most=MAX_TOKENS)
        trace, frobenius_sq = header.get("trace"), header.get("frobenius_sq")
        if type(trace) is not float or type(frobenius_sq) is not float:
            raise PartialRefused("malformed", f"trace {shown(trace)} or frobenius_sq {shown(frobenius_sq)} is no float")
        finite = math.isfinite(trace)
        most = MAX_TRACE if tokens else 0.0
        if (finite or not tokens) and not (0 <= trace <= most and 0 <= frobenius_sq <= most**2):
            raise PartialRefused("malformed", f"trace {trace} or frobenius_sq {frobenius_sq} is out of range")
        length = packed_offset(width, stop) - packed_offset(width, start)
        check_size(length, np.float32)
        check_array("mean", mean, np.float64, width)
        check_array("scatter", scatter, np.float32, length if finite and tokens else 0)
        if finite and not np.isfinite(mean).all():
            raise PartialRefused("malformed", "mean is not finite but trace is")
        if not tokens and mean.any():
            raise PartialRefused("malformed", "no tokens, but a mean")
        return cls(
            **origin,
            rows=rows,
            tokens=tokens,
            mean=mean,
            scatter=scatter,
            trace=trace,
            frobenius_sq=frobenius_sq,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PartialSamples(Origin):
    """The activation rows of one share, as the training computed them; the aggregator forms the scatter."""

    form: ClassVar[str] = SAMPLES

    samples: NDArray[Any]
    """(N, D) float32 or float16, or the bits of bfloat16 as uint16."""

    @property
    def ranks(self) -> frozenset[int]:
        return frozenset((self.rank,))

    @property
    def tokens(self) -> int:
        return int(self.samples.shape[0])

    @property
    def width(self) -> int:
        return int(self.samples.shape[1])

    @property
    def rows(self) -> tuple[int, int]:
        """Of the scatter: all."""
        return 0, self.width

    @property
    def nbytes(self) -> int:
        return int(self.samples.nbytes)

    def to_wire(self) -> WirePartial:
        (dtype,) = (name for name, dtype in ROWS_DTYPES.items() if dtype == self.samples.dtype)
        header = self.origin_header() | {
            "form": self.form,
            "width": self.width,
            "tokens": self.tokens,
            "dtype": dtype,
        }
        return WirePartial(header, np.empty(0), self.samples.reshape(-1))

    @classmethod
    def from_wire(cls, wire: WirePartial) -> PartialSamples:
        """The partial that was sent.

        Raises:
            PartialRefused: `reason` is one of `REFUSAL_REASONS`.
        """
        header, mean, flat = wire
        origin = read_origin(header, SAMPLES)
        width = integer(header, "width", least=1, most=MAX_WIDTH)
        tokens = integer(header, "tokens", most=MAX_TOKENS)
        check_size(tokens * width, payload_dtype(header))
        check_array("mean", mean, np.float64, 0)
        check_array("samples", flat, payload_dtype(header), tokens * width)
        return cls(**origin, samples=flat.reshape(tokens, width))


Partial: TypeAlias = PartialCovariance | PartialSamples
"""What one rank sends."""
Arrived: TypeAlias = Partial | PartialGroup
"""What a shard may be given."""


def partial_from_wire(wire: WirePartial) -> Partial:
    """One rank's partial that was sent, in the form that its header names.

    Raises:
        PartialRefused: `reason` is one of `REFUSAL_REASONS`.
    """
    form = wire.header.get("form") if isinstance(wire.header, dict) else None
    samples = isinstance(form, str) and form == SAMPLES
    return PartialSamples.from_wire(wire) if samples else PartialCovariance.from_wire(wire)


def arrived_from_wire(wire: WirePartial) -> Arrived:
    """The same, or the group of a node combiner."""
    group = isinstance(wire.header, dict) and wire.header.get("form") == GROUP
    return PartialGroup.from_wire(wire) if group else partial_from_wire(wire)


def _rows(header: dict[str, Any], width: int) -> tuple[int, int]:
    rows = header.get("rows")
    if type(rows) is not list or len(rows) != 2 or not all(type(row) is int for row in rows):
        raise PartialRefused("malformed", f"rows must be a list of two integers, got {shown(rows)}")
    start, stop = rows
    if not 0 <= start < stop <= width:
        raise PartialRefused("malformed", f"rows must be a part of [0, {width}), got {shown(rows)}")
    return start, stop
