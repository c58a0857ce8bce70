"""A server that keeps Grafana's HTTP contract as far as a push sees it, and its state.

After Grafana's API reference and its pkg/api:
401 without a token; 403 for a role that is too low and, for an Editor, where a uid does not exist;
404 for what is missing; 409 for a data source that exists; 412 for a folder that exists, and for a dashboard
whose version is not the stored one, unless `overwrite`. It is not Grafana itself.
"""

import json
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

TOKEN = "glsa_secret-of-the-test"


class Answer(NamedTuple):
    status: int
    body: Any


def refusal(status: int, message: str) -> Answer:
    return Answer(status, {"message": message})


class GrafanaServer:
    """Use as a context manager; it listens on a free port of 127.0.0.1."""

    def __init__(self, path_prefix: str = "") -> None:
        self.role: Literal["Viewer", "Editor", "Admin"] = "Admin"
        self.broken: Answer | None = None
        """Answered to every request, whatever it asks."""
        self.hold_answers = threading.Event()
        self.hold_answers.set()
        """Cleared: requests get no answer until it is set."""
        self.folders: dict[str, dict[str, Any]] = {}
        self.datasources: dict[str, dict[str, Any]] = {}
        self.dashboards: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str]] = []
        self._prefix = path_prefix
        self._next_id = 0

        grafana = self

        class Handler(BaseHTTPRequestHandler):
            def respond(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                grafana.hold_answers.wait(10)
                status, answer = grafana.answer(self.command, urlsplit(self.path).path, self.headers, body)
                is_html = isinstance(answer, str)
                content = answer.encode() if is_html else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if is_html else "application/json")
                self.send_header("Content-Length", str(len(content)))
                with suppress(ConnectionError):  # the client may have given up
                    self.end_headers()
                    self.wfile.write(content)

            do_GET = do_POST = do_PUT = respond

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}{path_prefix}"

    def __enter__(self) -> "GrafanaServer":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.hold_answers.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def writes(self) -> list[tuple[str, str]]:
        return [request for request in self.requests if request[0] != "GET"]

    def answer(self, method: str, path: str, headers: Any, body: Any) -> Answer:
        self.requests.append((method, path))
        if self.broken:
            return self.broken
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return refusal(401, "Invalid API key")
        if not path.startswith(f"{self._prefix}/api/"):
            return refusal(404, "Not found")
        path = path.removeprefix(f"{self._prefix}/api")
        if method != "GET" and self.role == "Viewer":
            return denied("dashboards:write")
        if path.startswith("/datasources") and self.role != "Admin":
            return denied("datasources:read")
        match method, path.strip("/").split("/"):
            case "GET", ["folders"]:
                return Answer(200, list(self.folders.values()))
            case "POST", ["folders"]:
                return self.create_folder(body)
            case "GET", ["datasources", "uid", uid]:
                return self.held(self.datasources, uid, "Data source not found")
            case "POST", ["datasources"]:
                return self.create_datasource(body)
            case "PUT", ["datasources", "uid", uid]:
                if uid not in self.datasources:
                    return refusal(404, "Data source not found")
                self.datasources[uid] = body | {"id": self.datasources[uid]["id"]}
                return Answer(200, {"message": "Datasource updated"})
            case "GET", ["dashboards", "uid", uid]:
                return self.held(self.dashboards, uid, "Dashboard not found")
            case "POST", ["dashboards", "db"]:
                return self.save_dashboard(body)
        return refusal(404, "Not found")

    def held(self, things: dict[str, dict[str, Any]], uid: str, missing: str) -> Answer:
        if uid in things:
            return Answer(200, things[uid])
        return refusal(404, missing) if self.role == "Admin" else denied("dashboards:read")

    def create_folder(self, body: dict[str, Any]) -> Answer:
        if not body.get("title"):
            return refusal(400, "folder title cannot be empty")
        if any(folder["title"] == body["title"] for folder in self.folders.values()):
            return refusal(412, "a folder with the same name already exists in the current location")
        uid = body.get("uid") or f"folder-{self.new_id()}"
        self.folders[uid] = {"id": self.new_id(), "uid": uid, "title": body["title"]}
        return Answer(200, self.folders[uid])

    def create_datasource(self, body: dict[str, Any]) -> Answer:
        if any(stored["name"] == body["name"] for stored in self.datasources.values()):
            return refusal(409, "data source with the same name already exists")
        stored = {"id": self.new_id(), "basicAuth": False, "jsonData": {}, "readOnly": False} | body
        self.datasources[body["uid"]] = stored
        return Answer(200, {"id": stored["id"], "message": "Datasource added"})

    def save_dashboard(self, body: dict[str, Any]) -> Answer:
        model = body["dashboard"]
        if not model.get("title"):
            return refusal(400, "Dashboard title cannot be empty")
        if body.get("folderUid") not in self.folders:
            return refusal(400, "folder not found")
        stored = self.dashboards.get(model["uid"], {"dashboard": {"id": self.new_id(), "version": 0}})["dashboard"]
        if stored["version"] and not body.get("overwrite") and model.get("version") != stored["version"]:
            return refusal(412, "The dashboard has been changed by someone else")
        version = stored["version"] + 1
        self.dashboards[model["uid"]] = {
            "dashboard": model | {"id": stored["id"], "version": version},
            "meta": {"folderUid": body["folderUid"], "version": version},
        }
        return Answer(200, {"status": "success", "uid": model["uid"], "version": version})

    def new_id(self) -> int:
        self._next_id += 1
        return self._next_id


def denied(permission: str) -> Answer:
    return refusal(403, f"You'll need additional permissions to perform this action. Permissions needed: {permission}")
