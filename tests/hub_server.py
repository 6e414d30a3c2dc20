"""A small server on the loopback interface that speaks the Hub's HTTP API, as far as downloading needs it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_test"


class Hub:
    """Repositories by name; each has revisions, each a folder."""

    def __init__(self) -> None:
        self.folders: dict[str, dict[str, Path]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.fetched: Counter[str] = Counter()  # "repository/file" of every GET of a file
        self.cut: set[str] = set()  # files whose next transfer breaks off in the middle
        self.url = ""

    def add(self, name: str, folder: Path, revision: str = "main") -> None:
        self.folders.setdefault(name, {})[revision] = folder

    def find(self, name: str, revision: str) -> tuple[str, Path] | None:
        """Commit and folder of a revision, by its name or its commit."""
        for known, folder in self.folders[name].items():
            commit = hashlib.sha1(f"{name}@{known}".encode()).hexdigest()
            if revision in (known, commit):
                return commit, folder
        return None


def files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.answer(head=True)

    def do_GET(self) -> None:
        self.answer(head=False)

    def answer(self, head: bool) -> None:
        path = unquote(self.path.split("?")[0])
        info = re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name = info[1] if info else file[1] if file else ""
        if name not in self.hub.folders or (name in self.hub.private and not self.allowed()):
            return self.fail(401, "RepoNotFound")
        if name in self.hub.gated and not self.allowed():
            return self.fail(403, "GatedRepo")
        found = self.hub.find(name, (info or file)[2] or "main")  # type: ignore[index]
        if found is None:
            return self.fail(404, "RevisionNotFound")
        commit, folder = found
        if info:
            return self.info(name, commit, folder)
        return self.file(name, commit, folder, file[3], head)  # type: ignore[index]

    def allowed(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {TOKEN}"

    def fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def info(self, name: str, commit: str, folder: Path) -> None:
        siblings = [{"rfilename": n, "size": p.stat().st_size, "blobId": "0" * 40} for n, p in files(folder).items()]
        body = json.dumps({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def file(self, name: str, commit: str, folder: Path, file: str, head: bool) -> None:
        path = files(folder).get(file)
        if path is None:
            return self.fail(404, "EntryNotFound")
        content = path.read_bytes()
        begin = int((self.headers.get("range") or "bytes=0-")[6:].split("-")[0])
        self.send_response(206 if "range" in self.headers else 200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content) - begin))
        if "range" in self.headers:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if head:
            return None
        self.hub.fetched[f"{name}/{file}"] += 1
        if f"{name}/{file}" in self.hub.cut:
            self.hub.cut.discard(f"{name}/{file}")
            self.wfile.write(content[begin : begin + len(content) // 2])
            self.close_connection = True
            self.connection.close()
            return None
        self.wfile.write(content[begin:])
        return None


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port of 127.0.0.1."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
