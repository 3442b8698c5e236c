"""A small Hugging Face Hub on the loopback interface, which real clients push to and load from over HTTP.

It knows model repositories with commits, branches, private ones and tokens. Weights take the large-file (LFS) path,
for which clients must set HF_HUB_DISABLE_XET=1, or with `Hub(xet=True)` the Xet one, whose store then is a folder that
the client reads and writes by itself. `Hub.uploads` lets a test hold an upload in the middle, and `Hub.mute` names
files about which the server does not answer.
"""

import base64
import contextlib
import hashlib
import json
import re
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub import ModelCard

OWNER = "tester"
TOKEN = "hf_tester"
LARGE = (".safetensors", ".bin")


@dataclass
class File:
    """One file of a commit: its content, or the checksum under which the large-file store holds it."""

    content: bytes = b""
    sha256: str | None = None
    size: int = 0

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % self.size + (self.sha256 or "").encode() + self.content).hexdigest()


@dataclass
class Repository:
    """Commits (id -> path -> file) and the branches that point at them."""

    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File]) -> str:
        described = [self.branches.get(branch), len(self.commits), sorted((p, f.blob_id) for p, f in files.items())]
        commit_id = hashlib.sha1(repr(described).encode()).hexdigest()
        self.commits[commit_id] = files
        self.branches[branch] = commit_id
        return commit_id

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class Hold:
    """Stops every upload while it is closed, and says when one has come."""

    def __init__(self):
        self.open, self.reached = threading.Event(), threading.Event()
        self.open.set()

    def __call__(self) -> None:
        if not self.open.is_set():
            self.reached.set()
            self.open.wait(60)


class Hub:
    """The server; use it as a context manager."""

    def __init__(self, *, xet: bool = False):
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.xet = tempfile.TemporaryDirectory() if xet else None
        self.xet_tokens: list[str] = []  # "write" and "read", as they were asked for
        self.mute: set[str] = set()
        self.uploads = Hold()
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.uploads.open.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        if self.xet:
            self.xet.cleanup()

    def files(self, name: str, revision: str = "main") -> dict[str, File]:
        repository = self.repositories[f"{OWNER}/{name}"]
        return repository.commits[repository.resolve(revision)]

    def xet_hash(self, sha256: str) -> str | None:
        """Name in the Xet store of a file of this SHA-256, None if it never arrived."""
        shards = Path(self.xet.name).glob("xet/xorbs/shards/*.mdb") if self.xet else ()
        return next((name for path in shards for name, found in xet_files(path.read_bytes()) if found == sha256), None)


def xet_files(shard: bytes) -> Iterator[tuple[str, str]]:
    """Xet name and SHA-256 of each file in a shard: records of 48 bytes, a header and the number of those after it."""

    def name(record: bytes) -> str:
        return "".join(f"{number:016x}" for number in struct.unpack("<4Q", record[:32]))

    place = 48
    while place + 48 <= len(shard) and (header := shard[place : place + 48])[:32] != b"\xff" * 32:
        flags, entries = struct.unpack("<II", header[32:40])
        place += 48 * (1 + entries * (2 if flags >> 31 else 1))
        if flags >> 30 & 1:
            yield name(header), name(shard[place : place + 48])
            place += 48


class Refusal(Exception):
    """An error as the Hub answers it: status, message, error code and further entries of the answer."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None, **entries: str):
        super().__init__(message)
        self.status, self.content = status, {"error": message, **entries}
        named = {"X-Error-Code": code, "X-Error-Message": message if code else None, "X-Repo-Commit": commit}
        self.headers = {name: value for name, value in named.items() if value}


class Handler(BaseHTTPRequestHandler):
    """Routes requests; a route is a method that returns the answer (JSON or bytes), with headers if it has any."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "large_batch"),
        ("PUT", r"/large/(\w+)", "large_upload"),
        ("HEAD|GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "download"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", "create_branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", "commit"),
        ("GET", r"/api/models/([^/]+/[^/]+)/xet-(read|write)-token/(.+)", "xet_token"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
    )

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.read_body()
        try:
            if self.headers.get("Authorization") and not self.signed_in and not path.startswith("/large/"):
                raise Refusal(401, "Invalid credentials in Authorization header")
            for methods, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in methods.split("|"):
                    answer = getattr(self, name)(body, *match.groups())
                    self.answer(200, *(answer if isinstance(answer, tuple) else (answer,)))
                    return
            raise Refusal(404, f"No route for {self.command} {path}")
        except Refusal as refusal:
            self.answer(refusal.status, refusal.content, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = route

    def log_message(self, *_) -> None:
        pass

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline() or b"0", 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, status: int, content: dict | list | bytes, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):  # from a client that was killed
                self.wfile.write(body)

    # ---- who may do what

    @property
    def signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        # As on the Hub, who may not see a repository is not told whether it exists, and only its owner writes.
        if repository is None or ((repository.private or self.command == "POST") and not self.signed_in):
            raise Refusal(404 if self.signed_in else 401, "Repository not found", "RepoNotFound")
        return repository

    def revision(self, name: str, revision: str | None) -> tuple[str, dict[str, File]]:
        repository = self.repository(name)
        commit = repository.resolve(revision or "main")
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repository.commits[commit]

    # ---- writing

    def validate_card(self, body: bytes) -> dict:
        return {"errors": [], "warnings": []}

    def create(self, body: bytes) -> dict:
        asked = json.loads(body)
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        url = f"{self.hub.address}/{name}"
        if not self.signed_in:
            raise Refusal(401, "Unauthorized")
        with self.hub.lock:
            if name in self.hub.repositories:
                raise Refusal(409, "You already created this model repo", url=url)
            self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
            self.hub.repositories[name].commit("main", {})
        return {"url": url, "name": name, "id": name}

    def create_branch(self, body: bytes, name: str, branch: str) -> dict:
        repository = self.repository(name)
        with self.hub.lock:
            if branch in repository.branches:
                raise Refusal(409, "Reference already exists")
            repository.branches[branch] = repository.branches["main"]
        return {}

    def preupload(self, body: bytes, name: str, revision: str) -> dict:
        self.revision(name, revision)
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = ["lfs" if path.endswith(LARGE) else "regular" for path in paths]
        described = zip(paths, modes, strict=True)
        return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in described]}

    def large_batch(self, body: bytes, name: str) -> tuple[dict, dict]:
        self.repository(name)
        objects = [{"oid": entry["oid"], "size": entry["size"]} for entry in json.loads(body)["objects"]]
        for entry in objects:
            if entry["oid"] not in self.hub.large:
                entry["actions"] = {"upload": {"href": f"{self.hub.address}/large/{entry['oid']}"}}
        return {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def large_upload(self, body: bytes, sha256: str) -> dict:
        self.hub.uploads()
        if hashlib.sha256(body).hexdigest() != sha256:
            raise Refusal(400, "The content does not match its SHA-256")
        self.hub.large[sha256] = body
        return {}

    def xet_token(self, body: bytes, name: str, kind: str, revision: str) -> tuple[dict, dict]:
        """Where the Xet store is, and for how long it may be used."""
        self.revision(name, revision)
        if kind == "write" and not self.signed_in:
            raise Refusal(401, "Unauthorized")
        self.hub.xet_tokens.append(kind)
        store, end = f"local://{self.hub.xet.name}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": store, "X-Xet-Access-Token": "t", "X-Xet-Token-Expiration": str(end)}
        return {"casUrl": store, "accessToken": "t", "exp": end}, headers

    def commit(self, body: bytes, name: str, branch: str) -> dict:
        repository = self.repository(name)
        with self.hub.lock:
            files = dict(self.revision(name, branch)[1])
            for line in body.splitlines():
                entry = json.loads(line)
                self.apply(entry["key"], entry["value"], files)
            request = {}
            if "create_pr=1" in urlsplit(self.path).query:
                number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.branches)
                branch = f"refs/pr/{number}"
                request = {"pullRequestUrl": f"{self.hub.address}/{name}/discussions/{number}"}
            commit = repository.commit(branch, files)
        url = f"{self.hub.address}/{name}/commit/{commit}"
        return {"success": True, "commitOid": commit, "commitUrl": url, **request}

    def apply(self, key: str, value: dict, files: dict[str, File]) -> None:
        """Carry out one line of a commit; its header changes nothing."""
        if key == "file":
            content = base64.b64decode(value["content"])
            files[value["path"]] = File(content, size=len(content))
        elif key == "lfsFile":
            if value["oid"] not in self.hub.large and self.hub.xet_hash(value["oid"]) is None:
                raise Refusal(400, f"The content of {value['path']} was never uploaded")
            files[value["path"]] = File(sha256=value["oid"], size=value["size"])
        elif key == "deletedFile":
            files.pop(value["path"], None)

    # ---- reading

    def download(self, body: bytes, name: str, revision: str, path: str) -> tuple[bytes, dict]:
        commit, files = self.revision(name, revision)
        if f"{name}/{path}" in self.hub.mute:
            raise Refusal(503, "Try again later")
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit)
        file = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.sha256 or file.blob_id}"'}
        if file.sha256 is None:
            return file.content, headers
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(file.size)}
        if self.hub.xet is None:
            return self.hub.large[file.sha256], headers
        route = f"{self.hub.address}/api/models/{name}/xet-read-token/{commit}"
        return b"", {**headers, "X-Xet-Hash": self.hub.xet_hash(file.sha256), "X-Xet-Refresh-Route": route}

    def tree(self, body: bytes, name: str, revision: str) -> list:
        _, files = self.revision(name, revision)
        return [{"type": "file", "path": p, "oid": f.blob_id, "size": f.size} for p, f in sorted(files.items())]

    def info(self, body: bytes, name: str, revision: str | None) -> dict:
        commit, files = self.revision(name, revision)
        card = ModelCard(files["README.md"].content.decode()).data.to_dict() if "README.md" in files else {}
        return {
            "_id": "0" * 24,
            "id": name,
            "sha": commit,
            "private": self.hub.repositories[name].private,
            **{key: card.get(key) for key in ("tags", "pipeline_tag", "library_name")},
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }
