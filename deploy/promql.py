"""The metric names in a PromQL expression, compared with the catalogue of what the exporter shows.

A renamed gauge breaks a dashboard or an alert without a sound: the panel is empty, the alert never fires. So
every expression that is shipped is checked against `schemas.prometheus`. This reads names only; Prometheus
itself judges the syntax (`promtool`, and a real server in the tests).
"""

import re

from ..schemas.prometheus import FAMILIES, Family

_STRING = re.compile(r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|`[^`]*`")
_GRAFANA_VARIABLE = re.compile(r"\$\{[^}]*\}|\$\w+|\[\[\w+\]\]")
_MATCHERS = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"\[[^\]]*\]")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", re.IGNORECASE)
_NAME = re.compile(r"(?<![\w:.])[A-Za-z_:][\w:]*(?![\w:])(?!\s*\()")
# `by (…)` and the like are removed with their labels; these stand alone.
_KEYWORDS = frozenset({"and", "or", "unless", "bool", "offset", "atan2", "inf", "nan", "group_left", "group_right"})
_LABEL_VALUES = re.compile(r"\s*label_values\s*\((.*),\s*\w+\s*\)\s*", re.DOTALL)

PROMETHEUS_NAMES = frozenset({"up", "ALERTS"})
"""Series that Prometheus itself writes for every target and rule."""


def sample_names(family: Family) -> tuple[str, ...]:
    """The names of a family's samples: a counter gains `_total`, a histogram has three."""
    suffixes = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return tuple(family.name + suffix for suffix in suffixes[family.kind])


SAMPLE_NAMES = frozenset(name for family in FAMILIES for name in sample_names(family))


def variable_expression(query: str) -> str:
    """The PromQL inside a Grafana variable's query: `label_values(expression, label)` or an expression."""
    match = _LABEL_VALUES.fullmatch(query)
    return match[1] if match else query


def metric_names(expression: str) -> set[str]:
    """Every metric name in an expression; Grafana's `$variables` may stand in strings, ranges and numbers.

    A matcher on `__name__` counts as the name `__name__`, since it could select anything.
    """
    text = _STRING.sub('""', expression)
    text = _GRAFANA_VARIABLE.sub("1", text)
    text = _MATCHERS.sub(lambda found: " __name__ " if "__name__" in found[1] else " ", text)
    text = _GROUPING.sub(" ", _RANGE.sub(" ", text))
    return {name for name in _NAME.findall(text) if name.lower() not in _KEYWORDS}


def unknown_names(expression: str) -> set[str]:
    """The names in an expression that neither the exporter nor Prometheus shows."""
    return metric_names(expression) - SAMPLE_NAMES - PROMETHEUS_NAMES
