"""`eigenwatch dashboards`, as a user runs it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from eigenwatch.cli.dashboards import dashboards

sys.path.insert(0, str(Path(__file__).parents[1] / "deploy"))
from tests.deploy.grafana_server import TOKEN, GrafanaServer

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture
def grafana() -> Iterator[GrafanaServer]:
    with GrafanaServer() as server:
        yield server


def run(*arguments: str, token: str = TOKEN) -> Result:
    result = CliRunner().invoke(dashboards, arguments, env={"GRAFANA_TOKEN": token}, catch_exceptions=False)
    assert not token or token not in result.output
    return result


def test_push_says_what_it_did_and_the_second_time_that_nothing_changed(grafana):
    first = run("push", "--url", grafana.url)
    assert first.exit_code == 0
    assert first.output == "folder eigenwatch: created\ndashboard eigenwatch run: created\n"

    second = run("push", "--url", grafana.url)
    assert second.output == "folder eigenwatch: unchanged\ndashboard eigenwatch run: unchanged\n"


def test_push_dry_run_writes_nothing(grafana):
    result = run("push", "--url", grafana.url, "--prometheus-url", "http://prometheus.test:9090", "--dry-run")

    assert "datasource eigenwatch: would be created" in result.output
    assert grafana.writes == []


def test_push_json_is_for_machines(grafana):
    result = run("push", "--url", grafana.url, "--folder", "training", "--json")

    assert json.loads(result.output) == {
        "dry_run": False,
        "changes": [
            {"kind": "folder", "name": "training", "action": "created"},
            {"kind": "dashboard", "name": "eigenwatch run", "action": "created"},
        ],
    }


def test_push_with_a_refused_token_fails_in_one_line(grafana):
    result = run("push", "--url", grafana.url, token="glsa_wrong")

    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert "token refused (401" in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "token", "said"),
    [
        (["--url", "localhost:3000"], TOKEN, "http(s)://host"),
        (["--prometheus-url", "prometheus:9090"], TOKEN, "Prometheus URL"),
        ([], "", "GRAFANA_TOKEN is not set"),
        (["--nonsense"], TOKEN, "No such option"),
    ],
)
def test_push_with_unusable_input_is_wrong_usage(arguments, token, said):
    result = run("push", *arguments, token=token)

    assert result.exit_code == 2
    assert said in result.output


def test_write_lays_the_files_out_as_grafana_reads_them(tmp_path):
    for _ in range(2):  # over its own copies too
        result = run("write", str(tmp_path / "grafana"))
        assert result.exit_code == 0

    source = DEPLOY / "grafana"
    written = {path.relative_to(tmp_path / "grafana") for path in (tmp_path / "grafana").rglob("*.*")}
    assert written == {path.relative_to(source) for path in source.rglob("*.*")}
    assert Path("dashboards/eigenwatch-run.json") in written
    for path in written:
        assert (tmp_path / "grafana" / path).read_bytes() == (source / path).read_bytes()


def test_write_where_a_file_is_in_the_way_fails_in_one_line(tmp_path):
    (tmp_path / "dashboards").write_text("a file")
    result = run("write", str(tmp_path))

    assert result.exit_code == 1
    assert result.output.startswith("Error: cannot write ")
    assert len(result.output.splitlines()) == 1


def test_check_accepts_the_committed_dashboards():
    result = run("check")

    assert result.exit_code == 0
    assert "name only known metrics" in result.output


def test_check_refuses_a_metric_that_the_exporter_does_not_show(tmp_path):
    model = json.loads((DEPLOY / "grafana/dashboards/eigenwatch-run.json").read_text())
    model["panels"][0]["targets"][0]["expr"] = "min(eigenwatch_hard_utilisation)"
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(model))

    result = run("check", str(mine))

    assert result.exit_code == 1
    assert "mine.json: panel 'Worst hard utilization' names eigenwatch_hard_utilisation" in result.output


def test_check_of_something_else_fails_in_one_line(tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text("{}")
    result = run("check", str(mine))
    assert result.exit_code == 1
    assert "is not a Grafana dashboard" in result.output

    assert run("check", str(tmp_path / "absent.json")).exit_code == 2


@pytest.mark.parametrize("arguments", [[], ["push"], ["write"], ["check"]])
def test_help_has_an_example(arguments):
    result = run(*arguments, "--help")

    assert result.exit_code == 0
    assert "Example:" in result.output
