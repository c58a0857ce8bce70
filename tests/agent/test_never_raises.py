"""Whatever a forward hands over, the training goes on: it is counted, and no wrong record comes of it."""

import numpy as np
import pytest
import torch
from eigenwatch.agent import Declared, attach
from torch import nn


class Model(nn.Module):
    """Its forward shows what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"down_proj": nn.Linear(16, 8)})})])

    def forward(self, x, attention_mask=None):
        return self.layers[0]["mlp"]["down_proj"](x)


@pytest.mark.parametrize("mask", [{"full": torch.ones(4, 5)}, [1, 1], np.ones((4, 5)), object()])
def test_a_mask_that_is_no_tensor_switches_the_observation_off_and_not_the_training(mask, tmp_path):
    model = Model()
    with attach(
        model, run_id="a", every=1, store=tmp_path, aggregator="inline", mask_argument="attention_mask"
    ) as agent:
        for step in range(4):
            model(torch.randn(4, 5, 16), attention_mask=mask)
            agent.step(step)
        assert agent.dropped == {"observation_error": 3}
        agent.mask(mask)


@pytest.mark.parametrize("shown", [np.ones((3, 16)), None, [1.0]])
def test_showing_something_that_is_no_tensor_is_counted(shown, tmp_path):
    model = Model()
    declared = [Declared(layer=7, width=16)]
    with attach(model, run_id="b", every=1, store=tmp_path, aggregator="inline", declared=declared) as agent:
        agent.observe(shown, layer=7)
        model(torch.randn(4, 5, 16))
        agent.step(0)
        assert agent.dropped == {"observation_error": 1}
