"""What a record is about: its key, and the names that may stand in one.

A run id becomes a folder, a Prometheus label and an SQL literal, so it is checked here, once, at the boundary.
"""

import re
from typing import NamedTuple

RUN_ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
SITES = ("post", "pre")


def check_run_id(run_id: str) -> str:
    """The run id itself, if it may name a run.

    Raises:
        ValueError: it does not match `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`.
    """
    if not isinstance(run_id, str) or not RUN_ID_PATTERN.fullmatch(run_id):
        raise ValueError(
            f"run_id {run_id!r} is not allowed: use 1 to 128 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit"
        )
    return run_id


class SeriesKey(NamedTuple):
    """One layer's stream of records within one attempt of a run."""

    run_id: str
    attempt: int
    layer: int
    site: str
    expert: int | None


class RecordKey(NamedTuple):
    """One record: a series at a step."""

    run_id: str
    attempt: int
    step: int
    layer: int
    site: str
    expert: int | None

    @property
    def series(self) -> SeriesKey:
        return SeriesKey(self.run_id, self.attempt, self.layer, self.site, self.expert)
