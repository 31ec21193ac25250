"""A server on the loopback interface that answers as the Hugging Face hub does, without Xet."""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, parse_qsl, unquote, urlsplit

WRITER, READER = "hf_writer0123456789", "hf_reader0123456789"
_LARGE = (".parquet", ".h5", ".safetensors", ".tar", ".mds")
_PAGE = 5
_LICENSES = ("unknown", "cc-by-4.0", "apache-2.0", "mit")


@dataclass(frozen=True)
class Blob:
    data: bytes
    is_lfs: bool

    @property
    def git(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.data).hexdigest() if self.is_lfs else self.git


@dataclass
class Repository:
    """Branches by name: each is a list of commits, the last one the newest; a commit is files by path."""

    private: bool = False
    branches: dict[str, list[str]] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)

    def add(self, branch: str, files: dict[str, Blob]) -> str:
        commit = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = files
        self.branches.setdefault(branch, []).append(commit)
        return commit

    def commit(self, revision: str) -> str | None:
        if revision in self.commits:
            return revision
        return self.branches[revision][-1] if revision in self.branches else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision without .gitattributes."""
        commit = self.commit(revision)
        assert commit is not None
        return {name: blob.data for name, blob in self.commits[commit].items() if name != ".gitattributes"}


class Hub(ThreadingHTTPServer):
    """
    Attributes:
        repositories: by kind and name, `datasets/me/x`.
        objects: large files by sha256.
        uploads: sha256 of each upload that came to its end.
        downloads: path and Range header of each download that was begun.
        limit: uploads or downloads after which the next one is left hanging half way; `hanging` is then set.
        quota: uploads after which all others are refused.
        damage: names of files whose downloads have one byte changed.
        trouble: HTTP status that every request is answered with.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.downloads: list[tuple[str, str | None]] = []
        self.limit: int | None = None
        self.quota: int | None = None
        self.hanging, self.closing, self.lock = threading.Event(), threading.Event(), threading.Lock()
        self.damage: set[str] = set()
        self.trouble: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def first_upload(self) -> None:
        """Called when the first file has come; tests replace it."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed are part of the tests."""


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        """Stay quiet."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if self.server.trouble is not None:
                raise _Refused(self.server.trouble, "not today")
            for method, pattern, answer in _ROUTES:
                found = re.fullmatch(pattern, path)
                if method == self.command.replace("HEAD", "GET") and found:
                    answer(self, **found.groupdict())
                    return
            raise _Refused(404, f"no such address: {self.command} {path}")
        except _Refused as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            self._send(error.status, json.dumps({"error": error.message}).encode(), headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: object, **headers: str) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def _token(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token not in (None, WRITER, READER):
            raise _Refused(401, "Invalid credentials in Authorization header")
        return token

    def _repository(self, kind: str, name: str, *, write: bool = False) -> Repository:
        token = self._token()
        found = self.server.repositories.get(f"{kind}s/{name}")
        if found is None or (found.private and token is None):
            raise _Refused(401 if token is None else 404, "Repository not found", "RepoNotFound")
        if write and token != WRITER:
            raise _Refused(403, "You have read access but not the required permissions for this operation")
        return found

    def _tree(self, repository: Repository, revision: str) -> tuple[str, dict[str, Blob]]:
        commit = repository.commit(revision)
        if commit is None:
            raise _Refused(404, "Invalid rev id", "RevisionNotFound")
        return commit, repository.commits[commit]

    def create(self) -> None:
        token, asked = self._token(), json.loads(self._body)
        if token is None:
            raise _Refused(401, "Invalid username or password.")
        if token != WRITER:
            raise _Refused(403, "You don't have the rights to create a repository under this namespace")
        name = f"{asked['organization']}/{asked['name']}"
        key = f"{asked.get('type', 'model')}s/{name}"
        url = f"{self.server.url}/{key.removeprefix('models/')}"
        with self.server.lock:
            if key in self.server.repositories:
                self._send(409, json.dumps({"error": "You already created it", "url": url}).encode(), {})
                return
            repository = self.server.repositories[key] = Repository(asked.get("visibility") == "private")
            repository.add("main", {".gitattributes": Blob(b"*.parquet filter=lfs\n", False)})
        self._json({"url": url})

    def branch(self, kind: str, name: str, branch: str) -> None:
        repository = self._repository(kind, name, write=True)
        if branch in repository.branches:
            raise _Refused(409, "Reference already exists")
        repository.add(branch, self._tree(repository, "main")[1])
        self._json({})

    def info(self, kind: str, name: str, revision: str = "main") -> None:
        repository = self._repository(kind, name)
        commit, files = self._tree(repository, revision)
        siblings = [{"rfilename": path} for path in files]
        self._json({"id": name, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []})

    def tree(self, kind: str, name: str, revision: str) -> None:
        files = self._tree(self._repository(kind, name), revision)[1]
        first = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        page = sorted(files)[first : first + _PAGE]
        address = f"{self.server.url}/api/{kind}s/{name}/tree/{revision}?recursive=true&cursor={first + _PAGE}"
        more = {"Link": f'<{address}>; rel="next"'} if first + _PAGE < len(files) else {}
        self._json([_entry(path, files[path]) for path in page], **more)

    def paths(self, kind: str, name: str, revision: str) -> None:
        files = self._tree(self._repository(kind, name), revision)[1]
        asked = [path for key, path in parse_qsl(self._body.decode()) if key == "paths"]
        folders = {path for path in asked if any(file.startswith(f"{path}/") for file in files)}
        found = [_entry(path, files[path]) for path in asked if path in files]
        self._json([*found, *({"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders))])

    def preupload(self, kind: str, name: str, revision: str) -> None:
        files = self._tree(self._repository(kind, name, write=True), revision)[1]
        asked = json.loads(self._body)["files"]
        answers: list[dict[str, Any]] = []
        for each in asked:
            path = each["path"]
            mode = "lfs" if path.endswith(_LARGE) else "regular"
            oid = {"oid": files[path].etag} if path in files else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        self._json({"files": answers})

    def batch(self, kind: str | None, name: str) -> None:
        self._repository((kind or "models/").removesuffix("s/"), name, write=True)
        answers: list[dict[str, Any]] = []
        for each in json.loads(self._body)["objects"]:
            answer = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.server.objects:
                answer["actions"] = {"upload": {"href": f"{self.server.url}/objects/{each['oid']}"}}
            answers.append(answer)
        self._json({"transfer": "basic", "objects": answers})

    def upload(self, sha256: str) -> None:
        self._hang(len(self.server.uploads))
        data = self._body
        if self.server.quota is not None and len(self.server.uploads) >= self.server.quota:
            raise _Refused(403, "Storage quota exceeded")
        assert hashlib.sha256(data).hexdigest() == sha256
        with self.server.lock:
            self.server.objects[sha256] = data
            self.server.uploads.append(sha256)
            if len(self.server.uploads) == 1:
                self.server.first_upload()
        self._send(200, b"", {})

    def _hang(self, done: int) -> None:
        if self.server.limit is not None and done >= self.server.limit:
            self.server.hanging.set()
            self.server.closing.wait()

    def commit(self, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name, write=True)
        files = dict(self._tree(repository, revision)[1])
        for line in self._body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                files[value["path"]] = Blob(self.server.objects[value["oid"]], True)
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.add(revision, files)
        self._json({"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{name}/commit/{commit}"})

    def card(self) -> None:
        text = json.loads(self._body)["content"]
        license = re.search(r"(?m)^license: (.+)$", text)
        if license is None or license[1] not in _LICENSES:
            self._send(400, json.dumps({"errors": [{"message": '"license" must be one of ...'}]}).encode(), {})
            return
        self._json({"errors": [], "warnings": []})

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        repository = self._repository((kind or "models/").removesuffix("s/"), name)
        commit, files = self._tree(repository, revision)
        if path not in files:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        blob, data = files[path], files[path].data
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            self._send(200, data, headers)
            return
        if path in self.server.damage:
            data = bytes([data[0] ^ 1]) + data[1:]
        wanted = self.headers.get("Range")
        with self.server.lock:
            begun = len(self.server.downloads)
            self.server.downloads.append((path, wanted))
        first = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        part = data[first:]
        self.send_response(206 if wanted else 200)
        if wanted:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        for key, value in {"Content-Length": str(len(part)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.server.limit is not None and begun >= self.server.limit:
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self._hang(begun)
        else:
            self.wfile.write(part)


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.git}
    if blob.is_lfs:
        entry["lfs"] = {"oid": blob.etag, "size": len(blob.data), "pointerSize": 130}
    return entry


_KIND, _REPO = r"(?P<kind>dataset|model)s", r"(?P<name>[^/]+/[^/]+)"
_PREFIX = rf"/(?P<kind>datasets/)?{_REPO}"
_ROUTES = (
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.card),
    ("POST", rf"/api/{_KIND}/{_REPO}/branch/(?P<branch>.+)", _Handler.branch),
    ("GET", rf"/api/{_KIND}/{_REPO}", _Handler.info),
    ("GET", rf"/api/{_KIND}/{_REPO}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", rf"/api/{_KIND}/{_REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("POST", rf"/api/{_KIND}/{_REPO}/paths-info/(?P<revision>.+)", _Handler.paths),
    ("POST", rf"/api/{_KIND}/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/api/{_KIND}/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", rf"{_PREFIX}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/objects/(?P<sha256>[0-9a-f]{64})", _Handler.upload),
    ("GET", rf"{_PREFIX}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
)


@contextmanager
def local_hub(cache: Path) -> Iterator[Hub]:
    """A hub that this process talks to, with the token of somebody who may write and an empty cache."""
    from huggingface_hub import HfFileSystem, constants

    with serve_hub() as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        settings = {"HUGGINGFACE_CO_URL_TEMPLATE": template, "ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache)}
        HfFileSystem.clear_instance_cache()
        with (
            mock.patch.multiple(constants, HF_HUB_DISABLE_XET=True, **settings),
            mock.patch.dict(os.environ, HF_TOKEN=WRITER),
        ):
            yield hub


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """The hub, at a free port."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        hub.shutdown()
        hub.server_close()
        thread.join()
