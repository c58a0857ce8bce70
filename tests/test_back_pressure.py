"""Back-pressure end to end: a solver that falls behind, and a job whose ranks sample less from one step on."""

import os
import signal
import urllib.request

from eigenwatch.history import open_history
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import start_serve, stop_serve
from tests.jobs.launch import start_job, step_of
from tests.processes import PATIENCE_SECONDS, marked, wait_until

LAYERS, EVERY = 3, 4


def test_a_shard_that_falls_behind_is_heard_by_every_rank(job_environment, tmp_path):
    served = start_serve(tmp_path / "store", "--behind", "1")
    out = tmp_path / "job"

    def cadences() -> dict[int, set[int]]:
        with open_history(served.store) as history:
            rows = history.query("SELECT step, sampling_steps, complete FROM records ORDER BY step").to_pylist()
        assert all(row["complete"] for row in rows), "a rank has sampled another step than the others"
        return {row["step"]: {row["sampling_steps"]} for row in rows}

    try:
        job = start_job(
            out, job_environment, "--run-id", "behind", "--aggregator", served.address,
            "--steps", "100000", "--until-go", "--every", str(EVERY), "--step-seconds", "0.05",
        )  # fmt: skip
        wait_until(cadences, "the first records")
        (solver,) = [
            pid for pid, command in marked(served.marker).items() if "eigenwatch.aggregator.solver_process" in command
        ]
        os.kill(solver, signal.SIGSTOP)

        def backlog_seconds() -> float:
            text = urllib.request.urlopen(served.metrics_url, timeout=10).read().decode()
            families = {family.name: family for family in text_string_to_metric_families(text)}
            return families["eigenwatch_backlog_seconds"].samples[0].value

        wait_until(lambda: backlog_seconds() > 3, "a backlog")
        os.kill(solver, signal.SIGCONT)
        wait_until(lambda: {2 * EVERY} in cadences().values(), "a record of the longer cadence")
        at = step_of(out)
        wait_until(lambda: step_of(out) >= at + 6 * EVERY, "more steps")
        (out / "go").touch()
        assert job.wait(PATIENCE_SECONDS) == 0, (out / "stderr").read_text()
        found = cadences()
        changed = min(step for step, cadence in found.items() if cadence == {2 * EVERY})
        before, after = [step for step in found if step < changed], [step for step in found if step >= changed]
        assert before == list(range(before[0], before[-1] + 1, EVERY)), "until then nothing is left out"
        assert after == list(range(after[0], after[-1] + 1, 2 * EVERY))
    finally:
        stop_serve(served)
