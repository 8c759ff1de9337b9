"""A fake of the Hugging Face hub on the loopback interface: repositories, commits, large files on a CDN, faults.

It answers what `huggingface_hub` and `datasets` ask when they read, as https://huggingface.co/docs/hub/api describes
it and as the clients' own code takes it apart; any other question is kept in `unknown`, and a test can fail on it.
"""

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

TOKEN = "hf_standinstandinstandinstandin"
SIGNATURE = "signedbythestandin"
PAGE_ENTRIES = 3
LARGE_BYTES = 1000
"""Files of at least this size are on the CDN, as LFS files are."""

_API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)
_RESOLVE = re.compile(r"/(?:(?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Fault:
    """A fault of requests with a matching path.

    Attributes:
        pattern: Searched in the method and path, such as `GET /lfs/`.
        status: Answer with this status.
        drop_after: Close the connection after so many bytes of the body; -1 before the answer.
        delay_s: Wait before the answer.
        times: How many requests it spoils.
        hits: How many it has spoiled.
    """

    pattern: str
    status: int = 0
    drop_after: int | None = None
    delay_s: float = 0.0
    times: int = 10**6
    hits: int = 0


@dataclass
class Repository:
    """A repository: files by commit, and the commits that branches and tags name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    access: str = "public"
    """`public`, `private` (seen with `TOKEN` only) or `gated` (seen, and its files with `TOKEN` only)."""


@dataclass
class Request:
    line: str
    range: str
    authorized: bool
    cdn: bool


class HubServer:
    """The fake hub; `start` and `stop` it repeatedly, it keeps its address."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.unknown: list[str] = []
        self.large: dict[str, bytes] = {}
        self._ports = [0, 0]
        self._servers: list[ThreadingHTTPServer] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def cdn(self) -> str:
        """Address of large files: another origin, which must not receive the token."""
        return f"http://127.0.0.1:{self._ports[1]}"

    def start(self) -> None:
        """Listen, on the same ports as before."""
        for number in (0, 1):
            handler = type("Handler", (_Handler,), {"hub": self, "cdn": bool(number)})
            server = _Server(("127.0.0.1", self._ports[number]), handler)
            self._ports[number] = server.server_address[1]
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            self._servers.append(server)

    def stop(self) -> None:
        """Refuse connections."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers.clear()

    def publish(self, kind: str, name: str, files: dict[str, bytes] | Path, *refs: str, access: str = "public") -> str:
        """Commit files to a repository of kind `models` or `datasets`; returns the commit that `refs` now name."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        repository = self.repositories.setdefault((kind, name), Repository())
        repository.access = access
        state = repr((len(repository.commits), name, sorted((path, _sha(data)) for path, data in files.items())))
        commit = hashlib.sha1(state.encode()).hexdigest()
        repository.commits[commit] = files
        repository.refs.update(dict.fromkeys(refs or ("main",), commit))
        self.large.update({_sha(data): data for data in files.values() if len(data) >= LARGE_BYTES})
        return commit

    @contextmanager
    def fault(self, pattern: str, **settings: Any) -> Iterator[Fault]:
        fault = Fault(pattern, **settings)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    def asked(self, pattern: str) -> list[Request]:
        return [request for request in self.requests if re.search(pattern, request.line)]


@dataclass
class _RefusedError(Exception):
    status: int
    code: str
    message: str
    headers: Mapping[str, str] = field(default_factory=dict)


class _Server(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise every answer takes 40 ms
    hub: HubServer
    cdn: bool

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def _answer(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        line = f"{self.command} {unquote(self.path)}"
        authorization = self.headers.get("Authorization", "")
        self._authorized = authorization == f"Bearer {TOKEN}"
        self.hub.requests.append(Request(line, self.headers.get("Range", ""), bool(authorization), self.cdn))
        self._drop_after: int | None = None
        try:
            self._respond(line, sent)
        except _RefusedError as refused:
            reason = {"X-Error-Message": refused.message, **refused.headers}
            reason |= {"X-Error-Code": refused.code} if refused.code else {}
            self._json({"error": refused.message}, reason, refused.status)

    do_HEAD = do_GET = do_POST = _answer  # noqa: N815 - as http.server names them

    def _respond(self, line: str, sent: str) -> None:
        for fault in self.hub.faults:
            if fault.hits < fault.times and re.search(fault.pattern, line):
                fault.hits += 1
                time.sleep(fault.delay_s)
                if fault.status:
                    raise _RefusedError(fault.status, "", "as the test requests", {"Retry-After": "0"})
                self._drop_after = fault.drop_after
                if fault.drop_after == -1:
                    self._hang_up()
                    return
                break
        path = unquote(urlsplit(self.path).path)
        if self.cdn and path.startswith("/lfs/"):
            self._body(self.hub.large[path.removeprefix("/lfs/")], {"ETag": '"of-the-cdn"'})
        elif api := _API.fullmatch(path):
            self._api(api, sent)
        elif resolve := _RESOLVE.fullmatch(path):
            self._resolve(**resolve.groupdict())
        else:
            # In some environments the client asks for a list of calling programs, which it does not need.
            if path != "/api/agent-harnesses":
                self.hub.unknown.append(line)
            raise _RefusedError(404, "", f"the fake hub does not know {line}")

    def _find(self, kind: str, name: str, revision: str | None) -> tuple[str, dict[str, bytes]]:
        """(commit, its files)."""
        repository = self.hub.repositories.get((kind, name))
        if repository is None or (repository.access == "private" and not self._authorized):
            # The hub hides private repositories from other users.
            if self._authorized:
                raise _RefusedError(404, "RepoNotFound", "Repository not found")
            raise _RefusedError(401, "", "Invalid username or password.")
        commit = repository.refs.get(revision or "main", revision or "")
        if commit not in repository.commits:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    def _api(self, asked: re.Match[str], sent: str) -> None:
        kind, name, what, revision, path = asked.group("kind", "name", "what", "revision", "path")
        commit, files = self._find(kind, name, revision)
        if what in {None, "revision"}:
            siblings = [{"rfilename": path} for path in sorted(files)]
            self._json({"_id": "0", "id": name, "sha": commit, "private": False, "gated": False, "siblings": siblings})
            return
        entries = _tree(files)
        if what == "paths-info":
            wanted = parse_qs(sent).get("paths", [])
            self._json([entry for entry in entries if entry["path"] in wanted])
            return
        folder = f"{path}/" if path else ""
        query = parse_qs(urlsplit(self.path).query)
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        inside = [
            entry
            for entry in entries
            if entry["path"].startswith(folder) and (recursive or "/" not in entry["path"][len(folder) :])
        ]
        if folder and not inside:
            raise _RefusedError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        begin = int(query.get("cursor", ["0"])[0])
        headers = {}
        if begin + PAGE_ENTRIES < len(inside):
            base = f"{self.hub.endpoint}{urlsplit(self.path).path}"
            headers["Link"] = f'<{base}?recursive={recursive}&cursor={begin + PAGE_ENTRIES}>; rel="next"'
        self._json(inside[begin : begin + PAGE_ENTRIES], headers)

    def _resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        commit, files = self._find(kind or "models", name, revision)
        if self.hub.repositories[kind or "models", name].access == "gated" and not self._authorized:
            raise _RefusedError(401, "GatedRepo", f"Access to {name} is restricted.")
        if path not in files:
            raise _RefusedError(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        data = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_git_sha(data)}"'}
        if len(data) < LARGE_BYTES:
            self._body(data, headers)
            return
        digest = _sha(data)
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        headers["Location"] = f"{self.hub.cdn}/lfs/{digest}?Signature={SIGNATURE}"
        self._send(302, headers, b"Found")

    def _body(self, data: bytes, headers: dict[str, str]) -> None:
        """Send a file, or the requested range of it."""
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            self._send(200, headers, data)
            return
        begin, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if begin >= len(data):
            self._send(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
            return
        headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
        self._send(206, headers, data[begin : end + 1])

    def _json(self, value: object, headers: Mapping[str, str] = MappingProxyType({}), status: int = 200) -> None:
        self._send(status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode())

    def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._drop_after is None or self._drop_after >= len(data):
            self.wfile.write(data)
        else:
            self.wfile.write(data[: self._drop_after])
            self._hang_up()

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def _tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """Folders and files, as the hub lists them."""
    folders = {str(parent) for path in files for parent in Path(path).parents if str(parent) != "."}
    listed = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in folders]
    for path, data in files.items():
        entry = {"type": "file", "oid": _git_sha(data), "size": len(data), "path": path}
        if len(data) >= LARGE_BYTES:
            entry["lfs"] = {"oid": _sha(data), "size": len(data), "pointerSize": 130}
        listed.append(entry)
    return sorted(listed, key=lambda entry: quote(str(entry["path"])))


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
