"""The examples, run as their README shows, and what they leave behind."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from eigenwatch.cli import cli
from eigenwatch.history import open_history

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "examples" / "README.md").read_text()
COMMANDS = {
    name: line.split()
    for line in README.splitlines()
    if (name := "".join(re.findall(r"^    .* examples/(\w+)\.py", line)))
}
"""How the README starts each example."""
PROGRAMS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
}
STEPS, EVERY, LAYERS = 6, 5, 4


def start(name: str, folder: Path, *options: str) -> "subprocess.Popen[str]":
    """The README's command with other options, in a folder of its own."""
    program, *arguments = COMMANDS[name]
    assert arguments[-2:] == ["--store", "runs/"]
    arguments = [str(REPOSITORY / one) if one.startswith("examples/") else one for one in arguments[:-2]]
    folder.mkdir()
    return subprocess.Popen(
        [*PROGRAMS[program], *arguments, *options, "--steps", str(STEPS), "--every", str(EVERY)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token"},
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr").open("w"),
        text=True,
    )


def finish(name: str, process: "subprocess.Popen[str]", folder: Path, store: Path) -> tuple[list[dict], list[dict]]:
    """What the query that the example printed last says, and the records in the store."""
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed + (folder / "stderr").read_text()
    (query,) = (line for line in printed.splitlines() if line.startswith("eigenwatch query"))
    asked = CliRunner(env={"EIGENWATCH_STORE": str(store)}).invoke(cli, [*shlex.split(query)[1:], "--json"])
    assert asked.exit_code == 0, asked.output
    run_id = re.findall("run_id = '(.*)'", query)[0]
    with open_history(store) as history:
        records = history.query("SELECT * FROM records WHERE run_id = ? ORDER BY step, layer", [run_id]).to_pylist()
    return json.loads(asked.output), records


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Those of one process, all at once, each with an aggregator inside."""
    folder = tmp_path_factory.mktemp("alone")
    options = ("--store", str(folder / "store"), "--aggregator", "inline")
    names = ("huggingface", "lightning_module", "accelerate_loop")
    processes = {name: start(name, folder / name, *options) for name in names}
    yield lambda name: finish(name, processes[name], folder / name, folder / "store")
    for process in processes.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def on_a_cluster(served, tmp_path_factory):
    """Those of several ranks, all at once, on the Ray that the tests share."""
    folder = tmp_path_factory.mktemp("cluster")
    names = ("torchrun", "ray_train")
    processes = {name: start(name, folder / name, "--aggregator", served.address) for name in names}
    yield lambda name: finish(name, processes[name], folder / name, served.store)
    for process in processes.values():
        process.kill()
        process.wait()


def test_the_readme_shows_every_example():
    assert set(COMMANDS) == {path.stem for path in (REPOSITORY / "examples").glob("*.py")}


def test_an_example_is_one_short_file():
    for path in (REPOSITORY / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 80, path


@pytest.mark.parametrize(
    ("name", "steps", "tokens"),
    [
        ("huggingface", [1, 5], None),  # padding is left out
        ("lightning_module", [0, 5], 2 * 8 * 64),
        ("accelerate_loop", [0, 5], 2 * 4 * 64),
    ],
)
def test_an_example_on_one_process_records_its_sampled_steps(alone, name, steps, tokens):
    answer, records = alone(name)
    assert [(one["step"], one["layer"]) for one in answer] == [(s, k) for s in steps for k in range(LAYERS)]
    assert all(one["hard_rank"] > 1 for one in answer)
    for step in steps:
        (counted,) = {one["tokens"] for one in records if one["step"] == step}
        assert counted == tokens or (tokens is None and 0 < counted < 8 * 128)


@pytest.mark.parametrize("name", ["torchrun", "ray_train"])
def test_an_example_on_two_ranks_records_what_both_saw(on_a_cluster, name):
    answer, records = on_a_cluster(name)
    assert [(one["step"], one["layer"]) for one in answer] == [(s, k) for s in (0, 5) for k in range(LAYERS)]
    assert {(one["tokens"], one["ranks_seen"], one["complete"]) for one in records} == {(2 * 8 * 64, 2, True)}
