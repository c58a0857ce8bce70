"""The committed dashboards: what stands in the JSON. `test_expressions_live.py` runs their queries."""

import pytest
import yaml
from eigenwatch.deploy.dashboards import Dashboard, committed_dashboards, load_dashboard, unknown_metrics
from eigenwatch.deploy.grafana_push import DATASOURCE_UID
from eigenwatch.deploy.promql import SAMPLE_NAMES, metric_names, unknown_names, variable_expression
from eigenwatch.schemas import COLLAPSE, STALE_AFTER_SECONDS

from tests.deploy.prometheus_programs import DEPLOY

DASHBOARDS = committed_dashboards()
PANELS = [
    pytest.param(panel, id=f"{dashboard.uid}-{panel['title']}")
    for dashboard in DASHBOARDS
    for panel in dashboard.panels()
]
HEATMAPS = [panel for panel in PANELS if panel.values[0]["type"] == "heatmap"]
RUN = next(dashboard for dashboard in DASHBOARDS if dashboard.uid == "eigenwatch-run")


def panel_titled(title: str) -> dict:
    return next(panel for panel in RUN.panels() if panel["title"] == title)


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_every_expression_names_only_what_the_exporter_shows(dashboard):
    assert unknown_metrics(dashboard) == []
    assert len(list(dashboard.expressions())) > len(list(dashboard.panels()))


@pytest.mark.parametrize("panel", PANELS)
def test_every_panel_has_a_unit_and_says_what_it_shows(panel):
    assert len(panel["description"]) > 40
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"]["uid"] == "${datasource}"
    assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_panels_have_ids_of_their_own_and_do_not_overlap(dashboard):
    panels = list(dashboard.panels())
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for grid in [panel["gridPos"]]
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


@pytest.mark.parametrize("panel", HEATMAPS)
def test_a_heatmap_draws_one_row_a_layer_and_hides_no_value(panel):
    (target,) = panel["targets"]
    assert panel["options"]["calculate"] is False
    assert target["format"] == "time_series"
    # Rows sort as numbers only when every name is a number, and every name must be that of one row.
    assert target["legendFormat"] == "{{layer}}"
    assert "by (layer)" in target["expr"]
    # Grafana's own default hides cells up to 1e-9, and a logarithm is negative.
    assert panel["options"]["filterValues"]["le"] < panel["options"]["color"]["min"]


def test_the_heatmaps_are_the_papers_three_in_its_scales():
    expressions = {
        next(iter(metric_names(panel.values[0]["targets"][0]["expr"]))): panel.values[0] for panel in HEATMAPS
    }
    assert set(expressions) == {
        "eigenwatch_hard_utilization",
        "eigenwatch_soft_utilization",
        "eigenwatch_spectral_concentration",
    }
    for name, panel in expressions.items():
        logarithmic = name != "eigenwatch_spectral_concentration"
        assert panel["targets"][0]["expr"].startswith("log10(") is logarithmic
        assert (panel["fieldConfig"]["defaults"]["unit"] == "prefix:10^") is logarithmic


def test_colors_change_at_the_thresholds_of_the_detector():
    steps = panel_titled("Worst hard utilization")["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert [step["value"] for step in steps] == [
        None,
        COLLAPSE.hard_utilization_enter,
        COLLAPSE.hard_utilization_leave,
    ]
    for title in ("Oldest last record", "Freshness"):
        steps = panel_titled(title)["fieldConfig"]["defaults"]["thresholds"]["steps"]
        assert [step["value"] for step in steps] == [None, STALE_AFTER_SECONDS]


def test_the_variables_choose_data_source_run_site_and_layer():
    variables = {variable["name"]: variable for variable in RUN.model["templating"]["list"]}
    assert list(variables) == ["datasource", "run", "site", "layer"]
    assert variables["layer"]["multi"]
    # Two sites in one heatmap would be two rows of the same name.
    assert not variables["site"]["multi"]
    assert not variables["site"]["includeAll"]


def test_provisioning_dashboards_and_push_agree_on_the_data_source():
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["uid"] == DATASOURCE_UID
    assert RUN.model["templating"]["list"][0]["current"]["value"] == DATASOURCE_UID


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('sum by (layer) (rate(a_total{run="$run",x=~"b|c"}[$__rate_interval]))', {"a_total"}),
        ("a / on (run, layer) group_left (kind) b", {"a", "b"}),
        ("histogram_quantile(0.95, sum by (le) (rate(a_bucket[5m]))) > 1e-3", {"a_bucket"}),
        ("a offset 5m unless on () b or vector(0)", {"a", "b"}),
        ("max without (severity) (a) == bool 1 and b @ start()", {"a", "b"}),
        ("topk(3, run:a:min) * ${factor} + $other", {"run:a:min"}),
        ("label_replace(a, 'to', \"b {c}\", `from`, '.*') > Inf", {"a"}),
        ('{__name__=~"a.*"}', {"__name__"}),
        ("max_over_time(a[1h:1m]) - -1.5e+3", {"a"}),
    ],
)
def test_metric_names_are_found_in_promql(expression, names):
    assert metric_names(expression) == names


def test_a_counter_and_a_histogram_are_known_by_the_names_of_their_samples():
    assert "eigenwatch_partials_received_total" in SAMPLE_NAMES
    assert unknown_names("eigenwatch_partials_received") == {"eigenwatch_partials_received"}
    assert unknown_names("eigenwatch_solve_seconds") == {"eigenwatch_solve_seconds"}
    assert not unknown_names("eigenwatch_solve_seconds_sum / eigenwatch_solve_seconds_count and up")


def test_a_variables_query_is_unwrapped():
    assert variable_expression('label_values(a{b="c"}, layer)') == 'a{b="c"}'
    assert variable_expression("query_result(a)") == "query_result(a)"


def test_panels_in_collapsed_rows_and_annotations_are_checked_too():
    target = {"targets": [{"expr": "gone_in_row"}], "title": "inner", "type": "stat"}
    model = {
        "panels": [{"type": "row", "title": "row", "panels": [target]}],
        "annotations": {"list": [{"name": "alerts", "expr": "gone_in_annotation"}]},
        "templating": {"list": [{"type": "query", "name": "v", "query": "label_values(gone_in_variable, x)"}]},
    }
    problems = " ".join(unknown_metrics(Dashboard("mine.json", model)))
    for name in ("gone_in_row", "gone_in_annotation", "gone_in_variable"):
        assert name in problems


@pytest.mark.parametrize("content", ["not json", "[]", '{"title": "no uid"}'])
def test_a_file_that_is_no_dashboard_is_refused_by_name(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"mine\.json"):
        load_dashboard(path)
