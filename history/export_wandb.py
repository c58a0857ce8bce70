"""Exports to Weights & Biases: offline runs below a folder, through its client; `wandb sync` uploads them.

What is new since is a segment, an offline run of the same id that resumes it. It is made in a folder of its own and
moved to the others when it is whole, with a list of what it holds. `wandb sync` uploads the segments of a run in order.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any

from .export import PREFIX, Attempt, Note, Record, missing_extra

try:
    import wandb
except ModuleNotFoundError:
    raise missing_extra("wandb") from None

MANIFEST = "eigenwatch-export.json"
_SEGMENTS = "offline-run-*"
_UNFINISHED = ".unfinished"


class WeightsAndBiases:
    """Opens the segments of each run."""

    def __init__(self, folder: Path, project: str) -> None:
        self.where = f"{folder}; upload: wandb sync {folder}/{_SEGMENTS}"
        self._folder = folder
        self._project = project

    def open(self, attempt: Attempt) -> Segments:
        return Segments(self._folder, self._project, attempt)


class Segments:
    """The offline runs of one attempt."""

    def __init__(self, folder: Path, project: str, attempt: Attempt) -> None:
        self._folder = folder
        self._project = project
        self._attempt = attempt
        # A name may hold characters that an id may not; two names never share one.
        digest = blake2b(attempt.name.encode(), digest_size=4).hexdigest()
        self._id = f"{re.sub(r'[^A-Za-z0-9_-]', '_', attempt.name)}-{digest}"
        self._unfinished = folder / _UNFINISHED / self._id
        self._run: Any = None
        self._keys: list[tuple[str, int]] = []

    def exported(self) -> set[tuple[str, int]]:
        found: set[tuple[str, int]] = set()
        for manifest in self._folder.glob(f"{_SEGMENTS}/{MANIFEST}"):
            told = json.loads(manifest.read_text(encoding="utf-8"))
            if told["attempt"] == self._attempt.name:
                found.update((series, step) for series, step in told["keys"])
        return found

    def write(self, records: list[Record], notes: list[Note]) -> None:
        if self._run is None:
            self._run = self._begin()
        for step, same in groupby(records, lambda record: record.step):
            values: dict[str, float] = {point.tag: point.value for record in same for point in record.points}
            self._run.log({f"{PREFIX}/step": step} | values)
        for note in notes:
            self._run.summary[f"{PREFIX}/{note.key[0]}/step_{note.step}"] = note.text
        self._keys += [record.key for record in records] + [note.key for note in notes]

    def commit(self) -> None:
        """Ends the segment; only now is it there."""
        if self._run is None:
            return
        segment = Path(self._run.dir).resolve().parent
        self._run.finish()
        manifest = {"attempt": self._attempt.name, "keys": self._keys}
        (segment / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        for path in segment.rglob("*"):
            _fsync(path)
        segment.rename(self._folder / segment.name)
        _fsync(self._folder)
        shutil.rmtree(self._unfinished, ignore_errors=True)
        self._run, self._keys = None, []

    def close(self, status: str) -> None:
        pass

    def _begin(self) -> Any:
        shutil.rmtree(self._unfinished, ignore_errors=True)  # of an export that was killed
        self._unfinished.mkdir(parents=True)
        quiet = wandb.Settings(console="off", silent=True, disable_git=True, x_disable_stats=True)
        try:
            run = wandb.init(
                project=self._project,
                id=self._id,
                name=self._attempt.name,
                group=self._attempt.run_id,
                config={"eigenwatch_run": self._attempt.run_id, "attempt": self._attempt.number, **self._attempt.tags},
                resume="allow",
                mode="offline",
                dir=str(self._unfinished),
                settings=quiet,
            )
        except wandb.Error as error:
            raise ValueError(f"Weights & Biases refused: {str(error).splitlines()[0]}") from None
        run.define_metric(f"{PREFIX}/step", hidden=True)
        run.define_metric(f"{PREFIX}/*", step_metric=f"{PREFIX}/step")
        return run


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
