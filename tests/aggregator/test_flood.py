"""A run that pushes more than a shard can solve: what the shard holds, and what a calm run beside it feels."""

import json
import subprocess
import sys

from eigenwatch.aggregator.backlog import BATCH_BYTES

from tests.jobs.flood import LAYERS, RECORDS
from tests.processes import PATIENCE_SECONDS


def test_a_run_that_floods_fills_neither_the_memory_nor_the_way_of_another(tmp_path):
    command = [sys.executable, "-m", "tests.jobs.flood", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_SECONDS)
    seen = json.loads(ended.stdout)
    assert seen["still_flooding"], "the calm run had it beside it all the time"
    assert max(one["solved_before"] for one in seen["calm"]) <= 1 + 3 * LAYERS, "what is solved together, hardly more"
    # Beside what is merged there are the matrices that are solved together, and what LAPACK needs for them.
    assert seen["grown_bytes"] <= seen["limit_bytes"] + BATCH_BYTES < RECORDS * seen["record_bytes"] / 2
    assert seen["unwritten"] == 0
