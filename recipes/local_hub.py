"""A small Hugging Face Hub on this machine, for demos and tests: the real client talks to it.

    python -m recipes.local_hub --port 8080            # prints the variables to export, then serves until Ctrl-C

or, in Python, before anything of Hugging Face is imported:

    with LocalHub() as hub:
        os.environ.update(hub.environment(home))

It knows models only, keeps everything in memory, believes every token (a request without one does not see private
repositories), and is not meant for anything but localhost.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_SUFFIXES = (".safetensors", ".bin", ".onnx")
USER = "local"


@dataclass
class Repo:
    """One repository: `commits` maps a commit to its files (path -> digest of the content)."""

    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, branch: str, files: dict[str, str]) -> str:
        state = json.dumps([len(self.commits), sorted(files.items())])
        sha = hashlib.sha1(state.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


class NotFound(Exception):
    """Answered with 404 (401 if a token might help); the code tells the client what is missing."""

    def __init__(self, code: str, commit: str | None = None, status: HTTPStatus = HTTPStatus.NOT_FOUND) -> None:
        super().__init__(code)
        self.code, self.commit, self.status = code, commit, status


class LocalHub:
    """A Hub in a thread of this process. A context manager; `endpoint` is its address."""

    def __init__(self, port: int = 0) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.large: set[str] = set()  # digests that came through LFS
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> LocalHub:
        self._thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def environment(self, home: str | Path) -> dict[str, str]:
        """Variables that make `huggingface_hub` talk to this server. Read once, when it is imported."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": "any",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def add(self, name: str, files: Mapping[str, bytes], private: bool = False) -> None:
        """Put a repository here that somebody else has pushed."""
        repo = self.repos[name] = Repo(private=private)
        digests = {path: self.store(content) for path, content in files.items()}
        self.large |= {digest for path, digest in digests.items() if path.endswith(LARGE_SUFFIXES)}
        repo.commit("main", digests)

    # -- what the routes need -------------------------------------------------------------------------------------
    def repo(self, name: str) -> Repo:
        if name not in self.repos:
            raise NotFound("RepoNotFound")
        return self.repos[name]

    def files(self, name: str, revision: str) -> tuple[str, dict[str, str]]:
        repo = self.repo(name)
        sha = repo.resolve(revision)
        if sha is None:
            raise NotFound("RevisionNotFound")
        return sha, repo.commits[sha]

    def store(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return digest


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"
    routes: list[tuple[str, re.Pattern[str], Callable[..., None]]] = []

    def log_message(self, format: str, *args: Any) -> None:
        pass

    # -- plumbing -------------------------------------------------------------------------------------------------
    def _dispatch(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.query = parse_qs(url.query)
        self.body = self._read_body()
        for method, pattern, handler in self.routes:
            found = pattern.fullmatch(path)
            if method == self.command.replace("HEAD", "GET") and found:
                try:
                    with self.hub.lock:
                        self._check_access(found.groupdict().get("repo"))
                        handler(self, **found.groupdict())
                except NotFound as missing:
                    headers = {"X-Error-Code": missing.code}
                    if missing.commit:
                        headers["X-Repo-Commit"] = missing.commit
                    self._json({"error": missing.code}, missing.status, headers)
                return
        self._json({"error": f"{self.command} {path} is not served here"}, HTTPStatus.NOT_FOUND)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _dispatch

    def _check_access(self, name: str | None) -> None:
        repo = self.hub.repos.get(name or "")
        if repo is not None and repo.private and "Authorization" not in self.headers:
            raise NotFound("RepoNotFound", status=HTTPStatus.UNAUTHORIZED)

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(parts)

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _entry(self, path: str, digest: str) -> dict[str, Any]:
        size = len(self.hub.blobs[digest])
        entry = {"type": "file", "path": path, "size": size, "oid": digest[:40]}
        if digest in self.hub.large:
            entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 134}
        return entry

    # -- account and repositories ---------------------------------------------------------------------------------
    def whoami(self) -> None:
        self._json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    def validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def create_repo(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        answer = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repos:
            self._json({"error": "You already created this model repo", **answer}, HTTPStatus.CONFLICT)
            return
        # Older clients send a flag, newer ones a word.
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        repo = self.hub.repos[name] = Repo(private=private)
        repo.commit("main", {})
        self._json(answer)

    def delete_repo(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        self.hub.repo(name)
        if "Authorization" not in self.headers:
            raise NotFound("RepoNotFound", status=HTTPStatus.UNAUTHORIZED)
        del self.hub.repos[name]
        self._json({})

    def create_branch(self, repo: str, branch: str) -> None:
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        sha, _ = self.hub.files(repo, start)
        if branch in self.hub.repo(repo).branches:
            self._json({"error": "Reference already exists"}, HTTPStatus.CONFLICT)
            return
        self.hub.repo(repo).branches[branch] = sha
        self._json({})

    # -- reading --------------------------------------------------------------------------------------------------
    def model_info(self, repo: str, revision: str | None = None) -> None:
        sha, files = self.hub.files(repo, revision or "main")
        self._json(
            {
                "id": repo,
                "modelId": repo,
                "sha": sha,
                "private": self.hub.repo(repo).private,
                "tags": [],
                "siblings": [{"rfilename": path} for path in sorted(files)],
            }
        )

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        sha, files = self.hub.files(repo, revision)
        prefix = f"{folder}/" if folder else ""
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: dict[str, dict[str, Any]] = {}
        for path, digest in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            name, slash, _ = path[len(prefix) :].partition("/")
            if slash and not deep:
                entries[name] = {"type": "directory", "path": prefix + name, "size": 0, "oid": "0" * 40}
            else:
                entries[path] = self._entry(path, digest)
        if folder and not entries:
            raise NotFound("EntryNotFound", sha)
        self._json(list(entries.values()))

    def resolve(self, repo: str, revision: str, path: str) -> None:
        sha, files = self.hub.files(repo, revision)
        if path not in files:
            raise NotFound("EntryNotFound", sha)
        digest = files[path]
        content = self.hub.blobs[digest]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if digest in self.hub.large:
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._send(content[first : last + 1], HTTPStatus.PARTIAL_CONTENT, headers)
        else:
            self._send(content, HTTPStatus.OK, headers)

    # -- writing --------------------------------------------------------------------------------------------------
    def preupload(self, repo: str, revision: str) -> None:
        self.hub.repo(repo)
        files = [
            {
                "path": item["path"],
                "uploadMode": "lfs" if item["path"].endswith(LARGE_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for item in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def lfs_batch(self, repo: str) -> None:
        self.hub.repo(repo)
        objects = []
        for item in json.loads(self.body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.blobs:
                answer["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if self.hub.store(self.body) != oid:
            self._json({"error": "The content does not have this digest"}, HTTPStatus.BAD_REQUEST)
            return
        self.hub.large.add(oid)
        self._json({})

    def commit(self, repo: str, revision: str) -> None:
        _, present = self.hub.files(repo, revision)
        files = dict(present)
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    self._json({"error": f"{value['path']} was not uploaded"}, HTTPStatus.BAD_REQUEST)
                    return
                files[value["path"]] = value["oid"]
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = self.hub.repo(repo).commit(revision, files)
        url = f"{self.hub.endpoint}/{repo}/commit/{sha}"
        self._json({"commitOid": sha, "commitUrl": url, "pullRequestUrl": None, "success": True})


def _route(method: str, pattern: str, handler: Callable[..., None]) -> None:
    named = pattern.replace("{repo}", r"(?P<repo>[^/]+/[^/]+)")
    named = re.sub(r"\{(revision|branch|oid)\}", r"(?P<\1>[^/]+)", named)
    named = re.sub(r"\{(path|folder)\}", r"(?P<\1>.+)", named)
    _Handler.routes.append((method, re.compile(named), handler))


_route("GET", "/api/whoami-v2", _Handler.whoami)
_route("POST", "/api/validate-yaml", _Handler.validate_yaml)
_route("POST", "/api/repos/create", _Handler.create_repo)
_route("DELETE", "/api/repos/delete", _Handler.delete_repo)
_route("POST", "/api/models/{repo}/branch/{branch}", _Handler.create_branch)
_route("POST", "/api/models/{repo}/preupload/{revision}", _Handler.preupload)
_route("POST", "/api/models/{repo}/commit/{revision}", _Handler.commit)
_route("GET", "/api/models/{repo}", _Handler.model_info)
_route("GET", "/api/models/{repo}/revision/{revision}", _Handler.model_info)
_route("GET", "/api/models/{repo}/tree/{revision}", _Handler.tree)
_route("GET", "/api/models/{repo}/tree/{revision}/{folder}", _Handler.tree)
_route("GET", "/{repo}/resolve/{revision}/{path}", _Handler.resolve)
_route("POST", r"/{repo}\.git/info/lfs/objects/batch", _Handler.lfs_batch)
_route("PUT", "/lfs/{oid}", _Handler.lfs_put)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8080, help="default: %(default)s; 0 for any free one")
    parser.add_argument("--home", default="local_hub_cache", help="HF_HOME of the clients (default: %(default)s)")
    args = parser.parse_args()
    with LocalHub(args.port) as hub:
        for name, value in hub.environment(Path(args.home).resolve()).items():
            print(f"export {name}={value}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
