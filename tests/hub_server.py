"""A small Hub on loopback: what huggingface_hub 2.4 asks of the real one for uploads over LFS, and for downloads.

It keeps everything that it was sent, and can be told to fail: with a status, or by cutting a connection.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".png", ".gif", ".mp4")
WRITE_TOKEN = "hf_writeMeNowhereElse0123456789"
READ_TOKEN = "hf_readOnly0123456789"


@dataclass
class Repository:
    """One model repository."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


@dataclass
class Request:
    """One that came in."""

    method: str
    path: str
    body: bytes


@dataclass
class Fault:
    """What happens to matching requests but the first `skip`: a status, or a cut after so many bytes of the body."""

    pattern: re.Pattern[str]
    times: int
    status: int = 500
    message: str = "broken on purpose"
    after: int | None = None
    skip: int = 0
    reached: Callable[[], None] = lambda: None


class HubServer:
    """Serves in threads of this process while used as a context."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[Request] = []
        self.tokens = {WRITE_TOKEN: "write", READ_TOKEN: "read"}
        self.part_size: int | None = None
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, pattern: str, *, times: int = 1, **kwargs: Any) -> None:
        """Let the next `times` requests fail whose `METHOD /path` matches."""
        self._faults.append(Fault(re.compile(pattern), times, **kwargs))

    def mend(self) -> None:
        """No faults any more."""
        self._faults.clear()

    def forget(self) -> None:
        """Start counting requests anew."""
        self.requests.clear()

    def sent(self, pattern: str) -> list[Request]:
        """The requests whose `METHOD /path` matches."""
        return [request for request in self.requests if re.search(pattern, f"{request.method} {request.path}")]

    def fault_for(self, request: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if not fault.pattern.search(request):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                elif fault.times > 0:
                    fault.times -= 1
                    return fault
        return None


class _CutError(Exception):
    """The connection is to be closed as it is."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        fault = self.hub.fault_for(line)
        try:
            body = self._body(fault)
        except _CutError:
            self.close_connection = True
            self.connection.close()
            return
        self.hub.requests.append(Request(self.command, path, body))
        if fault is not None:
            self._answer(fault.status, {"error": fault.message})
            return
        for method, pattern, serve in _ROUTES:
            if method == self.command and (found := re.fullmatch(pattern, path)):
                serve(self, body, *found.groups())
                return
        self._answer(404, {"error": f"no such route: {line}"})

    do_GET = do_POST = do_PUT = do_HEAD = _serve  # noqa: N815

    def _body(self, fault: Fault | None) -> bytes:
        limit = None if fault is None else fault.after
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
                self._cut_at(limit, sum(map(len, parts)), fault)
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        if limit is not None:
            self.rfile.read(min(limit, length))
            self._cut_at(limit, limit, fault)
        return self.rfile.read(length)

    def _cut_at(self, limit: int | None, received: int, fault: Fault | None) -> None:
        if limit is not None and received >= limit:
            assert fault is not None
            fault.reached()
            raise _CutError

    def _answer(self, status: int, value: Any = None, *, data: bytes | None = None, **headers: str) -> None:
        data = json.dumps(value).encode() if data is None else data
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Who may do what.

    def _role(self) -> str | None:
        return self.hub.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _may_write(self) -> bool:
        role = self._role()
        if role == "write":
            return True
        if role is None:
            message = "Invalid credentials in Authorization header"
            self._answer(401, {"error": message}, X_Error_Message=message)
        else:
            message = "you don't have the rights to write here"
            self._answer(403, {"error": message}, X_Error_Message=message)
        return False

    def _repository(self, repo_id: str) -> Repository | None:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self._role() is None):
            self._answer(404 if self._role() else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return repository

    # The API.

    def _create(self, body: bytes) -> None:
        if not self._may_write():
            return
        wanted = json.loads(body)
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        if repo_id in self.hub.repositories:
            self._answer(409, {"error": "You already created this model repo", "url": url})
            return
        self.hub.repositories[repo_id] = Repository(private=wanted.get("visibility") == "private")
        self._answer(200, {"url": url, "name": repo_id})

    def _auth_check(self, _: bytes, repo_id: str) -> None:
        if self._repository(repo_id) is not None and self._may_write():
            self._answer(200, {})

    def _validate_yaml(self, _: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def _info(self, _: bytes, repo_id: str, revision: str | None = None) -> None:
        if (repository := self._repository(repo_id)) is not None:
            siblings = [{"rfilename": path} for path in repository.files]
            info = {"id": repo_id, "modelId": repo_id, "sha": repository.sha, "private": repository.private}
            self._answer(200, {**info, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def _tree(self, _: bytes, repo_id: str, revision: str) -> None:
        if (repository := self._repository(repo_id)) is not None:
            self._answer(200, [_tree_entry(path, data) for path, data in repository.files.items()])

    def _preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        repository = self._repository(repo_id)
        if repository is None or not self._may_write():
            return
        files = []
        for item in json.loads(body)["files"]:
            path, known = item["path"], repository.files.get(item["path"])
            is_lfs = path.endswith(LFS_SUFFIXES)
            oid = None if known is None else hashlib.sha256(known).hexdigest() if is_lfs else _git_oid(known)
            mode = "lfs" if is_lfs else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": files})

    def _lfs_batch(self, body: bytes, repo_id: str) -> None:
        if self._repository(repo_id) is None or not self._may_write():
            return
        objects = []
        for item in json.loads(body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                entry["actions"] = self._upload_actions(item["oid"], item["size"])
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _upload_actions(self, oid: str, size: int) -> dict[str, Any]:
        href, part_size = f"{self.hub.endpoint}/lfs/{oid}", self.hub.part_size
        if part_size is None or size <= part_size:
            return {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        parts = {str(n + 1): f"{href}/part/{n + 1}" for n in range(-(-size // part_size))}
        return {"upload": {"href": f"{href}/complete", "header": {"chunk_size": str(part_size), **parts}}}

    def _put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(400, {"error": "wrong hash"})
            return
        self.hub.objects[oid] = body
        self._answer(200, {})

    def _put_part(self, body: bytes, oid: str, number: str) -> None:
        self.hub.parts[oid, int(number)] = body
        self._answer(200, {}, ETag=f'"{hashlib.md5(body).hexdigest()}"')

    def _complete(self, body: bytes, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        self._put(b"".join(self.hub.parts[oid, number] for number in numbers), oid)

    def _verify(self, body: bytes, oid: str) -> None:
        self._answer(200 if len(self.hub.objects.get(oid, b"")) == json.loads(body)["size"] else 404, {})

    def _commit(self, body: bytes, repo_id: str, revision: str) -> None:
        repository = self._repository(repo_id)
        if repository is None or not self._may_write():
            return
        files = dict(repository.files)
        header, *operations = [json.loads(line) for line in body.splitlines()]
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                assert operation["key"] == "deletedFile", operation
                del files[value["path"]]
        repository.files = files
        repository.commits.append(header["value"]["summary"])
        url = f"{self.hub.endpoint}/{repo_id}/commit/{repository.sha}"
        self._answer(200, {"success": True, "commitOid": repository.sha, "commitUrl": url})

    def _resolve(self, _: bytes, repo_id: str, revision: str, path: str) -> None:
        repository = self._repository(repo_id)
        if repository is None:
            return
        headers = {"X_Repo_Commit": repository.sha}
        data = repository.files.get(path)
        if data is None:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", **headers)
        else:
            self._answer(200, data=data, ETag=f'"{_git_oid(data)}"', **headers)


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._validate_yaml),
    ("GET", f"/api/models/{_REPO}/auth-check/write", _Handler._auth_check),
    ("GET", f"/api/models/{_REPO}", _Handler._info),
    ("GET", f"/api/models/{_REPO}/revision/([^/]+)", _Handler._info),
    ("GET", f"/api/models/{_REPO}/tree/([^/]+)", _Handler._tree),
    ("POST", f"/api/models/{_REPO}/preupload/([^/]+)", _Handler._preupload),
    ("POST", f"/{_REPO}\\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    ("PUT", "/lfs/(\\w+)", _Handler._put),
    ("PUT", "/lfs/(\\w+)/part/(\\d+)", _Handler._put_part),
    ("POST", "/lfs/(\\w+)/complete", _Handler._complete),
    ("POST", "/lfs/(\\w+)/verify", _Handler._verify),
    ("POST", f"/api/models/{_REPO}/commit/([^/]+)", _Handler._commit),
    ("GET", f"/{_REPO}/resolve/([^/]+)/(.+)", _Handler._resolve),
    ("HEAD", f"/{_REPO}/resolve/([^/]+)/(.+)", _Handler._resolve),
]


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _tree_entry(path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry
