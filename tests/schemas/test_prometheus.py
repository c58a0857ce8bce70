"""The catalogue of Prometheus families: complete, well named, and of bounded cardinality."""

import re

from eigenwatch.schemas import DATA_QUALITY, METRICS, RECORDS
from eigenwatch.schemas.prometheus import FAMILIES, PREFIX, RECORD_GAUGES, SERIES_LABELS

UNBOUNDED_LABELS = {"step", "rank", "index", "eigenvalue", "k"}


def test_every_metric_has_one_gauge_of_its_name():
    by_name = [family for family in FAMILIES if family.kind == "gauge"]
    for metric in (*METRICS, *DATA_QUALITY):
        (gauge,) = [family for family in by_name if family.name == PREFIX + metric.name]
        assert gauge.labels == SERIES_LABELS == ("run", "layer", "site", "expert")
        assert gauge.help == metric.help
    assert len(RECORD_GAUGES) == len(METRICS) + len(DATA_QUALITY)


def test_every_gauge_of_a_record_is_a_column_of_records():
    assert {family.name.removeprefix(PREFIX) for family in RECORD_GAUGES} <= set(RECORDS.names)


def test_no_label_grows_with_the_run():
    for family in FAMILIES:
        assert not UNBOUNDED_LABELS & set(family.labels), family.name


def test_names_are_unique_and_follow_prometheus():
    names = [family.name for family in FAMILIES]
    assert len(names) == len(set(names))
    for family in FAMILIES:
        assert re.fullmatch(r"eigenwatch_[a-z][a-z0-9_]*", family.name)
        assert not family.name.endswith("_total"), "the client adds it to counters"
        assert family.help.strip().endswith(".")
        assert family.kind in ("gauge", "counter", "histogram")


def test_what_measures_time_says_its_unit():
    for family in FAMILIES:
        if "timestamp" in family.name or family.kind == "histogram":
            assert family.name.endswith("_seconds"), family.name
