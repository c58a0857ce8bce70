"""`eigenwatch export`, as a shell sees it; what arrives in each target is tested in tests/history/test_export.py."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from eigenwatch.cli import cli

from tests.history.stored import alert, record, run, write
from tests.history.test_export import KINDS
from tests.processes import wait_until

DOCUMENT = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    eigenwatch export (.*)$", DOCUMENT, re.MULTILINE)
TENSORBOARD = KINDS["tensorboard"]


def export(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["export", *arguments])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the store of the document."""
    for name in ("llama-130m", "llama-250m"):
        write(tmp_path / "runs", name, "runs", run(written=0, status="finished"))
        write(tmp_path / "runs", name, "records", record(0), record(10))
        write(tmp_path / "runs", name, "alerts", alert("a", 10, written=10))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_document_works_and_again_adds_nothing(command: str, folder: Path) -> None:
    pytest.importorskip(re.search(r"--to (\w+)", command)[1])
    arguments = command.split()
    done = export(*arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("llama-130m: 2 records and 1 alerts exported\n")
    assert "llama-130m: 0 records and 0 alerts exported" in export(*arguments).stdout


def test_the_document_has_a_command_for_every_target() -> None:
    assert {re.search(r"--to (\w+)", command)[1] for command in COMMANDS} == set(KINDS)


def test_what_was_done_as_json(folder: Path) -> None:
    done = export("llama-130m", "llama-250m", "--to", "tensorboard", "--out", "tb", "--store", "runs", "--json")
    assert json.loads(done.stdout) == {
        "where": "tb",
        "runs": [
            {"run_id": name, "status": "finished", "records": 2, "alerts": 1, "waiting": 0}
            for name in ("llama-130m", "llama-250m")
        ],
    }


def test_it_follows_a_run_until_it_has_ended_or_somebody_ends_it(folder: Path) -> None:
    write(folder / "runs", "live", "runs", run(written=0))
    write(folder / "runs", "live", "records", record(0))
    command = [sys.executable, "-m", "eigenwatch.cli", "export", "live", "--to", "tensorboard", "--out", "tb"]
    command += ["--store", "runs", "--follow", "--interval", "0.1"]

    def steps() -> list[int]:
        if not list((folder / "tb").glob("live/events*")):
            return []
        return [
            step for tag, step, _ in TENSORBOARD.scalars(folder / "tb", "live") if tag == "eigenwatch/finite/layer_00"
        ]

    follower = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: steps() == [0], "the first step")
    write(folder / "runs", "live", "records", record(10))
    wait_until(lambda: steps() == [0, 10], "the second step")
    busy = export("live", "--to", "tensorboard", "--out", "tb", "--store", "runs")
    assert (busy.exit_code, busy.stderr.count("\n")) == (1, 1)
    assert "another export writes to tb" in busy.stderr
    follower.send_signal(signal.SIGINT)
    said, errors = follower.communicate(timeout=60)
    assert (follower.returncode, errors) == (0, "")
    assert said.startswith("live: 2 records and 0 alerts exported")

    write(folder / "runs", "live", "records", record(20))
    write(folder / "runs", "live", "runs", run(written=30, status="finished"))
    done = export("live", "--to", "tensorboard", "--out", "tb", "--store", "runs", "--follow")
    assert done.stdout.startswith("live: 1 records")
    assert steps() == [0, 10, 20]


def test_a_client_that_is_not_installed_is_one_line_with_the_command(folder: Path) -> None:
    script = """
import sys
for name in ("tensorboard", "wandb", "mlflow"):
    sys.modules[name] = None  # as where it is not installed
from eigenwatch.cli import main
main()
"""
    for target, place in (("tensorboard", ["--out", "o"]), ("wandb", ["--out", "o"]), ("mlflow", [])):
        arguments = ["export", "llama-130m", "--to", target, *place, "--store", "runs"]
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 1
        assert done.stderr == f"Error: {target} is not installed here: pip install 'eigenwatch[{target}]'\n"
    assert not os.path.exists("o")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "tensorboard"], "--to tensorboard needs --out DIR"),
        (["--to", "mlflow", "--out", "o"], "--to mlflow takes no --out"),
        (["--to", "tensorboard", "--out", "o", "--project", "p"], "takes no --project"),
        (["--to", "wandb", "--out", "o", "--tracking-uri", "x"], "takes no --tracking-uri"),
        (["--to", "elsewhere"], "'elsewhere' is not one of"),
    ],
)
def test_options_that_do_not_fit_are_wrong_usage(arguments: list[str], words: str) -> None:
    done = export("llama-130m", *arguments)
    assert done.exit_code == 2
    assert words in done.stderr


def test_a_run_or_folder_that_cannot_be_used_is_one_line(folder: Path) -> None:
    done = export("gpt", "--to", "tensorboard", "--out", "tb", "--store", "runs")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "no run 'gpt' in" in done.stderr
    assert "llama-130m, llama-250m" in done.stderr
    (folder / "file").write_text("")
    done = export("llama-130m", "--to", "tensorboard", "--out", "file/tb", "--store", "runs")
    assert done.exit_code == 1
    assert "pass another --out" in done.stderr
