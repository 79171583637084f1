"""A model hub on loopback: what huggingface_hub's client asks of one to push models and to load them.

    python tests/helpers/hub_server.py DIRECTORY

keeps a hub in DIRECTORY, prints how to reach it, and then a line for every request.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKENS = {"hf_user": "user", "hf_other": "other"}
"""Who a token belongs to; a user may write under their own name."""


class RequestError(Exception):
    """An answer that is an error: status, the client's code for it (if it has one), message."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


def _write(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    """What git keeps of a file in large file storage."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _read_shard(shard: bytes) -> Iterator[tuple[str, str]]:
    """sha256 and Xet's hash of the files in a shard, whose records of 48 bytes follow a header of as many.

    A file has a record with its hash, flags and a count; then as many segments; the same number of verifications if
    bit 31 of the flags is set; and its sha256 if bit 30 is. A hash of ones ends the list.
    """

    def text(start: int) -> str:
        return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", shard, start))

    start = 48
    while shard[start : start + 32] != b"\xff" * 32:
        flags, segments = struct.unpack_from("<II", shard, start + 32)
        end = start + 48 * (1 + segments * (1 + (flags >> 31)))
        if flags >> 30 & 1:
            yield text(end), text(start)
            end += 48
        start = end


class Hub:
    """Repositories in a directory.

    `repositories/<user>/<name>.json` holds a repository: whether it is private, its branches (name to commit) and its
    commits (title, parent, and the files by path: size, git's oid, sha256, and whether it is a large one). Contents
    are in `objects`, by sha256, or in `xet`, where hf_xet's own client keeps them.

    `large` are the endings of files that go to large file storage, in parts if they have more than `part_bytes`.
    `requests` lists what was asked and answered.
    `faults` says what shall go wrong, by how a request begins ("POST /api/models/user/name/commit"), each time once:
    `{"status": ...}` is answered, `{"cut": n}` breaks the connection after n bytes of the body.
    """

    def __init__(self, directory: Path, large: tuple[str, ...] = (".safetensors", ".bin")) -> None:
        self.directory, self.large = directory, large
        self.part_bytes: int | None = None
        self.endpoint = ""
        self.requests: list[str] = []
        self.log: Callable[[str], object] = self.requests.append
        self.faults: dict[str, list[dict[str, int]]] = {}
        self.lock = threading.RLock()
        self._key = secrets.token_bytes()

    def repository(self, name: str) -> dict:
        path = self.directory / "repositories" / f"{name}.json"
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or not path.is_file():
            raise RequestError(404, "RepoNotFound", f"There is no repository {name}")
        return json.loads(path.read_text(encoding="utf-8"))

    def create(self, name: str, private: bool = False) -> None:
        with self.lock:
            try:
                self.repository(name)
            except RequestError:
                self._save(name, {"private": private, "branches": {}, "commits": {}})
                self.commit(name, "main", "initial commit", lambda files: None)
            else:
                raise RequestError(409, message=f"You already created this model repo: {name}")

    def commit(self, name: str, branch: str, title: str, change: Callable[[dict], None], parent: str = "") -> str:
        """Let `change` edit the files of a branch; if it raises, nothing has happened. Returns the commit."""
        with self.lock:
            repository = self.repository(name)
            head = repository["branches"].get(branch)
            if head is None and repository["commits"]:
                raise RequestError(404, "RevisionNotFound", f"{name} has no branch {branch}")
            if parent not in ("", head):
                raise RequestError(412, message="A commit has happened since. Please refresh and try again.")
            files = dict(repository["commits"][head]["files"]) if head else {}
            change(files)
            commit = {"title": title, "parent": head, "time": time.time(), "files": files}
            oid = hashlib.sha1(json.dumps(commit).encode()).hexdigest()
            repository["commits"][oid] = commit
            repository["branches"][branch] = oid
            self._save(name, repository)
            return oid

    def branch(self, name: str, branch: str, start: str = "main") -> None:
        with self.lock:
            repository = self.repository(name)
            if branch in repository["branches"]:
                raise RequestError(409, message=f"Reference {branch} already exists")
            repository["branches"][branch] = self.resolve(name, start)
            self._save(name, repository)

    def resolve(self, name: str, revision: str) -> str:
        """The commit of a branch or of a commit's own id."""
        repository = self.repository(name)
        commit = repository["branches"].get(revision, revision)
        if commit not in repository["commits"]:
            raise RequestError(404, "RevisionNotFound", f"{name} has no revision {revision}")
        return commit

    def files(self, name: str, revision: str = "main") -> dict[str, dict]:
        return self.repository(name)["commits"][self.resolve(name, revision)]["files"]

    def regular(self, content: bytes) -> dict:
        """Store a file that git itself holds."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.store(sha256, content)
        return {"size": len(content), "oid": _git_oid(content), "sha256": sha256, "large": False}

    def large_file(self, sha256: str, size: int) -> dict:
        """A file in large file storage, where its content must be already."""
        if not self.has(sha256):
            raise RequestError(400, message=f"Object {sha256} was not uploaded")
        return {"size": size, "oid": _git_oid(_pointer(sha256, size)), "sha256": sha256, "large": True}

    def has(self, sha256: str) -> bool:
        return self.object(sha256).is_file() or sha256 in self.xet_hashes()

    def object(self, sha256: str) -> Path:
        return self.directory / "objects" / sha256

    def store(self, sha256: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != sha256:
            raise RequestError(400, message=f"The content is not that of {sha256}")
        _write(self.object(sha256), content)

    def xet_hashes(self) -> dict[str, str]:
        """Xet's hash of every file that hf_xet uploaded, by its sha256, as its shards say."""
        shards = self.directory.glob("xet/**/xorbs/shards/*.mdb")
        return {sha256: name for shard in shards for sha256, name in _read_shard(shard.read_bytes())}

    def signature(self, sha256: str) -> str:
        return hmac.new(self._key, sha256.encode(), "sha256").hexdigest()

    def address(self, sha256: str, *part: str) -> str:
        """Where large file storage has a file: on another host, without tokens, for whoever was told."""
        storage = self.endpoint.replace("127.0.0.1", "localhost")
        return f"{storage}/{'/'.join(['objects', sha256, *part])}?signature={self.signature(sha256)}"

    def part(self, sha256: str, number: int) -> Path:
        return self.directory / "parts" / sha256 / str(number)

    def add(self, name: str, directory: Path) -> None:
        """Make a repository of a directory's files, without a request."""
        self.create(name)
        paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
        content = {path.relative_to(directory).as_posix(): self.regular(path.read_bytes()) for path in paths}
        self.commit(name, "main", "Add files", lambda files: files.update(content))

    def _save(self, name: str, repository: dict) -> None:
        path = self.directory / "repositories" / f"{name}.json"
        _write(path, json.dumps(repository, indent=1).encode())


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.fault = self._fault(url.path)
        try:
            self.body = self._read(self.fault.get("cut"))
            if "status" in self.fault:
                raise RequestError(self.fault["status"], message="This fault was asked for")
            self.user = self._authenticate()
            parts = [unquote(part) for part in url.path.strip("/").split("/")]
            self.signature = parse_qs(url.query).get("signature", [""])[0]
            answer = self._route(parts)
        except ConnectionError:
            self._log("connection cut")
            self.close_connection = True
            return
        except RequestError as error:
            headers = {"X-Error-Message": str(error), **({"X-Error-Code": error.code} if error.code else {})}
            answer = error.status, {"error": str(error)}, headers
        self._send(*answer)

    def _fault(self, path: str) -> dict[str, int]:
        request = f"{self.command} {path}"
        with self.hub.lock:
            faults = [faults for start, faults in self.hub.faults.items() if faults and request.startswith(start)]
            return faults[0].pop(0) if faults else {}

    def _read(self, cut: int | None) -> bytes:
        """The request's body; with `cut`, only so many bytes, after which the connection breaks."""
        if cut is not None:
            self.rfile.read(cut)
            raise ConnectionError
        if self.headers.get("Transfer-Encoding") != "chunked":
            size = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(size)
            if len(body) < size:
                raise ConnectionError
            return body
        body = b""
        while size := int(self.rfile.readline() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def _authenticate(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise RequestError(401, message="Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def _may_read(self, name: str) -> None:
        if self.hub.repository(name)["private"] and self.user != name.split("/")[0]:
            raise RequestError(401 if self.user is None else 404, "RepoNotFound", f"There is no repository {name}")

    def _may_write(self, name: str) -> None:
        if self.user is None:
            raise RequestError(401, message="Invalid username or password.")
        if self.user != name.split("/")[0]:
            raise RequestError(403, message=f"You don't have the rights to write to {name}")

    def _route(self, parts: list[str]) -> tuple:
        """Status, body (bytes, or what is to be JSON), headers."""
        match self.command, parts:
            case "GET", ["api", "whoami-v2"]:
                self._may_write(f"{self.user}/")
                return 200, {"name": self.user, "type": "user", "orgs": []}, {}
            case "POST", ["api", "repos", "create"]:
                return self._create(json.loads(self.body))
            case "POST", ["api", "validate-yaml"]:
                return self._validate(json.loads(self.body)["content"])
            case "GET", ["api", "models", user, name, *rest] if not rest or rest[0] in ("revision", "tree"):
                return self._info(f"{user}/{name}", *rest)
            case "GET", ["api", "models", user, name, ("xet-read-token" | "xet-write-token") as kind, revision]:
                return self._xet_token(f"{user}/{name}", revision, kind == "xet-write-token")
            case "POST", ["api", "models", user, name, "branch", branch]:
                self._may_write(f"{user}/{name}")
                self.hub.branch(f"{user}/{name}", branch, json.loads(self.body).get("startingPoint", "main"))
                return 200, {}, {}
            case "POST", ["api", "models", user, name, "preupload", revision]:
                return self._preupload(f"{user}/{name}", revision, json.loads(self.body)["files"])
            case "POST", ["api", "models", user, name, "commit", branch]:
                return self._commit(f"{user}/{name}", branch, [json.loads(line) for line in self.body.splitlines()])
            case "POST", [user, repository, "info", "lfs", "objects", "batch"] if repository.endswith(".git"):
                return self._batch(f"{user}/{repository.removesuffix('.git')}", json.loads(self.body)["objects"])
            case "POST", ["objects", "verify"]:
                wanted = json.loads(self.body)
                self.hub.large_file(wanted["oid"], wanted["size"])
                return 200, {}, {}
            case (("GET" | "PUT"), ["objects", sha256]):
                return self._object(sha256)
            case "PUT", ["objects", sha256, number]:
                return self._part(sha256, int(number))
            case "POST", ["objects", sha256, "complete"]:
                return self._complete(sha256, json.loads(self.body)["parts"])
            case (("GET" | "HEAD"), [user, name, "resolve", revision, *path]):
                return self._resolve(f"{user}/{name}", revision, "/".join(path))
        raise RequestError(404, message=f"This hub does not know {self.command} {self.path}")

    def _create(self, wanted: dict) -> tuple:
        name = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        self._may_write(name)
        url = {"url": f"{self.hub.endpoint}/{name}"}
        try:
            self.hub.create(name, wanted.get("visibility") == "private")
        except RequestError as error:
            return error.status, {"error": str(error), **url}, {}
        return 200, url, {}

    def _validate(self, card: str) -> tuple:
        """The Hub's own rules are many more; these are that the metadata is YAML and names a base by id."""
        metadata = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
        errors: list[str] = []
        try:
            fields = yaml.safe_load(metadata[1]) if metadata else {}
        except yaml.YAMLError as error:
            fields, errors = {}, [str(error)]
        base = (fields or {}).get("base_model", [])
        for name in [base] if isinstance(base, str) else base:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
                errors.append(f'"base_model" with value "{name}" is not valid. Use a model id.')
        messages = [{"message": message} for message in errors]
        return (400 if errors else 200), {"errors": messages, "warnings": []}, {}

    def _info(self, name: str, kind: str = "revision", revision: str = "main", *path: str) -> tuple:
        self._may_read(name)
        commit, files = self.hub.resolve(name, revision), self.hub.files(name, revision)
        if kind == "revision":
            siblings = [{"rfilename": path} for path in files]
            private = self.hub.repository(name)["private"]
            return 200, {"id": name, "sha": commit, "private": private, "tags": [], "siblings": siblings}, {}
        folder = "".join(f"{part}/" for part in path)
        inside = {path: file for path, file in files.items() if path.startswith(folder)}
        if folder and not inside:
            raise RequestError(404, "EntryNotFound", f"{name} has no folder {folder}")
        return 200, [self._tree_entry(path, file) for path, file in inside.items()], {}

    def _tree_entry(self, path: str, file: dict) -> dict:
        entry = {"type": "file", "path": path, "size": file["size"], "oid": file["oid"]}
        if file["large"]:
            pointer_size = len(_pointer(file["sha256"], file["size"]))
            entry["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": pointer_size}
            if file["sha256"] in self.hub.xet_hashes():
                entry["xetHash"] = self.hub.xet_hashes()[file["sha256"]]
        return entry

    def _preupload(self, name: str, revision: str, wanted: list[dict]) -> tuple:
        self._may_write(name)
        files = self.hub.files(name, revision)
        answer = []
        for file in wanted:
            mode = "lfs" if file["path"].endswith(self.hub.large) else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            if file["path"] in files:
                there = files[file["path"]]
                answer[-1]["oid"] = there["sha256"] if there["large"] else there["oid"]
        return 200, {"files": answer}, {}

    def _batch(self, name: str, objects: list[dict]) -> tuple:
        self._may_write(name)
        answer = []
        for wanted in objects:
            answer.append({"oid": wanted["oid"], "size": wanted["size"]})
            if not self.hub.has(wanted["oid"]):
                verify = {"href": f"{self.hub.endpoint}/objects/verify"}
                answer[-1]["actions"] = {"upload": self._upload(wanted["oid"], wanted["size"]), "verify": verify}
        return 200, {"transfer": "multipart" if self.hub.part_bytes else "basic", "objects": answer}, {}

    def _upload(self, sha256: str, size: int) -> dict:
        """How the client is to send a file."""
        part_bytes = self.hub.part_bytes
        if part_bytes is None or size <= part_bytes:
            return {"href": self.hub.address(sha256)}
        parts = {str(n): self.hub.address(sha256, str(n)) for n in range(1, -(-size // part_bytes) + 1)}
        return {"href": self.hub.address(sha256, "complete"), "header": {"chunk_size": str(part_bytes), **parts}}

    def _part(self, sha256: str, number: int) -> tuple:
        self._check_signature(sha256)
        _write(self.hub.part(sha256, number), self.body)
        return 200, b"", {"ETag": hashlib.md5(self.body).hexdigest()}

    def _complete(self, sha256: str, parts: list[dict]) -> tuple:
        self._check_signature(sha256)
        content = [self.hub.part(sha256, part["partNumber"]).read_bytes() for part in parts]
        if [part["etag"] for part in parts] != [hashlib.md5(part).hexdigest() for part in content]:
            raise RequestError(400, message="A part is not what was uploaded")
        self.hub.store(sha256, b"".join(content))
        return 200, {}, {}

    def _check_signature(self, sha256: str) -> None:
        if not hmac.compare_digest(self.signature, self.hub.signature(sha256)):
            raise RequestError(403, message="The address is not signed")

    def _object(self, sha256: str) -> tuple:
        self._check_signature(sha256)
        if self.command == "PUT":
            self.hub.store(sha256, self.body)
            return 200, b"", {}
        if not self.hub.object(sha256).is_file():
            raise RequestError(404, message=f"{sha256} is in Xet storage, which this hub leaves to hf_xet")
        return 200, self.hub.object(sha256).read_bytes(), {"ETag": f'"{sha256}"'}

    def _commit(self, name: str, branch: str, lines: list[dict]) -> tuple:
        self._may_write(name)
        header = next(line["value"] for line in lines if line["key"] == "header")

        def change(files: dict[str, dict]) -> None:
            for line in lines:
                key, value = line["key"], line["value"]
                if key == "file":
                    files[value["path"]] = self.hub.regular(base64.b64decode(value["content"]))
                elif key == "lfsFile":
                    files[value["path"]] = self.hub.large_file(value["oid"], value["size"])
                elif key == "deletedFile":
                    del files[value["path"]]
                elif key == "deletedFolder":
                    for path in [path for path in files if path.startswith(f"{value['path'].rstrip('/')}/")]:
                        del files[path]

        oid = self.hub.commit(name, branch, header["summary"], change, header.get("parentCommit", ""))
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}"}, {}

    def _resolve(self, name: str, revision: str, path: str) -> tuple:
        self._may_read(name)
        commit = self.hub.resolve(name, revision)
        headers = {"X-Repo-Commit": commit}
        file = self.hub.files(name, commit).get(path)
        if file is None:
            return 404, b"", {**headers, "X-Error-Code": "EntryNotFound"}
        sha256 = file["sha256"]
        if not file["large"]:
            return 200, self.hub.object(sha256).read_bytes(), {**headers, "ETag": f'"{file["oid"]}"'}
        headers |= {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(file["size"])}
        if sha256 in self.hub.xet_hashes():
            headers["X-Xet-Hash"] = self.hub.xet_hashes()[sha256]
            headers["X-Xet-Refresh-Route"] = f"{self.hub.endpoint}/api/models/{name}/xet-read-token/{commit}"
        return 302, b"", {**headers, "Location": self.hub.address(sha256)}

    def _xet_token(self, name: str, revision: str, write: bool) -> tuple:
        (self._may_write if write else self._may_read)(name)
        expiration = int(time.time()) + 3600
        cas = f"local://{self.hub.directory / 'xet'}"
        headers = {"X-Xet-Cas-Url": cas, "X-Xet-Access-Token": "any", "X-Xet-Token-Expiration": str(expiration)}
        return 200, {"casUrl": cas, "accessToken": "any", "exp": expiration}, headers

    def _send(self, status: int, body: object, headers: dict[str, str]) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self._log(f"{status} by fault" if self.fault else status)
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _log(self, outcome: object) -> None:
        self.hub.log(f"{self.command} {urlsplit(self.path).path} {outcome}")

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serve(hub: Hub | dict[str, Path], port: int = 0) -> Iterator[str]:
    """Serve a hub, or directories as the repositories of one; yields the endpoint's URL."""
    with tempfile.TemporaryDirectory() as directory:
        if isinstance(hub, dict):
            repositories, hub = hub, Hub(Path(directory))
            for name, files in repositories.items():
                hub.add(name, files)
        server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": hub}))
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub.endpoint
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


if __name__ == "__main__":
    shown = Hub(Path(sys.argv[1]).resolve())
    shown.log = partial(print, flush=True)
    with serve(shown) as endpoint:
        shown.log(f"HF_ENDPOINT={endpoint} HF_TOKEN={next(iter(TOKENS))}")
        threading.Event().wait()
