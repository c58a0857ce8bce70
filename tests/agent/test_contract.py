"""The overhead contract in a training: the cadence stretches until it holds, on every rank alike."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from eigenwatch.agent import Schedule, attach

from tests.agent.reference import Key, Reference, records
from tests.jobs.contract import EVERY, EXPERTS, MANY, STEPS, WIDE, Layers, routed
from tests.jobs.launch import REPOSITORY

ALLOWED = 0.05


def test_the_cadence_stretches_until_the_contract_holds(tmp_path):
    """A layer whose input is copied at about the cost of its own product."""
    model, x = Layers(256, 0), torch.randn(MANY, 256)
    schedule = Schedule(every=1, max_overhead=ALLOWED)
    ratios = {}
    with (
        torch.no_grad(),
        attach(model, run_id="contract", schedule=schedule, store=tmp_path, aggregator="inline") as agent,
    ):
        for step in range(600):
            model.layers[0]["mlp"]["down_proj"](x)
            agent.step(step)
            ratios[step] = agent.overhead_ratio
    assert agent.dropped == {}
    found = {key.step: row for key, row in sorted(records(tmp_path, "contract").items())}
    stretches = {step: row["sampling_steps"] for step, row in found.items()}
    assert stretches[0] == 1
    assert max(stretches.values()) >= 4
    for step, following in itertools.pairwise([*found, 600]):
        # The decision that a sampled step brings holds from the next one on.
        stretch = stretches.get(following, following - step)
        assert step % stretches[step] == 0
        assert following == 600 or following == (step // stretch + 1) * stretch
    # Just after each decision, the ratio under the new cadence; one more step moves the medians a little.
    decided = [ratios[step + 1] for step in found if 20 < step < 599 and step + 1 not in found]
    assert decided
    assert all(ratio <= 1.5 * ALLOWED for ratio in decided)


def test_without_a_contract_the_cadence_stays_whatever_it_costs(tmp_path):
    model, x = Layers(256, 0), torch.randn(MANY, 256)
    with torch.no_grad(), attach(model, run_id="free", every=4, store=tmp_path, aggregator="inline") as agent:
        for step in range(20):
            model.layers[0]["mlp"]["down_proj"](x)
            agent.step(step)
    assert agent.overhead_ratio > 0.01
    assert {key.step: row["sampling_steps"] for key, row in records(tmp_path, "free").items()} == dict.fromkeys(
        range(0, 20, 4), 4
    )


@pytest.fixture(scope="module")
def two_ranks(served, tmp_path_factory) -> list[dict[str, int]]:
    """What each rank of the job said at its end."""
    out = tmp_path_factory.mktemp("contract")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.jobs.contract", str(out), served.address],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-5000:]
    return [json.loads(Path(out / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_an_expert_that_one_rank_alone_reaches_has_the_sum_of_both(two_ranks, served):
    reference = Reference()
    for reference.step, rank in itertools.product(range(STEPS), range(2)):
        for expert, rows_ND in routed(reference.step, rank).items():
            reference.keep(rows_ND, 0, expert=expert)
    keys = [Key(step, 0, "post", expert) for step in range(STEPS) for expert in range(EXPERTS)]
    found = reference.assert_stored_keys(served.store, "two-experts", keys)
    assert found[Key(1, 0, "post", 2)]["tokens"] == 0
    assert {row["ranks_seen"] for row in found.values()} == {2}


@pytest.mark.parametrize(("run", "tokens"), [("contract", 2 * MANY), ("contract-split", MANY)])
def test_all_ranks_sample_the_same_steps_when_the_cadence_changes(two_ranks, served, run, tokens):
    """Where a layer is split over them they would else wait for each other for ever."""
    assert [one["undelivered"] for one in two_ranks] == [0, 0]
    found = {key.step: row for key, row in sorted(records(served.store, run).items())}
    assert max(row["sampling_steps"] for row in found.values()) > EVERY
    for step, row in found.items():
        assert row["complete"], step
        assert row["tokens"] == tokens
        assert row["width"] == WIDE
        assert step % row["sampling_steps"] == 0
