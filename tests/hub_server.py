"""A small hub: one dataset, and the endpoints that huggingface_hub needs to list its files and to propose some. It fails as it is told."""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

TOKEN = "hf_secret_of_the_test"


class Hub:
    """Its files and pull requests. `faults`: (endpoint, what happens instead), each once, in order."""

    def __init__(self, faults: list[tuple[str, str]] | None = None, files: dict[str, bytes] | None = None) -> None:
        self.files = dict(files or {})
        self.proposed: list[dict[str, Any]] = []
        self.faults = list(faults or [])
        self.calls: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._make_handler())
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _make_handler(hub: Any) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.answer(b"")

            def do_POST(self) -> None:
                self.answer(self.rfile.read(int(self.headers["Content-Length"])))

            def answer(self, body: bytes) -> None:
                address = urlparse(self.path)
                path, query = address.path, parse_qs(address.query)
                kind = next((name for name in ("tree", "discussions", "preupload", "commit") if f"/{name}" in path), "other")
                hub.calls.append(kind)
                fault = hub.faults.pop(0)[1] if hub.faults and hub.faults[0][0] == kind else ""
                if fault == "close":
                    self.hang_up()
                elif fault.startswith("status "):
                    _, status, *wait = fault.split()
                    self.reply(int(status), {"error": "planted"}, {"Retry-After": wait[0]} if wait else {})
                elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self.reply(401, {"error": "Invalid username or password."})
                elif not path.startswith("/api/datasets/org/records/"):
                    self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                else:
                    found = getattr(self, kind)(path, query, body)
                    self.hang_up() if fault == "close after" else self.reply(200, found)

            def hang_up(self) -> None:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

            def reply(self, status: int, found: Any, headers: dict[str, str] | None = None) -> None:
                content = json.dumps(found).encode()
                self.send_response(status)
                for name, value in {
                    "Content-Type": "application/json",
                    "Content-Length": str(len(content)),
                    **(headers or {}),
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def tree(self, *_: Any) -> Any:
                return [
                    {"type": "file", "oid": "0" * 40, "size": len(content), "path": path} for path, content in hub.files.items()
                ]

            def discussions(self, *_: Any) -> Any:
                found = [
                    {
                        "title": one["title"],
                        "num": one["num"],
                        "author": {"name": "ann"},
                        "createdAt": "2026-11-20T10:00:00.000Z",
                        "status": "open",
                        "repo": {"name": "org/records", "type": "dataset"},
                        "isPullRequest": True,
                    }
                    for one in hub.proposed
                ]
                return {"discussions": found, "count": len(found), "start": 0}

            def preupload(self, _path: str, _query: Any, body: bytes) -> Any:
                files = json.loads(body)["files"]
                return {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]}

            def commit(self, _path: str, query: Any, body: bytes) -> Any:
                header, *rows = (json.loads(line) for line in body.splitlines())
                assert header["key"] == "header"
                assert query.get("create_pr") == ["1"], "a pull request, never a push"
                files = {row["value"]["path"]: base64.b64decode(row["value"]["content"]) for row in rows}
                assert not [path for path in files if not re.fullmatch(r"[\w.+-]+__[\w.+-]+/[\w.+-]+\.jsonl", path)]
                number = len(hub.proposed) + 1
                hub.proposed.append(
                    {"title": header["value"]["summary"], "text": header["value"]["description"], "num": number, "files": files}
                )
                address = f"{hub.address}/datasets/org/records"
                return {
                    "commitUrl": f"{address}/commit/{'1' * 40}",
                    "commitOid": "1" * 40,
                    "pullRequestUrl": f"{address}/discussions/{number}",
                }

        return Handler
