"""A push through the real grafana-client, over HTTP, to a server that keeps Grafana's contract."""

import copy
import re
import socket
from collections.abc import Iterator

import pytest
from eigenwatch.deploy.dashboards import committed_dashboards
from eigenwatch.deploy.grafana_push import DATASOURCE_UID, Change, GrafanaAddress, GrafanaPushError, push

from tests.deploy.grafana_server import TOKEN, Answer, GrafanaServer, refusal

PROMETHEUS = "http://prometheus.test:9090"
RUN = "eigenwatch-run"


@pytest.fixture
def grafana() -> Iterator[GrafanaServer]:
    with GrafanaServer() as server:
        yield server


def push_to(
    server: GrafanaServer, *, token: str = TOKEN, timeout_seconds: float = 5.0, **options: object
) -> list[Change]:
    address = GrafanaAddress(url=server.url, token=token, timeout_seconds=timeout_seconds)
    return push(address, committed_dashboards(), **({"folder": "eigenwatch"} | options))


def actions(changes: list[Change]) -> dict[str, str]:
    return {change.kind: change.action for change in changes}


def test_a_push_makes_the_folder_the_data_source_and_the_dashboards(grafana):
    changes = push_to(grafana, prometheus_url=PROMETHEUS)

    assert actions(changes) == {"folder": "created", "datasource": "created", "dashboard": "created"}
    (folder,) = grafana.folders.values()
    assert folder["title"] == "eigenwatch"
    assert grafana.datasources[DATASOURCE_UID]["url"] == PROMETHEUS
    stored = grafana.dashboards[RUN]
    assert stored["meta"]["folderUid"] == folder["uid"]
    assert stored["dashboard"]["panels"] == committed_dashboards()[0].model["panels"]


def test_a_second_push_changes_nothing_and_writes_nothing(grafana):
    push_to(grafana, prometheus_url=PROMETHEUS)
    state = copy.deepcopy((grafana.folders, grafana.datasources, grafana.dashboards))
    grafana.requests.clear()

    changes = push_to(grafana, prometheus_url=PROMETHEUS)

    assert set(actions(changes).values()) == {"unchanged"}
    assert grafana.writes == []
    assert state == (grafana.folders, grafana.datasources, grafana.dashboards)


def test_an_edit_in_the_browser_is_overwritten_without_a_version_conflict(grafana):
    push_to(grafana)
    stored = grafana.dashboards[RUN]["dashboard"]
    stored |= {"title": "edited", "version": 7}

    assert actions(push_to(grafana))["dashboard"] == "updated"
    assert grafana.dashboards[RUN]["dashboard"]["title"] == "eigenwatch run"
    assert grafana.dashboards[RUN]["dashboard"]["version"] == 8


def test_a_dashboard_in_another_folder_is_moved(grafana):
    push_to(grafana, folder="old")

    assert actions(push_to(grafana, folder="new")) == {"folder": "created", "dashboard": "updated"}
    titles = {uid: folder["title"] for uid, folder in grafana.folders.items()}
    assert titles[grafana.dashboards[RUN]["meta"]["folderUid"]] == "new"


def test_a_data_source_that_points_elsewhere_is_updated_and_keeps_what_else_was_set(grafana):
    push_to(grafana, prometheus_url="http://old.test:9090")
    grafana.datasources[DATASOURCE_UID] |= {"basicAuth": True, "basicAuthUser": "ops"}

    assert actions(push_to(grafana, prometheus_url=PROMETHEUS))["datasource"] == "updated"
    stored = grafana.datasources[DATASOURCE_UID]
    assert (stored["url"], stored["basicAuth"], stored["basicAuthUser"]) == (PROMETHEUS, True, "ops")


def test_without_a_prometheus_url_data_sources_are_not_touched(grafana):
    push_to(grafana)

    assert not [path for _, path in grafana.requests if "datasources" in path]


@pytest.mark.parametrize("pushed_before", [False, True])
def test_a_dry_run_writes_nothing_and_names_what_a_push_would_do(grafana, pushed_before):
    if pushed_before:
        push_to(grafana, prometheus_url="http://old.test:9090")
        grafana.dashboards[RUN]["dashboard"]["title"] = "edited"
        grafana.requests.clear()

    foretold = push_to(grafana, prometheus_url=PROMETHEUS, dry_run=True)

    assert grafana.writes == []
    assert foretold == push_to(grafana, prometheus_url=PROMETHEUS)


def test_an_editor_can_push_where_the_dashboard_does_not_exist_yet(grafana):
    grafana.role = "Editor"

    assert actions(push_to(grafana)) == {"folder": "created", "dashboard": "created"}


def test_a_grafana_under_a_path_is_reached_there():
    with GrafanaServer("/monitoring/grafana") as grafana:
        push_to(grafana)

        assert all(path.startswith("/monitoring/grafana/api/") for _, path in grafana.requests)
        assert RUN in grafana.dashboards


def refused(server: GrafanaServer, **options: object) -> str:
    with pytest.raises(GrafanaPushError) as caught:
        push_to(server, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert TOKEN not in message
    return message


def test_a_wrong_token_is_refused_by_name_and_not_quoted(grafana):
    message = refused(grafana, token="glsa_wrong")

    assert "token refused (401" in message
    assert "GRAFANA_TOKEN" in message
    assert "glsa_wrong" not in message


def test_a_role_too_low_is_told_which_role_it_needs(grafana):
    grafana.role = "Viewer"
    assert "token refused (403" in refused(grafana)

    grafana.role = "Editor"
    assert "for data sources Admin" in refused(grafana, prometheus_url=PROMETHEUS)


def test_a_data_source_of_the_same_name_is_not_taken_over(grafana):
    grafana.datasources["other"] = {"id": 1, "uid": "other", "name": "eigenwatch", "url": "http://other.test"}

    assert "already exists (409)" in refused(grafana, prometheus_url=PROMETHEUS)
    assert grafana.datasources["other"]["url"] == "http://other.test"


def test_a_failing_server_is_reported_with_its_status(grafana):
    grafana.broken = refusal(503, "database is locked")
    assert "database is locked (503)" in refused(grafana)

    grafana.broken = Answer(502, "<html>\n<body>Bad\nGateway</body></html>")
    assert "(502)" in refused(grafana)


def test_a_server_that_quotes_the_token_does_not_leak_it_through_us(grafana):
    grafana.broken = refusal(500, f"cannot parse Bearer {TOKEN}")

    assert "Bearer ***" in refused(grafana)


def test_a_server_that_is_not_grafana_is_told_from_one_that_is(grafana):
    grafana.broken = Answer(200, "<html>Welcome</html>")
    assert "right URL" in refused(grafana)

    grafana.broken = Answer(200, {"status": "ok"})
    assert "right URL" in refused(grafana)


def test_a_server_that_never_answers_runs_into_the_timeout(grafana):
    grafana.hold_answers.clear()

    assert "no answer within 0.2 s" in refused(grafana, timeout_seconds=0.2)


def test_a_port_on_which_nobody_listens_is_one_clear_line():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(GrafanaPushError, match=r"no connection: .*refused") as caught:
            push(GrafanaAddress(url=url, token=TOKEN), committed_dashboards(), folder="eigenwatch")
    assert url in str(caught.value)


@pytest.mark.parametrize(
    ("url", "token", "said"),
    [
        ("127.0.0.1:3000", TOKEN, "http(s)://host"),
        ("http://", TOKEN, "http(s)://host"),
        ("http://host:port", TOKEN, "http(s)://host"),
        ("http://host:3000/?verify=false", TOKEN, "http(s)://host"),
        ("http://admin:hunter2@host:3000", TOKEN, "must not hold credentials"),
        ("http://host:3000", "", "GRAFANA_TOKEN is not set"),
        ("http://host:3000", "two\nlines", "GRAFANA_TOKEN is not a token"),
    ],
)
def test_an_unusable_address_is_refused_with_the_remedy_and_without_the_secret(url, token, said):
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        GrafanaAddress(url=url, token=token)
    assert "hunter2" not in str(caught.value)
    assert "two" not in str(caught.value)


def test_an_unusable_prometheus_url_is_refused_before_anything_is_written(grafana):
    with pytest.raises(ValueError, match="Prometheus URL"):
        push_to(grafana, prometheus_url="prometheus:9090")
    assert grafana.requests == []


def test_the_token_is_in_no_repr():
    assert TOKEN not in repr(GrafanaAddress(url="http://host:3000", token=TOKEN))
