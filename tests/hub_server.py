"""A small Hub on 127.0.0.1: what the real client asks for, and everything that can go wrong.

Weights and large files are "LFS": `resolve` redirects to `/cdn/`, as the Hub does; the rest is
answered directly. Nothing here knows the package under test.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_LFS = (".safetensors", ".distcp", "tokenizer.json")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_INFO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?")
_CDN = re.compile(r"/cdn/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)")
_PREUPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+")
_COMMIT = re.compile(r"/api/models/([^/]+/[^/]+)/commit/[^/]+")
_BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")


@dataclass
class Repo:
    """A repository: directories by commit, commits by branch or tag."""

    commits: dict[str, Path]
    refs: dict[str, str]
    private: bool = False


@dataclass
class Fault:
    """What happens to requests whose method and path match; `times` counts down."""

    method: str
    path: str
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    """In place of the answer's own."""
    flip: bool = False
    """One bit in the middle of the body is another."""
    drip: float | None = None
    """Seconds between two bytes of the body."""
    endless: bool = False
    """The body has no end."""
    body: bytes | None = None
    """Sent with status 200 if `status` is 0."""
    cut: int | None = None
    """Bytes after which the connection breaks."""
    ranges: bool = True
    """False: a Range header is ignored, the whole file is sent."""
    whole: bool = False
    """Only requests without a Range header."""
    times: int = 1 << 30


@dataclass
class Hub:
    """The server's state: what it holds, and what it was asked."""

    repos: dict[str, Repo] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    """Method, path, Range and Authorization of every request."""
    sent: int = 0
    """Bytes of all bodies."""
    uploads: dict[str, bytes] = field(default_factory=dict)
    """Content of LFS objects by SHA-256."""
    watch: Callable[[str], object] = lambda path: None
    """Called with the path of every request."""
    token: str | None = None
    """Where set, writing needs it."""
    url: str = ""
    cdn: str = ""
    """The same server under another name: a token must not be sent there."""

    def add(self, name: str, folder: Path, ref: str = "main") -> str:
        """Publish a directory as a new commit of a branch; returns the commit."""
        repo = self.repos.setdefault(name, Repo({}, {}))
        commit = hashlib.sha1(f"{name} {folder}".encode()).hexdigest()
        repo.commits[commit] = folder
        repo.refs[ref] = commit
        return commit

    def asked(self, method: str, part: str) -> list[str]:
        """The paths of the requests of a method that contain a text."""
        return [path for m, path, _, _ in self.requests if m == method and part in path]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Run the server while the context lasts."""

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.cdn = f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _digests(path: Path) -> dict[str, Any]:
    """What the Hub states of a file, but for those that would take long here."""
    size = path.stat().st_size
    if size > 1 << 24:
        return {}
    content = path.read_bytes()
    if path.name.endswith(_LFS):
        sha256 = hashlib.sha256(content).hexdigest()
        return {"blobId": "0" * 40, "lfs": {"sha256": sha256, "size": size, "pointerSize": 134}}
    return {"blobId": hashlib.sha1(b"blob %d\0" % size + content).hexdigest()}


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.content = self._chunked()
        path = urlsplit(self.path).path
        self.state.requests.append(
            (self.command, path, self.headers.get("Range"), self.headers.get("Authorization"))
        )
        self.state.watch(path)
        self.fault = self._fault(path)
        fault = self.fault
        if fault and (fault.status or fault.body is not None):
            self._reply(fault.status or 200, fault.body or b"", fault.headers)
        elif match := _RESOLVE.fullmatch(path):
            self._resolve(match[1], unquote(match[2]), unquote(match[3]))
        elif match := _CDN.fullmatch(path):
            self._file(self.state.repos[match[1]].commits[match[2]] / unquote(match[3]), {})
        elif self.command in {"POST", "PUT"} or path == "/api/whoami-v2":
            self._write(path)
        elif match := _INFO.fullmatch(path):
            self._info(match[1], unquote(match[2] or "main"))
        else:
            self._error(404, "EntryNotFound", "nothing here")

    def _chunked(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _fault(self, path: str) -> Fault | None:
        for fault in self.state.faults:
            fits = fault.times > 0 and not (fault.whole and self.headers.get("Range"))
            if fits and fault.method == self.command and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    def _find(self, name: str, revision: str) -> tuple[Repo, str] | None:
        repo = self.state.repos.get(name)
        if repo is None:
            self._error(404, "RepoNotFound", "Repository not found")
            return None
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, commit

    def _info(self, name: str, revision: str) -> None:
        if (found := self._find(name, revision)) is None:
            return
        folder = found[0].commits[found[1]]
        siblings = [
            {
                "rfilename": path.relative_to(folder).as_posix(),
                "size": path.stat().st_size,
                **_digests(path),
            }
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        if "blobs" not in parse_qs(urlsplit(self.path).query):
            siblings = [{"rfilename": sibling["rfilename"]} for sibling in siblings]
        self._json({"id": name, "sha": found[1], "siblings": siblings})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if (found := self._find(name, revision)) is None:
            return
        repo, commit = found
        file = repo.commits[commit] / path
        headers = {"X-Repo-Commit": commit}
        if not file.is_file():
            self._error(404, "EntryNotFound", "Entry not found", headers)
        elif path.endswith(_LFS):
            etag = hashlib.sha256(f"{commit} {path}".encode()).hexdigest()
            headers |= {
                "Location": f"{self.state.cdn}/cdn/{name}/{commit}/{path}?signature=secret",
                "X-Linked-Etag": f'"{etag}"',
                "X-Linked-Size": str(file.stat().st_size),
            }
            self._reply(302, b"", headers)
        else:
            etag = hashlib.sha1(file.read_bytes()).hexdigest()
            self._file(file, headers | {"ETag": f'"{etag}"'})

    def _file(self, path: Path, headers: Mapping[str, str]) -> None:
        """The file or the range asked for, never more of it in memory than a piece."""
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and not (self.fault and not self.fault.ranges):
            start, stop = int(asked[1]), min(int(asked[2] or size - 1) + 1, size)
            status, more = 206, {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        else:
            start, stop, status, more = 0, size, 200, {}
        self._head(status, {**headers, **more, "Content-Length": str(stop - start)})
        if self.command == "HEAD":
            return
        cut = self.fault.cut if self.fault else None
        with path.open("rb") as file:
            file.seek(start)
            left = stop - start if cut is None else min(cut, stop - start)
            try:
                while left:
                    piece = file.read(min(left, 1 << 16))
                    self._send(piece)
                    self.state.sent += len(piece)
                    left -= len(piece)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def _write(self, path: str) -> None:
        state = self.state
        known = self.headers.get("Authorization") == f"Bearer {state.token}"
        if state.token and not known and not path.startswith("/lfs/"):
            self._error(401, "", "Invalid credentials in Authorization header")
            return
        if path == "/api/whoami-v2":
            self._json({"name": "someone", "type": "user", "orgs": [{"name": "lab"}]})
        elif path == "/api/repos/create":
            asked = json.loads(self.content)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            created = Repo({}, {}, private=asked.get("visibility") == "private")
            known = name in state.repos
            state.repos.setdefault(name, created)
            self._json({"url": f"{state.url}/{name}"}, 409 if known else 200)
        elif _PREUPLOAD.fullmatch(path):
            files = json.loads(self.content)["files"]
            self._json({"files": [self._mode(file["path"]) for file in files]})
        elif match := _BATCH.fullmatch(path):
            objects = json.loads(self.content)["objects"]
            self._json({"transfer": "basic", "objects": [self._upload(o) for o in objects]})
        elif path.startswith("/lfs/"):
            state.uploads[path.removeprefix("/lfs/")] = self.content
            self._reply(200, b"", {})
        elif match := _COMMIT.fullmatch(path):
            self._commit(match[1])
        else:
            self._error(404, "EntryNotFound", "nothing here")

    def _mode(self, path: str) -> dict[str, Any]:
        return {
            "path": path,
            "uploadMode": "lfs" if path.endswith(_LFS) else "regular",
            "shouldIgnore": False,
            "oid": None,
        }

    def _upload(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        href = f"{self.state.url}/lfs/{asked['oid']}"
        return {**asked, "actions": {"upload": {"href": href, "header": {}}}}

    def _commit(self, name: str) -> None:
        repo = self.state.repos[name]
        commit = hashlib.sha1(self.content).hexdigest()
        before = repo.commits.get(repo.refs.get("main", ""))
        folder = Path(next(iter(self.state.repos["store"].commits.values()))) / commit
        folder.mkdir(parents=True)
        for file in before.rglob("*") if before else ():
            if file.is_file():
                self._put(folder, file.relative_to(before or folder).as_posix(), file.read_bytes())
        for line in self.content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self._put(folder, value["path"], b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                self._put(folder, value["path"], self.state.uploads[value["oid"]])
        repo.commits[commit] = folder
        repo.refs["main"] = commit
        url = f"{self.state.url}/{name}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit, "hookOutput": "", "success": True})

    @staticmethod
    def _put(folder: Path, name: str, content: bytes) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    def _error(
        self, status: int, code: str, text: str, headers: Mapping[str, str] | None = None
    ) -> None:
        more = {"X-Error-Code": code} if code else {}
        self._reply(status, b"", {**more, "X-Error-Message": text, **(headers or {})})

    def _json(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self._reply(status, body, {"Content-Type": "application/json"})

    def _reply(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        endless = self.fault is not None and self.fault.endless
        length = {} if endless else {"Content-Length": str(len(body))}
        self._head(status, {**headers, **length})
        if self.command == "HEAD":
            return
        try:
            self._send(body)
            self.state.sent += len(body)
            while endless:
                self._send(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _send(self, body: bytes) -> None:
        fault = self.fault
        if fault and fault.flip and body:
            half = len(body) // 2
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        if fault is None or fault.drip is None:
            self.wfile.write(body)
            return
        for one in body:
            self.wfile.write(bytes([one]))
            time.sleep(fault.drip)

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        if self.fault is not None:
            names = {name.lower() for name in self.fault.headers}
            own = {name: value for name, value in headers.items() if name.lower() not in names}
            headers = {**own, **self.fault.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
