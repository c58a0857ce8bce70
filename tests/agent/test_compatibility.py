"""A cluster that a job cannot speak to is named, with the remedy, in one line."""

import os
import re
import shutil
import subprocess
import sys
import tempfile

import pytest
import ray
from eigenwatch.agent.compatibility import why_not_joined
from eigenwatch.agent.handover import CourierHandover
from eigenwatch.agent.spool import Destination, Spool
from eigenwatch.schemas import RunDescription

from tests.processes import end_all, marked_environment, wait_until

# What ray.init of 2.60.0 raised, word for word, when it joined a cluster of 2.52.1.
OLDER_RAY = (
    "Version mismatch: The cluster was started with:\n    Ray: 2.52.1\n    Python: 3.11.7\n"
    "This process on node 192.0.2.2 was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
)


def test_another_ray_is_named_with_the_one_to_install():
    said = why_not_joined("10.0.0.1:6379", RuntimeError(OLDER_RAY))
    assert said == (
        "the cluster at 10.0.0.1:6379 runs Ray 2.52.1 on Python 3.11.7, this job Ray 2.60.0 on Python 3.11.7, and Ray "
        "wants both the same: install ray==2.52.1 in the job's environment, or serve from a cluster of Ray 2.60.0 on "
        "Python 3.11.7"
    )


def test_another_python_is_named_too():
    text = OLDER_RAY.replace("2.52.1", "2.60.0").replace("3.11.7", "3.12.1", 1)
    said = why_not_joined("head:6379", RuntimeError(text))
    assert "use Ray 2.60.0 on Python 3.12.1 in the job's environment" in str(said)


@pytest.mark.parametrize("error", [OSError("Connection refused"), RuntimeError(""), ValueError("address 'x'")])
def test_what_may_pass_is_not_explained(error):
    assert why_not_joined("head:6379", error) is None


RAY = [sys.executable, "-m", "ray.scripts.scripts"]
# Joins as a courier does; before that, on request, makes the cluster say that an older Ray started it.
JOIN = """
import json, logging, sys
import ray
from ray._raylet import GcsClient
from eigenwatch.agent.compatibility import why_not_joined

address = sys.argv[1]
if sys.argv[2:]:
    from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
    from ray._private import ray_constants
    gcs, name = GcsClient(address=address), ray_constants.KV_NAMESPACE_CLUSTER
    said = json.loads(gcs.internal_kv_get(CLUSTER_METADATA_KEY, namespace=name))
    gcs.internal_kv_put(CLUSTER_METADATA_KEY, json.dumps(said | {"ray_version": sys.argv[2]}).encode(), True, name)
try:
    ray.init(address=address, namespace="eigenwatch", log_to_driver=False, logging_level=logging.ERROR)
except Exception as error:
    print(why_not_joined(address, error))
else:
    print("joined")
"""


@pytest.fixture(scope="module")
def cluster():
    """A Ray that wants a token; its address, and an environment that has the token."""
    folder = tempfile.mkdtemp(prefix="ew-ray-")  # pytest's own are too long for the names of Ray's sockets
    marker, environment = marked_environment()
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 32}
    head = ["start", "--head", "--port", "0", "--num-cpus", "1", "--include-dashboard", "false", "--temp-dir", folder]
    started = subprocess.run(
        [*RAY, *head, "--object-store-memory", str(100 << 20)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (address,) = set(re.findall(r"--address='([^']+)'", started.stdout))
    yield address, environment
    end_all(marker)
    shutil.rmtree(folder, ignore_errors=True)


def join(address: str, environment: dict[str, str], *version: str) -> str:
    """What a courier would say; `version` is what the cluster says from then on that it is."""
    command = [sys.executable, "-c", JOIN, address, *version]
    joined = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    return joined.stdout.strip()


def test_the_words_are_those_that_ray_says_today(cluster):
    address, environment = cluster
    assert join(address, environment, ray.__version__) == "joined"
    stranger = environment | {"RAY_AUTH_TOKEN": "u" * 32}
    assert join(address, stranger).startswith(f"somebody listens at {address} and does not let this process in")
    said = join(address, environment, "2.52.1")
    assert said.startswith(f"the cluster at {address} runs Ray 2.52.1 on Python ")
    assert "\n" not in said


def test_a_job_that_cannot_join_says_why_in_its_own_log_once(cluster, tmp_path, monkeypatch, caplog):
    address, environment = cluster
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, environment[name])
    join(address, environment, "2.52.1")
    described = RunDescription(run_id="old", launch_id="launch", world_size=1, layers=())
    handover = CourierHandover(Spool.create([tmp_path], described, 0, Destination(address)), 1 << 30)

    def told() -> str:
        handover.tick({})
        return caplog.text

    wait_until(told, "a warning")
    assert f"the cluster at {address} runs Ray 2.52.1 on Python " in told()
    assert told().count("training goes on") == 1
    assert handover.close(0.5, {}) == 0


@pytest.mark.skipif("OTHER_RAY" not in os.environ, reason="set OTHER_RAY to the `ray` command of another version")
def test_a_cluster_of_another_ray_is_named():
    folder = tempfile.mkdtemp(prefix="ew-ray-")
    marker, environment = marked_environment()
    command = [os.environ["OTHER_RAY"], "start", "--head", "--port", "0", "--num-cpus", "1", "--temp-dir", folder]
    try:
        options = ["--include-dashboard", "false", "--object-store-memory", str(100 << 20)]
        started = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=True)
        (address,) = set(re.findall(r"--address='([^']+)'", started.stdout))
        assert re.match(
            rf"the cluster at {address} runs Ray \S+ on Python \S+, this job Ray", join(address, environment)
        )
    finally:
        end_all(marker)
        shutil.rmtree(folder, ignore_errors=True)
