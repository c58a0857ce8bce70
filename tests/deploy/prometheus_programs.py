"""The Prometheus binaries that the tests run: on CI their absence is a failure, elsewhere a skip."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def program(name: str, package: str) -> str:
    """The path of a program; Debian's `package` has it."""
    path = shutil.which(name)
    if path is None:
        message = f"{name} is missing: install Debian's package {package}"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return path


def promtool(*arguments: str | Path) -> None:
    """Runs promtool and fails with its output unless it succeeds."""
    command = [program("promtool", "prometheus"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
