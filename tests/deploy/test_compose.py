"""The compose stack, as far as its file tells: no engine runs here."""

import re
import tomllib
from pathlib import PurePosixPath

import pytest
import yaml

from tests.deploy.prometheus_programs import DEPLOY

COMPOSE = DEPLOY / "compose"
REPOSITORY = DEPLOY.parent
STACK = yaml.safe_load((COMPOSE / "compose.yml").read_text())
SERVICES = STACK["services"]
DOCKERFILE = (COMPOSE / "Dockerfile").read_text()
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())

each_service = pytest.mark.parametrize("name", SERVICES)


def test_the_stack_is_aggregator_prometheus_alertmanager_and_grafana():
    assert set(SERVICES) == {"aggregator", "prometheus", "alertmanager", "grafana"}


@each_service
def test_a_service_runs_unprivileged_on_a_read_only_root(name):
    service = SERVICES[name]
    uid = int(service["user"].split(":")[0])
    assert uid != 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert "no-new-privileges:true" in service["security_opt"]


@each_service
def test_a_service_is_published_on_the_loopback_only_and_says_whether_it_is_healthy(name):
    assert SERVICES[name]["ports"]
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name]["ports"])
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"


@each_service
def test_an_image_is_pinned_to_an_exact_version(name):
    assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])


def test_the_aggregators_image_carries_the_packages_version_and_pinned_bases():
    assert SERVICES["aggregator"]["image"].endswith(f":{PROJECT['project']['version']}")
    for base in re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE):
        assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base)
    assert re.search(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)[1] == SERVICES["aggregator"]["user"]


@each_service
def test_every_mounted_file_exists_and_is_read_only_and_every_volume_is_declared(name):
    for mount in SERVICES[name].get("volumes", []):
        source, _, mode = mount.split(":") if mount.count(":") == 2 else (*mount.split(":"), "rw")
        if source.startswith("."):
            assert (COMPOSE / source).resolve().exists(), mount
            assert mode == "ro", mount
        else:
            assert source in STACK["volumes"], mount


@pytest.mark.parametrize("name", ["prometheus", "alertmanager"])
def test_a_configuration_and_its_rules_are_mounted_where_the_program_looks(name):
    targets = [mount.split(":")[1] for mount in SERVICES[name]["volumes"]]
    (config,) = [flag.split("=")[1] for flag in SERVICES[name]["command"] if "config.file" in flag]
    assert config in targets
    for rules in yaml.safe_load((DEPLOY / name / f"{name}.yml").read_text()).get("rule_files", []):
        assert str(PurePosixPath(config).with_name(rules)) in targets


def test_no_password_is_built_in_and_grafanas_is_required():
    text = (COMPOSE / "compose.yml").read_text()
    assert "${GRAFANA_ADMIN_PASSWORD:?" in text
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if "PASSWORD" in name or "TOKEN" in name:
                assert value is None or value.startswith("${"), name


def test_the_dockerfile_copies_every_package_that_is_installed_and_what_the_build_reads():
    copied = {word for line in re.findall(r"^COPY (?!--)(.*)", DOCKERFILE, re.MULTILINE) for word in line.split()}
    rooms = {folder.split("/")[0] for folder in PROJECT["tool"]["setuptools"]["package-dir"].values()}
    assert rooms <= copied
    assert {"pyproject.toml", "constraints.txt", PROJECT["project"]["readme"]} <= copied
    assert set(PROJECT["project"]["license-files"]) <= copied


def test_prometheus_scrapes_the_port_on_which_the_aggregator_serves():
    command = SERVICES["aggregator"]["command"]
    port = command[command.index("--metrics-port") + 1]
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    targets = {
        job["job_name"]: target
        for job in config["scrape_configs"]
        for static in job["static_configs"]
        for target in static["targets"]
    }
    assert targets["eigenwatch"] == f"aggregator:{port}"
    assert f"127.0.0.1:{port}:{port}" in SERVICES["aggregator"]["ports"]
    assert f":{port}/metrics" in SERVICES["aggregator"]["healthcheck"]["test"][-1]


def test_the_provisioned_data_source_and_folder_are_where_compose_puts_them():
    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((provisioning / "dashboards/eigenwatch.yml").read_text())["providers"]
    mounts = dict(mount.split(":")[:2] for mount in SERVICES["grafana"]["volumes"])
    assert mounts["../grafana/dashboards"] == provider["options"]["path"]
    assert mounts["../grafana/provisioning"] == "/etc/grafana/provisioning"
