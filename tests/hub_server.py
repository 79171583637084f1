"""A read-only model hub on loopback: the endpoints that downloading needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    repositories: dict[str, Path]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            directory = self.repositories.get("/".join(parts[2:4]))
            if directory is not None:
                files = [path for path in sorted(directory.iterdir()) if path.is_file()]
                body: object = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _oid(file)}
                    for file in files
                ]
                if "tree" not in parts:
                    siblings = [{"rfilename": file.name} for file in files]
                    body = {"id": "/".join(parts[2:4]), "sha": COMMIT, "private": False, "siblings": siblings}
                return self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        elif len(parts) > 4 and parts[2] == "resolve":
            directory = self.repositories.get("/".join(parts[:2]))
            file = directory / "/".join(parts[4:]) if directory else None
            if file is not None and file.is_file():
                return self._send(200, file.read_bytes(), {"ETag": f'"{_oid(file)}"'})
            if directory is not None:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[str]:
    """Serve directories as repositories; yields the endpoint's URL."""
    handler = type("Handler", (_Handler,), {"repositories": repositories})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
