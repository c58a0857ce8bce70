"""Every expression of the dashboards and rules, run by a real Prometheus that scrapes a real exposition.

The exposition holds every family of the catalogue for two layers of one run, so an expression that names a
wrong label or joins on the wrong ones returns nothing and fails here.
"""

import json
import re
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from eigenwatch.deploy.dashboards import committed_dashboards
from eigenwatch.schemas.prometheus import FAMILIES
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from tests.deploy.prometheus_programs import DEPLOY, program

LABELS = {
    "run": ["demo"], "layer": ["0", "1"], "site": ["post"], "expert": [""], "kind": ["collapse"],
    "severity": ["critical"], "reason": ["malformed"],
}  # fmt: skip
VARIABLES = {"$run": "demo", "$site": "post", "$layer": ".*", "$__rate_interval": "2s"}


def catalogue_registry() -> CollectorRegistry:
    """One sample or more of every family, labelled as the catalogue says."""
    registry = CollectorRegistry()
    kinds = {"gauge": Gauge, "counter": Counter, "histogram": Histogram}
    for family in FAMILIES:
        metric = kinds[family.kind](family.name, family.help, family.labels, registry=registry)
        for layer in LABELS["layer"] if "layer" in family.labels else [""]:
            labels = {name: layer if name == "layer" else LABELS.get(name, ["1"])[0] for name in family.labels}
            child = metric.labels(**labels) if labels else metric
            child.observe(0.1) if family.kind == "histogram" else child.inc(0.5)
    return registry


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> dict:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}{path}?{query}", timeout=10) as answer:
            return json.load(answer)

    def query(self, expression: str) -> list[dict]:
        answer = self.get("/api/v1/query", query=expression)
        assert answer["status"] == "success", answer
        return answer["data"]["result"]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory) -> Iterator[Prometheus]:
    binary = program("prometheus", "prometheus")
    folder: Path = tmp_path_factory.mktemp("prometheus")
    server, thread = start_http_server(0, addr="127.0.0.1", registry=catalogue_registry())
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "200ms", "evaluation_interval": "200ms"}
    config["rule_files"] = [str(DEPLOY / "prometheus/rules.yml")]
    (job,) = [job for job in config["scrape_configs"] if job["job_name"] == "eigenwatch"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{server.server_port}"]}]
    config["scrape_configs"] = [job]
    del config["alerting"]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        started = Prometheus(f"http://{address}")
        # Two scrapes for a rate, one evaluation for the recording rule.
        wait_for(started, "rate(eigenwatch_partials_received_total[2s])", process, folder / "log")
        wait_for(started, "run_site:eigenwatch_hard_utilization:min", process, folder / "log")
        yield started
    finally:
        process.terminate()
        process.wait(10)
        server.shutdown()
        server.server_close()
        thread.join(10)


def wait_for(prometheus: Prometheus, expression: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if prometheus.query(expression):
                return
        except OSError:
            pass
        time.sleep(0.05)
    pytest.fail(f"Prometheus did not answer {expression}:\n{log.read_text()[-2000:]}")


def test_every_expression_of_every_panel_and_variable_returns_data(prometheus):
    checked = 0
    for dashboard in committed_dashboards():
        for where, text in dashboard.expressions():
            expression = re.sub(r"\$\w+", lambda name: VARIABLES[name[0]], text)
            assert prometheus.query(expression), f"{where}: {expression} returns nothing"
            checked += 1
    assert checked >= 20


def test_every_variable_asks_for_a_label_that_its_series_have(prometheus):
    for dashboard in committed_dashboards():
        for variable in dashboard.model["templating"]["list"]:
            if variable["type"] == "query":
                metric, label = re.fullmatch(r"label_values\((\w+).*, (\w+)\)", variable["definition"]).groups()
                assert all(label in series["metric"] for series in prometheus.query(metric))


def test_the_heatmap_has_one_series_a_layer_named_by_a_number(prometheus):
    for panel in committed_dashboards()[0].panels():
        if panel["type"] == "heatmap":
            expression = re.sub(r"\$\w+", lambda name: VARIABLES[name[0]], panel["targets"][0]["expr"])
            series = [result["metric"] for result in prometheus.query(expression)]
            assert sorted(labels["layer"] for labels in series) == ["0", "1"]


def test_the_rules_load_and_evaluate_without_an_error(prometheus):
    groups = prometheus.get("/api/v1/rules")["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
