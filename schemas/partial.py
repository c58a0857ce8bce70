"""The partial: one rank's share of one covariance, and its form on the wire.

On the wire a partial is a header of plain numbers and strings and two arrays, so that neither a Ray worker nor a
reader of a spool needs the class, and everything that arrives is checked before it is believed.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .keys import SITES, RecordKey, check_run_id
from .tiles import packed_length

WIRE_VERSION = 1
MAX_WIDTH = 1 << 17
MAX_TRACE = MAX_WIDTH * float(np.finfo(np.float32).max)
"""What float32 entries can add up to; beyond it sums of squares would overflow."""
MAX_TOKENS = 1 << 40
MAX_TIME_SECONDS = 253_402_300_799.0
"""The year 9999."""


class PartialRefused(ValueError):
    """A partial that cannot be used; `reason` is the label under which it is counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class WirePartial(NamedTuple):
    """A partial as it travels: builtin values and two arrays."""

    header: dict[str, Any]
    mean: NDArray[np.float64]
    scatter: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PartialCovariance:
    """One rank's (tokens, mean, scatter) for one record.

    A partial whose activations held NaN or Inf, or whose scatter overflowed, has a non-finite `trace` and an
    empty `scatter`: it says that it happened and carries nothing that could poison a merge.
    """

    key: RecordKey
    rank: int
    tokens: int
    """Activation rows summed, N."""
    mean: NDArray[np.float64]
    """(D,) the mean of those rows. float64, since the rounding of a float32 mean would be the largest error of a merge
    where the means of ranks differ and are large against the deviation."""
    scatter: NDArray[np.float32]
    """(packed_length(D),) Σ (x−mean)(x−mean)ᵀ, upper triangle by row tiles; see `tiles`."""
    trace: float
    """tr scatter."""
    frobenius_sq: float
    """‖scatter‖²_F of the whole symmetric matrix."""
    captured_at: float
    """Unix time in seconds at the end of the step."""

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
        header = self.key._asdict() | {
            "version": WIRE_VERSION,
            "rank": self.rank,
            "tokens": self.tokens,
            "width": self.width,
            "trace": self.trace,
            "frobenius_sq": self.frobenius_sq,
            "captured_at": self.captured_at,
        }
        return WirePartial(header, self.mean, self.scatter)

    @classmethod
    def from_wire(cls, wire: WirePartial) -> PartialCovariance:
        """The partial that was sent.

        Raises:
            PartialRefused: `reason` is "version" for a newer sender and "malformed" for anything else.
        """
        header, mean, scatter = wire
        if not isinstance(header, dict):
            raise PartialRefused("malformed", "the header is not a mapping")
        version = header.get("version")
        if not isinstance(version, int) or not 1 <= version <= WIRE_VERSION:
            raise PartialRefused(
                "version",
                f"wire version {_shown(version)} is not understood; this side speaks up to {WIRE_VERSION}",
            )
        key = RecordKey(
            run_id=_run_id(header),
            attempt=_integer(header, "attempt"),
            step=_integer(header, "step"),
            layer=_integer(header, "layer"),
            site=_site(header),
            expert=None if header.get("expert") is None else _integer(header, "expert"),
        )
        width = _integer(header, "width", least=1, most=MAX_WIDTH)
        trace, frobenius_sq = _number(header, "trace"), _number(header, "frobenius_sq")
        finite = math.isfinite(trace)
        if finite and not (0 <= trace <= MAX_TRACE and 0 <= frobenius_sq <= MAX_TRACE**2):
            raise PartialRefused("malformed", f"trace {trace} or frobenius_sq {frobenius_sq} is out of range")
        captured_at = _number(header, "captured_at")
        if not 0 <= captured_at <= MAX_TIME_SECONDS:
            raise PartialRefused("malformed", f"captured_at {captured_at} is not a time")
        _check_array("mean", mean, np.float64, width)
        _check_array("scatter", scatter, np.float32, packed_length(width) if finite else 0)
        if finite and not np.isfinite(mean).all():
            raise PartialRefused("malformed", "mean is not finite but trace is")
        return cls(
            key=key,
            rank=_integer(header, "rank"),
            tokens=_integer(header, "tokens", least=1, most=MAX_TOKENS),
            mean=mean,
            scatter=scatter,
            trace=trace,
            frobenius_sq=frobenius_sq,
            captured_at=captured_at,
        )


def _shown(value: Any) -> str:
    """A value as a message may show it: short, whatever it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__}"


def _integer(header: dict[str, Any], name: str, least: int = 0, most: int = (1 << 63) - 1) -> int:
    value = header.get(name)
    if type(value) is not int or not least <= value <= most:
        raise PartialRefused("malformed", f"{name} must be an integer in [{least}, {most}], got {_shown(value)}")
    return value


def _number(header: dict[str, Any], name: str) -> float:
    value = header.get(name)
    if type(value) is not float:
        raise PartialRefused("malformed", f"{name} must be a float, got {_shown(value)}")
    return value


def _run_id(header: dict[str, Any]) -> str:
    try:
        return check_run_id(header.get("run_id", ""))
    except ValueError as error:
        raise PartialRefused("malformed", str(error)) from None


def _site(header: dict[str, Any]) -> str:
    site = header.get("site")
    if not isinstance(site, str) or site not in SITES:
        raise PartialRefused("malformed", f"site must be one of {SITES}, got {_shown(site)}")
    return site


def _check_array(name: str, array: NDArray[Any], dtype: type[np.floating[Any]], length: int) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != (length,):
        found = f"{array.dtype}{array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise PartialRefused("malformed", f"{name} must be {dtype.__name__} of shape ({length},), got {found}")
