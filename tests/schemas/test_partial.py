"""The partial on the wire: what is sent arrives, and nothing else is believed."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from eigenwatch.schemas import (
    REFUSAL_REASONS,
    ROWS_DTYPES,
    SITES,
    WIRE_VERSION,
    Partial,
    PartialCovariance,
    PartialRefused,
    PartialSamples,
    RecordKey,
    WirePartial,
    check_run_id,
    packed_length,
    packed_offset,
    partial_from_wire,
    payload_dtype,
)
from eigenwatch.spectrum import covariance_of, merge
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.spectrum.cases import partial_of

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
        partial_from_wire(sent)
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


ROWS = {
    "float32": np.arange(12, dtype=np.float32),
    "float16": np.arange(12, dtype=np.float16),
    "bfloat16": np.arange(12, dtype=np.uint16),
}
SAMPLES_HEADER = {
    **{name: value for name, value in HEADER.items() if name not in ("rows", "trace", "frobenius_sq")},
    "form": "samples",
    "tokens": 4,
    "dtype": "float32",
}
NO_MEAN = np.empty(0)


def wire_samples(mean: Any = NO_MEAN, rows: Any = None, **changes: Any) -> WirePartial:
    header = SAMPLES_HEADER | changes
    return WirePartial(header, mean, ROWS["float32"] if rows is None else rows)


@pytest.mark.parametrize("dtype", ROWS)
def test_rows_arrive_as_they_were_sent_and_without_a_copy(dtype):
    rows_ND = ROWS[dtype].reshape(4, WIDTH)
    sent = PartialSamples(
        key=RecordKey("run", 1, 500, 3, "post", 2), rank=2, share=2, captured_at=1.5e9, samples=rows_ND
    )
    header, mean, flat = sent.to_wire()
    assert (header["form"], header["dtype"], mean.size) == ("samples", dtype, 0)
    assert payload_dtype(header) == flat.dtype == ROWS[dtype].dtype
    arrived = partial_from_wire(WirePartial(json.loads(json.dumps(header)), mean, flat))
    assert isinstance(arrived, PartialSamples)
    assert arrived.fields() == sent.fields()
    assert (arrived.tokens, arrived.width, arrived.rows, arrived.nbytes) == (4, WIDTH, (0, WIDTH), rows_ND.nbytes)
    assert np.array_equal(arrived.samples, rows_ND)
    assert np.shares_memory(arrived.samples, ROWS[dtype])


@pytest.mark.parametrize("rows", [(0, 1), (1, 3), (2, 3)])
def test_a_block_of_rows_carries_its_slice_and_the_whole_mean(rows):
    slice_of = SCATTER[WIDTH * rows[0] : WIDTH * rows[1]]
    arrived = partial_from_wire(wire(scatter=slice_of, rows=list(rows), share=0))
    assert isinstance(arrived, PartialCovariance)
    assert (arrived.rows, arrived.share, arrived.rank, arrived.width) == (rows, 0, 1, WIDTH)
    assert refusal(wire(scatter=slice_of)).reason == "malformed"


@pytest.mark.parametrize("rows", [[0, 3], [1, 2]])
def test_a_rank_that_saw_no_token_says_so(rows):
    header = {"tokens": 0, "trace": 0.0, "frobenius_sq": 0.0, "rows": rows}
    arrived = partial_from_wire(wire(mean=np.zeros(WIDTH), scatter=NOTHING, **header))
    assert (arrived.tokens, arrived.width, arrived.nbytes) == (0, WIDTH, 8 * WIDTH)
    assert isinstance(arrived, PartialCovariance)
    assert arrived.finite
    for wrong in (
        wire(mean=MEAN, scatter=NOTHING, **header),
        wire(mean=np.zeros(WIDTH), **header),
        wire(mean=np.zeros(WIDTH), scatter=NOTHING, **(header | {"trace": 1.0})),
        wire(mean=np.zeros(WIDTH), scatter=NOTHING, **(header | {"trace": math.nan})),
    ):
        assert refusal(wrong).reason == "malformed"


def test_rows_of_no_token_may_come():
    assert partial_from_wire(wire_samples(rows=ROWS["float32"][:0], tokens=0)).tokens == 0


@pytest.mark.parametrize("sent", [wire, wire_samples])
def test_schedule_and_cost_may_be_left_out(sent):
    without = partial_from_wire(sent())
    assert (without.sampling_steps, without.overhead_ratio) == (None, None)
    assert "sampling_steps" not in without.to_wire().header
    with_both = partial_from_wire(partial_from_wire(sent(sampling_steps=1, overhead_ratio=0.0)).to_wire())
    assert (with_both.sampling_steps, with_both.overhead_ratio) == (1, 0.0)
    for wrong in (
        {"sampling_steps": 0}, {"sampling_steps": 1.0}, {"sampling_steps": None}, {"overhead_ratio": -0.1},
        {"overhead_ratio": 1}, {"overhead_ratio": math.nan}, {"overhead_ratio": math.inf},
    ):  # fmt: skip
        assert refusal(sent(**wrong)).reason == "malformed", wrong


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": 3}, {"tokens": 5}, {"tokens": -1}, {"width": 4}, {"width": 0}, {"dtype": "float64"}, {"dtype": None},
        {"dtype": ["float32"]}, {"dtype": "bfloat16"}, {"form": "rows"}, {"form": None}, {"form": ["samples"]},
        {"share": 2}, {"rank": -1}, {"mean": MEAN}, {"mean": None}, {"rows": ROWS["float16"]},
        {"rows": ROWS["float32"].reshape(4, WIDTH)}, {"rows": ROWS["float32"].astype(">f4")}, {"rows": b""},
    ],
    ids=str,
)  # fmt: skip
def test_rows_that_are_malformed_are_refused(changes):
    assert refusal(wire_samples(**changes)).reason == "malformed"


@pytest.mark.parametrize("name", sorted(SAMPLES_HEADER.keys() - {"expert"}))
def test_a_header_of_rows_that_lacks_something_is_refused(name):
    header = {key: value for key, value in SAMPLES_HEADER.items() if key != name}
    reason = refusal(WirePartial(header, NO_MEAN, ROWS["float32"])).reason
    assert reason == ("version" if name == "version" else "malformed")


@pytest.mark.parametrize("header", [{}, {"form": "rows"}, {"form": "samples", "dtype": "int8"}, [], None])
def test_a_payload_of_which_nobody_says_what_it_is_is_refused(header):
    with pytest.raises(PartialRefused, match="cannot be read"):
        payload_dtype(header)


@pytest.mark.parametrize("version", [WIRE_VERSION + 1, 0, -1, None, "1", 1.0])
def test_a_newer_sender_is_told_from_a_malformed_partial(version):
    assert refusal(wire(version=version)).reason == "version"


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": "a/b"}, {"run_id": None}, {"site": "middle"}, {"site": None}, {"site": ["post"]},
        {"attempt": -1}, {"step": "1"}, {"layer": 1 << 31}, {"rank": True}, {"rank": 1.0}, {"rank": "1"},
        {"expert": -1}, {"expert": "0"}, {"expert": 1 << 31}, {"tokens": 0}, {"tokens": -1},
        {"tokens": 2.5}, {"share": 2}, {"share": -1},
        {"rows": None}, {"rows": [0]}, {"rows": [0, 3, 3]}, {"rows": [0, 4]}, {"rows": [-1, 3]}, {"rows": [3, 3]},
        {"rows": [2, 1]}, {"rows": [0, True]}, {"rows": [0.0, 3.0]}, {"rows": "03"}, {"rows": (0, 3)}, {"rows": [0, 2]},
        {"form": "samples"}, {"form": None}, {"width": 0}, {"width": (1 << 17) + 1},
        {"trace": -1.0}, {"trace": 3}, {"frobenius_sq": -1.0}, {"frobenius_sq": math.nan}, {"captured_at": math.inf},
        {"captured_at": "now"}, {"mean": MEAN.astype(np.float32)}, {"mean": MEAN[:-1]}, {"mean": MEAN[None]},
        {"mean": np.array([0.0, np.nan, 0.0])}, {"mean": [0.0, 1.0, 2.0]}, {"mean": None}, {"mean": MEAN.astype(">f8")},
        {"scatter": SCATTER.astype(np.float64)}, {"scatter": SCATTER.reshape(3, 3)}, {"scatter": SCATTER[:-1]},
        {"scatter": NOTHING}, {"scatter": b""}, {"width": WIDTH + 1}, {"form": MEAN}, {"version": True, "form": MEAN},
        {"scatter": np.ma.masked_array(SCATTER)}, {"run_id": "x" * 1000},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_malformed_is_refused(changes):
    refused = refusal(wire(**changes))
    assert refused.reason == ("version" if "version" in changes else "malformed")
    assert len(str(refused)) < 300


@pytest.mark.parametrize("step", [-1, (1 << 53) + 1, 1 << 63, 10**4000])
def test_a_step_that_no_job_reaches_is_refused(step):
    assert refusal(wire(step=step)).reason == refusal(wire_samples(step=step)).reason == "step"


@pytest.mark.parametrize("step", [0, 15 * 10**12, 1 << 53])
def test_steps_may_be_counted_in_tokens(step):
    assert partial_from_wire(wire(step=step)).key.step == step


def test_a_message_is_refused_by_the_size_that_it_announces_whatever_comes_with_it():
    wide, ten_gigabytes = 1 << 17, 5_000_000_000
    for sent in (
        wire(width=wide, rows=[0, wide]),
        wire(width=wide, rows=[0, wide], scatter=None, mean=None),
        wire_samples(width=5, tokens=ten_gigabytes // 5, dtype="bfloat16"),
        wire_samples(tokens=1 << 40, rows=None),
    ):
        refused = refusal(sent)
        assert refused.reason == "too_large"
        assert "at most 4294967296 are taken" in str(refused)


def test_the_widest_layer_of_the_largest_models_fits_whole_and_twice_that_in_blocks():
    width = 28_672  # "malformed" where only the arrays are not there, which nobody wants to allocate here
    for rows in ([0, width], [0, width // 2]):
        assert refusal(wire(width=width, rows=rows)).reason == "malformed", (
            "the arrays are not there, the size is right"
        )
    assert refusal(wire(width=2 * width, rows=[0, 2 * width])).reason == "too_large"
    assert refusal(wire(width=2 * width, rows=[0, 10_000])).reason == "malformed"


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
    object, np.int64(1), np.float64(1.0), np.float32("nan"), np.zeros(2), np.zeros(0), [[0, 3]], {"form": "samples"},
)  # fmt: skip
EVERYTHING = HEADER | SAMPLES_HEADER
changes = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([*sorted(EVERYTHING), "sampling_steps", "overhead_ratio"]), st.sampled_from(JUNK)),
        st.tuples(st.sampled_from(["trace", "frobenius_sq", "captured_at"]), st.floats()),
        st.tuples(st.sampled_from(["attempt", "step", "layer", "expert", "rank", "tokens"]), st.integers(0, 2**64)),
        st.tuples(st.just("width"), st.integers(1, 5)),
        st.tuples(st.just("tokens"), st.integers(0, 5)),
        st.tuples(st.just("rows"), st.lists(st.integers(-1, 6), max_size=3)),
        st.tuples(st.just("dtype"), st.sampled_from(sorted(ROWS_DTYPES))),
        st.tuples(st.just("trace"), st.just(math.nan)),
        st.tuples(st.one_of(st.text(max_size=3), st.integers()), st.sampled_from(JUNK)),
    ),
    max_size=3,
)
anything = st.recursive(st.sampled_from(JUNK) | st.integers() | st.floats() | st.text(), st.lists, max_leaves=4)
removed = st.sampled_from([None] * 30 + sorted(EVERYTHING))
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
    samples = draw(st.booleans())
    header = (SAMPLES_HEADER if samples else HEADER) | dict(draw(changes))
    width = header["width"]
    width = width if type(width) is int and 1 <= width <= 5 else WIDTH
    trace, tokens = header.get("trace"), header["tokens"]
    finite = type(trace) is not float or math.isfinite(trace)
    right = np.dtype(np.float32)
    if samples:
        length = width * tokens if type(tokens) is int and 0 <= tokens <= 5 else width
        right = ROWS_DTYPES.get(header["dtype"] if isinstance(header["dtype"], str) else "", right)
    else:
        rows = header["rows"]
        known = type(rows) is list and len(rows) == 2 and all(type(row) is int and 0 <= row <= width for row in rows)
        length = packed_offset(width, rows[1]) - packed_offset(width, rows[0]) if known else packed_length(width)
        length = max(length, 0) if finite and tokens else 0
    header.pop(draw(removed), None)
    mean = array(0 if samples else width, np.float64, draw(values), draw(lengths), draw(dtypes))
    scatter = array(length, right, draw(values), draw(lengths), draw(dtypes))
    if draw(st.integers(0, 9)) == 0:
        mean = draw(wrong_arrays)
    return WirePartial(header, mean, scatter)


@given(
    header=st.dictionaries(st.sampled_from(sorted(EVERYTHING)) | st.text(max_size=9), anything) | anything,
    mean=anything | st.just(MEAN),
    payload=anything | st.just(SCATTER),
)
@settings(deadline=None, max_examples=500)
def test_anything_at_all_is_refused_in_one_line(header, mean, payload):
    with pytest.raises(PartialRefused) as refused:
        partial_from_wire(WirePartial(header, mean, payload))
    assert refused.value.reason in REFUSAL_REASONS
    assert len(str(refused.value)) < 300


def merge_with_another(partial: Partial) -> None:
    """What was accepted adds to a good partial of the same record, and takes nothing from it but its finiteness."""
    good_ND = torch.arange(3.0 * partial.width).reshape(3, -1).sin()
    rank = partial.rank + 1
    good = partial_of(good_ND, rank=rank, key=partial.key)
    with np.errstate(all="ignore"):
        covariance = covariance_of(partial) if isinstance(partial, PartialSamples) else partial
    group = merge([good, covariance])
    assert group.ranks == {partial.rank, rank}
    whole = partial.rows == (0, partial.width)
    assert group.tokens == 3 + (partial.tokens if whole else 0)
    if group.finite:
        assert group.covariance().shape == (partial.width, partial.width)


@given(wires())
@settings(deadline=None, max_examples=2000)
def test_whatever_arrives_is_a_valid_partial_or_refused(sent):
    try:
        partial = partial_from_wire(sent)
    except PartialRefused as refused:
        assert refused.reason in REFUSAL_REASONS  # noqa: PT017 - either outcome is right
        assert "\n" not in str(refused)  # noqa: PT017
        return
    merge_with_another(partial)
    key = partial.key
    assert check_run_id(key.run_id) == key.run_id
    assert key.site in SITES
    counts = (key.attempt, key.step, key.layer, key.expert or 0, partial.rank, partial.share, partial.tokens)
    for count in (*counts, partial.sampling_steps or 1):
        assert type(count) is int
        assert 0 <= count < 2**63
    assert partial.share <= partial.rank
    assert math.isfinite(partial.captured_at)
    assert 0 <= (partial.overhead_ratio or 0.0) < math.inf
    start, stop = partial.rows
    assert 0 <= start < stop <= partial.width
    if isinstance(partial, PartialSamples):
        assert partial.samples.shape == (partial.tokens, partial.width)
        assert partial.samples.dtype in ROWS_DTYPES.values()
        return
    assert partial.mean.dtype == np.float64
    assert partial.mean.shape == (partial.width,)
    assert partial.scatter.dtype == np.float32
    length = packed_offset(partial.width, stop) - packed_offset(partial.width, start)
    assert partial.scatter.shape == ((length,) if partial.finite and partial.tokens else (0,))
    if partial.finite:
        assert partial.trace >= 0
        assert 0 <= partial.frobenius_sq < math.inf
        assert np.isfinite(partial.mean).all()
    if not partial.tokens:
        assert partial.trace == partial.frobenius_sq == 0
        assert not partial.mean.any()
