"""`eigenwatch doctor`: what works on this machine, and the remedy for what does not."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import click

from ..schemas import absolute_store, default_store
from ..schemas.ray_token import token_environment


class Finding(NamedTuple):
    """One thing that was tried. "missing" is optional and absent; "broken" makes doctor fail."""

    subject: str
    state: Literal["works", "missing", "broken"]
    detail: str


@click.command(epilog="Example: eigenwatch doctor --store runs/")
@click.option("--store", help="Folder or s3://BUCKET/PREFIX.  [$EIGENWATCH_STORE, ./eigenwatch-store]")
@click.option("--json", "as_json", is_flag=True, help="For a machine.")
def doctor(store: str | None, as_json: bool) -> None:
    """Try what eigenwatch needs here: Python, torch, GPU, solver, Ray, store, DuckDB, Prometheus.

    Starts a local Ray and ends it again. Exit code 1 if something that is needed does not work.
    """
    where = absolute_store(store or default_store())
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("Python", _python),
        ("torch", _torch),
        ("solver", _solver),
        ("GPU", _gpu),
        ("store", lambda: _object_store(where) if "://" in where else _store(Path(where))),
        ("DuckDB", _duckdb),
        ("endpoint", _endpoint),
        ("Ray", _ray),
        ("shared memory", _shared_memory),
        ("pictures", _pictures),
        ("promtool", _promtool),
    ]
    findings = []
    for finding in _run(checks):
        findings.append(finding)
        if not as_json:
            mark, colour = {"works": ("ok", "green"), "missing": ("--", "yellow"), "broken": ("!!", "red")}[
                finding.state
            ]
            click.echo(f"{click.style(mark, fg=colour)}  {finding.subject:14} {finding.detail}")
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in findings], indent=2))
    if any(finding.state == "broken" for finding in findings):
        sys.exit(1)


def _run(checks: list[tuple[str, Callable[[], Finding]]]) -> Iterator[Finding]:
    for subject, check in checks:
        try:
            yield check()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
            words = (str(error).strip() or type(error).__name__).splitlines()[0]
            yield Finding(subject, "broken", f"{type(error).__name__}: {words}")


def _python() -> Finding:
    supported = sys.version_info >= (3, 11)
    detail = platform.python_version() + ("" if supported else ": install Python 3.11 or newer")
    return Finding("Python", "works" if supported else "broken", detail)


def _torch() -> Finding:
    import torch

    return Finding("torch", "works", f"{torch.__version__}, {torch.get_num_threads()} threads")


def _solver() -> Finding:
    import torch

    from ..spectrum import eigenvalues

    width = 512
    x = torch.randn(2 * width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    covariance = x.T @ x / (2 * width - 1)
    started = time.perf_counter()
    found = eigenvalues(covariance)
    seconds = time.perf_counter() - started
    right = abs(float(found.sum() - covariance.trace())) < 1e-8 * float(covariance.trace())
    detail = f"{width}×{width} in float64 on the CPU in {1000 * seconds:.0f} ms"
    return Finding("solver", "works" if right else "broken", detail if right else f"{detail}, wrongly: reinstall torch")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", "missing", "none that torch can use: the solver takes the CPU")
    from ..spectrum import eigenvalues

    eigenvalues(torch.eye(64, dtype=torch.float64, device="cuda"))
    return Finding("GPU", "works", torch.cuda.get_device_name())


def _store(folder: Path) -> Finding:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
        return Finding("store", "broken", f"{folder} cannot be written: pass another with --store")
    free = shutil.disk_usage(existing).free / 2**30
    return Finding("store", "works", f"{folder}{'' if folder.exists() else ' (will be created)'}, {free:.0f} GiB free")


def _object_store(uri: str) -> Finding:
    from ..schemas.object_store import one_line
    from ..schemas.store import open_store

    try:
        store = open_store(uri)
        store.check_writable()
    except ValueError as error:
        return Finding("store", "broken", str(error))
    except OSError as error:
        return Finding("store", "broken", f"{uri} cannot be written: {one_line(error)}")
    return Finding("store", "works", f"{store.uri}, a file was written and removed")


def _duckdb() -> Finding:
    from ..history import open_history

    with tempfile.TemporaryDirectory() as folder, open_history(folder) as history:
        history.query("SELECT count(*) FROM records")
    return Finding("DuckDB", "works", version("duckdb"))


def _endpoint() -> Finding:
    from ..aggregator.exporter import Endpoint
    from ..aggregator.snapshot import Snapshot

    endpoint = Endpoint(lambda: Snapshot(0.0, [], []), "127.0.0.1", 0)
    endpoint.close()
    return Finding("endpoint", "works", "a Prometheus endpoint opens on 127.0.0.1")


def _ray() -> Finding:
    os.environ.update(token_environment(os.environ, starts_ray=True))
    import ray

    started = time.perf_counter()
    ray.init(
        address="local",
        num_cpus=1,
        object_store_memory=128 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        gpus = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
        return Finding(
            "Ray",
            "works",
            f"{ray.__version__}, a local one starts in {time.perf_counter() - started:.1f} s, {gpus:g} GPUs",
        )
    finally:
        ray.shutdown()


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("shared memory", "missing", "no /dev/shm: partials wait on disk")
    free = shutil.disk_usage(folder).free / 2**30
    if free < 4:
        return Finding(
            "shared memory",
            "missing",
            f"{free:.1f} GiB free in /dev/shm: partials wait on disk (docker: --shm-size=8g)",
        )
    return Finding("shared memory", "works", f"{free:.0f} GiB free in /dev/shm")


def _pictures() -> Finding:
    try:
        return Finding("pictures", "works", f"matplotlib {version('matplotlib')}")
    except ImportError:
        return Finding("pictures", "missing", "no matplotlib: pip install 'eigenwatch[report]'")


def _promtool() -> Finding:
    path = shutil.which("promtool")
    if path is None:
        return Finding("promtool", "missing", "not installed (Debian's package prometheus has it): checks the rules")
    return Finding("promtool", "works", path)
