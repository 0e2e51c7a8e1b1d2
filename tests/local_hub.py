"""A server on this machine that speaks the Hub's API, for its real client: repositories with commits, branches and tags.

Files of up to ``small`` bytes are in git, larger ones in the large-file store, on another address, as on the Hub. What is
asked is kept in ``requests``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_of_the_tests"
NAME = r"(?P<name>[^/]+(?:/[^/]+)??)"
API = re.compile(
    rf"/api/(?P<kind>models|datasets)/{NAME}(?:/(?P<what>revision|tree|refs|paths-info|preupload|commit)(?:/(?P<rest>.*))?)?"
)
RESOLVE = re.compile(rf"/(?:(?P<kind>datasets)/)?{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Repository:
    """gated: whoever may not read it is told so; private: that it is not there. ``moved``: where it is now."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    moved: str | None = None

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit on a branch that has just these files; its sha."""
        content = json.dumps([[name, hashlib.sha256(data).hexdigest()] for name, data in sorted(files.items())])
        sha = hashlib.sha1(f"{content}{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        found = self.branches.get(revision) or self.tags.get(revision) or revision
        return found if found in self.commits else None


@dataclass
class Hub:
    """cut: names of files whose bytes end in the middle, and how often yet. small: bytes of the largest file that is in git."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    small: int = 10_000

    def add(self, name: str, folder: Path | dict[str, bytes] | None = None, **facts: object) -> Repository:
        """A repository with the files of a folder."""
        repository = self.repositories[name] = Repository(**facts)  # type: ignore[arg-type]
        if folder is not None:
            repository.commit(folder if isinstance(folder, dict) else files_of(folder))
        return repository

    def asked(self, method: str, pattern: str) -> list[str]:
        """The paths that were asked for, so far."""
        return [path for verb, path, _ in self.requests if verb == method and re.search(pattern, path)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def _folders(files: Iterable[str]) -> set[str]:
    return {"/".join(parts[:depth]) for parts in (file.split("/") for file in files) for depth in range(1, len(parts))}


def _below(files: Iterable[str], folder: str, deep: bool) -> set[str]:
    """The files and folders in a folder, or, deep, all files and folders below it."""
    inside = f"{folder}/" if folder else ""
    every = {path for path in {*files} | _folders(files) if path.startswith(inside)}
    return every if deep else {path for path in every if "/" not in path.removeprefix(inside)}


def git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """The server, for as long as the ``with`` block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def talk_to(hub: Hub, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Has the client, which reads its variables when it is imported, talk to this server, with cache and login in a folder."""
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(folder / "token"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if find_spec("datasets"):
        import datasets

        for name, value in {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": False,
            "HF_DATASETS_CACHE": str(folder / "datasets"),
        }.items():
            monkeypatch.setattr(datasets.config, name, value, raising=False)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._read()

    def do_GET(self) -> None:
        self._read()

    def do_POST(self) -> None:
        self._write()

    def do_PUT(self) -> None:
        self._write()

    # ------------------------------------------------------------------------------------------------------- answers

    @property
    def _path(self) -> str:
        return unquote(urlsplit(self.path).path)

    def _say(self, data: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._say({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    @property
    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _find(self, name: str, read: bool = False) -> Repository | None:
        """A repository that may be seen, or read; else it is said why not."""
        repository = self.hub.repositories.get(name)
        if self.headers.get("Authorization") and not self._known:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repository is None or (repository.private and not self._known):
            self._refuse(404 if self._known else 401, "RepoNotFound", "Repository not found")
        elif repository.gated and read and not self._known:
            self._refuse(401, "GatedRepo", f"Access to model {name} is restricted. You must be authenticated to access it.")
        elif repository.moved:
            self._say(b"", 307, {"Location": self.path.replace(name, repository.moved)})
        else:
            return repository
        return None

    # ------------------------------------------------------------------------------------------------------- reading

    def _read(self) -> None:
        self.hub.requests.append((self.command, self._path, dict(self.headers)))
        raw = urlsplit(self.path).path  # in which a revision's slashes are no slashes
        if (found := API.fullmatch(raw)) is not None:
            self._ask(**found.groupdict())
        elif (found := RESOLVE.fullmatch(raw)) is not None:
            self._resolve(found["name"], unquote(found["revision"]), unquote(found["path"]))
        elif self._path.startswith("/large/"):
            self._send(self.hub.large[self._path.removeprefix("/large/").split("/")[0]], self._path.rpartition("/")[2])
        else:
            self._refuse(404, "", "Not found")

    def _ask(self, kind: str, name: str, what: str | None, rest: str | None) -> None:
        repository = self._find(name)
        if repository is None:
            return
        if what == "refs":
            named = {"branches": repository.branches, "tags": repository.tags}
            refs = {key: [{"name": n, "ref": n, "targetCommit": sha} for n, sha in of.items()] for key, of in named.items()}
            self._say({**refs, "converts": []})
            return
        revision, inside = map(unquote, (rest or "main").partition("/")[::2])
        sha = repository.sha(revision)
        if sha is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files = repository.commits[sha]
        if what in (None, "revision"):
            facts = {"id": name, "sha": sha, "private": repository.private, "gated": repository.gated and "manual"}
            self._say({**facts, "tags": [], "siblings": [{"rfilename": file} for file in files]})
        elif what == "tree":
            deep = parse_qs(urlsplit(self.path).query).get("recursive", ["False"])[0].lower() in ("true", "1")
            self._say([self._entry(path, files.get(path)) for path in sorted(_below(files, inside, deep))])
        else:
            self._refuse(404, "", "Not found")

    def _entry(self, path: str, data: bytes | None) -> dict[str, object]:
        """data: None for a folder."""
        if data is None:
            return {"type": "directory", "path": path, "size": 0, "oid": git_sha(path.encode())}
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": git_sha(data)}
        if len(data) > self.hub.small:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._find(name, read=True)
        if repository is None:
            return
        sha = repository.sha(revision)
        if sha is None or path not in repository.commits[sha]:
            self._refuse(404, "EntryNotFound" if sha else "RevisionNotFound", "Not found")
            return
        data, headers = repository.commits[sha][path], {"X-Repo-Commit": sha}
        if len(data) <= self.hub.small:
            self._say(data, 200, headers | {"ETag": f'"{git_sha(data)}"'})
            return
        oid = hashlib.sha256(data).hexdigest()
        self.hub.large[oid] = data
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        port = self.server.server_port  # type: ignore[attr-defined]
        # Another host, which the client gives no token.
        self._say(b"", 302, headers | linked | {"Location": f"http://localhost:{port}/large/{oid}/{Path(path).name}"})

    def _send(self, data: bytes, name: str) -> None:
        """A large file, or the end of one; it may be cut."""
        if self.headers.get("Authorization"):
            self._refuse(400, "", "A token was sent to the large-file store")
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        body = data[start:]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut.get(name, 0) > 0:
            self.hub.cut[name] -= 1
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(body)

    # ------------------------------------------------------------------------------------------------------- writing

    def _write(self) -> None:
        self.hub.requests.append((self.command, self._path, dict(self.headers)))
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._path.startswith("/large/"):  # signed, so without a token
            self.hub.large[self._path.removeprefix("/large/")] = body
            self._say(b"")
        elif self._path == "/api/validate-yaml":
            self._say({"errors": [], "warnings": []})
        elif not self._known:
            self._refuse(401, "", "Invalid username or password.")
        elif self._path == "/api/repos/create":
            self._create(json.loads(body))
        elif self._path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            self._say({"transfer": "basic", "objects": [one | self._upload(one["oid"]) for one in objects]})
        elif (found := API.fullmatch(self._path)) is not None and found["what"] == "preupload":
            files = json.loads(body)["files"]
            modes = [(file["path"], "lfs" if file["size"] > self.hub.small else "regular") for file in files]
            self._say({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]})
        elif found is not None and found["what"] == "commit":
            self._commit(found["name"], body)
        elif found is not None and found["what"] == "paths-info":
            self._paths(found["name"], found["rest"], parse_qs(body.decode()))
        else:
            self._refuse(404, "", "Not found")

    def _create(self, asked: dict[str, str]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"tests/{asked['name']}"
        known = name in self.hub.repositories
        if not known:
            self.hub.add(name, {".gitattributes": b""})
        self._say({"url": f"{self.hub.url}/{name}", "id": "1", "name": name}, 409 if known else 200)

    def _upload(self, oid: str) -> dict[str, object]:
        return {} if oid in self.hub.large else {"actions": {"upload": {"href": f"{self.hub.url}/large/{oid}"}}}

    def _commit(self, name: str, body: bytes) -> None:
        repository = self.hub.repositories[name]
        files = dict(repository.commits[repository.branches["main"]])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files)
        self._say({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def _paths(self, name: str, rest: str | None, asked: dict[str, list[str]]) -> None:
        repository = self.hub.repositories[name]
        files = repository.commits[repository.sha(unquote(rest or "main")) or ""]
        there = _below(files, "", deep=True) | _folders(files)
        self._say([self._entry(path, files.get(path)) for path in asked.get("paths", []) if path in there])
