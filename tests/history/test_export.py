"""Exports: every target holds each record once, whatever happened on the way. Read back with the target's own reader.

TensorBoard is always tested; Weights & Biases and MLflow where they are installed (extras `wandb` and `mlflow`).
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest
from eigenwatch.history import open_history
from eigenwatch.history.export import Export, Exported, Opener, only_export, series_name

from tests.history.stored import NOT_FINITE, START, alert, record, run, write


class Kind(Protocol):
    """One kind of target below a folder."""

    needs: str

    def opener(self, folder: Path) -> Opener: ...

    def scalars(self, folder: Path, run_id: str) -> list[tuple[str, int, float]]:
        """(tag, step, value) of everything in a run of the target."""

    def texts(self, folder: Path, run_id: str) -> list[str]: ...


class TensorBoardKind(NamedTuple):
    needs: str = "tensorboard"

    def opener(self, folder: Path) -> Opener:
        from eigenwatch.history.export_tensorboard import TensorBoard

        return TensorBoard(folder)

    def scalars(self, folder: Path, run_id: str) -> list[tuple[str, int, float]]:
        events = self._events(folder / run_id)
        return [(tag, one.step, one.value) for tag in events.Tags()["scalars"] for one in events.Scalars(tag)]

    def texts(self, folder: Path, run_id: str) -> list[str]:
        events = self._events(folder / run_id)
        return [
            one.tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"] for one in events.Tensors(tag)
        ]

    def _events(self, folder: Path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


class WandbKind(NamedTuple):
    needs: str = "wandb"

    def opener(self, folder: Path) -> Opener:
        from eigenwatch.history.export_wandb import WeightsAndBiases

        return WeightsAndBiases(folder, "project")

    def scalars(self, folder: Path, run_id: str) -> list[tuple[str, int, float]]:
        found = []
        for one in self._records(folder, run_id):
            values = {".".join(item.nested_key) or item.key: item.value_json for item in one.history.item}
            step = values.pop("eigenwatch/step", None)
            found += [(tag, int(step), float(value)) for tag, value in values.items() if tag.startswith("eigenwatch/")]
        return found

    def texts(self, folder: Path, run_id: str) -> list[str]:
        items = [item for one in self._records(folder, run_id) for item in one.summary.update]
        named = {".".join(item.nested_key) or item.key: item.value_json for item in items}
        return [value.strip('"') for name, value in named.items() if name.startswith("eigenwatch/alerts/")]

    def _records(self, folder: Path, run_id: str):
        from wandb.proto.wandb_internal_pb2 import Record

        identity = run_id.replace("/", "_")
        for path in sorted(folder.glob(f"offline-run-*-{identity}/run-{identity}.wandb")):
            for data in leveldb_records(path.read_bytes()[7:]):
                yield Record.FromString(data)


class MLflowKind(NamedTuple):
    needs: str = "mlflow"

    def opener(self, folder: Path) -> Opener:
        from eigenwatch.history.export_mlflow import MLflow

        return MLflow(self._uri(folder), "experiment")

    def scalars(self, folder: Path, run_id: str) -> list[tuple[str, int, float]]:
        client, found = self._run(folder, run_id)
        histories = [client.get_metric_history(found.info.run_id, name) for name in found.data.metrics]
        return [(one.key, one.step, one.value) for history in histories for one in history]

    def texts(self, folder: Path, run_id: str) -> list[str]:
        _, found = self._run(folder, run_id)
        return [value for name, value in found.data.tags.items() if name.startswith("eigenwatch/alerts/")]

    def _uri(self, folder: Path) -> str:
        folder.mkdir(exist_ok=True)
        return f"sqlite:///{folder}/mlflow.db"

    def _run(self, folder: Path, run_id: str):
        from mlflow import MlflowClient

        client = MlflowClient(self._uri(folder))
        experiment = client.get_experiment_by_name("experiment").experiment_id
        (found,) = [one for one in client.search_runs([experiment]) if one.info.run_name == run_id]
        return client, found


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """The payloads of a log in LevelDB's format: blocks of 32 KiB, each record with a header of crc, length and type.

    wandb publishes no reader of its offline files.
    """
    whole, place = b"", 0
    while place + 7 <= len(data):
        left = (1 << 15) - (place + 7) % (1 << 15)  # wandb's own header of 7 bytes counts in the first block
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, last
            yield whole
            whole = b""


KINDS = {"tensorboard": TensorBoardKind(), "wandb": WandbKind(), "mlflow": MLflowKind()}


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    pytest.importorskip(request.param)
    return KINDS[request.param]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = tmp_path / "store"
    write(store, "llama", "runs", run(written=0, tags=[("norm", "pre")]))
    write(store, "llama", "records", *(record(step, layer, hard_rank=step + layer / 2)
                                       for step in (0, 10) for layer in (0, 1)))  # fmt: skip
    return store


def export(kind: Kind, store: Path, folder: Path) -> Exported:
    with open_history(store) as history:
        one = Export(history, "llama", kind.opener(folder))
        try:
            one.run()
        finally:
            one.close()
        return one.done


def ranks(kind: Kind, folder: Path, run_id: str = "llama") -> list[tuple[str, int, float]]:
    prefix = "eigenwatch/hard_rank/"
    found = kind.scalars(folder, run_id)
    return sorted((tag.removeprefix(prefix), step, value) for tag, step, value in found if tag.startswith(prefix))


FOUR = [("layer_00", 0, 0.0), ("layer_00", 10, 10.0), ("layer_01", 0, 0.5), ("layer_01", 10, 10.5)]


def test_each_export_adds_what_is_new_and_nothing_twice(kind: Kind, store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(store, "llama", "alerts", alert("a", 10, written=10, reason="two directions"))
    done = export(kind, store, folder)
    assert (done.records, done.alerts) == (4, 1)
    assert ranks(kind, folder) == FOUR
    assert kind.texts(folder, "llama") == ["critical collapse, firing: two directions"]
    before = kind.scalars(folder, "llama")
    assert ("eigenwatch/soft_utilization/layer_01", 10) in {(tag, step) for tag, step, _ in before}
    assert len(before) == len({(tag, step) for tag, step, _ in before})

    assert export(kind, store, folder).records == 0
    assert kind.scalars(folder, "llama") == before

    write(store, "llama", "records", record(5, 0, hard_rank=5.0), record(20, 0, hard_rank=20.0))  # one came late
    write(store, "llama", "runs", run(written=30, status="finished"))
    assert export(kind, store, folder).records == 2
    assert ranks(kind, folder) == sorted([*FOUR, ("layer_00", 5, 5.0), ("layer_00", 20, 20.0)])
    assert len(kind.texts(folder, "llama")) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
import eigenwatch.history.export as core
from tests.history.test_export import KINDS, export
core.ROWS_AT_ONCE = 1
kind, store, folder = KINDS[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3])
opener = kind.opener(folder)
class Killed:
    needs = ""
    def opener(self, _folder):
        return self
    def open(self, attempt):
        target = opener.open(attempt)
        write, calls = target.write, []
        def counted(records, notes):
            write(records, notes)
            calls.append(1)
            if len(calls) == 3:
                target.__dict__.get("_writer") and target.commit()  # what tensorboard has by then
                os.kill(os.getpid(), signal.SIGKILL)
        target.write = counted
        return target
export(Killed(), store, folder)
"""


def test_an_export_that_is_killed_in_the_middle_is_taken_up(kind: Kind, store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    mine = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}  # its service, not ours
    environment = mine | {"PYTHONPATH": os.pathsep.join((os.getcwd(), os.environ.get("PYTHONPATH", "")))}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, kind.needs, str(store), str(folder)], env=environment, timeout=300, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    export(kind, store, folder)
    assert ranks(kind, folder) == FOUR


def test_an_attempt_is_a_run_of_its_own(kind: Kind, store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(kind, store, folder)
    write(store, "llama", "runs", run(1, written=50))
    write(store, "llama", "records", record(10, 0, written=60, attempt=1, hard_rank=7.0))
    assert export(kind, store, folder).records == 1
    assert ranks(kind, folder) == FOUR
    assert ranks(kind, folder, "llama/attempt-1") == [("layer_00", 10, 7.0)]


@pytest.fixture
def tensorboard() -> Kind:
    return KINDS["tensorboard"]


def test_a_torn_event_is_written_again(tensorboard: Kind, store: Path, tmp_path: Path) -> None:
    export(tensorboard, store, tmp_path)
    (file,) = (tmp_path / "llama").iterdir()
    with file.open("r+b") as events:
        events.truncate(file.stat().st_size - 5)
    assert export(tensorboard, store, tmp_path).records == 1
    assert ranks(tensorboard, tmp_path) == FOUR


def test_a_record_that_lacks_ranks_waits_for_them_while_the_run_goes_on(
    tensorboard: Kind, store: Path, tmp_path: Path
) -> None:
    import time

    now = time.time() - START.timestamp()
    write(store, "llama", "records", record(20, 0, written=now, complete=False, ranks_seen=1, hard_rank=1.0))
    done = export(tensorboard, store, tmp_path)
    assert (done.records, done.waiting) == (4, 1)
    write(store, "llama", "records", record(20, 0, written=now + 1, hard_rank=2.0))
    assert export(tensorboard, store, tmp_path).records == 1
    assert ("layer_00", 20, 2.0) in ranks(tensorboard, tmp_path)
    write(store, "llama", "records", record(30, 0, written=now, complete=False, ranks_seen=1))
    write(store, "llama", "runs", run(written=now, status="lost"))
    assert export(tensorboard, store, tmp_path).records == 1


def test_a_record_without_metrics_is_exported_as_not_finite(tensorboard: Kind, store: Path, tmp_path: Path) -> None:
    write(store, "llama", "records", record(20, 0, **NOT_FINITE))
    assert export(tensorboard, store, tmp_path).records == 5
    found = {tag: value for tag, step, value in tensorboard.scalars(tmp_path, "llama") if step == 20}
    assert found["eigenwatch/finite/layer_00"] == 0
    assert "eigenwatch/hard_rank/layer_00" not in found
    assert export(tensorboard, store, tmp_path).records == 0


def test_a_layer_is_named_with_its_site_and_expert() -> None:
    assert series_name(3, "post", None) == "layer_03"
    assert series_name(3, "pre", 7) == "layer_03_pre_expert_007"


def test_a_run_that_is_not_there_is_said_with_those_that_are(tensorboard: Kind, store: Path, tmp_path: Path) -> None:
    with open_history(store) as history:
        one = Export(history, "gpt", tensorboard.opener(tmp_path))
        with pytest.raises(ValueError, match=r"no run 'gpt' in .*; there are llama"):
            one.run()


def test_two_exports_to_one_folder_exclude_each_other(tmp_path: Path) -> None:
    with only_export(tmp_path), pytest.raises(ValueError, match="another export writes to"), only_export(tmp_path):
        pass
    with only_export(tmp_path):
        pass
