"""A delivery round by round, against real shards in this process: who waits for whom, and what is asked."""

import dataclasses
import time
from pathlib import Path

import pytest
from eigenwatch.agent.delivery import BATCH, READ_AHEAD, Delivery
from eigenwatch.agent.ray_session import RaySession
from eigenwatch.agent.spool import Destination, Spool
from eigenwatch.aggregator.config import ShardLimits, SolverConfig
from eigenwatch.aggregator.shard import Shard
from eigenwatch.schemas import LayerDescription, PartialCovariance, RecordKey, RunDescription, WirePartial
from eigenwatch.schemas.delivery import Fate, PushReply

from tests.agent.test_delivery import WIDTH, partial
from tests.processes import wait_until

LAYERS, RANKS = 20, 3
"""Two ranks of this host, and one of another that is not here."""
GROUP_BYTES = 8 * (WIDTH * WIDTH + WIDTH)
NEVER = 1e6


def described(run_id: str, ranks: int = RANKS) -> RunDescription:
    layers = tuple(
        LayerDescription(layer=layer, site="post", name=f"h.{layer}", width=WIDTH,
                         shares=tuple((rank,) for rank in range(ranks)))
        for layer in range(LAYERS)
    )  # fmt: skip
    return RunDescription(run_id=run_id, launch_id="launch", world_size=ranks, layers=layers)


class InProcess(RaySession):
    """The session without the cluster: shards are objects. Layers below `BATCH` are the first one's."""

    def __init__(self, run: RunDescription, shards: list[Shard]) -> None:
        super().__init__("nowhere:1", run)
        self._owners = {one.layer: str(int(one.layer >= BATCH)) for one in run.layers}
        self.shards = shards
        self.messages: list[tuple[int, ...]] = []
        """By message, the ranks of each of its shares."""
        self.steps: list[int] = []

    def open(self) -> None:
        for shard in self.shards:
            shard.open_run(self._run.to_wire(), 0)

    def owner(self, layer: int) -> Shard:
        return self.shards[int(self._owners[layer]) % len(self.shards)]

    def push(self, wires: list[WirePartial]) -> list[PushReply]:
        self.messages += [tuple(len(part[0]) for part in wire.header.get("parts", [[[0]]])) for wire in wires]
        self.steps += [wire.header["step"] for wire in wires]
        return [
            self.owner(wire.header["layer"]).push(wire.header | {"attempt": 0}, wire.mean, wire.payload)
            for wire in wires
        ]

    def fates(self, asked: dict[RecordKey, list[int]]) -> dict[RecordKey, list[Fate]]:
        return {key: self.owner(key.layer).fates([(tuple(key), ranks)])[0] for key, ranks in asked.items()}

    def heartbeat(self, dropped: dict[int, dict[str, int]]) -> int:
        return 1


def at_layer(run_id: str, rank: int, layer: int, step: int = 0) -> PartialCovariance:
    one = partial(run_id, rank, step)
    return dataclasses.replace(one, key=one.key._replace(layer=layer))


@pytest.fixture
def shards(tmp_path):
    """One in which a single record finds room, and one that has plenty."""
    made = [
        Shard(str(tmp_path / "store"), SolverConfig(device="cpu"),
              ShardLimits(deadline_seconds=NEVER, memory_bytes=memory))
        for memory in (GROUP_BYTES, 1 << 30)
    ]  # fmt: skip
    yield made
    for shard in made:
        shard.close(0.1)


def spools_of(tmp_path: Path, run: RunDescription, ranks: int = 2) -> dict[int, Spool]:
    return {rank: Spool.create([tmp_path], run, rank, Destination("nowhere:1")) for rank in range(ranks)}


def deliver(delivery: Delivery, rounds: int = 10) -> None:
    for _ in range(rounds):
        delivery.work({0: {}, 1: {}}, waits=True)


def received(shard: Shard, run_id: str) -> int:
    return shard.snapshot([]).counters[run_id].received


def test_a_shard_that_is_full_holds_up_nobody_elses_records(tmp_path, shards):
    run = described("full")
    spools = spools_of(tmp_path, run)
    delivery = Delivery(session := InProcess(run, shards))
    for rank, spool in spools.items():
        for layer in range(LAYERS):
            spool.write(layer, at_layer("full", rank, layer))
        delivery.add(rank, spool)
    deliver(delivery)
    assert received(shards[0], "full") == 2, "one record of both ranks, which waits for the third rank"
    assert received(shards[1], "full") == 2 * (LAYERS - BATCH)
    assert set(session.messages) == {(1, 1)}, "and all as groups of two"


def test_a_long_outage_is_read_a_piece_at_a_time_and_in_order(tmp_path, shards):
    run = described("outage")
    spools = spools_of(tmp_path, run)
    steps = READ_AHEAD + 10
    delivery = Delivery(session := InProcess(run, shards[1:]))
    for rank, spool in spools.items():
        for step in range(steps):
            spool.write(step, at_layer("outage", rank, 9, step))
        delivery.add(rank, spool)
    while delivery.work({0: {}, 1: {}}, waits=True):
        assert len(delivery._mapped) <= 2 * READ_AHEAD
    assert received(shards[1], "outage") == 2 * steps
    assert session.steps == list(range(steps)), "a layer's steps one after the other"


def test_of_a_group_that_is_refused_only_the_rank_that_is_wrong_is_dropped(tmp_path, shards):
    run = described("apart")
    spools = spools_of(tmp_path, run)
    delivery = Delivery(session := InProcess(run, shards[1:]))
    spools[0].write(0, at_layer("apart", 0, 9))
    spools[1].write(0, dataclasses.replace(at_layer("apart", 1, 9), captured_at=time.time() + 10 * 86400))
    for rank, spool in spools.items():
        delivery.add(rank, spool)
    deliver(delivery, 3)
    assert session.messages == [(1, 1), (1,), (1,)]
    assert received(shards[1], "apart") == 1
    assert (spools[0].numbers(), spools[1].numbers()) == ([0], []), "the first waits for its record, the other is gone"
    assert spools[1].lost() == 1
    assert shards[1].snapshot([]).counters["apart"].dropped == (("future", 1),)


def test_after_an_interruption_only_what_the_shard_lacks_is_pushed(tmp_path, shards):
    run = described("again")
    spools = spools_of(tmp_path, run)
    first = Delivery(InProcess(run, shards[1:]))
    spools[0].write(0, at_layer("again", 0, 9))
    first.add(0, spools[0])
    first.work({0: {}}, waits=False)
    spools[1].write(0, at_layer("again", 1, 9))
    second = Delivery(session := InProcess(run, shards[1:]))
    for rank, spool in spools.items():
        second.add(rank, spool)
    deliver(second, 3)
    assert session.messages == [(1,)], "the second rank's alone: a sum cannot be taken apart again"
    assert received(shards[1], "again") == 2
    assert shards[1].snapshot([]).counters["again"].duplicated == 0


def test_a_group_of_which_the_shard_has_a_part_is_asked_about_and_the_rest_is_pushed(tmp_path, shards):
    """Somebody else has pushed the first rank's, after this courier had asked."""
    run = described("overlap")
    spools = spools_of(tmp_path, run)
    delivery = Delivery(session := InProcess(run, shards[1:]))
    for rank, spool in spools.items():
        delivery.add(rank, spool)
    delivery.work({0: {}, 1: {}}, waits=True)
    for rank, spool in spools.items():
        spool.write(0, at_layer("overlap", rank, 9))
    shards[1].push(*at_layer("overlap", 0, 9).to_wire())
    deliver(delivery, 3)
    assert session.messages == [(1, 1), (1,)]
    assert received(shards[1], "overlap") == 2


def test_a_rank_that_has_nothing_here_is_waited_for_and_not_for_long(tmp_path, shards):
    run = described("wait")
    spools = spools_of(tmp_path, run)
    delivery = Delivery(session := InProcess(run, shards[1:]))
    spools[0].write(0, at_layer("wait", 0, 9))
    for rank, spool in spools.items():
        delivery.add(rank, spool)
    deliver(delivery, 3)
    assert session.messages == []
    wait_until(lambda: delivery.work({0: {}, 1: {}}, waits=True) or session.messages, "the end of its patience")
    assert session.messages == [(1,)]


def test_what_a_shard_has_lost_is_pushed_again_without_waiting_for_ranks_that_may_be_there(tmp_path, shards):
    run = described("lost")
    spools = spools_of(tmp_path, run)
    delivery = Delivery(session := InProcess(run, shards[1:]))
    spools[0].write(0, at_layer("lost", 0, 9))
    for rank, spool in spools.items():
        delivery.add(rank, spool)
    delivery.work({0: {}, 1: {}}, waits=False)
    assert session.messages == [(1,)]
    session.shards = shards[:1]
    session.open()
    wait_until(lambda: delivery.work({0: {}, 1: {}}, waits=True) or delivery._again, "the answer that it is unknown")
    deliver(delivery, 2)
    assert session.messages == [(1,), (1,)]
    assert received(shards[0], "lost") == 1
