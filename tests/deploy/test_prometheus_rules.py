"""The rules, their promtool tests and the configurations around them."""

import re
import shutil
import subprocess

import pytest
import yaml
from eigenwatch.deploy.promql import unknown_names
from eigenwatch.schemas import STALE_AFTER_SECONDS

from tests.deploy.prometheus_programs import DEPLOY, promtool

PROMETHEUS = DEPLOY / "prometheus"
RULES = [rule for group in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}


def test_promtool_finds_nothing_to_complain_about():
    promtool("check", "rules", "--lint=all", "--lint-fatal", PROMETHEUS / "rules.yml")
    promtool("check", "config", PROMETHEUS / "prometheus.yml")


def test_the_rules_fire_when_they_must_and_only_then():
    promtool("test", "rules", PROMETHEUS / "rules_test.yml")


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_a_case_that_fires_and_one_that_must_not(alert):
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    fires = {
        bool(case["exp_alerts"])
        for test in tests
        for case in test.get("alert_rule_test", [])
        if case["alertname"] == alert
    }
    assert fires == {True, False}


def test_staleness_is_judged_by_the_one_threshold():
    (limit,) = re.findall(r"> (\d+)", ALERTS["EigenwatchTelemetryStale"]["expr"])
    assert int(limit) == STALE_AFTER_SECONDS
    assert ALERTS["EigenwatchRunSilent"]["for"] == f"{STALE_AFTER_SECONDS}s"


def test_no_other_rule_holds_a_threshold_of_its_own():
    """What collapses is judged by the detector; a rule compares with 0 and 1 only."""
    for rule in RULES:
        if rule.get("alert") != "EigenwatchTelemetryStale":
            assert {float(limit) for limit in re.findall(r"[<>=] *([\d.]+)", rule["expr"])} <= {0.0, 1.0}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_every_expression_names_only_what_the_exporter_shows(rule):
    assert unknown_names(rule["expr"]) <= RECORDED


@pytest.mark.parametrize("rule", ALERTS.values(), ids=ALERTS)
def test_every_template_queries_only_what_the_exporter_shows(rule):
    queried = re.findall(r'printf "(\w+)%s" \$series \| query', rule["annotations"]["description"])
    assert not unknown_names(" + ".join(queried))


def test_recording_rules_are_named_level_metric_operations():
    assert RECORDED
    for name in RECORDED:
        assert re.fullmatch(r"[a-z_]+:eigenwatch_[a-z0-9_]+:[a-z0-9_]+", name)


@pytest.mark.parametrize(("name", "rule"), ALERTS.items(), ids=ALERTS)
def test_every_alert_waits_and_says_how_bad_what_and_where_to_read_on(name, rule):
    assert rule["for"] != "0s"
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"
    text = rule["annotations"]["summary"] + rule["annotations"]["description"]
    level = re.search(r" by \(([^)]*)\)", rule["expr"])
    for label in level[1].split(", ") if level else ["instance"]:
        assert f"$labels.{label}" in text


@pytest.mark.parametrize("name", ["EigenwatchLayerCollapsed", "EigenwatchLayerNotFinite"])
def test_what_a_layer_has_outlasts_the_wait_for_a_dead_exporter(name):
    """Otherwise the page would resolve because nobody looks any more."""
    waits = {name: promtool_seconds(rule["for"]) for name, rule in ALERTS.items()}
    assert promtool_seconds(ALERTS[name]["keep_firing_for"]) > waits["EigenwatchExporterDown"]


def test_the_scrape_job_has_the_name_that_the_rules_look_for():
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    assert set(re.findall(r'job="(\w+)"', ALERTS["EigenwatchExporterDown"]["expr"])) <= jobs


def test_alertmanager_routes_every_alert_to_a_receiver_once_a_run():
    path = DEPLOY / "alertmanager" / "alertmanager.yml"
    config = yaml.safe_load(path.read_text())
    assert config["route"]["receiver"] in {receiver["name"] for receiver in config["receivers"]}
    assert {"alertname", "run"} <= set(config["route"]["group_by"])
    if amtool := shutil.which("amtool"):
        done = subprocess.run([amtool, "check-config", path], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def promtool_seconds(duration: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([smh])", duration).groups()
    return int(number) * {"s": 1, "m": 60, "h": 3600}[unit]
