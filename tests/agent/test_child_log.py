"""The log of a child process: it says what the child said last, and stays small."""

import subprocess
import sys

from eigenwatch.agent.child_log import LOG_BYTES, ChildLog

TALKER = "import sys\nfor line in sys.stdin: print(line.strip() * 1000, flush=True)"


def test_a_log_is_cut_to_its_end_while_the_child_goes_on_writing(tmp_path):
    child_log = ChildLog(tmp_path / "log")
    with child_log.open() as out:
        talker = subprocess.Popen([sys.executable, "-c", TALKER], stdin=subprocess.PIPE, stdout=out, text=True)
    assert talker.stdin is not None
    with talker.stdin as words:
        words.writelines(f"{line:05d}\n" for line in range(LOG_BYTES // 5000 + 10))
    assert talker.wait(30) == 0
    before = child_log.lines()
    assert child_log.path.stat().st_size > LOG_BYTES
    child_log.trim()
    assert child_log.path.stat().st_size < LOG_BYTES / 10
    kept = child_log.lines()
    assert kept
    assert kept == before[-len(kept) :]  # whole lines, the last ones


def test_what_a_child_writes_after_the_cut_follows_what_was_kept(tmp_path):
    child_log = ChildLog(tmp_path / "log")
    with child_log.open() as childs:
        childs.write(b"first\n" * (LOG_BYTES // 5))
        childs.flush()
        child_log.trim()
        childs.write(b"last\n")
    assert child_log.lines()[-2:] == ["first", "last"]
    assert child_log.path.stat().st_size < LOG_BYTES / 10


def test_a_short_log_is_left_as_it_is_and_a_missing_one_says_nothing(tmp_path):
    child_log = ChildLog(tmp_path / "log")
    child_log.trim()
    assert child_log.lines() == []
    child_log.path.write_text("short\n")
    child_log.trim()
    assert child_log.lines() == ["short"]
