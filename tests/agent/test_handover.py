"""The hand-over to a courier: what is full, stopped or dead is counted and waited for, and never raises or blocks."""

import contextlib
import dataclasses
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from eigenwatch.agent.handover import CourierHandover
from eigenwatch.agent.spool import Destination, Spool
from eigenwatch.history import open_history
from eigenwatch.schemas import (
    LayerDescription,
    PartialCovariance,
    RecordKey,
    RunDescription,
    packed_length,
    packed_offset,
)

from tests.agent.test_spool import full_disk  # noqa: F401 - a fixture
from tests.processes import wait_until

WIDTH = 400
NOWHERE = Destination("127.0.0.1:9")
AT_ONCE_SECONDS = 3.0


def run(run_id: str) -> RunDescription:
    layer = LayerDescription(layer=0, site="post", name="h.0", width=WIDTH, shares=((0,),))
    return RunDescription(run_id=run_id, launch_id=f"launch-{run_id}-{os.getpid()}", world_size=1, layers=(layer,))


def partial(run_id: str, step: int) -> PartialCovariance:
    """About 0.35 MB."""
    x_ND = np.random.default_rng(step).normal(size=(50, WIDTH))
    centred = x_ND - x_ND.mean(0)
    scatter_DD = (centred.T @ centred).astype(np.float32)
    packed = packed_length(WIDTH)
    flat = scatter_DD.ravel()[:packed] if packed <= scatter_DD.size else np.zeros(packed, np.float32)
    return PartialCovariance(
        key=RecordKey(run_id, 0, step, 0, "post", None),
        rank=0,
        share=0,
        rows=(0, WIDTH),
        tokens=50,
        mean=x_ND.mean(0),
        scatter=np.ascontiguousarray(flat),
        trace=float(np.trace(scatter_DD)),
        frobenius_sq=float((scatter_DD.astype(np.float64) ** 2).sum()),
        captured_at=1.5e9,
    )


def couriers(spool: Spool) -> list[int]:
    """Pids of the processes that carry this spool."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().decode().split("\0")
                if "eigenwatch.agent.courier" in words and str(spool.folder) in words:
                    found.append(int(folder.name))
    return found


@pytest.fixture
def filled(full_disk: Path) -> Path:  # noqa: F811
    """A file on the small disk that leaves room for about one partial."""
    filler = full_disk / "filler"
    filler.write_bytes(bytes(2 * 2**20 - 700_000))
    return filler


def test_a_full_disk_costs_partials_only_where_there_is_no_other_and_only_until_there_is_room(filled, caplog):
    spool = Spool.create([filled.parent], run("full"), 0, NOWHERE)
    handover = CourierHandover(spool, 1 << 30)
    started = time.monotonic()
    for step in range(4):
        handover.send(partial("full", step))
    handover.tick({})
    assert handover.dropped == {"spool_error": 3}
    assert spool.numbers() == [0]
    assert "partials are being dropped" in caplog.text
    filled.unlink()
    handover.send(partial("full", 4))
    assert handover.dropped == {"spool_error": 3}
    assert len(spool.numbers()) == 2
    assert time.monotonic() - started < AT_ONCE_SECONDS
    assert handover.close(0.5, {}) == 2


def test_stopped_courier_full_memory_and_full_spool_lose_only_the_oldest_and_the_rest_is_delivered(
    served, filled, tmp_path
):
    spool = Spool.create([filled.parent, tmp_path], run("overflow"), 0, Destination(served.address))
    room = 3 * (partial("overflow", 0).nbytes + 2000)
    handover = CourierHandover(spool, room)
    (courier,) = wait_until(lambda: couriers(spool), "a courier")
    os.kill(courier, signal.SIGSTOP)
    for step in range(5):
        handover.send(partial("overflow", step))
        handover.tick({})
    assert handover.dropped == {"outbox_full": 2}
    assert spool.numbers() == [2, 3, 4]
    assert any((tmp_path / spool.folder.name).glob("*.arrow")), "nothing went to the second folder"
    os.kill(courier, signal.SIGCONT)
    assert handover.close(60, handover.dropped) == 0
    assert not (tmp_path / spool.folder.name).exists()
    assert not spool.folder.exists()
    with open_history(served.store) as history:
        rows = history.query("SELECT step FROM records WHERE run_id = 'overflow' ORDER BY step").to_pylist()
    assert [row["step"] for row in rows] == [2, 3, 4]


@pytest.mark.parametrize("why", ["refused", "given up"])
def test_closing_counts_what_the_aggregator_dropped(served, tmp_path, caplog, why):
    """A width that the run did not announce, and half of a share whose other half never comes."""
    run_id = f"dropped-{why.replace(' ', '-')}"
    (layer,) = run(run_id).layers
    whole = partial(run_id, 0)
    if why == "refused":
        announced, sent = dataclasses.replace(layer, width=WIDTH // 2), whole
    else:
        announced = dataclasses.replace(layer, shares=((0, 1),))
        rows = announced.block_of(0).rows
        sent = dataclasses.replace(whole, rows=rows, scatter=whole.scatter[: packed_offset(WIDTH, rows[1])])
    spool = Spool.create(
        [tmp_path], dataclasses.replace(run(run_id), layers=(announced,)), 0, Destination(served.address)
    )
    handover = CourierHandover(spool, 1 << 30)
    handover.send(sent)
    assert handover.close(60, {}) == 1
    assert "1 partials were given up by the aggregator" in caplog.text
    assert not spool.folder.exists()


def test_closing_is_bounded_while_the_courier_is_stopped_and_says_where_the_rest_is(tmp_path, caplog):
    spool = Spool.create([tmp_path], run("stopped"), 0, NOWHERE)
    handover = CourierHandover(spool, 1 << 30)
    (courier,) = wait_until(lambda: couriers(spool), "a courier")
    os.kill(courier, signal.SIGSTOP)
    handover.send(partial("stopped", 0))
    started = time.monotonic()
    assert handover.close(1.0, {}) == 1
    assert time.monotonic() - started < AT_ONCE_SECONDS
    assert f"1 partials were not delivered and remain in {spool.folder}" in caplog.text
    assert couriers(spool) == []
    assert spool.closed
    assert Spool(spool.folder).lock(alone=True)


def test_a_courier_that_cannot_be_started_is_tried_again(tmp_path, caplog):
    spool = Spool.create([tmp_path], run("unstartable"), 0, NOWHERE)
    (spool.folder / "courier.log").mkdir()
    handover = CourierHandover(spool, 1 << 30)
    handover.send(partial("unstartable", 0))
    assert "no courier can be started" in caplog.text
    (spool.folder / "courier.log").rmdir()

    def started() -> list[int]:
        handover.tick({})
        return couriers(spool)

    wait_until(started, "a courier")
    assert handover.close(0.5, {}) == 1
