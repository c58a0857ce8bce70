"""`attach(latest_only=True)` is said once and reaches the aggregator with the run."""

import pytest
from eigenwatch.agent import attach
from eigenwatch.schemas import RunDescription
from torch import nn


def model() -> nn.Module:
    feed_forward = nn.ModuleDict(
        {"gate_proj": nn.Linear(4, 8), "up_proj": nn.Linear(4, 8), "down_proj": nn.Linear(8, 4)}
    )
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": feed_forward})])})


@pytest.mark.parametrize("said", [{}, {"latest_only": False}, {"latest_only": True}])
def test_a_run_says_whether_it_wants_its_latest_steps_only(tmp_path, said):
    with attach(model(), run_id="run", aggregator="inline", store=tmp_path, **said) as agent:
        assert agent.run.latest_only == said.get("latest_only", False)
        assert RunDescription.from_wire(agent.run.to_wire()) == agent.run


def test_an_older_agent_that_does_not_say_it_wants_every_step(tmp_path):
    with attach(model(), run_id="run", aggregator="inline", store=tmp_path) as agent:
        wire = agent.run.to_wire()
    del wire["latest_only"]
    assert RunDescription.from_wire(wire).latest_only is False


def test_what_is_neither_true_nor_false_is_refused(tmp_path):
    with pytest.raises(ValueError, match="latest_only must be bool, got 1"):
        attach(model(), run_id="run", aggregator="inline", store=tmp_path, latest_only=1)
