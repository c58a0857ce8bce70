"""The spool: what is written is read, and whatever else lies in its folder harms nobody."""

import json
import math
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from eigenwatch.agent.spool import _SCHEMA, Destination, Spool, _trailer, spool_roots, spools_in
from eigenwatch.schemas import (
    LayerDescription,
    PartialCovariance,
    PartialRefused,
    PartialSamples,
    RecordKey,
    RunDescription,
    WirePartial,
    packed_length,
    partial_from_wire,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

WIDTH = 300
LAYER = LayerDescription(layer=0, site="post", name="h.0", width=WIDTH, shares=((0,), (1,)))
RUN = RunDescription(run_id="run", launch_id="launch", world_size=2, layers=(LAYER,), tags={"norm": "pre"})
HERE = Destination("10.0.0.1:6379")


def partial(step: int = 0, width: int = WIDTH, finite: bool = True) -> PartialCovariance:
    random = np.random.default_rng(step)
    return PartialCovariance(
        key=RecordKey("run", 0, step, 0, "post", None),
        rank=1,
        share=1,
        rows=(0, width),
        tokens=40,
        mean=random.normal(size=width) if finite else np.full(width, np.nan),
        scatter=random.normal(size=packed_length(width) if finite else 0).astype(np.float32),
        trace=3.0 if finite else math.nan,
        frobenius_sq=3.0 if finite else math.nan,
        captured_at=1.5e9,
    )


@pytest.fixture
def spool(tmp_path):
    return Spool.create([tmp_path], RUN, 1, HERE)


def file_of(spool: Spool, number: int):
    return spool.folder / f"{number:012d}.arrow"


def assert_same(read: PartialCovariance, written: PartialCovariance) -> None:
    assert read.key == written.key
    for name in ("rank", "tokens", "mean", "scatter", "trace", "frobenius_sq", "captured_at"):
        assert np.array_equal(getattr(read, name), getattr(written, name), equal_nan=True), name


@pytest.mark.parametrize("width", [1, 7, WIDTH])
def test_what_is_written_is_read_to_the_last_bit(spool, width):
    written = partial(5, width)
    spool.write(3, written)
    assert_same(PartialCovariance.from_wire(spool.read(3)), written)


def test_a_partial_that_is_not_finite_passes_through(spool):
    spool.write(0, partial(finite=False))
    read = PartialCovariance.from_wire(spool.read(0))
    assert not read.finite
    assert_same(read, partial(finite=False))


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16"])
def test_rows_pass_through_in_the_dtype_of_the_training(spool, dtype):
    rows_ND = np.random.default_rng(0).integers(0, 1000, (5, WIDTH)).astype(dtype)
    key = RecordKey("run", 0, 5, 0, "post", None)
    spool.write(0, PartialSamples(key=key, rank=1, share=1, captured_at=1.5e9, samples=rows_ND, sampling_steps=20))
    read = partial_from_wire(spool.read(0))
    assert isinstance(read, PartialSamples)
    assert (read.key, read.rank, read.share, read.sampling_steps) == (key, 1, 1, 20)
    assert read.samples.dtype == dtype
    assert np.array_equal(read.samples, rows_ND)


def test_reading_maps_the_file_and_copies_nothing(spool):
    spool.write(0, partial(width=1500))
    before = pa.total_allocated_bytes()
    wire = spool.read(0)
    assert wire.payload.nbytes > 4_000_000
    assert pa.total_allocated_bytes() - before < 100_000
    assert not wire.payload.flags.owndata
    assert not wire.payload.flags.writeable


def test_what_was_read_outlives_the_file(spool):
    spool.write(0, partial())
    wire = spool.read(0)
    spool.remove(0)
    assert np.array_equal(wire.payload, partial().scatter)


def test_partials_come_oldest_first(spool):
    for number in (10, 2, 10**12, 0):
        spool.write(number, partial(number % 7))
    assert spool.numbers() == [0, 2, 10, 10**12]
    spool.remove(2)
    spool.remove(2)
    assert spool.numbers() == [0, 10, 10**12]


def test_a_size_is_that_of_the_arrays_and_little_more(spool):
    spool.write(0, partial())
    assert partial().nbytes < spool.size_bytes(0) < partial().nbytes + 2000
    assert spool.size_bytes(1) == 0


def test_the_courier_finds_the_run_the_rank_and_the_aggregator(spool):
    label = Spool.at(spool.folder).label()
    assert (label.run, label.rank, label.destination) == (RUN, 1, HERE)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"run": 3, "rank": 1, "destination": ["a"], "created_at": 1}'])
def test_a_label_that_says_nothing_is_told_as_such(spool, content):
    (spool.folder / "run.json").write_text(content)
    with pytest.raises(ValueError, match="is not readable"):
        spool.label()


def test_only_its_owner_may_look_into_a_spool(spool):
    assert stat.S_IMODE(spool.folder.stat().st_mode) == 0o700


def test_a_removed_partial_is_told_from_a_broken_one(spool):
    with pytest.raises(FileNotFoundError):
        spool.read(0)


# A parent that forks writers and kills them: forking is quicker than starting, and here no thread runs yet.
KILLED_WRITERS = """
import os, random, signal, sys, time
from pathlib import Path
from eigenwatch.agent.spool import Spool
from tests.agent.test_spool import partial

spool, large = Spool(Path(sys.argv[1])), partial(width=1000)
random.seed(0)
for kill in range(10):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for number in range(1000):
            spool.write(100 * kill + number % 3, large)
            os.write(writer, b".")
    os.close(writer)
    os.read(reader, 1)
    time.sleep(random.uniform(0.0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
"""


def test_a_writer_may_be_killed_at_any_moment(spool):
    command = [sys.executable, "-c", KILLED_WRITERS, str(spool.folder)]
    subprocess.run(command, check=True, timeout=120, cwd=Path(__file__).parents[2])
    assert len(spool.numbers()) >= 10
    assert list(spool.folder.glob("*.tmp")), "none of these deaths came in the middle of a write"
    for number in spool.numbers():
        assert_same(PartialCovariance.from_wire(spool.read(number)), partial(width=1000))


def test_a_write_that_fails_leaves_nothing_behind(spool):
    file_of(spool, 0).mkdir()  # what a partial cannot be renamed to
    (file_of(spool, 0) / "x").touch()
    with pytest.raises(OSError, match=r"[Dd]irectory"):
        spool.write(0, partial())
    assert list(spool.folder.glob("*.tmp")) == []
    with pytest.raises(OSError, match="No such"):
        Spool(spool.folder / "gone").write(0, partial())


def test_nothing_is_left_of_a_spool_that_is_discarded(spool):
    spool.write(0, partial())
    spool.discard()
    spool.discard()
    assert not spool.folder.exists()


def test_a_spool_lies_in_shared_memory_where_there_is_room_for_every_rank_of_the_host(monkeypatch):
    mine, temporary = f"eigenwatch-{os.getuid()}", Path(tempfile.gettempdir())
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("this host has no shared memory to write to")
    monkeypatch.delenv("EIGENWATCH_SPOOL")
    both = [Path("/dev/shm") / mine, temporary / mine]
    room = shutil.disk_usage("/dev/shm").free // 3
    assert spool_roots(room) == both
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert spool_roots(room // 2) == both
    assert spool_roots(room) == [temporary / mine]
    monkeypatch.setenv("EIGENWATCH_SPOOL", "/somewhere/else")
    assert spool_roots(room) == [Path("/somewhere/else")]


# Processes that use a spool as a rank, as a courier and as a later job's courier do.
OTHER_PROCESS = """
import sys
from pathlib import Path
from eigenwatch.agent.spool import Spool
print(Spool(Path(sys.argv[1])).lock(alone=sys.argv[2] == "alone"))
"""


def locks_elsewhere(spool: Spool, how: str) -> bool:
    command = [sys.executable, "-c", OTHER_PROCESS, str(spool.folder), how]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout == "True\n"


def test_a_spool_is_taken_over_only_when_nobody_uses_it_whatever_the_rank_has_forked(spool):
    assert locks_elsewhere(spool, "together")
    assert not locks_elsewhere(spool, "alone")
    reader, writer = os.pipe()
    worker = os.fork()  # as a DataLoader does
    if worker == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    try:
        spool.unlock()  # as the kernel does when the rank dies
        assert locks_elsewhere(spool, "alone")
        assert spool.lock()
    finally:
        os.close(writer)
        os.waitpid(worker, 0)


def test_a_spool_that_was_discarded_cannot_be_locked(spool):
    spool.discard()
    assert not Spool(spool.folder).lock(alone=True)


def test_other_folders_are_not_taken_for_spools(spool, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text("{}")
    (tmp_path / "file").touch()
    assert [one.folder for one in spools_in([tmp_path, tmp_path, tmp_path / "gone"])] == [spool.folder]


def test_where_the_first_folder_cannot_be_made_the_second_is_used(tmp_path):
    (tmp_path / "file").touch()
    spool = Spool.create([tmp_path / "file", tmp_path / "b"], RUN, 1, HERE)
    assert spool.folder.parent == tmp_path / "b"
    with pytest.raises(OSError, match="File exists"):
        Spool.create([tmp_path / "file"], RUN, 1, HERE)


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 2 MiB, to be filled; what is in it vanishes with it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs, so no disk can be filled")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_what_no_longer_fits_goes_to_the_second_folder_and_is_one_spool_with_the_first(full_disk, tmp_path):
    spool = Spool.create([full_disk, tmp_path / "b"], RUN, 1, HERE)
    large = partial(width=700)  # 1 MiB
    for number in range(4):
        spool.write(number, large)
    assert len(list(spool.folder.glob("*.arrow"))) == 1
    assert not list(spool.folder.glob("*.tmp"))
    found = spools_in([full_disk, tmp_path / "b"])
    for same in (Spool.at(spool.folder), *found):
        assert same.numbers() == [0, 1, 2, 3]
        assert_same(PartialCovariance.from_wire(same.read(3)), large)
    found[0].remove(3)
    assert spool.numbers() == [0, 1, 2]
    spool.remove(0)
    spool.write(4, large)
    assert [file.name for file in spool.folder.glob("*.arrow")] == ["000000000004.arrow"]
    alone = spools_in([tmp_path / "b"])[0]  # as after a restart of the host
    assert alone.label().run == RUN
    assert alone.numbers() == [1, 2]
    assert alone.lock(alone=True)
    spool.discard()
    assert spools_in([full_disk, tmp_path / "b"]) == []


def readable(spool: Spool, content: bytes) -> WirePartial | None:
    """What a file with this content is read as; anything but a refusal fails the test."""
    file_of(spool, 0).write_bytes(content)
    try:
        return spool.read(0)
    except PartialRefused as refused:
        assert refused.reason in ("malformed", "version")  # noqa: PT017 - either outcome is right
        assert "spool file 0" in str(refused)  # noqa: PT017
        return None


any_file = settings(deadline=None, max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=300).map(lambda noise: noise + _trailer(whole(noise), 0))))
@example(b"")
@example(bytes(5000))
@any_file
def test_noise_is_refused_even_with_the_checksums_of_a_partial(spool, content):
    assert readable(spool, content) is None


def whole(content: bytes) -> np.ndarray:
    return np.frombuffer(content.ljust(8, b"\0"), np.uint8)


@given(keep=st.floats(0, 1, exclude_max=True), tail=st.sampled_from([b"", b"\0"]))
@any_file
def test_a_file_that_was_cut_or_whose_end_was_never_written_is_refused(spool, keep, tail):
    spool.write(0, partial(width=4))
    whole = file_of(spool, 0).read_bytes()
    kept = int(keep * len(whole))
    assert readable(spool, whole[:kept] + tail * (len(whole) - kept)) is None


WRITTEN = {
    "scatter": partial(width=5),
    "not finite": partial(width=5, finite=False),
    "rows": PartialSamples(
        key=RecordKey("run", 0, 5, 0, "post", None), rank=1, share=1, captured_at=1.5e9,
        samples=np.arange(21, dtype=np.float16).reshape(7, 3),
    ),
}  # fmt: skip


@given(
    form=st.sampled_from(sorted(WRITTEN)),
    places=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["flip", "zero", "set", "cut", "add", "swap"])),
        min_size=1, max_size=4,
    ),
    noise=st.binary(min_size=8, max_size=64),
)  # fmt: skip
@settings(any_file, max_examples=2000)
def test_a_file_that_was_damaged_anywhere_is_refused(spool, form, places, noise):
    spool.write(0, WRITTEN[form])
    before = spool.read(0)
    written = file_of(spool, 0).read_bytes()
    damaged = bytearray(written)
    for where, how in places:
        at, length = int(where * len(damaged)), len(noise)
        if how == "flip":
            damaged[at] ^= 1 << (noise[0] % 8)
        elif how == "zero":
            damaged[at : at + length] = bytes(len(damaged[at : at + length]))
        elif how == "set":
            damaged[at : at + length] = noise[: len(damaged[at : at + length])]
        elif how == "cut":
            del damaged[at : at + length]
        elif how == "add":
            damaged[at:at] = noise
        else:
            damaged[at : at + 16] = damaged[at + 8 : at + 16] + damaged[at : at + 8]
    read = readable(spool, bytes(damaged))
    if read is not None:  # nothing was changed, or only the order of the payload's words, which harms no process
        assert read.header == before.header
        assert read.mean.tobytes() == before.mean.tobytes()
        assert sorted(read.payload.tobytes()) == sorted(before.payload.tobytes())


@pytest.mark.parametrize("page", range(5))
def test_a_page_of_the_payload_that_never_reached_the_disk_is_noticed(spool, page):
    spool.write(0, partial(width=64))
    damaged = bytearray(file_of(spool, 0).read_bytes())
    assert len(damaged) > 5 * 3000
    damaged[3000 * page : 3000 * page + 3000] = bytes(3000)
    assert readable(spool, bytes(damaged)) is None


def test_any_reader_of_arrow_streams_reads_a_file(spool):
    spool.write(0, partial())
    with pa.ipc.open_stream(file_of(spool, 0)) as stream:
        (row,) = stream.read_all().to_pylist()
    assert json.loads(row["header"])["tokens"] == 40
    assert row["payload"] == partial().scatter.tobytes()


def spooled(payload_bytes: int = 0, schema: pa.Schema | None = None, **columns: pa.Array) -> bytes:
    """Another Arrow stream with a trailer that is right."""
    batch = pa.record_batch(columns, schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        if batch.num_columns:
            writer.write_batch(batch)
    stream = sink.getvalue().to_pybytes()
    return stream + _trailer(np.frombuffer(stream, np.uint8), payload_bytes)


def binary(*values: bytes | None) -> pa.Array:
    return pa.array(values, pa.large_binary())


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"header": pa.array(["{}"])},
        {"a": pa.array([1]), "b": pa.array([2]), "c": pa.array([3])},
        {"a": pa.array([], pa.large_string()), "b": pa.array([], pa.binary()), "c": pa.array([], pa.binary())},
        {name: binary(None) for name in "abc"},
        {"header": pa.array([None], pa.large_string()), "mean": binary(None), "payload": binary(None)},
        {"header": pa.array([], pa.large_string()), "mean": binary(), "payload": binary()},
        {"header": pa.array(["no json"], pa.large_string()), "mean": binary(b""), "payload": binary(b"")},
        {"header": pa.array(["[" * 9999], pa.large_string()), "mean": binary(b""), "payload": binary(b"")},
        {"header": pa.array(["{}"], pa.large_string()), "mean": binary(b"123"), "payload": binary(b"")},
        {"header": pa.array(["{}"] * 2, pa.large_string()), "mean": binary(b"", b""), "payload": binary(b"", b"")},
    ],
    ids=[
        "no column", "a column", "integers", "no rows", "nulls", "our nulls", "none of ours", "no json", "deep json",
        "no numbers", "two",
    ],
)  # fmt: skip
def test_another_arrow_stream_is_refused_though_its_checksums_are_right(spool, columns):
    assert readable(spool, spooled(**columns)) is None


def test_a_header_that_lacks_something_is_refused(spool):
    spool.write(0, partial(width=4))
    header, mean, payload = spool.read(0)
    arrays = {name: binary(array.tobytes()) for name, array in (("mean", mean), ("payload", payload))}

    def file_with(header: dict[str, Any]) -> bytes:
        text = pa.array([json.dumps(header)], pa.large_string())
        return spooled(payload.nbytes, _SCHEMA, header=text, **arrays)

    assert readable(spool, file_with(header))
    for name in header.keys() - {"expert"}:
        assert not readable(spool, file_with({key: value for key, value in header.items() if key != name}))
