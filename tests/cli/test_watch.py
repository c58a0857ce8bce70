"""`eigenwatch watch`: what is seen of a run that writes, on a real terminal, in a pipe, and from a real exporter."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from eigenwatch.agent import attach
from eigenwatch.aggregator.exporter import Endpoint
from eigenwatch.aggregator.judge import Alert
from eigenwatch.aggregator.snapshot import (
    LATENCY_BOUNDS,
    SOLVE_BOUNDS,
    Histogram,
    LatestRecord,
    RunCounters,
    RunState,
    ShardSnapshot,
    Snapshot,
)
from eigenwatch.cli import cli
from eigenwatch.cli.watch.scraped import ScrapedSource
from eigenwatch.cli.watch.stored import StoredSource
from eigenwatch.cli.watch.table import draw
from eigenwatch.cli.watch.view import Firing, Ingestion, Layer, Series, View
from eigenwatch.history.compaction import CompactionConfig, compact
from eigenwatch.schemas import SeriesKey
from eigenwatch.schemas.store import open_store
from rich.console import Console

from tests.history.stored import NOT_FINITE, START, alert, at, record, run, write
from tests.processes import wait_until

METRIC = "hard_utilization"
NOW = START.timestamp() + 100
DOCUMENT = (Path(__file__).parents[2] / "docs" / "watch.md").read_text(encoding="utf-8")


def watch(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["watch", *arguments])


def described(layers: int) -> list[dict[str, object]]:
    return [
        {"layer": layer, "site": "post", "expert": None, "name": f"l{layer}", "width": 256} for layer in range(layers)
    ]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A run of four layers, one of which has collapsed, one is not finite and one has shown nothing."""
    write(tmp_path, "llama", "runs", run(written=0, layers=described(4), dropped=[("outbox_full", 3)]))
    write(tmp_path, "llama", "records", *(record(step, layer) for step in (0, 10) for layer in (0, 1)))
    write(tmp_path, "llama", "records", record(10, 2, **NOT_FINITE))
    write(tmp_path, "llama", "alerts", alert("a", 10, written=10, reason="two directions"))
    return tmp_path


# What is seen of a store


def test_each_layer_has_a_state_its_last_values_and_its_history(store: Path) -> None:
    view = StoredSource(str(store), "llama", METRIC).read(NOW)
    assert (view.run_id, view.status, view.attempt, view.world_size, view.step) == ("llama", "running", 0, 2, 10)
    assert [(layer.series.layer, layer.states, layer.step) for layer in view.layers] == [
        (0, ("collapse",), 10),
        (1, ("ok",), 10),
        (2, ("not finite",), 10),
        (3, ("no record",), None),
    ]
    assert view.layers[0].history == [0.0745, 0.0745]
    assert view.layers[2].history == [None]
    assert view.alerts == [Firing(Series(0, "post", None), "collapse", "critical", 0, "two directions")]
    assert view.ingestion.dropped == {"outbox_full": 3}
    assert view.ingestion.last_record_at == at(10).timestamp()
    assert view.ingestion.complete_ratio == 1


def test_what_was_read_once_is_not_read_again(store: Path) -> None:
    old = write(store, "llama", "records", record(15, 1))
    source = StoredSource(str(store), "llama", METRIC)
    source.read(NOW)
    other = write(store, "elsewhere", "records", record(15, 1, written=99, hard_utilization=0.9))
    other.replace(old)  # which nobody does; but who read it again would see it
    write(store, "llama", "records", record(20, 1, hard_utilization=0.5))
    layer = source.read(NOW).layers[1]
    assert (layer.step, layer.history) == (20, [0.0745, 0.0745, 0.0745, 0.5])


def test_a_compaction_in_between_changes_nothing(store: Path) -> None:
    source = StoredSource(str(store), "llama", METRIC)
    before = source.read(NOW)
    compact(open_store(store), CompactionConfig(grace_seconds=0))
    assert source.read(NOW) == before


def test_a_later_revision_replaces_a_record_and_a_restart_hides_what_it_abandoned(store: Path) -> None:
    source = StoredSource(str(store), "llama", METRIC)
    source.read(NOW)
    write(store, "llama", "records", record(20, 1, complete=False, ranks_seen=1, ranks_missing=[1]))
    seen = source.read(NOW)
    assert (seen.layers[1].states, seen.ingestion.ranks_missing) == (("incomplete",), (1,))
    write(store, "llama", "records", record(20, 1, written=21, hard_utilization=0.3))
    assert source.read(NOW).layers[1].history == [0.0745, 0.0745, 0.3]
    write(store, "llama", "records", record(10, 1, written=30, attempt=1, hard_utilization=0.2))
    restarted = source.read(NOW)
    assert restarted.layers[1].history == [0.0745, 0.2]
    assert restarted.layers[0].history == [0.0745]


def test_an_alert_goes_when_it_is_resolved_and_a_run_says_when_it_has_ended(store: Path) -> None:
    source = StoredSource(str(store), "llama", METRIC)
    assert source.read(NOW).alerts
    write(store, "llama", "alerts", alert("a", 20, written=20, state="resolved"))
    write(store, "llama", "runs", run(written=30, status="finished"))
    view = source.read(NOW)
    assert (view.alerts, view.status) == ([], "finished")


def test_a_layer_of_a_running_run_without_a_record_for_long_is_stale(store: Path) -> None:
    source = StoredSource(str(store), "llama", METRIC)
    assert source.read(NOW + 1000).layers[1].states == ("stale",)
    write(store, "llama", "runs", run(written=30, status="finished"))
    assert source.read(NOW + 1000).layers[1].states == ("ok",)


def test_without_a_name_it_is_the_run_under_way_else_the_newest(store: Path) -> None:
    write(store, "later", "runs", run(written=50, started_at=at(50), status="finished"))
    write(store, "later", "records", record(0))
    view = StoredSource(str(store), None, METRIC).read(NOW)
    assert (view.run_id, view.chosen) == ("llama", "the run under way of 2")
    write(store, "llama", "runs", run(written=60, status="finished"))
    view = StoredSource(str(store), None, METRIC).read(NOW)
    assert (view.run_id, view.chosen) == ("later", "the newest run of 2")


def test_several_runs_under_way_are_named(store: Path) -> None:
    write(store, "other", "runs", run(written=50))
    done = watch("--store", str(store), "--once")
    assert done.exit_code == 2
    assert "2 runs are under way (llama, other): name one of them, such as: eigenwatch watch llama" in done.stderr


def test_what_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    source = StoredSource(str(tmp_path / "store"), "llama", METRIC)
    assert source.read(NOW).waiting_for == (f"no store at {tmp_path / 'store'}",)
    write(tmp_path / "store", "other", "runs", run(written=0))
    assert source.read(NOW).waiting_for == (f"no run llama in {tmp_path / 'store'}; there are other",)
    write(tmp_path / "store", "llama", "records", record(0))
    view = source.read(NOW)
    assert (view.waiting_for, view.step) == ((), 0)


def test_a_training_is_seen(tmp_path: Path) -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(8, 24), torch.nn.Linear(24, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).relu())

    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([Block(), Block()])})
    source = StoredSource(str(tmp_path), None, METRIC)
    with attach(
        model, run_id="r", every=1, store=str(tmp_path), aggregator="inline", layers=r"blocks\.(\d+)\.down"
    ) as agent:
        for step in range(3):
            for block in model["blocks"]:
                block(torch.randn(64, 8))
            agent.step(step)
    view = source.read(NOW)
    assert [(layer.series.layer, layer.width, len(layer.history)) for layer in view.layers] == [(0, 24, 3), (1, 24, 3)]


# What is seen of an exporter


class Exporter:
    """An aggregator's endpoint, which may go and come back on its port."""

    def __init__(self) -> None:
        self.port = 0
        self.written = 0
        self.step = 10
        self.start()
        self.port = int(self.endpoint.url.split(":")[2].split("/")[0])

    def start(self) -> None:
        self.endpoint = Endpoint(self.snapshot, "127.0.0.1", self.port)

    def snapshot(self) -> Snapshot:
        series = [SeriesKey("llama", 1, layer, "post", None) for layer in range(2)]
        values = {"hard_utilization": 0.25, "hard_rank": 2.0, "width": 256.0, "finite": 1.0, "complete": 1.0}
        return Snapshot(
            NOW,
            [RunState("llama", 1, 8, 2, {"outbox_full": 2})],
            [
                ShardSnapshot(
                    "incarnation",
                    [LatestRecord(one, self.step, NOW - 5, values) for one in series],
                    [Alert(series[1], "collapse", "critical", True)],
                    {"llama": RunCounters(4, 0, self.written)},
                    Histogram.empty(SOLVE_BOUNDS),
                    Histogram.empty(LATENCY_BOUNDS),
                    1.5,
                    {},
                )
            ],
        )


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    exporter = Exporter()
    yield exporter
    exporter.endpoint.close()


def test_an_exporter_shows_layers_alerts_and_its_own_health(exporter: Exporter) -> None:
    source = ScrapedSource(exporter.endpoint.url, None, METRIC)
    source.read(NOW)
    exporter.step, exporter.written = 20, 6
    view = source.read(NOW + 3)
    assert (view.run_id, view.attempt, view.world_size, view.step) == ("llama", 1, 8, 20)
    assert [(layer.states, layer.width, layer.history) for layer in view.layers] == [
        (("ok",), 256, [0.25, 0.25]),
        (("collapse",), 256, [0.25, 0.25]),
    ]
    assert [(one.series.layer, one.kind, one.reason) for one in view.alerts] == [
        (1, "collapse", "now hard rank 2, hard utilization 0.25")
    ]
    assert view.ingestion == Ingestion(
        NOW - 5, 2.0, 1.0, dropped={"outbox_full": 2}, backlog_seconds=1.5, shards_here=1, shards_away=0
    )


def test_an_exporter_that_goes_is_waited_for_and_followed_when_it_is_back(exporter: Exporter) -> None:
    source = ScrapedSource(exporter.endpoint.url, "llama", METRIC)
    exporter.written = 6
    source.read(NOW)
    exporter.endpoint.close()
    gone = source.read(NOW + 2)
    assert gone.status == "unknown"
    assert "no answer from http" in gone.waiting_for[0]
    assert len(gone.layers) == 2
    exporter.written = 0
    exporter.start()
    back = source.read(NOW + 4)
    assert (back.status, back.waiting_for, back.ingestion.records_per_second) == ("running", (), None)


def test_an_address_that_is_no_exporter_is_said_in_one_line(exporter: Exporter) -> None:
    root = exporter.endpoint.url.replace("/metrics", "/nothing")
    for url, words in ((root, "eigenwatch|404"), ("http://127.0.0.1:1/metrics", "refused")):
        done = watch("--url", url, "--once")
        assert done.exit_code in (0, 1)
        if done.exit_code:
            assert re.search(words, done.stderr)
            assert len(done.stderr.splitlines()) == 1
    assert watch("--url", "127.0.0.1:9845").exit_code == 2
    assert watch("--url", exporter.endpoint.url, "--store", "x").exit_code == 2


# How it is drawn


def view_of(layers: int, alerts: int = 0) -> View:
    def layer(number: int) -> Layer:
        values = dict.fromkeys(("hard_rank", "soft_rank", "spectral_concentration"), 12.5)
        used = 0.5 - number / 1000
        return Layer(
            Series(number, "post", None), ("collapse",) if number < alerts else ("ok",), 3072, 12345,
            values | {METRIC: used}, [used * (1 + step % 7) for step in range(120)], NOW,
        )  # fmt: skip

    firing = [
        Firing(Series(one, "post", None), "collapse", "critical", 10, "two directions " * 9) for one in range(alerts)
    ]
    told = Ingestion(NOW, 1.5, 0.99, (3, 5), {"outbox_full": 2}, 0.4, 2.0, 2, 1, True)
    return View("store", "llama", "running", 0, 8, METRIC, [layer(one) for one in range(layers)], firing, told)


def drawn(view: View, width: int, height: int | None) -> list[str]:
    console = Console(width=width, height=height or 25, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(draw(view, NOW, width, height))
    return console.export_text().splitlines()


@pytest.mark.parametrize("alerts", [0, 1, 40])
@pytest.mark.parametrize(("width", "height"), [(300, 120), (120, 40), (80, 24), (50, 12), (30, 6), (12, 3)])
def test_it_fits_any_screen(width: int, height: int, alerts: int) -> None:
    lines = drawn(view_of(96, alerts), width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_where_layers_do_not_fit_the_worst_come_first_and_the_rest_is_counted() -> None:
    lines = drawn(view_of(96, alerts=1), 100, 24)
    rows = [int(line.split()[0]) for line in lines if re.match(r"\d+ +(ok|collapse) ", line)]
    assert rows[:3] == [0, 95, 94]  # the one with the alert, then the least utilization
    assert any(f"{96 - len(rows)} layers hidden" in line for line in lines)
    assert [line.split()[0] for line in drawn(view_of(5), 100, 24) if re.match(r"\d+ +ok", line)] == list("01234")


def test_96_layers_are_seen_at_once_on_a_tall_screen() -> None:
    lines = drawn(view_of(96), 100, 105)
    assert len([line for line in lines if re.match(r"\d+ +ok ", line)]) == 96


def test_a_narrow_screen_shows_state_and_the_watched_metric_before_all_else() -> None:
    wide, narrow = drawn(view_of(3), 160, 24), drawn(view_of(3), 45, 24)
    assert any(re.match(r"layer +state +hard util +hard +soft +.*conc +.*D +step", line) for line in wide)
    (heading,) = [line for line in narrow if line.startswith("layer")]
    assert heading.split() == ["layer", "state", "hard", "util"]


def test_a_sparkline_is_on_one_scale_for_all_layers() -> None:
    view = view_of(2)
    layers = [view.layers[0]._replace(history=[0.01, None, 1.0]), view.layers[1]._replace(history=[0.1])]
    lines = drawn(view._replace(layers=layers), 100, 24)
    assert any("▁·█" in line for line in lines)
    assert any("▅" in line for line in lines if line.startswith("1"))  # 0.1 is half way on a log scale
    assert any("hard_utilization ▁ 0.01 … █ 1, log" in line for line in lines)


def test_the_health_of_the_telemetry_is_said_in_full() -> None:
    text = "\n".join(drawn(view_of(2), 60, None))
    for words in (
        "last record 0.0 s ago", "1.5 records/s", "99 % complete", "missing ranks 3, 5", "stored 0.4 s after its step",
        "backlog 2 s", "2 shards, 1 away", "2 dropped (outbox_full 2)", "another job trains under this run id",
    ):  # fmt: skip
        assert words in text


# On a terminal, and in a pipe


SLOW = """
import eigenwatch.cli.watch.screen as screen
from eigenwatch.cli import main
screen.REDRAW_SECONDS = 1000.0  # so that what is drawn was drawn for a reason
main()
"""


class Terminal:
    """A command in a pseudo-terminal of its own."""

    def __init__(self, columns: int, lines: int, *arguments: str) -> None:
        self.keyboard, self.line = pty.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(self.line)
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", SLOW, "watch", *arguments],
            stdin=self.line,
            stdout=self.line,
            stderr=self.line,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env=environment | {"TERM": "xterm-256color"},
        )
        self.shown = ""

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def wait_for(self, text: str) -> str:
        """What came up to this text, without colours; forgets what came before."""

        def look() -> str | None:
            while select.select([self.keyboard], [], [], 0)[0]:
                self.shown += os.read(self.keyboard, 1 << 16).decode(errors="replace")
            plain = re.sub(r"\x1b\[[0-9;]*m", "", self.shown)
            return plain if text in plain else None

        plain = wait_until(look, f"{text!r} on the screen")
        self.shown = ""
        return plain

    def type(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def ended(self) -> int:
        """The exit status; the terminal is as it was."""
        self.wait_for("\x1b[?1049l")
        code = self.process.wait(60)
        assert termios.tcgetattr(self.line) == self.before
        os.close(self.keyboard)
        os.close(self.line)
        return code


@pytest.fixture
def terminal() -> Iterator[type[Terminal]]:
    started: list[Terminal] = []

    class Kept(Terminal):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            started.append(self)

    yield Kept
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def test_on_a_terminal_it_follows_the_run_and_the_size_of_the_window_until_q(tmp_path: Path, terminal) -> None:
    write(tmp_path, "llama", "runs", run(written=0, layers=described(30)))
    write(tmp_path, "llama", "records", *(record(10, layer) for layer in range(30)))
    screen = terminal(100, 20, "--store", str(tmp_path), "--interval", "0.1")
    assert "\x1b[?1049h" in screen.wait_for("layers hidden, better off than these")
    write(tmp_path, "llama", "records", record(4711, 3))
    screen.wait_for("step 4711")
    screen.resize(100, 60)
    wait_until(lambda: "layers hidden" not in screen.wait_for("29     stale"), "a screen with all layers")
    screen.type("q")
    assert screen.ended() == 0


def test_a_new_size_of_the_window_is_drawn_at_once(store: Path, terminal) -> None:
    screen = terminal(100, 20, "llama", "--store", str(store), "--interval", "1000")
    screen.wait_for("hard_utilization ▁")
    screen.resize(100, 8)
    screen.wait_for("layers hidden")
    screen.type("q")
    assert screen.ended() == 0


@pytest.mark.parametrize("end", ["Ctrl-C", "Ctrl-\\", "SIGTERM", "SIGHUP"])
def test_it_waits_for_a_store_and_ends_quietly_by(end: str, tmp_path: Path, terminal) -> None:
    screen = terminal(100, 20, "llama", "--store", str(tmp_path / "store"), "--interval", "0.1")
    screen.wait_for("waiting: no store at")
    write(tmp_path / "store", "llama", "records", record(10))
    screen.wait_for("step 10")
    screen.type("\x1a")  # Ctrl-Z would leave a shell with half a terminal
    write(tmp_path / "store", "llama", "records", record(20))
    screen.wait_for("step 20")
    if end.startswith("Ctrl"):
        screen.type({"Ctrl-C": "\x03", "Ctrl-\\": "\x1c"}[end])
    else:
        screen.process.send_signal(getattr(signal, end))
    assert screen.ended() == 0
    assert "Traceback" not in screen.shown


def test_in_a_pipe_it_prints_every_look_until_nobody_reads(store: Path) -> None:
    command = [sys.executable, "-m", "eigenwatch.cli", "watch", "--store", str(store), "--json", "--interval", "0.1"]
    piped = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert piped.stdout is not None
    assert json.loads(piped.stdout.readline())["step"] == 10
    write(store, "llama", "records", record(20))
    assert any(json.loads(piped.stdout.readline())["step"] == 20 for _ in count())
    piped.stdout.close()
    assert piped.wait(60) == 0
    assert piped.stderr is not None
    assert piped.stderr.read() == ""
    piped.stderr.close()


def test_once_prints_the_whole_view(store: Path) -> None:
    done = watch("llama", "--store", str(store), "--once")
    assert done.exit_code == 0
    assert re.search(r"^0 +collapse, stale +0.0745 ", done.stdout, re.MULTILINE)
    said = json.loads(watch("--store", str(store), "--once", "--json", "--metric", "soft_rank").stdout)
    assert said["layers"][1]["history"] == [80.0, 80.0]
    assert said["layers"][3]["states"] == ["no record"]
    assert said["alerts"][0]["reason"] == "two directions"


def test_once_fails_in_one_line_where_there_is_nothing(tmp_path: Path) -> None:
    done = watch("--store", str(tmp_path / "nowhere"), "--once")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: no store at {tmp_path / 'nowhere'}")
    assert watch("--metric", "nothing", "--once").exit_code == 2


# The document

COMMANDS = re.findall(r"^    eigenwatch watch(.*)$", DOCUMENT, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_document_works(
    command: str, store: Path, exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store / "runs").mkdir()
    (store / "run_id=llama").rename(store / "runs" / "run_id=llama-130m")
    monkeypatch.chdir(store)
    arguments = command.replace("http://127.0.0.1:9845/metrics", exporter.endpoint.url).split()
    done = watch(*arguments, *([] if "--once" in arguments else ["--once"]))
    assert done.exit_code == 0, done.output
    assert "llama" in done.stdout


def test_every_state_of_the_document_is_one() -> None:
    told = set(re.findall(r"^\| `([a-z ]+)` \|", DOCUMENT, re.MULTILINE))
    assert told == {"ok", "collapse", "not finite", "stale", "incomplete", "skipped", "no record"}
    assert len(COMMANDS) >= 4
