"""The main job: two ranks train, and what is stored, shown and judged is what a plain script would compute."""

import json
import os
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest
import torch
from eigenwatch import spectrum
from eigenwatch.history import open_history
from eigenwatch.schemas import METRIC_NAMES
from prometheus_client.parser import text_string_to_metric_families

from tests.jobs.launch import start_job
from tests.processes import PATIENCE_SECONDS, wait_until

RANKS, LAYERS, EVERY, STEPS = 2, 3, 4, 10
SAMPLED = range(0, STEPS, EVERY)


def exposition(url: str) -> dict[str, list]:
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    return {family.name: family.samples for family in text_string_to_metric_families(text)}


@pytest.fixture(scope="module")
def finished_job(served, tmp_path_factory):
    """A job on two ranks against the shared aggregator, and what its endpoint showed before it closed."""
    out = tmp_path_factory.mktemp("job")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ("--run-id", "main", "--aggregator", served.address, "--steps", str(STEPS), "--every", str(EVERY))
    job = start_job(out, environment, *options, "--hold")

    def all_recorded() -> dict[str, list] | None:
        assert job.poll() is None, (out / "stderr").read_text()
        shown = exposition(served.metrics_url)
        steps = {s.labels["layer"]: s.value for s in shown["eigenwatch_last_record_step"] if s.labels["run"] == "main"}
        return shown if list(steps.values()) == [max(SAMPLED)] * LAYERS else None

    shown = wait_until(all_recorded, "the last sampled step on the endpoint")
    with urllib.request.urlopen(served.metrics_url) as response:
        (out / "exposition.txt").write_bytes(response.read())
    (out / "go").touch()
    assert job.wait(PATIENCE_SECONDS) == 0, (out / "stderr").read_text()
    return out, shown


def reference(out: Path, step: int, layer: int) -> tuple[torch.Tensor, int]:
    """Covariance and tokens of one record, in float64, from the activations that the witnesses kept."""
    rows = [
        forward
        for rank in range(RANKS)
        for forward in torch.load(out / f"witness-{step}-{rank}.pt", weights_only=True)[layer]
    ]
    x_ND = torch.cat(rows).double()
    return torch.cov(x_ND.T), len(x_ND)


def test_every_record_equals_the_covariance_of_the_gathered_activations(finished_job, served):
    out, _ = finished_job
    with open_history(served.store) as history:
        records = history.query("SELECT * FROM records WHERE run_id = 'main' ORDER BY step, layer").to_pylist()
        spectra = history.query("SELECT step, layer, eigenvalues FROM eigenvalues WHERE run_id = 'main'").to_pylist()
    assert [(one["step"], one["layer"]) for one in records] == [(s, k) for s in SAMPLED for k in range(LAYERS)]
    stored = {(one["step"], one["layer"]): torch.tensor(one["eigenvalues"]).double() for one in spectra}
    for record in records:
        covariance, tokens = reference(out, record["step"], record["layer"])
        assert record["tokens"] == tokens
        assert record["complete"]
        assert record["ranks_seen"] == record["ranks_expected"] == RANKS
        expected = spectrum.eigenvalues(covariance)
        found = stored[record["step"], record["layer"]]
        assert (found - expected).abs().max() <= 1e-5 * expected[0]
        for name in (
            "hard_rank", "soft_rank", "hard_utilization", "soft_utilization", "spectral_concentration",
            "utilization_index", "effective_dimension", "top1_share",
        ):  # fmt: skip
            assert record[name] == pytest.approx(getattr(spectrum, name)(expected).item(), rel=1e-4), name
        for percent in (10, 25, 50):
            share = spectrum.variance_share(expected, percent / 100).item()
            assert record[f"variance_{percent}"] == pytest.approx(share, rel=1e-4)
        assert record["power_law_alpha"] == pytest.approx(spectrum.power_law(expected).alpha.item(), rel=1e-4)
        assert record["total_variance"] == pytest.approx(covariance.trace().item(), rel=1e-4)
        assert record["hard_rank_correction"] == "pairs"


def test_the_loss_is_the_same_to_the_last_bit_without_the_agent(finished_job, job_environment, tmp_path):
    out, _ = finished_job
    options = ("--aggregator", "none", "--steps", str(STEPS), "--every", str(EVERY))
    assert start_job(tmp_path, job_environment, *options).wait(120) == 0
    for rank in range(RANKS):
        with_agent = json.loads((out / f"losses-{rank}.json").read_text())
        assert with_agent == json.loads((tmp_path / f"losses-{rank}.json").read_text())


def test_every_rank_learns_that_everything_was_delivered(finished_job):
    out, _ = finished_job
    for rank in range(RANKS):
        assert json.loads((out / f"closed-{rank}.json").read_text())["undelivered"] == 0


def test_the_endpoint_shows_every_gauge_of_every_layer_while_the_run_is_under_way(finished_job):
    _, shown = finished_job
    wanted = {f"eigenwatch_{name}" for name in METRIC_NAMES} - {"eigenwatch_js_divergence"}  # no `pre` site here
    for name in wanted | {"eigenwatch_tokens", "eigenwatch_last_record_timestamp_seconds"}:
        labels = [sample.labels for sample in shown[name] if sample.labels["run"] == "main"]
        assert labels == [{"run": "main", "layer": str(layer), "site": "post"} for layer in range(LAYERS)], name
    (info,) = (sample for sample in shown["eigenwatch_run_info"] if sample.labels["run"] == "main")
    assert info.labels["world_size"] == str(RANKS)
    (received,) = (
        s.value
        for s in shown["eigenwatch_partials_received"]
        if s.labels["run"] == "main" and s.name.endswith("_total")
    )
    assert received == len(SAMPLED) * LAYERS * RANKS


def test_promtool_finds_nothing_in_the_exposition(finished_job):
    out, _ = finished_job
    if shutil.which("promtool") is None:
        (pytest.fail if "CI" in os.environ else pytest.skip)("promtool is not installed")
    text = (out / "exposition.txt").read_bytes()
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_the_series_of_an_ended_run_vanish(finished_job, served):
    def gone() -> bool:
        shown = exposition(served.metrics_url)
        return not any(s.labels.get("run") == "main" for family in shown.values() for s in family)

    wait_until(gone, "the end of the run's series")


def test_the_run_is_described_in_the_store(finished_job, served):
    with open_history(served.store) as history:
        (run,) = history.query("SELECT * FROM runs WHERE run_id = 'main'").to_pylist()
    assert (run["status"], run["attempt"], run["world_size"]) == ("finished", 0, RANKS)
    assert [layer["name"] for layer in run["layers"]] == [f"layers.{k}.mlp.down_proj" for k in range(LAYERS)]
    assert dict(run["tags"]) == {"norm": "pre"}
