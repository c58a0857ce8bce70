"""Partials that cannot be used: each is refused with a reason, counted, said once, and harms nothing around it."""

import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from eigenwatch.aggregator.config import ShardLimits, SolverConfig
from eigenwatch.aggregator.shard import UNKNOWN_RUN, Shard
from eigenwatch.schemas import REFUSAL_REASONS, WIRE_VERSION, RunDescription
from eigenwatch.schemas.delivery import PushReply

from tests.aggregator.test_shard import FLUSH_SECONDS, WIDTH, layer, partial, run, stored

HEADER, MEAN, SCATTER = partial(0).to_wire()
DAY = 86400.0
WEEK = 7 * DAY
ROWS = {"form": "samples", "dtype": "bfloat16"}


class Bad(NamedTuple):
    reason: str
    words: str
    changes: dict[str, Any] | None = None
    mean: Any = MEAN
    payload: Any = SCATTER
    header: Any = HEADER
    run: str = "run"
    """Under which it is counted."""

    def pushed_to(self, shard: Shard) -> PushReply:
        header = self.header if self.changes is None else self.header | self.changes
        return shard.push(header, self.mean, self.payload)


BAD = {
    "wrong shape": Bad("malformed", "must be float32 of shape (144,)", payload=SCATTER.reshape(WIDTH, WIDTH)),
    "too short": Bad("malformed", "must be float32 of shape (144,), got float32(143,)", payload=SCATTER[:-1]),
    "wrong dtype": Bad("malformed", "got float64(144,)", payload=SCATTER.astype(np.float64)),
    "a mean in float32": Bad("malformed", "mean must be float64", mean=MEAN.astype(np.float32)),
    "no array": Bad("malformed", "got bytes", payload=SCATTER.tobytes()),
    "fewer than no tokens": Bad("malformed", "tokens must be an integer in [0, ", {"tokens": -1}),
    "a mean that is not finite": Bad("malformed", "mean is not finite", mean=MEAN * np.nan),
    "a negative trace": Bad("malformed", "trace -1.0", {"trace": -1.0}),
    "a width that is not that of the run": Bad(
        "width", f"has width {WIDTH}, got {WIDTH + 1}",
        partial(0, width=WIDTH + 1).to_wire().header, *partial(0, width=WIDTH + 1).to_wire()[1:],
    ),
    "a layer that nobody announced": Bad("unexpected", "no layer 7", {"layer": 7}),
    "a rank that nobody announced": Bad("unexpected", "on rank 9", {"rank": 9, "share": 9}),
    "rows of another rank": Bad("unexpected", "rows (0, 12) of share 0", {"rank": 1, "share": 0}),
    "a step of the far future": Bad("step", "step must lie in [0, 9007199254740992]", {"step": 1 << 60}),
    "a step before the first": Bad("step", "got -1", {"step": -1}),
    "captured next week": Bad("future", "7.0 days from now: set its host's clock", {"captured_at": time.time() + WEEK}),
    "captured in the year 10000": Bad("malformed", "captured_at must be a float in", {"captured_at": 1e12}),
    "a newer sender": Bad("version", "upgrade it first", {"version": WIRE_VERSION + 1}),
    "10 GB": Bad("too_large", "of 10000000000 bytes", ROWS | {"width": 5, "tokens": 10**9}),
    "a whole scatter of D=131072": Bad("too_large", "34426847232 bytes", {"width": 1 << 17, "rows": [0, 1 << 17]}),
    "a site that is none": Bad("malformed", "site must be one of", {"site": "middle"}),
    "no mapping": Bad("malformed", "the header is not a mapping", header=[1, 2], run=UNKNOWN_RUN),
    "a run id that leaves the store": Bad("malformed", "is not allowed", {"run_id": "../../etc"}, run=UNKNOWN_RUN),
    "a run id that is an array": Bad("malformed", "is not allowed", {"run_id": np.zeros(3)}, run=UNKNOWN_RUN),
    "nothing": Bad("version", "None is not understood", header={}, run=UNKNOWN_RUN),
}  # fmt: skip


@pytest.fixture
def shard(tmp_path: Path):
    shard = Shard(str(tmp_path), SolverConfig(device="cpu"), ShardLimits())
    shard.open_run(run(layer()).to_wire(), 0)
    yield shard
    shard.close(FLUSH_SECONDS)


def dropped(shard: Shard, run_id: str = "run") -> dict[str, int]:
    counters = shard.snapshot([]).counters
    return dict(counters[run_id].dropped) if run_id in counters else {}


@pytest.mark.parametrize("what", BAD)
def test_it_is_refused_with_a_reason_and_counted(shard, what):
    bad = BAD[what]
    reply = bad.pushed_to(shard)
    assert (reply.status, reply.reason) == ("refused", bad.reason)
    assert bad.words in reply.message
    assert "\n" not in reply.message
    assert dropped(shard, bad.run) == {bad.reason: 1}
    assert set(shard.snapshot([]).counters) <= {"run", UNKNOWN_RUN}, "no label comes from what was refused"


def test_what_is_good_around_them_is_stored_as_if_they_were_not_there(shard, tmp_path):
    bad, good = list(BAD.values()), [(step, rank) for step in range(100, 108) for rank in range(2)]
    for step, rank in good:
        for one in bad:
            assert one.pushed_to(shard).status == "refused"
        assert shard.push(*partial(rank, step=step).to_wire()).status == "merged"
    assert shard.flush(FLUSH_SECONDS) == 0
    records = stored(tmp_path)
    assert [(row["step"], row["complete"], row["tokens"]) for row in records] == [
        (step, True, 80) for step in range(100, 108)
    ]
    assert all(row["finite"] and row["hard_rank"] > 1 for row in records)
    (alone,) = [row for row in records if row["step"] == 100]
    undisturbed = Shard(str(tmp_path / "other"), SolverConfig(device="cpu"), ShardLimits())
    undisturbed.open_run(run(layer()).to_wire(), 0)
    for rank in range(2):
        undisturbed.push(*partial(rank).to_wire())
    undisturbed.close(FLUSH_SECONDS)
    (same,) = stored(tmp_path / "other")
    assert {name: alone[name] for name in ("hard_rank", "soft_rank", "total_variance")} == {
        name: same[name] for name in ("hard_rank", "soft_rank", "total_variance")
    }
    for run_id in ("run", UNKNOWN_RUN):
        expected: dict[str, int] = {}
        for one in bad:
            if one.run == run_id:
                expected[one.reason] = expected.get(one.reason, 0) + len(good)
        assert dropped(shard, run_id) == expected


def test_a_rank_that_is_wrong_in_every_sample_is_said_so_now_and_then(shard, caplog):
    for _ in range(150):
        BAD["wrong dtype"].pushed_to(shard)
    BAD["a newer sender"].pushed_to(shard)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 4
    assert [f"(malformed, {count} so far)" in line for count, line in zip((1, 10, 100), said, strict=False)] == [
        True
    ] * 3
    assert said[3].startswith("run run: partial refused (version, 1 so far): wire version 2 is not understood")
    assert not any(record.exc_info for record in caplog.records)


def test_every_reason_stands_in_the_catalogue(shard):
    assert {bad.reason for bad in BAD.values()} <= set(REFUSAL_REASONS)
    shard.push(HEADER, MEAN, _Explodes((1,)))
    assert set(dropped(shard)) <= set(REFUSAL_REASONS)


class _Explodes(np.ndarray):
    @property
    def dtype(self):
        raise RuntimeError("an array of another make")


@pytest.mark.parametrize("captured_at", [0.0, 1.0, 1.5e9, pytest.param(time.time() + 0.9 * DAY, id="tomorrow")])
def test_what_was_captured_long_ago_or_by_a_clock_that_is_fast_is_taken(shard, captured_at):
    assert shard.push(HEADER | {"captured_at": captured_at}, MEAN, SCATTER).status == "merged"


def test_steps_may_come_in_any_order_and_be_tokens(shard):
    for step in (5000, 10, 15 * 10**12, 0):
        assert shard.push(HEADER | {"step": step}, MEAN, SCATTER).status == "merged"


def test_a_run_that_nobody_announced_must_be_and_is_counted_only_if_it_never_is(shard, monkeypatch, caplog):
    stranger = HEADER | {"run_id": "other"}
    for _ in range(3):
        reply = shard.push(stranger, MEAN, SCATTER)
        assert (reply.status, reply.message) == (
            "unknown_run",
            "nobody announced run other, attempt 0, to this shard",
        )
    assert dropped(shard, UNKNOWN_RUN) == {}, "so it goes after every restart, and nothing is lost"
    monkeypatch.setattr("eigenwatch.aggregator.shard.STRANGER_SECONDS", -1.0)
    for _ in range(3):
        assert shard.push(stranger, MEAN, SCATTER).status == "unknown_run"
    assert dropped(shard, UNKNOWN_RUN) == {"unknown_run": 3}
    assert sum("nobody announced run other" in record.getMessage() for record in caplog.records) == 1
    monkeypatch.undo()
    shard.open_run(run(layer(), run_id="other").to_wire(), 0)
    assert shard.push(stranger, MEAN, SCATTER).status == "merged"


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": None}, {"layers": [{"layer": 0}]}, {"colour": "blue"}, {"run_id": "a/b"},
        {"layers": [{"layer": 1 << 40, "site": "post", "name": "h", "width": 8, "shares": [[0]]}]},
        {"layers": [{"layer": 0, "site": "post", "name": "h", "width": 1 << 20, "shares": [[0]]}]},
        {"layers": [{"layer": 0, "site": "post", "name": "h", "width": 8, "shares": 3}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_run_whose_description_is_not_understood_is_not_opened(shard, changes):
    with pytest.raises(ValueError, match=r"not understood|not allowed|must lie in") as refused:
        shard.open_run(run(layer(), run_id="other").to_wire() | changes, 0)
    assert "\n" not in str(refused.value)
    assert shard.push(HEADER, MEAN, SCATTER).status == "merged"


def test_a_description_survives_its_way(shard):
    described = run(layer(expert=3))
    assert RunDescription.from_wire(described.to_wire()) == described
