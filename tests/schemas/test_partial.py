"""The partial on the wire: what is sent arrives, and nothing else is believed."""

import json
import math
from typing import Any

import numpy as np
import pytest
from eigenwatch.schemas import (
    SITES,
    WIRE_VERSION,
    PartialCovariance,
    PartialRefused,
    RecordKey,
    WirePartial,
    check_run_id,
    packed_length,
)
from hypothesis import given, settings
from hypothesis import strategies as st

WIDTH = 3
HEADER: dict[str, Any] = {
    "run_id": "run",
    "attempt": 0,
    "step": 100,
    "layer": 2,
    "site": "post",
    "expert": None,
    "version": WIRE_VERSION,
    "form": "scatter",
    "rank": 1,
    "share": 1,
    "rows": [0, WIDTH],
    "tokens": 40,
    "width": WIDTH,
    "trace": 3.0,
    "frobenius_sq": 3.0,
    "captured_at": 1.5e9,
}
MEAN = np.arange(WIDTH, dtype=np.float64)
SCATTER = np.eye(WIDTH, dtype=np.float32).ravel()
NOTHING = np.empty(0, dtype=np.float32)


def wire(mean: Any = MEAN, scatter: Any = SCATTER, **changes: Any) -> WirePartial:
    return WirePartial(HEADER | changes, mean, scatter)


def refusal(sent: WirePartial) -> PartialRefused:
    with pytest.raises(PartialRefused) as refused:
        PartialCovariance.from_wire(sent)
    assert "\n" not in str(refused.value)
    return refused.value


@pytest.mark.parametrize("expert", [None, 0, 5])
def test_a_partial_arrives_as_it_was_sent_and_without_a_copy(expert):
    sent = PartialCovariance(
        key=RecordKey("run", 1, 500, 3, "pre", expert),
        rank=2,
        share=1,
        rows=(0, WIDTH),
        tokens=40,
        mean=MEAN,
        scatter=SCATTER,
        trace=3.0,
        frobenius_sq=3.0,
        captured_at=1.5e9,
    )
    header, mean, scatter = sent.to_wire()
    arrived = PartialCovariance.from_wire(WirePartial(json.loads(json.dumps(header)), mean, scatter))
    for name in ("key", "rank", "tokens", "trace", "frobenius_sq", "captured_at", "width", "nbytes"):
        assert getattr(arrived, name) == getattr(sent, name), name
    assert arrived.mean is MEAN
    assert arrived.scatter is SCATTER
    assert arrived.finite


@pytest.mark.parametrize("trace", [math.nan, math.inf, -math.inf])
def test_a_partial_that_is_not_finite_arrives_without_a_scatter(trace):
    mean = np.full(WIDTH, np.nan)
    arrived = PartialCovariance.from_wire(wire(mean=mean, scatter=NOTHING, trace=trace, frobenius_sq=trace))
    assert not arrived.finite
    assert refusal(wire(mean=mean, trace=trace)).reason == "malformed"


@pytest.mark.parametrize("version", [WIRE_VERSION + 1, 0, -1, None, "1", 1.0])
def test_a_newer_sender_is_told_from_a_malformed_partial(version):
    assert refusal(wire(version=version)).reason == "version"


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": "a/b"}, {"run_id": None}, {"site": "middle"}, {"site": None}, {"site": ["post"]},
        {"attempt": -1}, {"step": -1}, {"layer": 1 << 63}, {"rank": True}, {"rank": 1.0}, {"rank": "1"},
        {"expert": -1}, {"expert": "0"}, {"tokens": 0}, {"tokens": 2.5}, {"width": 0}, {"width": (1 << 17) + 1},
        {"trace": -1.0}, {"trace": 3}, {"frobenius_sq": -1.0}, {"frobenius_sq": math.nan}, {"captured_at": math.inf},
        {"captured_at": "now"}, {"mean": MEAN.astype(np.float32)}, {"mean": MEAN[:-1]}, {"mean": MEAN[None]},
        {"mean": np.array([0.0, np.nan, 0.0])}, {"mean": [0.0, 1.0, 2.0]}, {"mean": None}, {"mean": MEAN.astype(">f8")},
        {"scatter": SCATTER.astype(np.float64)}, {"scatter": SCATTER.reshape(3, 3)}, {"scatter": SCATTER[:-1]},
        {"scatter": NOTHING}, {"scatter": b""}, {"width": WIDTH + 1},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_malformed_is_refused(changes):
    assert refusal(wire(**changes)).reason == "malformed"


@pytest.mark.parametrize("name", sorted(HEADER.keys() - {"expert"}))
def test_a_header_that_lacks_something_is_refused(name):
    header = {key: value for key, value in HEADER.items() if key != name}
    assert refusal(WirePartial(header, MEAN, SCATTER)).reason == ("version" if name == "version" else "malformed")


def test_a_layer_without_width_is_refused():
    assert refusal(wire(mean=np.empty(0), scatter=NOTHING, width=0)).reason == "malformed"


def test_a_header_that_is_no_mapping_is_refused():
    assert refusal(WirePartial([], MEAN, SCATTER)).reason == "malformed"  # type: ignore[arg-type]


JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, WIDTH, 2**31, 2**63 - 1, 2**63, 10**400, -0.0, 0.5, 3.0, 1e300, math.nan, math.inf,
    -math.inf, "", "run", "a/b", "post", "pre", "x" * 128, "x" * 129, "3", b"", b"run", (), [], [1], {}, {"a": 1}, 1j,
    object, np.int64(1), np.float64(1.0), np.float32("nan"),
)  # fmt: skip
changes = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(sorted(HEADER)), st.sampled_from(JUNK)),
        st.tuples(st.sampled_from(["trace", "frobenius_sq", "captured_at"]), st.floats()),
        st.tuples(st.sampled_from(["attempt", "step", "layer", "expert", "rank", "tokens"]), st.integers(0, 2**64)),
        st.tuples(st.just("width"), st.integers(1, 5)),
        st.tuples(st.just("trace"), st.just(math.nan)),
        st.tuples(st.one_of(st.text(max_size=3), st.integers()), st.sampled_from(JUNK)),
    ),
    max_size=3,
)
removed = st.sampled_from([None] * 30 + sorted(HEADER))
values = st.sampled_from([0.0, 1.0, -1.0, 1e38, np.nan, np.inf])
lengths = st.sampled_from([None] * 6 + [0, 1, WIDTH, WIDTH + 1, WIDTH * WIDTH])
"""None: as the header says."""
dtypes = st.sampled_from([None] * 8 + [np.float16, np.float32, np.float64, np.int64, ">f4", "U3", object, "f4,f4"])
"""None: the right one."""
wrong_arrays = st.sampled_from([None, 1.0, [0.0] * WIDTH, b"", np.zeros(()), np.zeros((WIDTH, 1)), np.zeros(6)[::2]])


def array(length: int, right: Any, value: float, asked_length: int | None, dtype: Any) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.full(length if asked_length is None else asked_length, value).astype(dtype or right)


@st.composite
def wires(draw: st.DrawFn) -> WirePartial:
    """Partials in which a few things, or none, are not what they should be."""
    header = HEADER | dict(draw(changes))
    width = header["width"]
    width = width if type(width) is int and 1 <= width <= 5 else WIDTH
    finite = type(header["trace"]) is not float or math.isfinite(header["trace"])
    header.pop(draw(removed), None)
    mean = array(width, np.float64, draw(values), draw(lengths), draw(dtypes))
    scatter = array(packed_length(width) if finite else 0, np.float32, draw(values), draw(lengths), draw(dtypes))
    if draw(st.integers(0, 9)) == 0:
        mean = draw(wrong_arrays)
    return WirePartial(header, mean, scatter)


@given(wires())
@settings(deadline=None, max_examples=2000)
def test_whatever_arrives_is_a_valid_partial_or_refused(sent):
    try:
        partial = PartialCovariance.from_wire(sent)
    except PartialRefused as refused:
        assert refused.reason in ("malformed", "version")  # noqa: PT017 - either outcome is right
        return
    key = partial.key
    assert check_run_id(key.run_id) == key.run_id
    assert key.site in SITES
    for count in (key.attempt, key.step, key.layer, key.expert or 0, partial.rank, partial.tokens - 1):
        assert type(count) is int
        assert 0 <= count < 2**63
    assert partial.mean.dtype == np.float64
    assert partial.mean.shape == (partial.width,)
    assert partial.scatter.dtype == np.float32
    assert partial.scatter.shape == ((packed_length(partial.width),) if partial.finite else (0,))
    assert math.isfinite(partial.captured_at)
    if partial.finite:
        assert partial.trace >= 0
        assert 0 <= partial.frobenius_sq < math.inf
        assert np.isfinite(partial.mean).all()
