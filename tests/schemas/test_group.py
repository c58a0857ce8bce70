"""The group on the wire: whatever comes is refused with a reason, or can be merged."""

import copy
import math
from typing import Any

import numpy as np
from eigenwatch.agent.combine import combine
from eigenwatch.schemas import PartialRefused, WirePartial, arrived_from_wire
from eigenwatch.spectrum import Group
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.spectrum.cases import KEY, blocks_of, partial_of, samples

WIDTH = 5
ANYTHING = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just(math.nan), st.just(10**400)
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@st.composite
def groups(draw) -> WirePartial:
    """Of two whole shares and one that two ranks hold."""
    whole = [partial_of(draw(samples(WIDTH, min_tokens=1)), rank=rank, key=KEY) for rank in range(2)]
    split = blocks_of(partial_of(draw(samples(WIDTH, min_tokens=1))), [2, 3])
    (packet,) = combine([one.to_wire() for one in (*whole, *split)])
    return packet.wire


@settings(deadline=None, max_examples=400)
@given(groups(), st.data())
def test_a_header_that_was_changed_is_refused_or_can_be_merged(wire, data):
    header: dict[str, Any] = copy.deepcopy(wire.header)
    name = data.draw(st.sampled_from(sorted(header)))
    if name == "parts" and data.draw(st.booleans()):
        part = data.draw(st.integers(0, len(header["parts"]) - 1))
        header["parts"][part][data.draw(st.integers(0, 3))] = data.draw(ANYTHING)
    elif data.draw(st.booleans()):
        del header[name]
    else:
        header[name] = data.draw(ANYTHING)
    try:
        arrived = arrived_from_wire(WirePartial(header, wire.mean, wire.payload))
    except PartialRefused:
        return
    Group(width=arrived.width).add_(arrived)


@settings(deadline=None, max_examples=150)
@given(groups(), st.integers(0, 200), st.sampled_from([np.float32, np.float64, np.int32, np.uint16]))
def test_arrays_of_another_length_or_dtype_are_refused(wire, length, dtype):
    good = length == wire.payload.size and dtype == wire.payload.dtype
    for mean, payload in ((wire.mean, np.zeros(length, dtype)), (np.zeros(length, dtype), wire.payload)):
        try:
            arrived_from_wire(WirePartial(wire.header, mean, payload))
        except PartialRefused:
            continue
        assert good or (length == wire.mean.size and dtype == wire.mean.dtype)
