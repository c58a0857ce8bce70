"""Exports to MLflow: a tracking server or database, through its client; one MLflow run for each attempt.

A batch of metrics is one transaction there. What is there is asked of the server, by the metric that every record has.
"""

from __future__ import annotations

from typing import Any

from .export import PREFIX, Attempt, Note, Record, missing_extra

try:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException
except ModuleNotFoundError:
    raise missing_extra("mlflow") from None

METRICS_AT_ONCE = 1000
"""The most that a server takes."""
TAG_CHARACTERS = 5000
_MARK = f"{PREFIX}/finite/"
_ENDED = {"finished": "FINISHED", "lost": "KILLED"}


class MLflow:
    """Opens the run of each attempt in one experiment."""

    def __init__(self, tracking_uri: str | None, experiment: str) -> None:
        """Raises ValueError where the server or database cannot be used."""
        try:
            self._client = MlflowClient(tracking_uri=tracking_uri)
            self.where = f"MLflow experiment {experiment!r} at {self._client.tracking_uri}"
            found = self._client.get_experiment_by_name(experiment)
            self._experiment = self._client.create_experiment(experiment) if found is None else found.experiment_id
        except MlflowException as error:
            raise _refused(tracking_uri, error) from None

    def open(self, attempt: Attempt) -> MLflowRun:
        marks = {"eigenwatch.run": attempt.run_id, "eigenwatch.attempt": str(attempt.number)}
        wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in marks.items())
        try:
            found = self._client.search_runs([self._experiment], wanted, max_results=1)
            if not found:
                told = {f"eigenwatch.tag.{name}": value for name, value in attempt.tags.items()}
                found = [self._client.create_run(self._experiment, tags=marks | told, run_name=attempt.name)]
        except MlflowException as error:
            raise _refused(self._client.tracking_uri, error) from None
        return MLflowRun(self._client, found[0].info.run_id)


class MLflowRun:
    """One attempt in MLflow."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self._run_id = run_id

    def exported(self) -> set[tuple[str, int]]:
        data = self._client.get_run(self._run_id).data
        marks = [name for name in data.metrics if name.startswith(_MARK)]
        records = {
            (mark.removeprefix(_MARK), metric.step)
            for mark in marks
            for metric in self._client.get_metric_history(self._run_id, mark)
        }
        alerts = {_step_apart(name) for name in data.tags if name.startswith(f"{PREFIX}/alerts/")}
        return records | alerts

    def write(self, records: list[Record], notes: list[Note]) -> None:
        batch: list[Any] = []
        try:
            for record in records:
                if len(batch) + len(record.points) > METRICS_AT_ONCE:
                    self._client.log_batch(self._run_id, metrics=batch)
                    batch = []
                time_ms = round(record.time * 1000)
                batch += [Metric(tag, value, time_ms, record.step) for tag, value in record.points]
            if batch:
                self._client.log_batch(self._run_id, metrics=batch)
            for note in notes:
                name = f"{PREFIX}/{note.key[0]}/step_{note.step}"
                self._client.set_tag(self._run_id, name, note.text[:TAG_CHARACTERS])
        except MlflowException as error:
            raise _refused(self._client.tracking_uri, error) from None

    def commit(self) -> None:
        pass

    def close(self, status: str) -> None:
        if status in _ENDED:
            self._client.set_terminated(self._run_id, _ENDED[status])


def _step_apart(name: str) -> tuple[str, int]:
    series, _, step = name.removeprefix(f"{PREFIX}/").rpartition("/step_")
    return series, int(step)


def _refused(uri: str | None, error: Exception) -> ValueError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ValueError(f"MLflow at {uri or 'its default'} refused: {lines[0]}")
