"""Compaction among real processes: a service that writes, queries under way, and compactions killed at any moment."""

import json
import subprocess
import sys
from pathlib import Path

from eigenwatch.history import open_history
from eigenwatch.history.compaction import CompactionConfig, compact
from eigenwatch.schemas.store import open_store

REPOSITORY = Path(__file__).parents[2]
KILLS = 40
ROWS = 4
"""In each file."""
GRACE_SECONDS = 5.0
"""Longer than a query of this size takes on a busy machine."""

# Forked, since that is quicker than starting, and in the parent no thread runs.
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
from eigenwatch.aggregator.writer import StoreWriter
from eigenwatch.history.compaction import CompactionConfig, compact
from eigenwatch.schemas.store import open_store
from tests.history.stored import record, spectrum
from tests.history.test_compaction_under_fire import GRACE_SECONDS, ROWS

store, kills = sys.argv[1], int(sys.argv[2])
killer = os.getpid()
random.seed(0)
config = CompactionConfig(part_bytes=200_000, grace_seconds=GRACE_SECONDS)

def forked(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child

def write():
    writer = StoreWriter(store)
    for step in range(10**9):
        if os.getppid() != killer:
            return
        eigenvalues = [float(step)] * 100
        writer.append_tables(
            f"run-{step % 2}",
            {
                "eigenvalues": [spectrum(step, layer, eigenvalues=eigenvalues) for layer in range(ROWS)],
                "records": [record(step, layer) for layer in range(ROWS)],
            },
        )
        os.write(1, f"{step + 1}\\n".encode())  # so many steps are durable

service = forked(write)
ended = killed = 0
seen, removed = set(), set()
began = time.monotonic()
patient = lambda seconds: time.monotonic() < began + seconds
while killed < kills or patient(3 * GRACE_SECONDS) or (not removed and patient(20 * GRACE_SECONDS)):
    parts = set(Path(store).glob("run_id=*/records/part-*.parquet"))
    removed |= seen - parts
    seen |= parts
    child = forked(lambda: compact(open_store(store), config))
    enough = killed >= kills and not patient(3 * GRACE_SECONDS)  # now they may end, however slow this machine is
    at = time.monotonic() + (60.0 if enough else random.choice([0.05, 0.5, 3.0]) * random.random())
    while not (left := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < at:
        time.sleep(0.001)
    if left[0]:
        assert left[1] == 0, "a compaction failed"
        ended += 1
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
os.kill(service, signal.SIGKILL)
os.waitpid(service, 0)
print(json.dumps({"killed": killed, "ended": ended, "removed": len(removed)}))
"""


def test_every_query_sees_every_row_once_while_runs_write_and_compactions_die(tmp_path: Path) -> None:
    said = tmp_path / "said"
    store = tmp_path / "store"
    store.mkdir()
    with said.open("wb") as out:
        killer = subprocess.Popen([sys.executable, "-c", KILLER, store, str(KILLS)], stdout=out, cwd=REPOSITORY)
    queries = 0
    try:
        with open_history(store) as history:
            while killer.poll() is None:
                durable = max((int(line) for line in said.read_text().split("\n")[:-1] if line.isdigit()), default=0)
                for view in ("records_raw", "records", "eigenvalues"):
                    keys = "count(*) AS rows, count(DISTINCT (step, layer)) AS keys, count(DISTINCT step) AS steps"
                    (found,) = history.query(f"SELECT {keys} FROM {view}").to_pylist()
                    assert found["rows"] == found["keys"], f"{view} shows a row twice"
                    assert found["rows"] >= ROWS * durable, f"{view} misses a row"
                    queries += 1
    finally:
        killer.kill()
        killer.wait()
    assert killer.returncode == 0
    *_, durable, last = said.read_text().split("\n")[:-1]
    ended = json.loads(last)
    assert ended["killed"] >= KILLS
    assert ended["ended"]
    assert queries > 10
    assert ended["removed"], "parts went while the queries ran"

    for _ in range(3):
        compact(open_store(store), CompactionConfig(grace_seconds=0))
    parts = list(store.rglob("part-*.parquet"))
    assert len(parts) == 4, "one a table and run"
    with open_history(store) as history:
        for view in ("records_raw", "eigenvalues"):
            table = history.query(f"SELECT step, layer FROM {view} ORDER BY step, layer").to_pylist()
            steps = len({row["step"] for row in table})
            assert steps - int(durable) in (0, 1), "and the one that was not acknowledged"
            assert table == [{"step": step, "layer": layer} for step in range(steps) for layer in range(ROWS)]
