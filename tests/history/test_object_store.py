"""A store in an object store: written, read, queried and compacted as one in a folder is, on a real S3 server."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest
from click.testing import CliRunner
from eigenwatch.aggregator.stored import stored_attempts, stored_records
from eigenwatch.aggregator.writer import StoreWriter
from eigenwatch.cli.compact import compact
from eigenwatch.cli.query import query
from eigenwatch.history import open_history
from eigenwatch.schemas import RecordKey
from eigenwatch.schemas.store import open_store

from tests.conftest import start_serve, stop_serve
from tests.history.stored import record, run, spectrum
from tests.jobs.launch import start_job
from tests.processes import PATIENCE_SECONDS
from tests.s3_server import CREDENTIALS, new_store, s3_server


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def uri(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    return new_store(endpoint)


def fill(uri: str, steps: int = 6) -> None:
    writer = StoreWriter(uri)
    writer.append("runs", "r", [run(written=0)])
    for step in range(steps):
        writer.append("records", "r", [record(step, layer) for layer in range(3)])
        writer.append("eigenvalues", "r", [spectrum(step, layer) for layer in range(3)])


def files(uri: str) -> list[str]:
    return [name for names in open_store(uri).listed().values() for name in names]


def test_what_is_appended_is_queried(uri: str) -> None:
    fill(uri)
    with open_history(uri) as history:
        assert history.query("SELECT count(*) AS n FROM records").to_pylist() == [{"n": 18}]
        where = "run_id = 'r' AND layer = 1 AND step >= 4 ORDER BY step"
        rows = history.query(f"SELECT run_id, step, eigenvalues FROM eigenvalues WHERE {where}").to_pylist()
        assert rows == [{"run_id": "r", "step": step, "eigenvalues": [3.0, 2.0, 1.0]} for step in (4, 5)]
        StoreWriter(uri).append("records", "r", [record(99)])
        assert history.query("SELECT max(step) AS last FROM records").to_pylist() == [{"last": 99}]


def test_the_address_of_what_was_appended_is_its_uri(uri: str) -> None:
    address = StoreWriter(uri).append("records", "r", [record(0)])
    bucket = uri.split("/")[2]
    assert re.fullmatch(rf"s3://{bucket}/a/store/run_id=r/records/part-[^/]+\.parquet", address)


def test_what_the_store_has_of_a_run_is_known_again(uri: str) -> None:
    fill(uri, steps=2)
    store = open_store(uri)
    assert stored_attempts(store, "r") == {"a1": 0}
    assert stored_attempts(store, "other") == {}
    keys = [RecordKey("r", 0, step, layer, "post", None) for step in range(2) for layer in range(3)]
    assert stored_records(store, "r", 0) == dict.fromkeys(keys, frozenset())
    assert stored_records(store, "r", 1) == {}


def test_compaction_merges_and_removes(uri: str) -> None:
    fill(uri)
    runner = CliRunner()
    done = json.loads(runner.invoke(compact, ["--store", uri, "--json"]).output)
    assert (done["merged"], done["into"], done["removed"], done["waiting"]) == (12, 2, 0, 12)
    assert len(files(uri)) == 15
    for removed in (12, 0):
        with open_history(uri) as history:
            assert history.query("SELECT count(*) AS n FROM records_raw").to_pylist() == [{"n": 18}]
            assert history.query("SELECT count(*) AS n FROM eigenvalues").to_pylist() == [{"n": 18}]
        done = json.loads(runner.invoke(compact, ["--store", uri, "--json", "--grace", "0s"]).output)
        assert (done["merged"], done["removed"], done["waiting"]) == (0, removed, 0)
    assert len(files(uri)) == 3
    assert len(stored_records(open_store(uri), "r", 0)) == 18


def test_a_session_reaches_no_further_than_the_store(uri: str) -> None:
    fill(uri, steps=1)
    bucket = uri.split("/")[2]
    outside = open_store(uri).filesystem
    with outside.open_output_stream(f"{bucket}/secret.csv") as stream:
        stream.write(b"password\nswordfish\n")
    with open_history(uri) as history:
        for statement in (
            f"FROM 's3://{bucket}/secret.csv'",
            f"FROM read_text('s3://{bucket}/secret.csv')",
            f"COPY records TO 's3://{bucket}/a/store/out.csv'",
            "FROM '/etc/passwd'",
            "LOAD httpfs",
        ):
            with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as refusal:
                history.query(statement)
            assert "swordfish" not in str(refusal.value)
        for statement in (f"FROM 's3://{bucket}/secret.csv'", f"COPY records TO 's3://{bucket}/a/store/out.csv'"):
            with pytest.raises(duckdb.Error):
                history.connection.execute(statement).fetchall()
    assert not [name for name in files(uri) if "out" in name]


def test_the_endpoint_may_come_from_the_environment(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _, options = uri.partition("?")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://" + re.findall(r"override=([^&]+)", options)[0])
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    fill(plain, steps=1)
    asked = CliRunner().invoke(query, ["SELECT count(*) AS n FROM records", "--json", "--store", plain])
    assert json.loads(asked.output) == [{"n": 3}]


def refused(uri: str) -> str:
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as refusal:
        StoreWriter(uri)
    assert time.monotonic() - began < 30
    return str(refusal.value)


def test_what_is_wrong_with_a_uri_is_said_in_one_line(uri: str) -> None:
    assert "names no bucket: pass s3://BUCKET/PREFIX" in refused("s3://")
    assert "it has an option 'endpiont'" in refused("s3://bucket/x?endpiont=h:1")
    assert "'gs://bucket/x' is neither a folder nor an object store" in refused("gs://bucket/x")
    options = uri.partition("?")[2]
    missing = f"s3://no-such-bucket/x?{options}"
    assert "'s3://no-such-bucket/x' cannot be written (no such bucket (make the bucket" in refused(missing)
    assert "no store at s3://no-such-bucket/x" in refused_by_query(missing)


def refused_by_query(uri: str) -> str:
    done = CliRunner().invoke(query, ["FROM records", "--store", uri])
    assert done.exit_code == 1
    (line,) = done.output.splitlines()
    return line


def test_a_server_that_does_not_answer_is_named_with_the_remedy() -> None:
    uri = "s3://bucket/x?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    assert "check the endpoint" in refused(uri)
    assert "check the endpoint" in refused_by_query(uri)


def test_missing_credentials_are_named(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nonexistent")
    assert "access denied (check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in refused(uri)


def test_serve_stores_a_training_there(uri: str, job_environment: dict[str, str], tmp_path: Path) -> None:
    served = start_serve(uri)
    try:
        options = ("--run-id", "job", "--aggregator", served.address, "--steps", "5", "--every", "2")
        job = start_job(tmp_path, job_environment, *options, ranks=1)
        assert job.wait(PATIENCE_SECONDS) == 0, (tmp_path / "stderr").read_text()
    finally:
        assert stop_serve(served) == 0
    with open_history(uri) as history:
        counted = history.query("SELECT count(*) AS records, bool_and(complete) AS whole FROM records").to_pylist()
        assert counted == [{"records": 9, "whole": True}]
        assert history.query("SELECT run_id, status FROM runs").to_pylist() == [{"run_id": "job", "status": "finished"}]
