"""A small local Hub: real HTTP for the unmodified huggingface_hub client, so that publishing is tested without mocks.

State is in memory, file contents lie in a folder, large files go to and come from a second origin as on the real Hub.
Its users are tokens. Pull requests, gating, paging, datasets and spaces are not there: they are answered with an error.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE_SUFFIXES = (".safetensors", ".bin", ".png")
LARGE_SIZE = 10_000_000
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\n"
FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
UNPACK_XET = """
import sys, hf_xet
session = hf_xet.XetSession()
group = session.new_download_stream_group(endpoint=sys.argv[1])
sys.stdout.buffer.writelines(group.download_stream(hf_xet.XetFileInfo(sys.argv[2], int(sys.argv[3]))))
"""


@dataclass(frozen=True)
class Request:
    """What a client asked, kept for assertions; status 0: the connection was closed without an answer."""

    method: str
    path: str  # as sent: quoted, with its query
    origin: str  # "hub" or "cdn"
    authorization: str | None
    status: int


@dataclass(frozen=True)
class Blob:
    """What the server announces about a file, also after `flip_byte` has damaged the stored content."""

    sha256: str
    sha1: str  # git's object id: of the content, for large files of their LFS pointer
    size: int
    lfs: bool

    @classmethod
    def of(cls, data: bytes, lfs: bool) -> "Blob":
        sha256 = hashlib.sha256(data).hexdigest()
        content = f"{LFS_POINTER}oid sha256:{sha256}\nsize {len(data)}\n".encode() if lfs else data
        return cls(sha256, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), len(data), lfs)

    def listed(self, oid_key: str, sha256_key: str) -> dict[str, Any]:
        """The two listings of the API spell the same facts differently."""
        pointer_size = len(f"{LFS_POINTER}oid sha256:{self.sha256}\nsize {self.size}\n")
        lfs = {"lfs": {sha256_key: self.sha256, "size": self.size, "pointerSize": pointer_size}} if self.lfs else {}
        return {oid_key: self.sha1, "size": self.size, **lfs}


@dataclass(frozen=True)
class Commit:
    parent: str | None
    message: str
    files: dict[str, Blob]


@dataclass
class Repo:
    id: str
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def oid(self, revision: str) -> str:
        oid = {oid: oid for oid in self.commits} | self.branches | self.tags
        if revision not in oid:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid[revision]

    def files(self, revision: str) -> dict[str, Blob]:
        return self.commits[self.oid(revision)].files

    def commit(self, branch: str, message: str, files: dict[str, Blob]) -> str:
        parent = self.branches.get(branch)
        identity = repr((self.id, len(self.commits), parent, message, sorted(files.items())))
        oid = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[oid] = Commit(parent, message, files)
        self.branches[branch] = oid
        return oid


@dataclass(frozen=True)
class User:
    name: str
    orgs: tuple[str, ...]
    write: bool

    def belongs_to(self, namespace: str) -> bool:
        return namespace in (self.name, *self.orgs)


@dataclass
class Call:
    """A request while it is being answered."""

    method: str
    target: str
    headers: Message
    body: bytes = b""
    user: User | None = None

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        return {key: values[-1] for key, values in parse_qs(urlsplit(self.target).query).items()}

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def repo_id(self) -> str:
        wish = self.json()
        return f"{wish.get('organization') or (self.user.name if self.user else '')}/{wish['name']}"


@dataclass
class Reply:
    body: bytes | dict[str, Any] | list[Any]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer in the client's error protocol, which reads the exception type from `X-Error-Code`."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping = {}, **more: Any):
        super().__init__(message)
        one_line = " ".join(message.split()).encode("ascii", "replace").decode()
        codes = {"X-Error-Code": code} if code else {}
        self.reply = Reply({"error": message, **more}, status, {"X-Error-Message": one_line, **codes, **headers})


@dataclass
class Rule:
    """An intervention asked for by a test, for the next requests that match."""

    method: str
    path_part: str
    times: int = 1
    status: int = 503
    action: Callable[[], Any] | None = None

    def takes(self, call: Call) -> bool:
        matches = self.times > 0 and self.method == call.method and self.path_part in call.target
        self.times -= matches
        return matches


ROUTES: list[tuple[str, str, re.Pattern[str], bool, Callable[..., Reply]]] = []


def route(method: str, pattern: str, origin: str = "hub", write: bool = False) -> Callable:
    """Register a method of HubServer; `{repo}` arrives as a Repo the user may read (with `write`: change)."""
    for name, expression in {"repo": "[^/]+/[^/]+", "path": ".+"}.items():
        pattern = pattern.replace(f"{{{name}}}", f"(?P<{name}>{expression})")
    compiled = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern))

    def register(function: Callable[..., Reply]) -> Callable[..., Reply]:
        ROUTES.append((method, origin, compiled, write, function))
        return function

    return register


class HubServer:
    """The Hub as a context manager: it serves inside the `with` block and refuses connections after it."""

    def __init__(self, folder: Path):
        self.blobs, self.cas = folder / "blobs", folder / "cas"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.cas.mkdir(exist_ok=True)
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.errors: list[Exception] = []
        self._users: dict[str, User] = {}
        self._failures: list[Rule] = []
        self._actions: list[Rule] = []
        self._uploads: set[str] = set()  # sha256 of the contents that the second origin accepts
        self._large: dict[str, Blob] = {}  # by sha256, as the xet hashes
        self._xet_hashes: dict[str, str] = {}
        self._lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        self._origins = [Origin(self, "hub"), Origin(self, "cdn")]
        self.url, self.cdn_url = (origin.url for origin in self._origins)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for origin in self._origins:
            origin.stop()
        if self.errors and kind is None:
            raise self.errors[0]

    def add_user(self, token: str, name: str, orgs: tuple[str, ...] = ("org",), write: bool = True) -> None:
        self._users[token] = User(name, tuple(orgs), write)

    def environment(self, home: Path, token: str | None = None, xet: bool = False, **more: str) -> dict[str, str]:
        """A client reads these at import only, hence a subprocess; nothing of the caller's own Hub settings remains.

        With `xet`, one client process at a time: the local xet store is locked by the process that uses it.
        """
        foreign = re.compile(r"HF_|HUGGING|.*_PROXY$", re.IGNORECASE)
        return {
            **{key: value for key, value in os.environ.items() if not foreign.match(key)},
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            **({} if xet else {"HF_HUB_DISABLE_XET": "1"}),
            **({"HF_TOKEN": token} if token else {}),
            **more,
        }

    def put(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> str:
        """Commit to main as somebody else would, without a request."""
        with self._lock:
            repo = self.repos.get(repo_id) or self._new_repo(repo_id, private)
            blobs = {path: self._store(data, is_large(path, len(data))) for path, data in files.items()}
            return repo.commit("main", "Commit on the server", {**repo.files("main"), **blobs})

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        return self._content(self.repos[repo_id].files(revision)[path]).read_bytes()

    def flip_byte(self, repo_id: str, path: str, revision: str = "main") -> None:
        """Damage what is stored, not what is announced; a file that came by xet is served without xet from now on."""
        blob = self.repos[repo_id].files(revision)[path]
        data = bytearray(self._content(blob).read_bytes())
        data[len(data) // 2] ^= 0xFF
        self._content(blob).write_bytes(data)
        self._xet_hashes.pop(blob.sha256, None)

    def fail_next(self, method: str, path_part: str, status: int = 503, times: int = 1) -> Rule:
        """Status 0 closes the connection in the middle of the request's body; `times = 0` of the answer ends it."""
        self._failures.append(Rule(method, path_part, times, status))
        return self._failures[-1]

    def before(self, method: str, path_part: str, action: Callable[[], Any]) -> None:
        self._actions.append(Rule(method, path_part, action=action))

    # Answering

    def failure(self, call: Call) -> int | None:
        with self._lock:
            return next((rule.status for rule in self._failures if rule.takes(call)), None)

    def answer(self, call: Call, origin: str) -> Reply:
        with self._lock:
            actions = [rule.action for rule in self._actions if rule.takes(call)]
        for action in actions:  # outside the lock, so that it may be a client, too
            action()
        with self._lock:
            try:
                return self._dispatch(call, origin)
            except Refusal as refusal:
                return refusal.reply
            except Exception as error:
                self.errors.append(error)
                return Refusal(500, traceback.format_exc()).reply

    def _dispatch(self, call: Call, origin: str) -> Reply:
        if origin == "hub" and (authorization := call.headers["Authorization"]):
            call.user = self._users.get(authorization.removeprefix("Bearer "))
            if call.user is None:
                raise Refusal(401, "Invalid credentials in Authorization header")
        method = "GET" if call.method == "HEAD" else call.method
        for route_method, route_origin, pattern, write, function in ROUTES:
            if (route_method, route_origin) == (method, origin) and (match := pattern.fullmatch(call.path)):
                values: dict[str, Any] = {name: unquote(text) for name, text in match.groupdict().items() if text}
                if "repo" in values:
                    values["repo"] = self._permitted(call.user, values["repo"], write)
                if "path" in values:
                    check_path(values["path"])
                return function(self, call, **values)
        raise Refusal(404, f"This server has no {call.method} {call.path}")

    def _permitted(self, user: User | None, repo_id: str, write: bool) -> Repo:
        repo, namespace = self.repos.get(repo_id), repo_id.split("/")[0]
        if repo is None or (repo.private and not (user and user.belongs_to(namespace))):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self._check_write(user, namespace)
        return repo

    @staticmethod
    def _check_write(user: User | None, namespace: str) -> None:
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if not (user.write and user.belongs_to(namespace)):
            raise Refusal(403, f"You don't have the rights to write to the namespace {namespace!r}")

    # Contents

    def _content(self, blob: Blob) -> Path:
        return self.blobs / blob.sha256

    def _store(self, data: bytes, lfs: bool) -> Blob:
        blob = Blob.of(data, lfs)
        if not self._content(blob).exists():
            self._content(blob).write_bytes(data)
        if lfs:
            self._large[blob.sha256] = blob
        return blob

    def _uploaded(self, sha256: str, size: int) -> Blob:
        """The large file that a commit refers to, unpacked from the xet store if it came that way."""
        if sha256 not in self._large and (xet_hash := find_xet_hash(self.cas, sha256)):
            with tempfile.TemporaryDirectory() as copy:  # the client, still running, holds a lock on the original
                shutil.copytree(self.cas, copy, dirs_exist_ok=True)
                command = [sys.executable, "-c", UNPACK_XET, f"local://{copy}", xet_hash, str(size)]
                data = subprocess.run(command, env={**os.environ, "HF_HOME": copy}, stdout=-1, check=True).stdout
            self._xet_hashes[self._store(data, lfs=True).sha256] = xet_hash
        if sha256 not in self._large:
            raise Refusal(400, f"Your push was rejected because the LFS object {sha256} was not uploaded")
        return self._large[sha256]

    def _new_repo(self, repo_id: str, private: bool) -> Repo:
        repo = self.repos[repo_id] = Repo(repo_id, private)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_SUFFIXES)
        repo.commit("main", "initial commit", {".gitattributes": self._store(attributes.encode(), lfs=False)})
        return repo

    # Account and repositories

    @route("GET", "/api/whoami-v2")
    def _whoami(self, call: Call) -> Reply:
        if call.user is None:
            raise Refusal(401, "Invalid username or password.")
        token = {"displayName": "test", "role": "write" if call.user.write else "read"}
        orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in call.user.orgs]
        auth = {"type": "access_token", "accessToken": token}
        return Reply({"type": "user", "name": call.user.name, "orgs": orgs, "auth": auth})

    @route("POST", "/api/repos/create")
    def _create(self, call: Call) -> Reply:
        wish, repo_id = call.json(), call.repo_id()
        url = f"{self.url}/{repo_id}"
        self._check_write(call.user, repo_id.split("/")[0])
        if wish.get("type", "model") != "model" or not re.fullmatch(r"[\w.-]+/\w[\w.-]{0,95}", repo_id):
            raise Refusal(400, f"Not a model repository's name: {repo_id}")
        if repo_id in self.repos:
            raise Refusal(409, "You already created this model repo", url=url)
        self._new_repo(repo_id, wish.get("visibility") == "private")
        return Reply({"url": url, "name": repo_id})

    @route("DELETE", "/api/repos/delete")
    def _delete(self, call: Call) -> Reply:
        del self.repos[self._permitted(call.user, call.repo_id(), write=True).id]
        return Reply({})

    @route("GET", "/api/models/{repo}(?:/revision/{revision})?")
    def _info(self, call: Call, repo: Repo, revision: str = "main") -> Reply:
        blobs = call.query.get("blobs", "false").lower() in ("true", "1")
        siblings = [
            {"rfilename": path, **(blob.listed("blobId", "sha256") if blobs else {})}
            for path, blob in sorted(repo.files(revision).items())
        ]
        names = {"id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0]}
        return Reply({**names, "sha": repo.oid(revision), "private": repo.private, "tags": [], "siblings": siblings})

    @route("GET", "/api/models/{repo}/tree/{revision}(?:/{path})?")
    def _tree(self, call: Call, repo: Repo, revision: str, path: str = "") -> Reply:
        prefix, everything = f"{path}/" if path else "", call.query.get("recursive", "").lower() in ("true", "1")
        found: dict[str, dict[str, Any]] = {}
        for name, blob in sorted(repo.files(revision).items()):
            if name.startswith(prefix):
                for folder in (name[:end] for end in range(len(prefix), len(name)) if name[end] == "/"):
                    oid = hashlib.sha1(folder.encode()).hexdigest()
                    found[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
                found[name] = {"type": "file", "path": name, **blob.listed("oid", "oid"), **self._xet(blob)}
        if path and not found:
            raise Refusal(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        return Reply([item for name, item in found.items() if everything or "/" not in name[len(prefix) :]])

    @route("GET", "/api/models/{repo}/refs")
    def _refs(self, call: Call, repo: Repo) -> Reply:
        def listed(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]

        return Reply({"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags), "converts": []})

    @route("POST", "/api/models/{repo}/tag/{revision}", write=True)
    def _tag(self, call: Call, repo: Repo, revision: str) -> Reply:
        oid, tag = repo.oid(revision), call.json()["tag"]
        if tag in repo.tags:
            raise Refusal(409, f"Tag {tag} already exists")
        repo.tags[tag] = oid
        return Reply({})

    @route("DELETE", "/api/models/{repo}/tag/{tag}", write=True)
    def _delete_tag(self, call: Call, repo: Repo, tag: str) -> Reply:
        if repo.tags.pop(tag, None) is None:
            raise Refusal(404, f"There is no tag {tag}", "RevisionNotFound")
        return Reply({})

    # Uploads

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, call: Call) -> Reply:
        """The real Hub's rules are its own; these are the parts of them that a model card cannot do without."""
        matter = FRONT_MATTER.match(call.json()["content"])
        if matter is None:
            return Reply({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        try:
            metadata = yaml.safe_load(matter[1])
            error = "metadata must be a mapping" if not isinstance(metadata, dict) else None
            error = error or (None if metadata.get("license") else '"license" is required')
        except yaml.YAMLError as problem:
            error = f"not valid YAML: {problem}"
        if error:
            raise Refusal(400, "Invalid metadata in README.md", errors=[{"message": error}], warnings=[])
        return Reply({"errors": [], "warnings": []})

    @route("POST", "/api/models/{repo}/preupload/{branch}", write=True)
    def _preupload(self, call: Call, repo: Repo, branch: str) -> Reply:
        present, answers = repo.files(branch), []
        for file in call.json()["files"]:
            path = check_path(file["path"])
            answer = {"path": path, "uploadMode": "lfs" if is_large(path, file["size"]) else "regular"}
            if path in present:
                answer["oid"] = present[path].sha256 if present[path].lfs else present[path].sha1
            answers.append({**answer, "shouldIgnore": False})
        return Reply({"files": answers})

    @route("POST", "/{repo}.git/info/lfs/objects/batch", write=True)
    def _lfs_batch(self, call: Call, repo: Repo) -> Reply:
        answers = []
        for wanted in call.json()["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self._large:
                self._uploads.add(wanted["oid"])
                answer["actions"] = {"upload": {"href": f"{self.cdn_url}/{wanted['oid']}"}}
            answers.append(answer)
        headers = {"Content-Type": "application/vnd.git-lfs+json"}
        return Reply({"transfer": "basic", "objects": answers}, headers=headers)

    @route("POST", "/api/models/{repo}/commit/{branch}", write=True)
    def _commit(self, call: Call, repo: Repo, branch: str) -> Reply:
        if branch not in repo.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        if "create_pr" in call.query:
            raise Refusal(400, "This server has no pull requests")
        header, *operations = [json.loads(line) for line in call.body.splitlines() if line]
        if header["value"].get("parentCommit") not in (None, repo.branches[branch]):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.files(branch))
        for key, value in ((operation["key"], operation["value"]) for operation in operations):
            path = check_path(value["path"].rstrip("/") if key == "deletedFolder" else value["path"])
            if key == "file":
                files[path] = self._store(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                files[path] = self._uploaded(value["oid"], value["size"])
            else:
                inside = {"deletedFile": "$", "deletedFolder": "/"}[key]
                gone = [name for name in files if re.match(re.escape(path) + inside, name)]
                if not gone:
                    raise Refusal(404, f"There is no {path} to delete", "EntryNotFound")
                for name in gone:
                    del files[name]
        oid = repo.commit(branch, header["value"]["summary"], files)
        return Reply({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo.id}/commit/{oid}"})

    @route("PUT", "/{sha256}", origin="cdn")
    def _receive(self, call: Call, sha256: str) -> Reply:
        if sha256 not in self._uploads:
            raise Refusal(403, "There is no upload of this name")
        if hashlib.sha256(call.body).hexdigest() != sha256:
            raise Refusal(400, "The content does not match its sha256")
        self._store(call.body, lfs=True)
        return Reply(b"")

    # Downloads

    @route("GET", "/{repo}/resolve/{revision}/{path}")
    def _resolve(self, call: Call, repo: Repo, revision: str, path: str) -> Reply:
        headers, blob = {"X-Repo-Commit": repo.oid(revision)}, repo.files(revision).get(path)
        if blob is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        if not blob.lfs:
            return part(call, self._content(blob).read_bytes(), {**headers, "ETag": f'"{blob.sha1}"'})
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        if xet := self._xet(blob):
            token_url = f"{self.url}/api/models/{repo.id}/xet-read-token/{headers['X-Repo-Commit']}"
            headers |= {"X-Xet-Hash": xet["xetHash"], "X-Xet-Refresh-Route": token_url}
        return Reply(b"", 302, {**headers, "Location": f"{self.cdn_url}/{blob.sha256}"})

    @route("GET", "/{sha256}", origin="cdn")
    def _send(self, call: Call, sha256: str) -> Reply:
        if sha256 not in self._large:
            raise Refusal(404, "There is no such content")
        return part(call, self._content(self._large[sha256]).read_bytes(), {"ETag": f'"{sha256}"'})

    # Xet: instead of a storage service, a folder that client and server share

    def _xet(self, blob: Blob) -> dict[str, str]:
        return {"xetHash": self._xet_hashes[blob.sha256]} if blob.sha256 in self._xet_hashes else {}

    @route("GET", "/api/models/{repo}/xet-{right}-token/{revision}")
    def _xet_token(self, call: Call, repo: Repo, right: str, revision: str) -> Reply:
        self._permitted(call.user, repo.id, write=right == "write")
        url, expires = f"local://{self.cas}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        return Reply({"casUrl": url, "accessToken": "xet", "exp": expires}, headers=headers)


def is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE_SUFFIXES) or size > LARGE_SIZE


def check_path(path: str) -> str:
    """A path that could leave the repository's folder at a reader's is refused when it arrives."""
    if "\\" in path or any(part in ("", ".", "..") for part in path.split("/")) or re.match(r"[A-Za-z]:", path):
        raise Refusal(400, f"Invalid path: {path!r}")
    return path


def part(call: Call, data: bytes, headers: dict[str, str]) -> Reply:
    """The content or, for a client that resumes a download, the range of it that is asked for."""
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers["Range"] or "")
    if wanted is None:
        return Reply(data, 200, {**headers, "Accept-Ranges": "bytes"})
    start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
    if start > end:
        raise Refusal(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
    return Reply(data[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})


def find_xet_hash(cas: Path, sha256: str) -> str | None:
    """Only the client knows under which hash it stored a content, and leaves it in an index file (a "shard")."""

    def words(data: bytes) -> str:  # a hash is written as four 64-bit numbers
        return "{:016x}{:016x}{:016x}{:016x}".format(*struct.unpack("<4Q", data))

    def entries(data: bytes) -> Iterator[tuple[str, str]]:
        start = 48
        while data[start : start + 32] != b"\xff" * 32:  # records of 48 bytes: head, segments, checks?, sha256?
            flags, segments = struct.unpack_from("<II", data, start + 32)
            end = start + 48 * (1 + segments * (1 + (flags >> 31)) + (flags >> 30 & 1))
            if flags >> 30 & 1:
                yield words(data[end - 48 : end - 16]), words(data[start : start + 32])
            start = end

    known: dict[str, str] = {}
    for shard in cas.glob("**/shards/*.mdb"):
        known.update(entries(shard.read_bytes()))
    return known.get(sha256)


class Handler(BaseHTTPRequestHandler):
    """Reads a whole request before it answers, as keep-alive needs."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Origin"

    def handle_request(self) -> None:
        hub, call = self.server.hub, Call(self.command, self.path, self.headers)
        size = int(self.headers["Content-Length"] or 0)
        failure = hub.failure(call)
        if failure == 0:
            self.rfile.read(size // 2)
            self._record(0)
            self.close_connection = True
            return
        call.body = self.rfile.read(size)
        if len(call.body) < size:  # the client is gone
            self.close_connection = True
            return
        wanted = Refusal(failure, "Failure asked for by the test").reply if failure else None
        reply = wanted or hub.answer(call, self.server.name)
        self._record(reply.status)
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        kind = "application/octet-stream" if isinstance(reply.body, bytes) else "application/json"
        self.send_response(reply.status)
        for name, value in {"Content-Type": kind, **reply.headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def _record(self, status: int) -> None:
        asked = Request(self.command, self.path, self.server.name, self.headers["Authorization"], status)
        self.server.hub.requests.append(asked)

    def log_message(self, *_: object) -> None: ...


class Origin(ThreadingHTTPServer):
    """One port, which can really be closed: the standard server goes on answering on open connections."""

    daemon_threads = False  # so that closing waits for them

    def __init__(self, hub: HubServer, name: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub, self.name, self.url = hub, name, f"http://127.0.0.1:{self.server_port}"
        self._connections: set[Any] = set()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(error := sys.exc_info()[1], ConnectionError):
            self.hub.errors.append(error)  # type: ignore[arg-type]

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        for connection in list(self._connections):
            try:
                connection.shutdown(SHUT_RDWR)
            except OSError:  # it ended by itself
                continue
        self.server_close()
