"""Every alert that can wake somebody has its heading in the runbook."""

import re
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parent.parent.parent


def test_every_alert_points_at_a_heading_of_the_runbook():
    rules = yaml.safe_load((REPOSITORY / "deploy/prometheus/rules.yml").read_text())
    headings = {
        heading.lower() for heading in re.findall(r"^## (\S+)$", (REPOSITORY / "docs/runbook.md").read_text(), re.M)
    }
    alerts = [rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    assert alerts
    for alert in alerts:
        page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
        assert page == "docs/runbook.md"
        assert anchor == alert["alert"].lower()
        assert anchor in headings
