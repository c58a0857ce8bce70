"""Spools of dead jobs: which are taken, which are left alone, and that none stays for ever."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from eigenwatch.agent.leftovers import ABANDONED_SECONDS, MAX_TAKES, Leftovers
from eigenwatch.agent.ray_session import RaySession
from eigenwatch.agent.spool import Destination, Spool
from eigenwatch.schemas import LayerDescription, RunDescription

from tests.agent.test_spool import locks_elsewhere, partial

NOBODY = Destination("127.0.0.1:9")
"""No Ray listens there: what is taken stays taken."""
LAYER = LayerDescription(layer=0, site="post", name="h.0", width=300, shares=((0,), (1,)))


def leave(
    root: Path, run_id: str = "run", launch: str = "old", rank: int = 0, to: Destination = NOBODY, partials: int = 1
) -> Spool:
    """A spool whose owners are dead."""
    run = RunDescription(run_id=run_id, launch_id=launch, world_size=2, layers=(LAYER,))
    spool = Spool.create([root], run, rank, to)
    for number in range(partials):
        spool.write(number, partial(number))
    spool.unlock()
    return spool


def age(spool: Spool, seconds: float) -> None:
    for file in spool.folder.iterdir():
        os.utime(file, (time.time() - seconds,) * 2)


def leftovers(root: Path, to: Destination = NOBODY) -> Leftovers:
    """Those of a job that has just begun."""
    return beginning(leave(root, launch="new", to=to))


def beginning(own: Spool) -> Leftovers:
    address = own.label().destination.address
    return Leftovers(own.label(), own.roots, lambda run: RaySession(address, run))


HOLDER = """
import sys
from pathlib import Path
from eigenwatch.agent.spool import Spool
assert Spool(Path(sys.argv[1])).lock()
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def used(spool: Spool) -> Iterator[None]:
    """Another process uses it meanwhile."""
    command = [sys.executable, "-c", HOLDER, str(spool.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.kill()


def taken_by(one: Leftovers, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What its next round begins to deliver."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        one.work()
    return [message for message in caplog.messages if message.startswith("delivering")]


@pytest.mark.parametrize(
    ("mine", "theirs", "run_id", "is_taken"),
    [
        (NOBODY, NOBODY, "other", True),
        (NOBODY, Destination("127.0.0.1:10"), "run", True),
        (NOBODY, Destination("127.0.0.1:10"), "other", False),
        (Destination("/a", "/store"), Destination("/b", "/store"), "other", True),
        (Destination("/a", "/store"), Destination("/b", "/else"), "run", False),
        (NOBODY, Destination("/b", "/store"), "run", False),
    ],
)
def test_a_spool_is_delivered_where_it_belongs(tmp_path, caplog, mine, theirs, run_id, is_taken):
    leave(tmp_path, run_id, to=theirs, partials=3)
    expected = [f"delivering 3 partials that launch old of {run_id} left"] if is_taken else []
    assert taken_by(leftovers(tmp_path, mine), caplog) == expected


def test_a_launch_is_taken_whole_or_not_at_all(tmp_path, caplog):
    spools = [leave(tmp_path, rank=rank) for rank in range(2)]
    own = leave(tmp_path, launch="new")
    with used(spools[1]):
        assert taken_by(beginning(own), caplog) == []
    one = beginning(own)
    assert taken_by(one, caplog) == ["delivering 2 partials that launch old of run left"]
    assert [locks_elsewhere(spool, "together") for spool in spools] == [False, False]
    one.release()
    assert [locks_elsewhere(spool, "alone") for spool in spools] == [True, True]
    assert [spool.numbers() for spool in spools] == [[0], [0]]


def test_a_spool_over_which_couriers_die_is_left_alone(tmp_path, caplog):
    poison, good = leave(tmp_path, launch="poison"), leave(tmp_path, launch="sound")
    for _ in range(MAX_TAKES):
        poison.count_take()
    assert taken_by(leftovers(tmp_path), caplog) == ["delivering 1 partials that launch sound of run left"]
    assert f"{poison.folder} stays where it is" in caplog.text
    assert poison.numbers() == good.numbers() == [0]


def test_what_lies_there_empty_is_removed_without_an_aggregator(tmp_path, caplog):
    empty = leave(tmp_path, partials=0)
    assert taken_by(leftovers(tmp_path), caplog) == []
    assert not empty.folder.exists()


def test_what_nobody_can_deliver_is_kept_for_a_week_and_then_removed_unless_it_is_in_use(tmp_path, caplog):
    far = Destination("10.0.0.1:1")
    strange, quiet, busy, young = kept = [leave(tmp_path, "far", name, to=far) for name in ("a", "b", "c", "d")]
    (strange.folder / "run.json").write_text("?")
    own = leave(tmp_path, launch="new")
    Leftovers(own.label(), [tmp_path], lambda *_: pytest.fail("nothing is delivered")).work()
    assert all(spool.numbers() == [0] for spool in kept)
    for spool in (strange, quiet, busy):
        age(spool, ABANDONED_SECONDS + 60)
    with used(busy):
        Leftovers(own.label(), [tmp_path], lambda *_: pytest.fail("nothing is delivered")).work()
    assert [spool.folder.exists() for spool in kept] == [False, False, True, True]
    assert f"{quiet.folder} is removed, its 1 partials are lost" in caplog.text
    assert young.numbers() == own.numbers() == [0]
