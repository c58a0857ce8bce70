"""docs/sql.md: its statements, commands and Python work as they stand there, and it names every view and macro."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from eigenwatch.cli import cli
from eigenwatch.history import History, open_history
from eigenwatch.schemas.views import VIEWS, macro_statements

from tests.history.stored import alert, record, run, spectrum, write

DOCUMENT = (Path(__file__).parents[2] / "docs" / "sql.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    eigenwatch (.+)$", DOCUMENT, re.MULTILINE)
STATEMENTS = [
    statement.strip()
    for block in re.findall(r"```sql\n(.+?)```", DOCUMENT, re.DOTALL)
    for statement in block.split(";")
    if statement.strip()
]
PYTHON = re.findall(r"```python\n(.+?)```", DOCUMENT, re.DOTALL)
WIDTHS = {"llama-130m": 256, "llama-130m-2d": 512, "llama-130m-4d": 1024}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A working folder with the store of the document."""
    folder = tmp_path_factory.mktemp("document")
    for name, width in WIDTHS.items():
        keys = [(step, layer) for step in (0, 100, 200, 300) for layer in (0, 1)]
        ranks = {"width": width, "hard_rank": width**0.5, "soft_rank": width / 2, "effective_dimension": width / 3}
        rows = [record(*key, **ranks, utilization_index=0.1) for key in keys]
        write(folder / "runs", name, "records", *rows)
        write(folder / "runs", name, "eigenvalues", *[spectrum(*key) for key in keys])
        write(folder / "runs", name, "runs", run(written=0, tags={"norm": "pre"}))
    write(folder / "runs", "llama-130m", "alerts", alert("4c1d", 200, written=200, evidence_steps=[100, 200]))
    with pytest.MonkeyPatch.context() as environment:
        environment.chdir(folder)
        environment.setenv("EIGENWATCH_STORE", "runs/")
        yield folder


@pytest.fixture(scope="module")
def history(folder: Path):
    with open_history("runs/") as history:
        yield history


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_statement_answers(history: History, statement: str) -> None:
    assert history.query(statement).num_rows > 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_works(folder: Path, command: str) -> None:
    done = CliRunner().invoke(cli, shlex.split(command))
    assert done.exit_code == 0, done.output
    assert done.output


@pytest.mark.usefixtures("folder")
def test_the_python_works() -> None:
    (text,) = PYTHON
    names: dict[str, object] = {}
    exec(text, names)
    assert names["rows"] == [(24,)]


def test_every_view_and_macro_has_an_example() -> None:
    macros = re.findall(r"CREATE OR REPLACE MACRO (\w+)", "\n".join(macro_statements()))
    for view in VIEWS:
        assert any(re.search(rf"FROM {view}\b", statement) for statement in STATEMENTS), view
    for macro in macros:
        assert any(f"{macro}(" in statement for statement in STATEMENTS), macro


@pytest.mark.parametrize("macro", ["layer_summary", "compare", "width_law", "spectrum", "alert_evidence", "recompute"])
def test_a_macro_s_columns_are_those_of_the_document(history: History, macro: str) -> None:
    (text,) = re.findall(rf"^\*\*`{macro}\(.+?(?=\n\n)", DOCUMENT, re.MULTILINE | re.DOTALL)
    arguments = {
        "compare": "'llama-130m', 'llama-130m'",
        "width_law": "['llama-130m']",
        "recompute": "['llama-130m']",
        "spectrum": "'llama-130m', 0, 0",
    }
    columns = history.query(f"FROM {macro}({arguments.get(macro, repr('llama-130m'))})").column_names
    summed_up = {"alert_evidence": ("rank", "utilization", "concentration", "effective_dimension")}.get(macro, ())
    for column in columns:
        name = re.sub(r"_[ab]$", "", column) if macro == "compare" else column
        assert f"`{name}`" in text or any(word in name for word in summed_up), column
