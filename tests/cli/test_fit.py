"""`eigenwatch fit`, as a shell sees it, and docs/laws.md: its commands and its Python work as they stand there."""

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from eigenwatch.cli import cli
from eigenwatch.cli.fit import fit

from tests.history.stored import record, write
from tests.history.sweep import WIDTHS, ranks, write_sweep

DOCUMENT = (Path(__file__).parents[2] / "docs" / "laws.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    eigenwatch (fit.+)$", DOCUMENT, re.MULTILINE)
(PAPER_CSV,) = re.findall(r"```csv\n(.+?)```", DOCUMENT, re.DOTALL)
(PYTHON,) = re.findall(r"```python\n(.+?)```", DOCUMENT, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A working folder with the store and the CSV of the document."""
    folder = tmp_path_factory.mktemp("laws")
    for norm in ("pre", "post"):
        columns = {"tokens_per_width": 1.5, "hard_rank_corrected": 30.0, "soft_rank_corrected": 90.0}
        write_sweep(folder / "runs", f"llama-{norm}", WIDTHS[:4], tags={"norm": norm}, **columns)
    (folder / "paper.csv").write_text(PAPER_CSV, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture
def call(folder: Path):
    def call(*arguments: str, **options) -> Result:
        return CliRunner().invoke(fit, [*arguments, *([] if "--csv" in arguments else ["--store", "runs"])], **options)

    return call


def page(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_document_works(folder: Path, command: str) -> None:
    assert page(CliRunner().invoke(cli, shlex.split(command)))


def test_the_document_shows_what_the_papers_example_prints(folder: Path) -> None:
    for column in ("hard", "soft", "edim"):
        shown = page(CliRunner().invoke(cli, ["fit", "--csv", "paper.csv", "--column", column])).splitlines()[2]
        assert " ".join(shown.split()) in re.sub(r" +", " ", DOCUMENT)


def test_the_python_of_the_document_works(folder: Path) -> None:
    names: dict[str, object] = {}
    exec(PYTHON, names)
    assert names["exponent"] == pytest.approx(0.9)


def test_the_document_has_every_option() -> None:
    options = {option for parameter in fit.params for option in parameter.opts if option.startswith("--")}
    assert {option for option in options if option not in DOCUMENT} == set()


def test_the_page_has_laws_points_sentences_and_limits(call) -> None:
    text = page(call("llama-pre-*"))
    assert re.search(r"hard rank +0\.500 +± 0\.000 +1\.000 +4 +256 … 2048", text)
    assert re.search(r"256 +llama-pre-256 +5 +24\.0 \[24\.0 … 24\.0\]", text)
    assert "Hard rank: × 1.41 where the width doubles" in text
    assert "Tail growth" in text
    assert "1.5 tokens a width in llama-pre-" in text
    assert "prune" not in text
    assert "Over training" not in text


def test_advice_and_training_come_when_asked(call) -> None:
    text = page(call("llama-pre-*", "--advice", "--by-step", "--gain", "0.05"))
    assert "one more unit of width brings" in text
    assert re.search(r"prune.*\n  - llama-pre-\d+, layer 1: effective dimension", text)
    assert re.search(r"more width.*\n  - llama-pre-\d+, layer 3: ", text)
    assert re.search(r"every 2\. of 30 common steps", text)
    assert "R² of the hard rank stays above 0.6 from step 0 on." in text


def test_by_gives_a_page_for_each_value(call) -> None:
    assert re.findall(r"── (.+) ──", page(call("--by", "norm"))) == ["norm: post", "norm: pre"]


def test_json_has_beta_its_interval_and_r2_of_each_law(call) -> None:
    found = json.loads(page(call("llama-pre-*", "--json", "--by-step", "--advice")))
    law = found["laws"]["soft_rank"]
    assert (law["beta"], law["beta_ci95"], law["r2"]) == pytest.approx((0.9, 0, 1), abs=1e-6)
    assert [point["width"] for point in found["points"]] == list(WIDTHS[:4])
    assert found["points"][0]["values"]["hard_rank"].keys() == {"median", "lower", "upper"}
    assert len(found["steps"]) == 30
    assert found["steps"][-1]["laws"]["hard_rank"]["beta"] == pytest.approx(0.5)
    assert found["advice"]["knee"]["width"] > 0
    assert {candidate["use"]["layer"] for candidate in found["advice"]["prune"]} == {1}
    assert found["limits"]
    assert [fit["value"] for fit in json.loads(page(call("--by", "norm", "--json")))] == ["post", "pre"]


def test_json_says_null_for_what_has_no_end(folder: Path, call) -> None:
    for width in WIDTHS:
        write(
            folder / "linear", f"r{width}", "records", record(0, width=width, hard_rank=width / 4, soft_rank=width / 2)
        )
    found = json.loads(page(CliRunner().invoke(fit, ["--store", "linear", "--advice", "--json"])))
    assert (found["advice"]["knee"]["width"], found["advice"]["knee"]["high"]) == (None, None)


def test_a_csv_gives_one_law_as_json_too(call) -> None:
    law = json.loads(page(call("--csv", "paper.csv", "--column", "hard", "--json")))
    assert f"{law['beta']:.3f} {law['beta_ci95']:.3f} {law['r2']:.3f}" == "0.612 0.404 0.696"
    piped = json.loads(page(call("--csv", "-", "--json", input="width,rank\n1,1\n2,2\n4,4\n")))
    assert piped["beta"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["llama-pre-256"],
            1,
            "at least 3 different widths, got 1 (256): add runs of 2 more widths; --advice says what",
        ),
        (["--by", "world_siz"], 1, "no tag 'world_siz'"),
        (["nobody"], 1, "no run 'nobody' has records; the store has llama-post-1024"),
        (["--steps", "1:x"], 2, "'1:x' is no window of steps: write FROM:TO, such as 4000:5000"),
        (["--steps", "9:1"], 2, "'9:1' is no window of steps"),
        (["--steps", "1:2", "--last", "5"], 2, "choose one of --steps and --last"),
        (["--gain", "1"], 2, "--gain goes with --advice"),
        (["--column", "hard"], 2, "--column goes with --csv"),
        (["--csv", "paper.csv", "--by", "norm"], 2, "--csv stands by itself"),
        (["--csv", "paper.csv"], 1, "paper.csv has columns alpha, D, hard, soft, edim: say which one is the rank"),
        (["--csv", "none.csv"], 1, "cannot read none.csv: No such file or directory"),
    ],
)
def test_what_cannot_be_fitted_is_one_line_with_the_remedy(call, arguments: list[str], code: int, message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_one_run_gets_advice_on_its_layers(call) -> None:
    text = page(call("llama-pre-256", "--advice"))
    assert (
        "No law of hard rank, soft rank, effective dimension, hard utilization, soft utilization: a law needs" in text
    )
    assert "No knee: a law needs at least 3 different widths" in text
    assert "llama-pre-256, layer 1: effective dimension" in text


def test_many_points_are_cut_and_said(tmp_path: Path) -> None:
    for number in range(45):
        width = 64 + number
        write(tmp_path, f"r{number}", "records", record(0, width=width, **ranks(width)))
    text = page(CliRunner().invoke(fit, ["--store", str(tmp_path)]))
    assert "the first 40 of 45 points; --json gives all" in text


def test_help_has_an_example() -> None:
    assert "eigenwatch fit --by norm --advice" in page(CliRunner().invoke(cli, ["fit", "--help"]))
