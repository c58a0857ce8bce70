"""Every parallel stack, on four real ranks over gloo: its records are those of a plain training of the same model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from eigenwatch import spectrum
from eigenwatch.history import open_history

from tests.jobs.launch import REPOSITORY
from tests.stacks import plain
from tests.stacks.stacks import STACKS

STEPS = int(os.environ.get("EIGENWATCH_TEST_STEPS", plain.STEPS))
pytestmark = pytest.mark.timeout(900 + 30 * STEPS)  # the first test waits for all stacks
RANKS = 4
BOTH = ("post", "pre")


class Expected(NamedTuple):
    """What a stack must have stored of a layer, beside the spectrum."""

    sites: tuple[str, ...] = ("post",)
    ranks: int = RANKS
    """Whose partials make a record complete."""


EXPECTED = {
    "data_parallel": Expected(BOTH),
    "fully_sharded": Expected(),
    "hybrid_sharded": Expected(),
    "tensor_parallel_fsdp": Expected(BOTH),
    "tensor_parallel_compiled": Expected(BOTH),
    "sequence_parallel": Expected(BOTH),
    "megatron": Expected(),
    "context_parallel": Expected(),
    "pipeline": Expected(ranks=1),
    "pipeline_interleaved": Expected(ranks=2),
}


@pytest.fixture(scope="module")
def finished(served, tmp_path_factory) -> Path:
    """All stacks trained under one torchrun, against the shared aggregator; the folder with each rank's losses."""
    out = tmp_path_factory.mktemp("stacks")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command = [sys.executable, *launcher, "-m", "tests.stacks.job", str(out), served.address, *EXPECTED]
    ended = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-5000:]
    return out


@pytest.fixture(scope="module")
def spectra() -> dict[tuple[int, int, str], torch.Tensor]:
    """Eigenvalues of the plain training, by step, layer and site."""
    rows = plain.activations()
    return {key: spectrum.eigenvalues(torch.cov(x_ND.double().T)) for key, x_ND in rows.items()}


def test_every_stack_is_expected_to_store_something():
    assert set(EXPECTED) == set(STACKS)


@pytest.mark.parametrize("stack", EXPECTED)
def test_the_records_are_those_of_a_plain_training(finished, served, spectra, stack):
    with open_history(served.store) as history:
        records = history.query(f"SELECT * FROM records WHERE run_id = '{stack}'").to_pylist()
        stored = history.query(f"SELECT * FROM eigenvalues WHERE run_id = '{stack}'").to_pylist()
    found = {(one["step"], one["layer"], one["site"]): torch.tensor(one["eigenvalues"]).double() for one in stored}
    expected = EXPECTED[stack]
    assert set(found) == {key for key in spectra if key[2] in expected.sites}
    assert len(records) == len(found)
    for record in records:
        key = record["step"], record["layer"], record["site"]
        true = spectra[key]
        assert (record["width"], record["tokens"]) == (plain.WIDTH, plain.SEQUENCES * plain.TIME), key
        assert record["complete"]
        assert record["ranks_seen"] == record["ranks_expected"] == expected.ranks
        assert (found[key] - true).abs().max() <= 1e-4 * true[0], key
        for name in ("hard_rank", "soft_rank", "spectral_concentration", "top1_share", "effective_dimension"):
            assert record[name] == pytest.approx(getattr(spectrum, name)(true).item(), rel=1e-4), (key, name)
        assert record["sampling_steps"] == plain.EVERY


@pytest.mark.parametrize("stack", [name for name, one in EXPECTED.items() if one.sites == BOTH])
def test_both_sites_of_a_layer_give_their_divergence(finished, served, spectra, stack):
    with open_history(served.store) as history:
        rows = history.query(
            f"SELECT step, layer, js_divergence FROM records WHERE run_id = '{stack}' AND site = 'post'"
        ).to_pylist()
    assert len(rows) == len(plain.SAMPLED) * plain.LAYERS
    for row in rows:
        pre, post = (spectra[row["step"], row["layer"], site] for site in ("pre", "post"))
        assert row["js_divergence"] == pytest.approx(spectrum.js_divergence(pre, post).item(), rel=1e-3)


@pytest.mark.parametrize("stack", EXPECTED)
def test_the_loss_is_the_same_to_the_last_bit_and_everything_was_delivered(finished, stack):
    for rank in range(RANKS):
        results = json.loads((finished / f"{stack}-{rank}.json").read_text())
        assert results["observed"] == results["alone"]
        assert results["undelivered"] == 0
