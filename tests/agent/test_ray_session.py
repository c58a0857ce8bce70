"""A courier's session with the aggregator."""

import json
import os
import subprocess
import sys

import pytest
import torch
from eigenwatch.history import open_history
from eigenwatch.schemas.ray_token import token_environment

from tests.processes import wait_until

OPENS_A_SESSION = """
import json, sys
from eigenwatch.agent.ray_session import RaySession
from eigenwatch.schemas import LayerDescription, RunDescription
layer = LayerDescription(layer=3, site="post", expert=None, name="down", width=8, shares=((0,),))
run = RunDescription(run_id="light", launch_id="1", world_size=1, layers=(layer,), tags={})
session = RaySession(sys.argv[1], run)
session.open()
print(json.dumps({"knows": session.knows(3), "heavy": [name for name in ("torch", "scipy") if name in sys.modules]}))
session.finish([(0, True, {})])
session.close()
"""


def test_looking_up_the_actors_imports_none_of_what_they_compute_with(served):
    ended = subprocess.run(
        [sys.executable, "-c", OPENS_A_SESSION, served.address],
        env=os.environ | token_environment(os.environ, starts_ray=False),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == {"knows": True, "heavy": []}


PUSHES_IN_PIECES = """
import json, sys
import numpy as np
import torch
from eigenwatch.agent import ray_session
from eigenwatch.schemas import LayerDescription, Origin, RecordKey, RunDescription
from eigenwatch.spectrum import Moments, partial_of
ray_session.MESSAGE_BYTES = 3000
layer = LayerDescription(layer=0, site="post", expert=None, name="down", width=64, shares=((0,),))
run = RunDescription(run_id="pieces", launch_id="1", world_size=1, layers=(layer,), tags={})
moments = Moments(64)
moments.add(torch.randn(200, 64, generator=torch.Generator().manual_seed(0)))
key = RecordKey("pieces", 0, 5, 0, "post", None)
wire = partial_of(moments, Origin(key=key, rank=0, share=0, captured_at=1.0)).to_wire()
session = ray_session.RaySession(sys.argv[1], run)
session.open()
print(len(ray_session._pieces(wire.payload)), session.push([wire])[0].status)
session.finish([(0, True, {})])
session.close()
"""


def test_what_is_larger_than_a_message_travels_in_pieces_and_arrives_whole(served):
    ended = subprocess.run(
        [sys.executable, "-c", PUSHES_IN_PIECES, served.address],
        env=os.environ | token_environment(os.environ, starts_ray=False),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["6", "merged"]

    def stored() -> list[dict[str, float]]:
        with open_history(served.store) as history:
            return history.query("SELECT hard_rank FROM records WHERE run_id = 'pieces'").to_pylist()

    (record,) = wait_until(stored, "the record")
    x_ND = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).double()
    true_D = torch.linalg.eigvalsh(torch.cov(x_ND.T))
    assert record["hard_rank"] == pytest.approx(float(true_D.sum() ** 2 / true_D.square().sum()), rel=1e-5)
