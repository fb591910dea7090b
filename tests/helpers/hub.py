"""A stand-in for a hub: the parts of its HTTP interface that huggingface_hub asks for, with repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Hub(ThreadingHTTPServer):
    """Repositories by name: commits in their order, each with all of its files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, name: str) -> dict[str, bytes]:
        return self.repositories[name][-1]


def _sha(name: str, number: int) -> str:
    return hashlib.sha1(f"{name}@{number}".encode()).hexdigest()


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._look()

    def do_HEAD(self) -> None:
        self._look()

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/api/models/(.+/.+)/preupload/([^/]+)", self.path.split("?")[0]):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]  # fmt: skip
            return self._json({"files": files})
        if found := re.fullmatch(r"/api/models/(.+/.+)/commit/([^/]+)", self.path.split("?")[0]):
            return self._commit(found[1], [json.loads(line) for line in body.splitlines()])
        self._fail(404, "EntryNotFound")

    def _create(self, asked: dict[str, Any]) -> None:
        name = (
            f"{asked['organization']}/{asked['name']}"
            if asked.get("organization")
            else asked["name"]
        )
        if name in self.server.repositories:
            return self._json({"url": f"{self.server.address}/{name}"}, 409)
        self.server.repositories[name] = [{}]
        self.server.private[name] = asked.get("visibility") == "private" or bool(
            asked.get("private")
        )
        self._json({"url": f"{self.server.address}/{name}", "name": name})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.server.files(name))
        for line in lines:
            if line["key"] == "header":
                self.server.messages.append(line["value"]["summary"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
            else:
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.server.repositories[name].append(files)
        oid = _sha(name, len(self.server.repositories[name]) - 1)
        self._json({"commitUrl": f"{self.server.address}/{name}/commit/{oid}", "commitOid": oid})

    def _look(self) -> None:
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            if (at := self._at(found[1], found[2])) is not None:
                sha, files = at
                siblings = [{"rfilename": file} for file in files]
                self._json({"id": found[1], "modelId": found[1], "sha": sha, "siblings": siblings})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if (at := self._at(found[1], found[2])) is not None:
                sha, files = at
                if found[3] not in files:
                    return self._fail(404, "EntryNotFound")
                etag = hashlib.sha1(files[found[3]]).hexdigest()
                self._send(200, files[found[3]], {"ETag": f'"{etag}"', "X-Repo-Commit": sha})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            if (at := self._at(found[1], found[2])) is not None:
                self._json([{"type": "file", "path": p, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for p, b in at[1].items()])  # fmt: skip
        else:
            self._fail(404, "EntryNotFound")

    def _at(self, name: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        held = self.server.repositories.get(name)
        if held is None:
            self._fail(404, "RepoNotFound")
            return None
        shas = [_sha(name, number) for number in range(len(held))]
        if revision in (None, "main"):
            return shas[-1], held[-1]
        if revision in shas:
            return str(revision), held[shas.index(str(revision))]
        self._fail(404, "RevisionNotFound")
        return None

    def _json(self, data: Any, status: int = 200) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    with Hub() as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
