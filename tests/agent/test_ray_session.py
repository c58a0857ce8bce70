"""A courier's session with the aggregator."""

import json
import os
import subprocess
import sys

from eigenwatch.schemas.ray_token import token_environment

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
