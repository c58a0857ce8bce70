"""The push to a running Grafana: a folder, a Prometheus data source, then each dashboard by its uid.

Called by `eigenwatch dashboards push`, on its thread, one request after the other, each with a timeout. What
is there already and equal is left alone, so a second push changes nothing and adds no version to a history.
The token comes from the environment, and no message ever holds it.
"""

import re
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from grafana_client.api import GrafanaApi
from grafana_client.client import GrafanaException, GrafanaTimeoutError

from .dashboards import Dashboard

TOKEN_VARIABLE = "GRAFANA_TOKEN"
DATASOURCE_UID = "eigenwatch-prometheus"
"""The data source that the dashboards select by default; provisioning gives it the same uid."""

_SERVER_FIELDS = frozenset({"id", "version"})
"""What Grafana itself writes into a stored dashboard."""


class GrafanaPushError(Exception):
    """Grafana could not be reached or refused; one line for the user, without the token."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        """The HTTP status of a refusal."""


class Change(NamedTuple):
    """What a push did to one thing, or would do."""

    kind: Literal["folder", "datasource", "dashboard"]
    name: str
    action: Literal["created", "updated", "unchanged"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GrafanaAddress:
    """Where Grafana listens and the token that opens it."""

    url: str
    """`http(s)://host[:port][/path]`."""
    token: str = field(repr=False)
    """A service account's token; role Editor, and Admin to write data sources."""
    timeout_seconds: float = 10.0
    """For each request: to connect, and between bytes of the answer."""

    def __post_init__(self) -> None:
        if "@" in self.url:
            raise ValueError(f"the Grafana URL must not hold credentials: put a token into {TOKEN_VARIABLE}")
        if not _is_base_url(self.url):
            raise ValueError(f"the Grafana URL must be http(s)://host[:port][/path], got {self.url!r}")
        if not self.token:
            raise ValueError(f"{TOKEN_VARIABLE} is not set: put the token of a Grafana service account into it")
        if not re.fullmatch(r"[!-~]+", self.token):
            # Refused here, because the HTTP library would quote the header in its own message.
            raise ValueError(f"{TOKEN_VARIABLE} is not a token: it holds spaces or characters beyond ASCII")
        if self.timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds must be positive, got {self.timeout_seconds}")


def push(
    address: GrafanaAddress,
    dashboards: Iterable[Dashboard],
    *,
    folder: str,
    prometheus_url: str | None = None,
    dry_run: bool = False,
) -> list[Change]:
    """Makes Grafana hold these dashboards, in a top-level folder of that title.

    With `prometheus_url` the data source `eigenwatch` points there; without it data sources are not touched.
    With `dry_run` nothing is written and the changes are those that a push would make.

    Raises:
        ValueError: `prometheus_url` is no URL.
        GrafanaPushError: Grafana cannot be reached, or refuses; what was pushed before stays.
    """
    if prometheus_url is not None and not _is_base_url(prometheus_url):
        raise ValueError(f"the Prometheus URL must be http(s)://host[:port][/path], got {prometheus_url!r}")
    api: Any = GrafanaApi(address.token, timeout=address.timeout_seconds)
    # GrafanaApi.from_url loses the brackets of an IPv6 address and the slash after a path.
    api.client.url = f"{address.url.rstrip('/')}/api"
    with closing(api.client.s):
        grafana = _Grafana(api, address, dry_run)
        folder_uid, change = grafana.ensure_folder(folder)
        changes = [change]
        if prometheus_url is not None:
            changes.append(grafana.ensure_datasource(prometheus_url))
        changes += [grafana.ensure_dashboard(dashboard, folder_uid) for dashboard in dashboards]
    return changes


class _Grafana:
    """The API's answers, with Grafana's absences and refusals turned into values and one-line errors."""

    def __init__(self, api: Any, address: GrafanaAddress, dry_run: bool) -> None:
        self._api = api
        self._address = address
        self._dry_run = dry_run

    def ensure_folder(self, title: str) -> tuple[str | None, Change]:
        """The folder's uid, None where a dry run found no folder."""
        folders = self._call("list folders", self._api.folder.get_all_folders, list)
        for found in folders:
            if found.get("title") == title:
                return str(found["uid"]), Change("folder", title, "unchanged")
        created = self._write(f"create folder {title}", lambda: self._api.folder.create_folder(title))
        return (str(created["uid"]) if created else None), Change("folder", title, "created")

    def ensure_datasource(self, prometheus_url: str) -> Change:
        wanted = {
            "uid": DATASOURCE_UID,
            "name": "eigenwatch",
            "type": "prometheus",
            "access": "proxy",
            "url": prometheus_url,
        }
        stored = self._find("read the data source", lambda: self._api.datasource.get_datasource_by_uid(DATASOURCE_UID))
        if stored is None:
            self._write("create the data source", lambda: self._api.datasource.create_datasource(wanted))
            return Change("datasource", "eigenwatch", "created")
        if all(stored.get(name) == value for name, value in wanted.items()):
            return Change("datasource", "eigenwatch", "unchanged")
        # What else was set on it, authentication for example, is kept.
        self._write(
            "update the data source",
            lambda: self._api.datasource.update_datasource_by_uid(DATASOURCE_UID, stored | wanted),
        )
        return Change("datasource", "eigenwatch", "updated")

    def ensure_dashboard(self, dashboard: Dashboard, folder_uid: str | None) -> Change:
        wanted = _without_server_fields(dashboard.model)
        stored = self._find(f"read dashboard {dashboard.uid}", lambda: self._api.dashboard.get_dashboard(dashboard.uid))
        if stored is not None:
            same_folder = stored.get("meta", {}).get("folderUid") == folder_uid
            if same_folder and _without_server_fields(stored.get("dashboard", {})) == wanted:
                return Change("dashboard", dashboard.title, "unchanged")
        # Overwrite: the file is the source, so an edit in the browser is no version conflict (412).
        payload = {
            "dashboard": wanted | {"id": None},
            "folderUid": folder_uid,
            "overwrite": True,
            "message": "eigenwatch dashboards push",
        }
        self._write(f"write dashboard {dashboard.uid}", lambda: self._api.dashboard.update_dashboard(payload))
        return Change("dashboard", dashboard.title, "created" if stored is None else "updated")

    def _find(self, what: str, request: Callable[[], Any]) -> dict[str, Any] | None:
        """What Grafana holds, None where it holds nothing.

        For a uid that does not exist Grafana 13 answers 403 to an Editor, because the permission check fails
        before the look-up (block/proto-fleet#830). A token that may not write is refused when it writes.
        """
        try:
            found: dict[str, Any] = self._call(what, request, dict)
        except GrafanaPushError as error:
            if error.status in (403, 404):
                return None
            raise
        return found

    def _write(self, what: str, request: Callable[[], Any]) -> dict[str, Any]:
        if self._dry_run:
            return {}
        answer: dict[str, Any] = self._call(what, request, dict)
        return answer

    def _call(self, what: str, request: Callable[[], Any], answer_type: type) -> Any:
        try:
            answer = request()
        except GrafanaTimeoutError as error:
            raise self._error(what, f"no answer within {self._address.timeout_seconds:g} s") from error
        except GrafanaException as error:
            raise self._error(what, _refusal(error), error.status_code) from error
        except OSError as error:  # every error of the HTTP library is one
            raise self._error(what, f"no connection: {_root(error)}") from error
        if not isinstance(answer, answer_type):
            raise self._error(what, "the answer is not Grafana's; is this the right URL?")
        return answer

    def _error(self, what: str, why: str, status: int | None = None) -> GrafanaPushError:
        line = " ".join(f"Grafana at {self._address.url}: could not {what}: {why}".split())
        return GrafanaPushError(line.replace(self._address.token, "***")[:500], status)


def _is_base_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port_is_valid = parts.port != 0  # reading it raises ValueError where it is no number
    except ValueError:
        return False
    named = parts.scheme in ("http", "https") and bool(parts.hostname)
    return named and port_is_valid and not parts.query and not parts.fragment


def _refusal(error: GrafanaException) -> str:
    status, answer = error.status_code, error.response
    said = answer.get("message", "") if isinstance(answer, dict) else str(answer)
    if status == 401:
        return f"token refused (401: {said}); check {TOKEN_VARIABLE}"
    if status == 403:
        return f"token refused (403: {said}); it needs the role Editor, for data sources Admin"
    return f"{said} ({status})"


def _root(error: BaseException) -> BaseException:
    """The innermost cause, which names what failed; the HTTP library wraps it three times."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def _without_server_fields(model: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in model.items() if name not in _SERVER_FIELDS}
