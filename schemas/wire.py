"""A partial as it travels, and the checks that everything that arrives must pass before it is believed.

A header of plain numbers and strings and two arrays, so that neither a Ray worker nor a reader of a spool needs a
class of ours. Couriers check what they read before they push it, shards what is pushed, by the same functions.
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
MAX_STEP = 1 << 53
"""A gauge, which is a float64, still shows it exactly. Within a launch any step may come after any other: sampling is
sparse, a restart goes back, and some count tokens rather than steps, which reaches 10^13."""
MAX_NUMBER = (1 << 31) - 1
"""Of attempts, layers, experts and ranks: their columns are int32."""
MAX_PAYLOAD_BYTES = 1 << 32
"""The whole scatter of D=28 672 is 1.7 GB, and wider layers come in blocks of a tensor-parallel group."""
MAX_TIME_SECONDS = 253_402_300_799.0
"""The year 9999."""
MAX_RATIO = 1e6

ROWS_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}
"""How activation rows travel, by the name of the training's dtype: numpy has no bfloat16, so its bits go as uint16."""


REFUSAL_REASONS = {
    "malformed": "not a partial, or its numbers and arrays do not fit together",
    "version": "from a newer sender",
    "too_large": "more bytes than a partial may have",
    "step": "a step beyond what can be counted",
    "future": "captured more than a day ahead of the aggregator's clock",
    "width": "another width than its run announced for the layer",
    "unexpected": "a layer, rank or block of rows that its run did not announce",
    "contradiction": "another number of tokens, or the same rows, as a block of its share that came before",
    "unknown_run": "of a run that nobody announced, again and again",
    "failed": "an error of the aggregator's own",
}
"""What a refused partial is counted under, and why."""


class PartialRefused(ValueError):
    """A partial that cannot be used; `reason` is the label under which it is counted, of `REFUSAL_REASONS`."""

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
        PartialRefused: `reason` is "version" for a newer sender, "step" for one that is out of range, and "malformed"
            for anything else.
    """
    if not isinstance(header, dict):
        raise PartialRefused("malformed", "the header is not a mapping")
    version = header.get("version")
    if type(version) is not int or not 1 <= version <= WIRE_VERSION:
        raise PartialRefused(
            "version",
            f"wire version {shown(version)} is not understood; this side speaks up to {WIRE_VERSION}: upgrade it first",
        )
    if not isinstance(header.get("form"), str) or header["form"] != form:
        raise PartialRefused("malformed", f"form must be {form!r}, got {shown(header.get('form'))}")
    key = RecordKey(
        run_id=_run_id(header),
        attempt=integer(header, "attempt", most=MAX_NUMBER),
        step=_step(header),
        layer=integer(header, "layer", most=MAX_NUMBER),
        site=_site(header),
        expert=None if header.get("expert") is None else integer(header, "expert", most=MAX_NUMBER),
    )
    rank = integer(header, "rank", most=MAX_NUMBER)
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


def check_size(numbers: int, dtype: DTypeLike) -> None:
    """Refuses a payload of so many numbers by what its header announces, whatever has come and before more is done.

    Raises:
        PartialRefused: `reason` is "too_large".
    """
    announced = numbers * np.dtype(dtype).itemsize
    if announced > MAX_PAYLOAD_BYTES:
        raise PartialRefused("too_large", f"a payload of {announced} bytes; at most {MAX_PAYLOAD_BYTES} are taken")


def check_array(name: str, array: Any, dtype: DTypeLike, length: int) -> None:
    if type(array) is not np.ndarray or array.dtype != dtype or array.shape != (length,):
        found = f"{array.dtype}{array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise PartialRefused("malformed", f"{name} must be {np.dtype(dtype)} of shape ({length},), got {found}")


def _run_id(header: dict[str, Any]) -> str:
    try:
        return check_run_id(header.get("run_id", ""))
    except ValueError:
        raise PartialRefused("malformed", f"run_id {shown(header.get('run_id'))} is not allowed") from None


def _step(header: dict[str, Any]) -> int:
    step = header.get("step")
    if type(step) is not int:
        raise PartialRefused("malformed", f"step must be an integer, got {shown(step)}")
    if not 0 <= step <= MAX_STEP:
        raise PartialRefused("step", f"step must lie in [0, {MAX_STEP}], got {shown(step)}")
    return step


def _site(header: dict[str, Any]) -> str:
    site = header.get("site")
    if not isinstance(site, str) or site not in SITES:
        raise PartialRefused("malformed", f"site must be one of {SITES}, got {shown(site)}")
    return site
