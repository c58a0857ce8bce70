"""The outbox: the training step leaves its samples there and goes on, whatever becomes of them."""

import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from eigenwatch.agent import OutboxLimits
from eigenwatch.agent.capture import Capture, Room
from eigenwatch.agent.observation import Place
from eigenwatch.agent.outbox import Outbox, Sample
from eigenwatch.schemas import Partial, PartialCovariance, PartialSamples, RecordKey
from eigenwatch.spectrum import Moments, covariance_of

from tests.processes import wait_until

WIDTH = 8
PLACE = Place(layer=3, site="post", name="layers.3", width=WIDTH, share=0, block=(0, WIDTH))
AT_ONCE_SECONDS = 0.5
"""No hand-over of these tests takes so little when it blocks."""


class Recorder:
    """A transport that keeps what it is given, waits where it is told to, and fails for the steps it is told to."""

    def __init__(
        self, undelivered: int = 0, fails: tuple[int, ...] = (), error: type[BaseException] = RuntimeError
    ) -> None:
        self.dropped: Counter[str] = Counter()
        self.partials: list[PartialCovariance] = []
        self.ticks: list[dict[str, int]] = []
        self.closed: list[tuple[float, dict[str, int]]] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.entered = threading.Event()
        self.threads: set[str] = set()
        self.undelivered, self.fails, self.error = undelivered, fails, error

    def send(self, partial: PartialCovariance) -> None:
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        self.may_go_on.wait()
        if partial.key.step in self.fails:
            raise self.error(f"step {partial.key.step} is refused")
        self.partials.append(partial)

    def tick(self, dropped: dict[str, int]) -> None:
        self.ticks.append(dropped)

    def close(self, timeout_seconds: float, dropped: dict[str, int]) -> int:
        self.closed.append((timeout_seconds, dropped))
        return self.undelivered

    @property
    def steps(self) -> list[int]:
        return [partial.key.step for partial in self.partials]


def sample(step: int, bad: float | None = None) -> Sample:
    x_ND = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(step))
    if bad is not None:
        x_ND[3, 2] = bad
    return sample_of(x_ND, step=step)


def sample_of(*forwards: torch.Tensor, step: int = 0, room: Room | None = None) -> Sample:
    capture = Capture(PLACE.width, PLACE.block, room or Room(1 << 30))
    for x_ND in forwards:
        capture.add(x_ND)
    return Sample(
        step=step, place=PLACE, capture=capture, captured_at=1e9 + step, sampling_steps=100, overhead_ratio=0.01
    )


def moments_of(*forwards: torch.Tensor) -> Moments:
    moments = Moments(WIDTH)
    for x_ND in forwards:
        moments.add(x_ND)
    return moments


def outbox(handover: Recorder, samples_in_memory: int = 1000, rows_allowed: bool = True) -> Outbox:
    limits = OutboxLimits(memory_bytes=samples_in_memory * sample(0).nbytes)
    return Outbox(handover, "run", 1, limits, rows_allowed)


def handed_over(*samples: Sample, rows_allowed: bool = True) -> list[Partial]:
    handover = Recorder()
    box = outbox(handover, rows_allowed=rows_allowed)
    for one in samples:
        box.put(one)
    assert box.close(10) == 0
    return handover.partials


@pytest.fixture
def blocked():
    """A transport that blocks in its first `send`; it goes on at the end of the test."""
    handover = Recorder()
    handover.may_go_on.clear()
    yield handover
    handover.may_go_on.set()


def test_what_is_put_in_is_handed_over_in_order_by_one_other_thread():
    handover = Recorder()
    box = outbox(handover)
    for step in range(20):
        box.put(sample(step))
    assert box.close(10) == 0
    assert handover.steps == list(range(20))
    assert handover.threads == {"eigenwatch-outbox"}
    assert box.dropped == {}


def test_a_sample_becomes_the_partial_of_its_rank():
    handover = Recorder()
    box = outbox(handover)
    box.put(sample(7))
    box.close(10)
    (partial,) = handover.partials
    moments = moments_of(torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(7)))
    assert partial.key == RecordKey("run", 0, 7, 3, "post", None)
    assert (partial.rank, partial.share, partial.tokens, partial.captured_at) == (1, 0, 20, 1e9 + 7)
    assert (partial.sampling_steps, partial.overhead_ratio) == (100, 0.01)
    assert np.array_equal(partial.mean, moments.mean.numpy())
    assert np.array_equal(partial.scatter, moments.scatter.numpy())
    square_DD = moments.scatter.view(WIDTH, WIDTH).double()
    assert partial.trace == pytest.approx(float(square_DD.trace()))
    assert partial.frobenius_sq == pytest.approx(float(square_DD.square().sum()))
    assert PartialCovariance.from_wire(partial.to_wire()).finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_that_are_fewer_bytes_than_their_scatter_go_as_they_are(dtype):
    few = [torch.randn(2, WIDTH).to(dtype), torch.randn(1, WIDTH).to(dtype)]
    (partial,) = handed_over(sample_of(*few))
    assert isinstance(partial, PartialSamples)
    assert partial.tokens == 3
    arrived = covariance_of(partial)
    assert np.array_equal(arrived.scatter, moments_of(torch.cat(few)).scatter.numpy())
    many = torch.randn(4 * WIDTH, WIDTH).to(dtype)
    (partial,) = handed_over(sample_of(many))
    assert isinstance(partial, PartialCovariance)


def test_rows_stay_in_the_process_where_they_may_not_leave_it():
    few = torch.randn(3, WIDTH)
    (partial,) = handed_over(sample_of(few), rows_allowed=False)
    assert isinstance(partial, PartialCovariance)
    assert np.array_equal(partial.scatter, moments_of(few).scatter.numpy())


def test_what_has_no_room_as_rows_is_folded_at_once_and_gives_the_same():
    forwards = [torch.randn(20, WIDTH) for _ in range(3)]
    room = Room(forwards[0].nbytes)
    (partial,) = handed_over(sample_of(*forwards, room=room))
    expected = moments_of(*forwards)
    assert partial.tokens == 60
    np.testing.assert_allclose(partial.scatter, expected.scatter.numpy(), rtol=1e-5)
    assert room.take(forwards[0].nbytes), "the room was given back"


def test_a_place_that_no_token_reached_is_said_to_be_empty():
    nothing = Sample(step=1, place=PLACE, capture=None, captured_at=1.0, sampling_steps=1, overhead_ratio=None)
    (partial,) = handed_over(nothing)
    assert PartialCovariance.from_wire(partial.to_wire()).tokens == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_sample_that_is_not_finite_says_so_and_carries_no_scatter(bad):
    handover = Recorder()
    box = outbox(handover)
    box.put(sample(0, bad))
    box.close(10)
    (partial,) = handover.partials
    arrived = PartialCovariance.from_wire(partial.to_wire())
    assert not arrived.finite
    assert arrived.scatter.size == 0
    assert arrived.tokens == 20


def test_putting_returns_at_once_while_the_hand_over_blocks(blocked):
    box = outbox(blocked)
    box.put(sample(0))
    assert blocked.entered.wait(10)
    started = time.perf_counter()
    for step in range(1, 100):
        box.put(sample(step))
    assert time.perf_counter() - started < AT_ONCE_SECONDS
    assert blocked.steps == []
    blocked.may_go_on.set()
    assert box.close(10) == 0
    assert blocked.steps == list(range(100))


def test_a_full_outbox_drops_the_oldest_and_counts_them(blocked):
    box = outbox(blocked, samples_in_memory=3)
    box.put(sample(0))
    assert blocked.entered.wait(10)  # now it holds none
    for step in range(1, 9):
        box.put(sample(step))
    assert box.dropped == {"outbox_full": 5}
    blocked.may_go_on.set()
    box.close(10)
    assert blocked.steps == [0, 6, 7, 8]
    ((_, told),) = blocked.closed
    assert told == {"outbox_full": 5}


def test_a_sample_larger_than_the_whole_memory_is_not_lost_while_it_is_the_only_one(blocked):
    box = Outbox(blocked, "run", 1, OutboxLimits(memory_bytes=1), True)
    box.put(sample(0))
    assert blocked.entered.wait(10)
    box.put(sample(1))
    assert box.dropped == {}
    box.put(sample(2))
    assert box.dropped == {"outbox_full": 1}
    blocked.may_go_on.set()
    box.close(10)
    assert blocked.steps == [0, 2]


def test_losses_of_the_transport_are_losses_of_the_rank():
    handover = Recorder()
    box = outbox(handover)
    handover.dropped["spool_error"] += 2
    assert box.dropped == {"spool_error": 2}
    wait_until(lambda: {"spool_error": 2} in handover.ticks, "a tick that tells them")
    box.close(10)


def test_closing_waits_for_what_is_inside_and_passes_on_what_the_transport_says(blocked):
    blocked.undelivered = 4
    box = outbox(blocked)
    box.put(sample(0))
    box.put(sample(1))
    closing = threading.Thread(target=lambda: results.append(box.close(10)))
    results: list[int] = []
    closing.start()
    assert blocked.entered.wait(10)
    assert blocked.closed == []
    blocked.may_go_on.set()
    closing.join(10)
    assert results == [4]
    assert blocked.steps == [0, 1]
    ((left_seconds, dropped),) = blocked.closed
    assert 0 < left_seconds <= 10
    assert dropped == {}
    assert box.close(10) == 4
    assert len(blocked.closed) == 1


def test_an_error_of_the_transport_is_counted_and_the_thread_goes_on(caplog):
    handover = Recorder(fails=(1, 2))
    box = outbox(handover)
    for step in range(5):
        box.put(sample(step))
    assert box.close(10) == 2
    assert handover.steps == [0, 3, 4]
    assert box.dropped == {"handover_error": 2}
    assert [record.getMessage() for record in caplog.records] == [
        "a partial could not be handed over: RuntimeError: step 1 is refused"
    ]


@pytest.mark.parametrize("error", [MemoryError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_no_exception_of_any_kind_ends_the_thread(error):
    handover = Recorder(fails=(1,), error=error)
    box = outbox(handover)
    for step in range(3):
        box.put(sample(step))
    assert box.close(10) == 1
    assert handover.steps == [0, 2]
    assert box.dropped == {"handover_error": 1}
    assert len(handover.closed) == 1


class FailingClose(Recorder):
    def close(self, timeout_seconds: float, dropped: dict[str, int]) -> int:
        raise MemoryError


def test_closing_ends_even_where_the_transport_cannot_close():
    box = outbox(FailingClose())
    started = time.monotonic()
    assert box.close(5) > 0
    assert time.monotonic() - started < 5


def test_closing_is_bounded_while_the_hand_over_hangs(blocked):
    box = outbox(blocked)
    for step in range(3):
        box.put(sample(step))
    assert blocked.entered.wait(10)
    started = time.monotonic()
    assert box.close(0.2) == 3
    assert time.monotonic() - started < 3


class FailingTicks(Recorder):
    def tick(self, dropped: dict[str, int]) -> None:
        super().tick(dropped)
        raise OSError("nobody there")


def test_a_transport_that_fails_between_samples_does_not_end_the_thread():
    handover = FailingTicks()
    box = outbox(handover)
    wait_until(lambda: handover.ticks, "the first tick")
    box.put(sample(0))
    assert box.close(10) == 0
    assert handover.steps == [0]
    assert box.dropped == {}, "no partial was lost"


@pytest.mark.parametrize("name", ["memory_bytes", "spool_bytes"])
@pytest.mark.parametrize("value", [0, -1])
def test_limits_that_leave_no_room_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive, got {value}"):
        OutboxLimits(**{name: value})
