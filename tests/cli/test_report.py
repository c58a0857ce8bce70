"""`eigenwatch report` as a user types it, and every example of docs/report.md as printed."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from eigenwatch.cli import cli

from tests.history.reported import alarm, collapsing, train
from tests.history.stored import record, write

DOCUMENT = Path(__file__).parents[2] / "docs" / "report.md"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    train(folder / "runs", "llama-130m", collapsing)
    train(folder / "runs", "llama-130m-wide", width=128, pre=True)
    alarm(folder / "runs", "llama-130m", "one direction")
    return folder / "runs"


@pytest.fixture
def run(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the verb in an empty folder beside which the store is `runs/`."""
    (tmp_path / "runs").symlink_to(store)
    (tmp_path / "a-file").touch()
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(cli, ["report", "--store", "runs/", *arguments])


def test_it_answers_in_the_terminal_and_names_the_file(run: Callable[..., Result], tmp_path: Path) -> None:
    done = run("llama-130m")
    assert done.exit_code == 0, done.output
    answer, file = done.output.splitlines()
    assert answer.startswith("llama-130m: 1 of 4 layers wastes its width. Layer 0 has collapsed, since step 20")
    assert file == "Report: llama-130m.html"
    assert '<h2 id="run-0">llama-130m</h2>' in (tmp_path / "llama-130m.html").read_text()


def test_json_holds_the_verdicts(run: Callable[..., Result]) -> None:
    found = json.loads(run("llama-130m", "--json").output)
    assert found["report"] == "llama-130m.html"
    (told,) = found["runs"]
    assert told["alerts"] == 1
    assert [(layer["layer"], layer["state"], layer["since_step"]) for layer in told["layers"]][:2] == [
        (0, "collapsed", 20),
        (1, "in use", None),
    ]


def test_without_a_run_it_takes_the_one_that_was_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for written, name in enumerate(("b", "c", "a")):
        write(tmp_path / "runs", name, "records", record(0, written=written % 2))
    assert CliRunner().invoke(cli, ["report", "--store", "runs"]).output.endswith("Report: c.html\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama"], "no records of run 'llama' at site 'post'; the store has llama-130m, llama-130m-wide"),
        (["a/b"], "run_id"),
        (["llama-130m", "-o", "a-file/y.html"], "cannot write"),
    ],
)
def test_bad_input_is_one_line_and_exit_1(run: Callable[..., Result], arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 1
    assert message in done.output
    assert done.output.count("\n") == 1


def test_an_empty_store_is_told_from_a_missing_one(run: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no records yet" in run("--store", "empty").output
    assert "no store at nowhere" in run("--store", "nowhere").output


def test_more_runs_than_a_page_can_hold_are_wrong_usage(run: Callable[..., Result]) -> None:
    done = run(*(f"r{number}" for number in range(17)))
    assert done.exit_code == 2
    assert "at most 16 runs, got 17" in done.output


def test_every_example_of_the_document_runs_as_printed(run: Callable[..., Result], tmp_path: Path) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    commands = re.findall(r"^    eigenwatch (.+)$", text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        done = CliRunner().invoke(cli, shlex.split(command))
        assert done.exit_code == 0, done.output
    assert {"llama-130m.html", "compare.html", "figures"} <= {path.name for path in tmp_path.iterdir()}
    drawn = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert {"heatmaps-llama-130m", "pre-post-llama-130m-wide", "comparison", "rank-against-width"} <= drawn
    (python,) = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    exec(compile(python, str(DOCUMENT), "exec"), {})
    assert (tmp_path / "heatmaps.svg").exists()


def test_help_shows_an_example() -> None:
    assert "eigenwatch report llama-130m" in CliRunner().invoke(cli, ["report", "--help"]).output
