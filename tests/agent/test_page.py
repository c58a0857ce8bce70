"""A page and a lock: what two processes say to each other without room on a disk, and who lives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from eigenwatch.agent.page import PAGE_BYTES, Page
from eigenwatch.agent.record_lock import RecordLock

from tests.agent.test_spool import full_disk  # noqa: F401 - a fixture


def test_what_was_said_last_is_read(tmp_path):
    page = Page(tmp_path / "said")
    assert page.read() == {}
    page.write({"dropped": {"outbox_full": 3}})
    page.write({"close_at": 17.5})
    assert page.read() == {"close_at": 17.5}


def test_a_page_can_be_written_on_a_disk_that_is_full(full_disk):  # noqa: F811
    page = Page(full_disk / "said")
    page.write({})
    (full_disk / "filler").write_bytes(bytes(os.statvfs(full_disk).f_bavail * os.statvfs(full_disk).f_frsize))
    page.write({"close_at": 17.5})
    assert page.read() == {"close_at": 17.5}


def test_what_is_too_long_stays_unsaid(tmp_path):
    page = Page(tmp_path / "said")
    page.write({"a": 1})
    page.write({"a": "x" * PAGE_BYTES})
    assert page.read() == {"a": 1}


@pytest.mark.parametrize("content", [b"", b"00000000 {}", b"zz {}", b"\xff" * PAGE_BYTES, b'{"a": 1}'])
def test_a_page_that_is_torn_says_nothing(tmp_path, content):
    (tmp_path / "said").write_bytes(content)
    assert Page(tmp_path / "said").read() == {}


ELSEWHERE = """
import sys
from pathlib import Path
from eigenwatch.agent.record_lock import RecordLock
lock = RecordLock(Path(sys.argv[1]))
print(lock.held_elsewhere, lock.take(alone=sys.argv[2] == "alone"), flush=True)
sys.stdin.read()
"""


def elsewhere(path: Path, how: str) -> tuple["subprocess.Popen[str]", str]:
    """Another process that tries the lock, and what it found."""
    process = subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE, str(path), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


def test_a_lock_held_alone_is_seen_and_goes_with_its_process(tmp_path):
    path = tmp_path / "lock"
    mine = RecordLock(path)
    assert not mine.held_elsewhere
    assert not path.exists(), "whoever only looks leaves nothing behind"
    process, found = elsewhere(path, "alone")
    assert found == "False True"
    assert mine.held_elsewhere
    assert not mine.take(alone=False)
    end(process)
    assert not mine.held_elsewhere
    assert mine.take(alone=True)


def test_one_who_shares_a_lock_can_tell_whether_others_do(tmp_path):
    path = tmp_path / "lock"
    mine = RecordLock(path)
    assert mine.take(alone=False)
    assert mine.only_ours()
    process, found = elsewhere(path, "together")
    assert found == "False True"
    assert not mine.only_ours()
    end(process)
    assert mine.only_ours()
    other, found = elsewhere(path, "together")
    assert found == "False True", "asking does not keep it"
    end(other)


def test_a_lock_that_was_removed_is_made_anew(tmp_path):
    first, second = RecordLock(tmp_path / "lock"), RecordLock(tmp_path / "lock")
    assert first.take(alone=True)
    first.remove()
    assert not (tmp_path / "lock").exists()
    assert second.take(alone=True)
