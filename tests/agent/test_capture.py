"""What a layer's sample holds until it is sent; an accelerator's path runs on the CPU's null streams."""

import pytest
import torch
from eigenwatch.agent import OutboxLimits, attach
from eigenwatch.agent.capture import Capture, NoRoom, Room, Scratch
from eigenwatch.cli.demo.decoder import Decoder, DecoderConfig
from eigenwatch.schemas import packed_length
from eigenwatch.spectrum import unpack
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.agent.reference import Key, Reference, records
from tests.processes import wait_until
from tests.spectrum.cases import two_pass_scatter

WIDTH = 40
SCATTER_BYTES = 4 * packed_length(WIDTH)
FEW = SCATTER_BYTES // (4 * WIDTH)
"""As many rows as are no more bytes than their scatter."""


class SmallRoom(Room):
    """A room that knows how full it was."""

    def __init__(self, limit_bytes: int = 1 << 20) -> None:
        super().__init__(limit_bytes)
        self.most_bytes = 0

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def take(self, nbytes: int) -> bool:
        fits = super().take(nbytes)
        assert 0 <= self._used_bytes <= self._limit_bytes
        self.most_bytes = max(self.most_bytes, self._used_bytes)
        return fits

    def give_back(self, nbytes: int) -> None:
        super().give_back(nbytes)
        assert self._used_bytes >= 0


def rows(count: int, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=draws) * torch.arange(1, WIDTH + 1) + 3


def on_device(room: Room, scratch: Scratch | None = None) -> Capture:
    return Capture(WIDTH, (0, WIDTH), room, scratch or Scratch(torch.device("cpu")))


FORWARDS = {
    "rows": [5, FEW],
    "scatters": [FEW + 1, 3 * FEW, 2 * FEW],
    "rows and scatters": [2 * FEW, 7, 3 * FEW, 1],
}


@pytest.mark.parametrize("counts", FORWARDS.values(), ids=FORWARDS)
def test_what_an_accelerator_sends_is_what_the_cpu_would_have_folded(counts):
    room = SmallRoom()
    here, there = Capture(WIDTH, (0, WIDTH), room), on_device(room)
    for seed, count in enumerate(counts):
        x_ND = rows(count, seed)
        here.add(x_ND)
        there.add(x_ND)
        x_ND.zero_()  # the training goes on with its memory
    assert (there.rows_ND(1 << 20) is not None) == (max(counts) <= FEW)
    true = two_pass_scatter(torch.cat([rows(count, seed) for seed, count in enumerate(counts)]).double())
    moments, same = there.moments(), here.moments()
    assert moments.tokens == same.tokens == there.tokens == sum(counts)
    torch.testing.assert_close(moments.mean, same.mean, rtol=1e-6, atol=1e-6)
    for one in (moments, same):
        assert float((unpack(one.scatter, WIDTH).double() - true).norm() / true.norm()) < 1e-6
    for one in (here, there):
        one.release()
    assert room.used_bytes == 0


def test_scatters_are_formed_in_two_buffers_by_turns_and_no_more():
    scratch = Scratch(torch.device("cpu"))
    captures = [on_device(SmallRoom(), scratch) for _ in range(5)]
    used = []
    for seed, capture in enumerate(captures):
        capture.add(rows(2 * FEW, seed))
        used.append([None if one is None else one.data_ptr() for one in scratch._buffers])
    assert used[0][0] is not None
    assert used[0][1] is None
    assert used[1][1] not in (None, used[1][0])
    assert all(one == used[1] for one in used[1:])
    for seed, capture in enumerate(captures):  # what a buffer held was away before its next turn
        true = two_pass_scatter(rows(2 * FEW, seed).double())
        seen = unpack(capture.moments().scatter, WIDTH).double()
        assert float((seen - true).norm() / true.norm()) < 1e-6


@pytest.mark.parametrize("count", [FEW, FEW + 1], ids=["rows", "scatter"])
def test_an_accelerator_whose_host_has_no_room_says_so_and_gives_back_all(count):
    room = SmallRoom(SCATTER_BYTES + 10)
    capture = on_device(room)
    capture.add(rows(FEW))
    with pytest.raises(NoRoom):
        capture.add(rows(count))
    capture.release()
    assert room.used_bytes == 0
    again = on_device(room)
    again.add(rows(count))
    assert again.moments().tokens == count


added = st.tuples(st.just("add"), st.integers(0, 3), st.integers(1, 3 * FEW))
ended = st.tuples(st.sampled_from(["send", "release"]), st.integers(0, 3), st.just(0))


@settings(max_examples=60, deadline=None)
@given(st.booleans(), st.integers(0, 4 * SCATTER_BYTES), st.lists(added | ended, max_size=25))
def test_room_is_never_negative_or_overdrawn_and_all_comes_back(device, limit_bytes, events):
    room = SmallRoom(limit_bytes)
    scratch = Scratch(torch.device("cpu")) if device else None
    captures: dict[int, Capture] = {}
    for event, place, count in events:
        if event == "add":
            capture = captures.setdefault(place, Capture(WIDTH, (0, WIDTH), room, scratch))
            try:
                capture.add(rows(count))
            except NoRoom:
                assert device
                captures.pop(place).release()
        elif place in captures:
            capture = captures.pop(place)
            if event == "send" and capture.rows_ND(SCATTER_BYTES) is None:
                assert capture.moments().tokens == capture.tokens
            capture.release()
        assert room.used_bytes == sum(one._held_bytes for one in captures.values())
    for capture in captures.values():
        capture.release()
    assert room.used_bytes == 0


def test_many_micro_batches_hold_no_more_than_the_room_and_a_scatter():
    room = SmallRoom(3 * SCATTER_BYTES)
    capture = Capture(WIDTH, (0, WIDTH), room)
    for seed in range(50):
        capture.add(rows(FEW // 2, seed))
        assert capture.nbytes <= 3 * SCATTER_BYTES + SCATTER_BYTES
    assert room.most_bytes <= 3 * SCATTER_BYTES
    true = two_pass_scatter(torch.cat([rows(FEW // 2, seed) for seed in range(50)]).double())
    moments = capture.moments()
    assert float((unpack(moments.scatter, WIDTH).double() - true).norm() / true.norm()) < 1e-6


def test_a_training_with_hardly_any_room_still_has_its_records(tmp_path):
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(model_dim=16, width=WIDTH, layers=2, heads=2, vocabulary=32))
    reference = Reference().hook(model)
    limits = OutboxLimits(memory_bytes=4 * SCATTER_BYTES)
    with attach(model, run_id="small", every=2, store=tmp_path, aggregator="inline", limits=limits) as agent:
        for reference.step in range(3):
            for micro in range(20):
                tokens = torch.randint(32, (4, 16), generator=torch.Generator().manual_seed(micro))
                model(tokens)
            agent.step(reference.step)
            wait_until(lambda: len(records(tmp_path, "small")) >= 2 * (1 + reference.step // 2), what="the records")
    assert agent.dropped == {}
    reference.assert_stored(tmp_path, "small", [0, 2])


def test_a_sample_without_room_is_dropped_and_counted_and_the_next_is_whole(tmp_path, monkeypatch):
    """As on an accelerator, whose samples cannot be folded on the host."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(model_dim=16, width=WIDTH, layers=1, heads=2, vocabulary=32))
    reference = Reference().hook(model)
    limits = OutboxLimits(memory_bytes=4 * SCATTER_BYTES)  # half of it for captures
    with attach(model, run_id="full", every=1, store=tmp_path, aggregator="inline", limits=limits) as agent:
        scratch = Scratch(torch.device("cpu"))
        for one in agent._watched:  # nothing else makes a CPU's capture take the accelerator's path
            monkeypatch.setattr(one.observer, "_scratch_of", lambda device: scratch, raising=False)
        for reference.step in range(4):
            for micro in range(3 if reference.step == 1 else 1):
                model(torch.randint(32, (8, 16), generator=torch.Generator().manual_seed(10 * reference.step + micro)))
            agent.step(reference.step)
            wanted = {0: 1, 1: 1, 2: 2, 3: 3}[reference.step]
            wait_until(lambda wanted=wanted: len(records(tmp_path, "full")) >= wanted, what="the records")
    assert agent.dropped == {"outbox_full": 1}
    reference.assert_stored_keys(tmp_path, "full", [Key(step, 0) for step in (0, 2, 3)])
