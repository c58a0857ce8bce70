"""docs/store.md: its commands and its Python work as they stand there."""

import os
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from eigenwatch.aggregator.writer import StoreWriter
from eigenwatch.cli import cli
from pyarrow import fs

from tests.history.stored import record, run, spectrum
from tests.s3_server import CREDENTIALS, s3_server

DOCUMENT = (Path(__file__).parents[2] / "docs" / "store.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (?:eigenwatch) (.+)$", DOCUMENT, re.MULTILINE)
PYTHON = re.findall(r"```python\n(.+?)```", DOCUMENT, re.DOTALL)


def fill(store: str) -> None:
    writer = StoreWriter(store)
    writer.append("runs", "r", [run(written=0)])
    for step in range(3):
        tables = {"records": [record(step)], "eigenvalues": [spectrum(step)]}
        writer.append_tables("r", tables)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A working folder with the stores of the document: `runs/` and `s3://telemetry/runs`."""
    folder = tmp_path_factory.mktemp("document")
    with s3_server() as endpoint, pytest.MonkeyPatch.context() as environment:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://{endpoint}", "AWS_REGION": "us-east-1"}.items():
            environment.setenv(name, value)
        environment.chdir(folder)
        fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], allow_bucket_creation=True).create_dir(
            "telemetry"
        )
        for store in ("runs/", "s3://telemetry/runs"):
            fill(store)
        yield folder


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith("serve ")])
def test_a_command_works(folder: Path, command: str) -> None:
    done = CliRunner().invoke(cli, shlex.split(command))
    assert done.exit_code == 0, done.output
    assert done.output


def test_the_python_works(folder: Path) -> None:
    (text,) = PYTHON
    names: dict[str, object] = {}
    exec(text, names)
    table = names["table"]
    assert isinstance(table, pa.Table)
    assert table.num_rows == 3


def test_every_command_of_the_document_is_tried() -> None:
    assert len(COMMANDS) >= 9
