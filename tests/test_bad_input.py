"""Bad input gets one clear line that names the input and the remedy, and no traceback."""

import json
import os
import re
import socket
import subprocess
import sys
from collections import Counter

import pytest
import torch
from eigenwatch.agent import attach
from eigenwatch.history import open_history
from eigenwatch.schemas.ray_token import token_environment
from torch import nn

from tests.aggregator.test_bad_partials import BAD
from tests.jobs.launch import REPOSITORY
from tests.processes import wait_until
from tests.test_main_job import exposition


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(8, width), "down_proj": nn.Linear(width, 8)})

    def forward(self, x):
        return x + self.mlp["down_proj"](torch.relu(self.mlp["up_proj"](x)))


class Model(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for width in widths)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "eigenwatch.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def one_line(completed: "subprocess.CompletedProcess[str]") -> str:
    lines = completed.stderr.strip().splitlines()
    assert "Traceback" not in completed.stderr
    errors = [line for line in lines if line.startswith("Error: ")]
    assert len(errors) == 1, completed.stderr
    return errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run_id": "a/b"}, r"run_id 'a/b' is not allowed: use 1 to 128 letters"),
        ({"run_id": "a", "every": 0}, r"every must be a positive integer number of steps, got 0"),
        ({"run_id": "a", "layers": r"nothing\.(\d+)"}, r"no layer matches .*candidates: layers\.N\.mlp\.down_proj"),
        ({"run_id": "a", "layers": "("}, r"layers='\(' is not a regular expression"),
        ({"run_id": "a", "store": "/proc/nowhere"}, r"store '/proc/nowhere' cannot be written .*pass another"),
        ({"run_id": "a", "aggregator": "ray://head:10001"}, r"is a Ray Client address"),
        ({"run_id": "a", "aggregator": "embeded"}, r"aggregator 'embeded' is none of 'embedded', 'inline'"),
    ],
)
def test_attach_names_what_is_wrong_and_the_remedy(arguments, message, tmp_path):
    defaults = {"aggregator": "inline", "store": str(tmp_path)}
    with pytest.raises(ValueError, match=message) as raised:
        attach(Model(16, 16), **(defaults | arguments))
    assert "\n" not in str(raised.value)


def test_the_embedded_aggregators_error_is_raised_by_attach():
    with pytest.raises(ValueError, match=r"store '/proc/nowhere' cannot be written"):
        attach(Model(16), run_id="a", store="/proc/nowhere")


def test_a_model_without_feed_forward_layers_is_refused_with_candidates(tmp_path):
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    with pytest.raises(ValueError, match=r"no .*LLaMA, .*GPT-NeoX.* layer found: pass layers=.*candidates: N$"):
        attach(model, run_id="a", aggregator="inline", store=str(tmp_path))


def test_layers_of_different_widths_simply_work(tmp_path):
    model = Model(16, 300, 24)
    with attach(model, run_id="widths", every=1, aggregator="inline", store=str(tmp_path)) as agent:
        model(torch.randn(50, 8)).sum().backward()
        agent.step(0)
    with open_history(tmp_path) as history:
        rows = history.query("SELECT layer, width, tokens FROM records ORDER BY layer").to_pylist()
    assert [(row["layer"], row["width"], row["tokens"]) for row in rows] == [(0, 16, 50), (1, 300, 50), (2, 24, 50)]


def test_a_port_in_use_is_named_before_ray_starts(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        completed = run("serve", "--store", str(tmp_path), "--metrics-port", str(port))
    assert completed.returncode == 1
    assert one_line(completed) == (
        f"Error: metrics port 127.0.0.1:{port} cannot be used (Address already in use): "
        "pass another metrics port, or 0 for a free one"
    )


def test_a_store_that_cannot_be_written_is_named(tmp_path):
    completed = run("serve", "--store", "/proc/nowhere", "--metrics-port", "0")
    assert completed.returncode == 1
    assert "store '/proc/nowhere' cannot be written" in one_line(completed)


def test_no_ray_cluster_at_the_address_is_named(tmp_path):
    completed = run("serve", "--store", str(tmp_path), "--metrics-port", "0", "--address", "127.0.0.1:1")
    assert completed.returncode == 1
    assert "no Ray cluster at 127.0.0.1:1" in one_line(completed)


def test_the_demo_refuses_a_run_id_with_a_slash(tmp_path):
    completed = run("demo", "--run-id", "a/b", "--store", str(tmp_path))
    assert completed.returncode == 1
    assert "run_id 'a/b' is not allowed" in one_line(completed)


def test_wrong_usage_exits_with_2():
    completed = run("demo", "--every", "0")
    assert completed.returncode == 2
    assert "--every" in completed.stderr


def test_a_broken_statement_is_one_line(tmp_path):
    completed = run("query", "--store", str(tmp_path), "SELEC 1")
    assert completed.returncode == 1
    assert "syntax error" in one_line(completed)


@pytest.mark.parametrize("verb", ["dashboards", "demo", "doctor", "query", "serve"])
def test_every_verb_explains_itself_with_an_example(verb):
    completed = run(verb, "--help")
    assert completed.returncode == 0
    assert re.search(rf"Examples?:\s+eigenwatch {verb}", completed.stdout)


def test_what_one_rank_is_told_wrongly_all_hear_of():
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, "-m", "tests.jobs.disagree"]
    completed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, cwd=REPOSITORY)
    messages = [
        "run_id is 'run-0' on rank 0 and 'run-1' on rank 1: pass the same to all",
        "model is None: pass the module that is trained, or the list of this rank's pipeline chunks",
        "limits must be OutboxLimits, got 7",
        "layers=[0, 9]: no rank has layer 9",
    ]
    said = completed.stdout.splitlines()
    for rank in range(2):
        assert [line.removeprefix(f"{rank}: ") for line in said if line.startswith(f"{rank}: ")] == messages


def test_bad_partials_are_refused_by_a_cluster_and_harm_nothing_around_them(served):
    command = [sys.executable, "-m", "tests.jobs.stranger", served.address, "strangers"]
    environment = dict(os.environ) | token_environment(os.environ)
    completed = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=180, cwd=REPOSITORY, env=environment
    )
    assert completed.returncode == 0, completed.stderr[-2000:]
    replies = json.loads(completed.stdout.splitlines()[-1])
    assert replies.pop("good") == ["merged"] * 8
    assert replies == {what: [f"refused {bad.reason}"] * 8 for what, bad in BAD.items()}

    def stored() -> list[dict]:
        with open_history(served.store) as history:
            return history.query(
                "SELECT step, complete, finite, tokens FROM records WHERE run_id = 'strangers' ORDER BY step"
            ).to_pylist()

    wait_until(lambda: len(stored()) == 4, "the good ones")
    assert stored() == [{"step": step, "complete": True, "finite": True, "tokens": 80} for step in range(100, 104)]
    shown = wait_until(lambda: exposition(served.metrics_url).get("eigenwatch_partials_dropped"), "the counters")
    found = {one.labels["reason"]: one.value for one in shown if one.labels["run"] == "strangers"}
    expected = Counter(bad.reason for bad in BAD.values() if bad.run == "run")
    assert found == {reason: 8 * partials for reason, partials in expected.items()}
