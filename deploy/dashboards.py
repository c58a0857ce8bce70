"""The committed Grafana dashboards: where they lie, and every PromQL expression in them.

They are plain JSON under `grafana/dashboards/`, shipped with the package, so that provisioning,
`eigenwatch dashboards push` and `eigenwatch dashboards check` all read the same files.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .promql import unknown_names, variable_expression

GRAFANA = Path(__file__).parent / "grafana"
"""Holds `dashboards/` and `provisioning/`, laid out as under /etc/grafana."""


class Expression(NamedTuple):
    """One query of a dashboard and where it stands."""

    where: str
    text: str


class Dashboard(NamedTuple):
    """One dashboard: the file's name and its JSON model."""

    file: str
    model: dict[str, Any]

    @property
    def uid(self) -> str:
        return str(self.model["uid"])

    @property
    def title(self) -> str:
        return str(self.model["title"])

    def panels(self) -> Iterator[dict[str, Any]]:
        """Every panel that draws something, those inside collapsed rows included."""
        for panel in self.model.get("panels", []):
            if panel.get("type") != "row":
                yield panel
            yield from panel.get("panels", [])

    def expressions(self) -> Iterator[Expression]:
        """Every PromQL expression: of panels, of variables and of annotations."""
        for panel in self.panels():
            for target in panel.get("targets", []):
                if target.get("expr"):
                    yield Expression(f"{self.file}: panel {panel.get('title')!r}", target["expr"])
        for variable in self.model.get("templating", {}).get("list", []):
            if variable.get("type") == "query":
                query = variable["query"]
                text = query["query"] if isinstance(query, dict) else query
                yield Expression(f"{self.file}: variable {variable['name']!r}", variable_expression(text))
        for annotation in self.model.get("annotations", {}).get("list", []):
            if annotation.get("expr"):
                yield Expression(f"{self.file}: annotation {annotation.get('name')!r}", annotation["expr"])


def load_dashboard(path: Path) -> Dashboard:
    """The dashboard in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a dashboard's JSON model with `uid` and `title`.
    """
    try:
        model = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(model, dict) or not model.get("uid") or not model.get("title"):
        raise ValueError(f"{path} is not a Grafana dashboard: its JSON model needs a uid and a title")
    return Dashboard(path.name, model)


def committed_dashboards() -> list[Dashboard]:
    """The dashboards that ship with eigenwatch, by file name."""
    return [load_dashboard(path) for path in sorted((GRAFANA / "dashboards").glob("*.json"))]


def unknown_metrics(dashboard: Dashboard) -> list[str]:
    """One line for each name in the dashboard that the exporter does not show."""
    return [
        f"{where} names {name}, which the exporter does not show"
        for where, text in dashboard.expressions()
        for name in sorted(unknown_names(text))
    ]
