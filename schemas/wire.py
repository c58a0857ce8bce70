"""A partial as it travels, and the checks that everything that arrives must pass before it is believed.

A header of plain numbers and strings and two arrays, so that neither a Ray worker nor a reader of a spool needs a
class of ours.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .forms import GROUP, SAMPLES, SCATTER
from .keys import SITES, RecordKey, check_run_id

WIRE_VERSION = 1
MAX_WIDTH = 1 << 17
MAX_TOKENS = 1 << 40
MAX_TRACE = MAX_WIDTH * float(np.finfo(np.float32).max)
"""What float32 entries can add up to; beyond it sums of squares would overflow."""
MAX_TIME_SECONDS = 253_402_300_799.0
"""The year 9999."""
MAX_RATIO = 1e6

ROWS_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}
"""How activation rows travel, by the name of the training's dtype: numpy has no bfloat16, so its bits go as uint16."""


class PartialRefused(ValueError):
    """A partial that cannot be used; `reason` is the label under which it is counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class WirePartial(NamedTuple):
    """A partial as it travels: builtin values and two arrays."""

    header: dict[str, Any]
    mean: NDArray[np.float64]
    """(D,); empty where the payload are rows."""
    payload: NDArray[Any]
    """One-dimensional: the packed scatter, or activation rows one after the other; the header's "form" says which."""


def payload_dtype(header: Any) -> np.dtype[Any]:
    """In which dtype the payload is to be read.

    Raises:
        PartialRefused: the header does not say.
    """
    form = header.get("form") if isinstance(header, dict) else None
    name = "float32" if form in (SCATTER, GROUP) else header.get("dtype") if form == SAMPLES else None
    if not isinstance(name, str) or name not in ROWS_DTYPES:
        raise PartialRefused("malformed", f"a payload of form {shown(form)} and dtype {shown(name)} cannot be read")
    return ROWS_DTYPES[name]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Origin:
    """What a partial says in either form: what it is about, whose it is and how it came to be."""

    key: RecordKey
    rank: int
    share: int
    """The lowest rank that holds this set of tokens: of a tensor-parallel group, else the rank itself."""
    captured_at: float
    """Unix time in seconds at the end of the step."""
    sampling_steps: int | None = None
    """Steps between samples of this layer, as they are scheduled now."""
    overhead_ratio: float | None = None
    """What the rank measured the observation to cost, amortised over all steps, as a part of the training's time."""

    def fields(self) -> dict[str, Any]:
        """The fields of this class alone, for a partial in another form."""
        return {field.name: getattr(self, field.name) for field in fields(Origin)}

    def origin_header(self) -> dict[str, Any]:
        header = {"version": WIRE_VERSION, **self.key._asdict()}
        header |= {"rank": self.rank, "share": self.share, "captured_at": self.captured_at}
        optional = {"sampling_steps": self.sampling_steps, "overhead_ratio": self.overhead_ratio}
        return header | {name: value for name, value in optional.items() if value is not None}


def read_origin(header: Any, form: str) -> dict[str, Any]:
    """The fields of `Origin`, by name, from the header of a partial of this form.

    Raises:
        PartialRefused: `reason` is "version" for a newer sender and "malformed" for anything else.
    """
    if not isinstance(header, dict):
        raise PartialRefused("malformed", "the header is not a mapping")
    version = header.get("version")
    if not isinstance(version, int) or not 1 <= version <= WIRE_VERSION:
        raise PartialRefused(
            "version", f"wire version {shown(version)} is not understood; this side speaks up to {WIRE_VERSION}"
        )
    if header.get("form") != form:
        raise PartialRefused("malformed", f"form must be {form!r}, got {shown(header.get('form'))}")
    key = RecordKey(
        run_id=_run_id(header),
        attempt=integer(header, "attempt"),
        step=integer(header, "step"),
        layer=integer(header, "layer"),
        site=_site(header),
        expert=None if header.get("expert") is None else integer(header, "expert"),
    )
    rank = integer(header, "rank")
    return {
        "key": key,
        "rank": rank,
        "share": integer(header, "share", most=rank),
        "captured_at": number(header, "captured_at", MAX_TIME_SECONDS),
        "sampling_steps": integer(header, "sampling_steps", least=1) if "sampling_steps" in header else None,
        "overhead_ratio": number(header, "overhead_ratio", MAX_RATIO) if "overhead_ratio" in header else None,
    }


def shown(value: Any) -> str:
    """A value as a message may show it: short, whatever it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__}"


def integer(header: dict[str, Any], name: str, least: int = 0, most: int = (1 << 63) - 1) -> int:
    value = header.get(name)
    if type(value) is not int or not least <= value <= most:
        raise PartialRefused("malformed", f"{name} must be an integer in [{least}, {most}], got {shown(value)}")
    return value


def number(header: dict[str, Any], name: str, most: float) -> float:
    """A float between 0 and `most`."""
    value = header.get(name)
    if type(value) is not float or not 0 <= value <= most:
        raise PartialRefused("malformed", f"{name} must be a float in [0, {most:g}], got {shown(value)}")
    return value


def check_array(name: str, array: Any, dtype: DTypeLike, length: int) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != (length,):
        found = f"{array.dtype}{array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise PartialRefused("malformed", f"{name} must be {np.dtype(dtype)} of shape ({length},), got {found}")


def _run_id(header: dict[str, Any]) -> str:
    try:
        return check_run_id(header.get("run_id", ""))
    except ValueError as error:
        raise PartialRefused("malformed", str(error)) from None


def _site(header: dict[str, Any]) -> str:
    site = header.get("site")
    if not isinstance(site, str) or site not in SITES:
        raise PartialRefused("malformed", f"site must be one of {SITES}, got {shown(site)}")
    return site
