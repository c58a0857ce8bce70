"""The delivery of a host's spools over a real Ray: merged on the way, nothing twice, each rank heard."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import urllib.request
import uuid
from pathlib import Path

import pytest
import torch
from eigenwatch.agent.handover import CourierHandover
from eigenwatch.agent.spool import Destination, Spool, courier_lock
from eigenwatch.history import open_history
from eigenwatch.schemas import LayerDescription, Origin, PartialCovariance, RecordKey, RunDescription
from eigenwatch.spectrum import Moments, eigenvalues, merge, partial_of
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import start_serve, stop_serve
from tests.processes import marked, wait_until

WIDTH, RANKS = 24, 4


def run(run_id: str, ranks: int = RANKS) -> RunDescription:
    layer = LayerDescription(
        layer=0, site="post", name="h.0", width=WIDTH, shares=tuple((rank,) for rank in range(ranks))
    )
    return RunDescription(run_id=run_id, launch_id=uuid.uuid4().hex, world_size=ranks, layers=(layer,))


def partial(run_id: str, rank: int, step: int = 0) -> PartialCovariance:
    x_ND = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank)) + rank
    moments = Moments(WIDTH)
    moments.add(x_ND)
    key = RecordKey(run_id, 0, step, 0, "post", None)
    return partial_of(moments, Origin(key=key, rank=rank, share=rank, captured_at=1.7e9))


def host(served, tmp_path: Path, described: RunDescription) -> list[CourierHandover]:
    """The hand-overs of all ranks of one host, in one process."""
    spools = [Spool.create([tmp_path], described, rank, Destination(served.address)) for rank in range(RANKS)]
    return [CourierHandover(spool, 1 << 30) for spool in spools]


def couriers(tmp_path: Path) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().decode().split("\0")
                if "eigenwatch.agent.courier" in words and any(word.startswith(str(tmp_path)) for word in words):
                    found.append(int(folder.name))
    return found


def counter(served, name: str, run_id: str) -> float:
    text = urllib.request.urlopen(served.metrics_url, timeout=10).read().decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and sample.labels.get("run") == run_id:
                return sample.value
    return 0.0


def records(served, run_id: str) -> list[dict]:
    with open_history(served.store) as history:
        return history.query("SELECT * FROM records WHERE run_id = ? ORDER BY step", [run_id]).to_pylist()


def close_all(handovers: list[CourierHandover]) -> list[int]:
    """Closes ranks one after the other; the first does not end the courier of the others."""
    return [one.close(60.0, {}) for one in handovers]


def test_ranks_of_a_host_have_one_courier_and_one_message_for_a_record(served, tmp_path):
    described = run("one-message")
    handovers = host(served, tmp_path, described)
    for step in range(3):
        for rank, handover in enumerate(handovers):
            handover.send(partial("one-message", rank, step))
    wait_until(lambda: counter(served, "eigenwatch_records_written_total", "one-message") == 3, "the records")
    wait_until(lambda: len(couriers(tmp_path)) == 1, "the end of couriers that are not needed")
    assert counter(served, "eigenwatch_partials_received_total", "one-message") == 3 * RANKS
    assert counter(served, "eigenwatch_messages_received_total", "one-message") == 3
    assert close_all(handovers) == [0] * RANKS
    wait_until(lambda: not couriers(tmp_path), "the end of the courier")
    assert not any(tmp_path.iterdir()), "nothing is left in the spools"
    assert not courier_lock(described)._path.exists()
    for step, record in enumerate(records(served, "one-message")):
        group = merge([partial("one-message", rank, step) for rank in range(RANKS)])
        expected = eigenvalues(group.covariance())
        assert record["complete"]
        assert record["ranks_missing"] is None
        assert record["form"] == "scatter"
        assert record["hard_rank"] == pytest.approx(float(expected.sum() ** 2 / expected.square().sum()), rel=1e-5)
        assert record["hard_rank_correction"] == "pairs"


def test_a_courier_that_is_killed_is_replaced_and_nothing_counts_twice(served, tmp_path):
    handovers = host(served, tmp_path, run("courier-killed"))
    for step in range(20):
        for rank, handover in enumerate(handovers):
            handover.send(partial("courier-killed", rank, step))
        if step in (5, 15):
            for pid in couriers(tmp_path):
                os.kill(pid, signal.SIGKILL)
            for handover in handovers:
                handover.tick({})
    assert close_all(handovers) == [0] * RANKS
    stored = records(served, "courier-killed")
    assert [(one["step"], one["complete"], one["tokens"]) for one in stored] == [
        (step, True, 60 * RANKS) for step in range(20)
    ]
    assert counter(served, "eigenwatch_partials_dropped_total", "courier-killed") == 0


def test_one_bad_partial_does_not_cost_the_others_of_its_group(served, tmp_path):
    handovers = host(served, tmp_path, run("one-bad"))
    for rank, handover in enumerate(handovers):
        good = partial("one-bad", rank)
        # Rank 2 speaks of a site that its run did not announce; the others of its group do not wait for it.
        handover.send(good if rank != 2 else dataclasses.replace(good, key=good.key._replace(site="pre")))
    undelivered = close_all(handovers)
    assert undelivered == [0, 0, 1, 0]
    (record,) = records(served, "one-bad")
    assert (record["complete"], record["ranks_seen"], record["ranks_missing"]) == (False, 3, [2])


def test_losses_that_ranks_report_are_counted_for_each(served, tmp_path):
    handovers = host(served, tmp_path, run("losses"))
    for rank, handover in enumerate(handovers):
        handover.send(partial("losses", rank))
        handover.tick({"outbox_full": rank})
    wait_until(
        lambda: counter(served, "eigenwatch_partials_dropped_total", "losses") == 0 + 1 + 2 + 3, "the losses of all"
    )
    assert close_all(handovers) == [0] * RANKS


def test_a_rank_that_is_gone_is_not_waited_for(served, tmp_path):
    """Two of the host's four ranks are other processes that die; the courier goes on with the rest."""
    described = run("two-dead")
    folder = tmp_path / "described.json"
    folder.write_text(json.dumps(described.to_wire()))
    script = (
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "from eigenwatch.agent.spool import Destination, Spool\n"
        "from eigenwatch.schemas import RunDescription\n"
        "from tests.agent.test_delivery import partial\n"
        "described = RunDescription.from_wire(json.loads(Path(sys.argv[1]).read_text()))\n"
        "rank = int(sys.argv[3])\n"
        "spool = Spool.create([Path(sys.argv[1]).parent], described, rank, Destination(sys.argv[2]))\n"
        "spool.write(0, partial('two-dead', rank))\n"
    )
    for rank in (2, 3):
        subprocess.run([sys.executable, "-c", script, str(folder), served.address, str(rank)], check=True)
    spools = [Spool.create([tmp_path], described, rank, Destination(served.address)) for rank in range(2)]
    handovers = [CourierHandover(spool, 1 << 30) for spool in spools]
    for rank, handover in enumerate(handovers):
        handover.send(partial("two-dead", rank))
    wait_until(lambda: [one["complete"] for one in records(served, "two-dead")] == [True], "the record of all four")
    assert close_all(handovers) == [0, 0]
    wait_until(lambda: not couriers(tmp_path), "the end of the courier")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_ranks_that_come_late_complete_their_record_though_the_shard_has_restarted_meanwhile(tmp_path):
    served = start_serve(tmp_path / "store", "--deadline", "8")
    spools = tmp_path / "spools"
    spools.mkdir()
    try:
        described = run("late")
        early = [
            CourierHandover(Spool.create([spools], described, rank, Destination(served.address)), 1 << 30)
            for rank in (0, 1)
        ]
        for rank, handover in enumerate(early):
            handover.send(partial("late", rank))
        wait_until(lambda: [one["ranks_missing"] for one in records(served, "late")] == [[2, 3]], "what has come")
        for pid, command in marked(served.marker).items():
            if command.startswith("ray::ShardActor"):
                os.kill(pid, signal.SIGKILL)
        late = [
            CourierHandover(Spool.create([spools], described, rank, Destination(served.address)), 1 << 30)
            for rank in (2, 3)
        ]
        for rank, handover in enumerate(late, start=2):
            handover.send(partial("late", rank))
        wait_until(lambda: [one["complete"] for one in records(served, "late")] == [True], "the record of all four")
        assert close_all([*early, *late]) == [0] * RANKS
        (record,) = records(served, "late")
        assert (record["tokens"], record["ranks_missing"]) == (60 * RANKS, None)
        assert counter(served, "eigenwatch_partials_dropped_total", "late") == 0
    finally:
        stop_serve(served)
