"""Who may import whom: the table of DESIGN.md, read off the source."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ARRAYS = {"numpy", "pyarrow"}
"""What partials and tables are made of comes with `schemas`."""
MAY_IMPORT = {
    "schemas": ARRAYS,
    "spectrum": {"torch", "numpy", "schemas"},
    "agent": {"torch", "ray", "spectrum", "schemas", *ARRAYS},
    "aggregator": {"ray", "torch", "prometheus_client", "spectrum", "schemas", *ARRAYS},
    "history": {
        "duckdb", "fsspec", "jinja2", "markupsafe", "matplotlib", "polars", "scipy", "spectrum", "schemas", *ARRAYS
    },
    "deploy": {"grafana_client", "schemas"},
    "cli": {
        "click", "rich", "torch", "ray", "duckdb", "prometheus_client",
        "schemas", "spectrum", "agent", "aggregator", "history", "deploy", *ARRAYS,
    },
}  # fmt: skip
FRONT_ENDS = {
    "agent/huggingface.py": {"transformers"},
    "agent/lightning.py": {"lightning", "pytorch_lightning"},
    "history/export_tensorboard.py": {"tensorboard"},
    "history/export_wandb.py": {"wandb"},
    "history/export_mlflow.py": {"mlflow"},
}
"""The callbacks and exports, which import the client they are for; nothing else imports them at its start."""
ROOMS = set(MAY_IMPORT)


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, wherever it stands; a sibling room by its name alone."""
    depth = len(file.relative_to(REPOSITORY).parent.parts)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            yield node.lineno, node.module.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level > depth:
            assert node.level == depth + 1, f"{file}:{node.lineno} leaves the package"
            names = [alias.name for alias in node.names] if node.module is None else [node.module]
            yield from ((node.lineno, name.partition(".")[0]) for name in names)


def files(room: str) -> list[Path]:
    return sorted((REPOSITORY / room).rglob("*.py"))


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_only_what_the_design_allows(room):
    allowed = MAY_IMPORT[room] | set(sys.stdlib_module_names)
    found = [(file, line, module) for file in files(room) for line, module in imports(file)]
    assert found
    broken = [
        f"{file.relative_to(REPOSITORY)}:{line} imports {module}"
        for file, line, module in found
        if module not in allowed | FRONT_ENDS.get(str(file.relative_to(REPOSITORY)), set())
    ]
    assert broken == []


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_reach_each_other_by_relative_imports(room):
    for file in files(room):
        assert "eigenwatch" not in [module for _, module in imports(file)], file


def test_the_namespace_has_no_code_of_its_own():
    assert not (REPOSITORY / "__init__.py").exists()
    assert {path.parent.name for path in REPOSITORY.glob("*/py.typed")} == ROOMS


def test_only_the_courier_speaks_to_ray():
    assert [file.name for file in files("agent") if "ray" in [module for _, module in imports(file)]] == [
        "ray_session.py"
    ]


def test_this_test_sees_every_way_to_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "REPOSITORY", tmp_path)
    (tmp_path / "room" / "inner").mkdir(parents=True)
    file = tmp_path / "room" / "inner" / "module.py"
    file.write_text(
        "import a.b, c as d\nfrom e.f import g\nfrom . import own\nfrom .own import x\nfrom .. import upper\n"
        "from ... import sibling\nfrom ...other.part import y\ndef f():\n    if 1:\n        import late\n"
    )
    assert {module for _, module in imports(file)} == {"a", "c", "e", "sibling", "other", "late"}


def modules_after(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after a statement."""
    script = f"import json, sys\n{statement}\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_courier_starts_without_torch():
    assert not {"torch", "duckdb", "transformers"} & modules_after("import eigenwatch.agent.courier")


def test_a_query_waits_for_neither_torch_nor_ray():
    statement = "from eigenwatch.cli import cli; cli(['query', '--help'], standalone_mode=False)"
    loaded = modules_after(statement)
    assert "duckdb" in loaded or "click" in loaded
    assert not {"torch", "ray", "matplotlib"} & loaded


def test_nothing_of_ours_imports_a_front_end():
    for file in (file for room in ROOMS for file in files(room)):
        text = file.read_text(encoding="utf-8")
        assert not [name for name in ("huggingface", "lightning") if f"from .{name} import" in text], file


def test_looking_into_the_agents_room_loads_nothing_heavy():
    assert not {"torch", "ray", "pyarrow"} & modules_after("import eigenwatch.agent")
