"""What is installed works: the wheel in a fresh environment, and the editable install that developers have."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import distributions, version
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[1]
ROOMS = ("schemas", "spectrum", "agent", "aggregator", "history", "deploy", "cli")


def run(*command: str | Path, **options) -> str:
    done = subprocess.run([str(one) for one in command], capture_output=True, text=True, timeout=240, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy without what git ignores: a stale `build/` would find its way into a wheel."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in run("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=REPOSITORY).split("\0"):
        if name and (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, source / name)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, source)
    (built,) = out.iterdir()
    return built


class Installed(NamedTuple):
    """An environment in which eigenwatch is installed."""

    python: Path
    eigenwatch: Path
    package: Path
    """The folder below which the package's code must lie."""


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory) -> Installed:
    """The wheel alone in an environment that borrows this one's dependencies, though not its eigenwatch."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    run(sys.executable, "-m", "pip", "--python", folder, "install", "--quiet", "--no-deps", wheel)
    library = Path(
        run(folder / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    # A .pth file that is found by way of another is not read, so the editable install of `.venv` stays out.
    paths = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (library / "dependencies.pth").write_text("".join(f"{path}\n" for path in paths))
    return Installed(folder / "bin" / "python", folder / "bin" / "eigenwatch", library / "eigenwatch")


@pytest.fixture(scope="module")
def editable() -> Installed:
    # Several are found where pytest runs in the repository, which holds the metadata of builds.
    origins = [one.read_text("direct_url.json") or "{}" for one in distributions(name="eigenwatch")]
    if not any(json.loads(origin).get("dir_info", {}).get("editable") for origin in origins):
        pytest.skip("these tests do not run on an editable install")
    bin_folder = Path(sys.executable).parent
    return Installed(Path(sys.executable), bin_folder / "eigenwatch", REPOSITORY)


@pytest.fixture(params=["fresh", "editable"])
def installed(request) -> Installed:
    return request.getfixturevalue(request.param)


def test_a_wheel_holds_the_code_and_data_of_every_room_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for room in ROOMS:
        sources = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / room).rglob("*.py")}
        assert {f"eigenwatch/{name}" for name in sources} <= names
        assert f"eigenwatch/{room}/py.typed" in names
    for suffix in (".sql", ".json", ".yml", ".html", ".css", ".js", ".LICENSE"):
        data = {
            f"eigenwatch/{path.relative_to(REPOSITORY)}"
            for room in ROOMS
            for path in (REPOSITORY / room).rglob(f"*{suffix}")
        }
        assert data
        assert data <= names
    assert {
        "eigenwatch/schemas/views.sql",
        "eigenwatch/deploy/prometheus/rules.yml",
        "eigenwatch/history/report/static/report.js",
    } <= names
    assert {name.split("/")[1] for name in names if name.startswith("eigenwatch/")} == set(ROOMS)
    assert not [name for name in names if "test" in name.split("/")[0] or "__pycache__" in name]
    assert any(name.endswith("licenses/LICENSE") for name in names)


EVERY_ROOM = """
import importlib, json
from importlib.metadata import entry_points
rooms = {room: importlib.import_module(f"eigenwatch.{room}").__file__ for room in ROOMS}
from eigenwatch.agent import attach
from eigenwatch.cli.demo import decoder, train
from eigenwatch.deploy.dashboards import committed_dashboards
from eigenwatch.schemas.views import view_statements
(inline,) = entry_points(group="eigenwatch.aggregators")
print(json.dumps({
    "rooms": rooms,
    "views": len(view_statements({})),
    "dashboards": len(list(committed_dashboards())),
    "inline": inline.load().__name__,
}))
"""


def test_every_room_is_imported_from_where_it_was_installed_with_its_data(installed, tmp_path):
    script = f"ROOMS = {ROOMS!r}\n{EVERY_ROOM}"
    found = json.loads(run(installed.python, "-c", script, cwd=tmp_path).splitlines()[-1])
    for room, file in found["rooms"].items():
        assert Path(file) == installed.package / room / "__init__.py"
    assert found["views"] > 5
    assert found["dashboards"] >= 1
    assert found["inline"] == "InlineAggregator"


def test_the_command_says_its_version(installed, tmp_path):
    said = f"eigenwatch, version {version('eigenwatch')}\n"
    assert run(installed.eigenwatch, "--version", cwd=tmp_path) == said
    assert run(installed.python, "-m", "eigenwatch.cli", "--version", cwd=tmp_path) == said


TRAINING = """
import torch
from eigenwatch.agent import attach
from eigenwatch.cli.demo.decoder import Decoder, DecoderConfig
model = Decoder(DecoderConfig(model_dim=16, width=40, layers=2, heads=2))
with attach(model, run_id="packaged", every=2, store="store", aggregator="inline") as agent:
    for step in range(5):
        model(torch.randint(256, (4, 16))).sum().backward()
        agent.step(step)
"""


def test_a_training_is_recorded_and_read_with_the_wheel_alone(fresh, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run(fresh.python, "-c", TRAINING, cwd=tmp_path, env=environment)
    sql = "SELECT step, layer, width, tokens FROM records WHERE hard_rank > 1 ORDER BY ALL"
    records = json.loads(run(fresh.eigenwatch, "query", "--json", "--store", "store", sql, cwd=tmp_path))
    assert [(row["step"], row["layer"]) for row in records] == [(step, layer) for step in (0, 2, 4) for layer in (0, 1)]
    assert {(row["width"], row["tokens"]) for row in records} == {(40, 64)}
