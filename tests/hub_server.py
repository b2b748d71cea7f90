"""A small Hub on loopback for the upload tests: the endpoints that `huggingface_hub` calls, kept in memory.

Covered: whoami, repo create and delete, repo info, refs, tree, commits, branches, YAML validation, pre-upload, LFS
batch with single and multi-part upload and verification, NDJSON commits (pull requests and `parentCommit` included)
and `resolve` by HEAD and GET. LFS files are answered by a redirect to another path with the linked headers, as the
Hub does. Xet is not spoken: the client must run with `HF_HUB_DISABLE_XET=1`.

Tests drive faults through `HubServer.cut_after`, `cut_next` and `fail_commits`, and read `HubServer.requests`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REGULAR_FILE_LIMIT = 1 << 20
DATE = "2024-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".png", ".gz")
INITIAL_FILE = (".gitattributes", b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")


def _git_blob_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class StoredFile:
    """One file of a commit: its content, and whether it is kept in the LFS store."""

    content: bytes
    lfs: bool = False

    @property
    def blob_id(self) -> str:
        return _git_blob_sha(self.content)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass
class Commit:
    sha: str
    parent: str | None
    title: str
    files: dict[str, StoredFile]


@dataclass
class Repo:
    """A model repo: commits by hash, branches and pull requests by name."""

    repo_id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def add_commit(self, ref: str, parent: str | None, title: str, files: dict[str, StoredFile]) -> str:
        digest = hashlib.sha1(f"{self.repo_id} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits[digest] = Commit(digest, parent, title, dict(files))
        self.refs[ref] = digest
        return digest

    def resolve(self, revision: str) -> str | None:
        if revision in self.refs:
            return self.refs[revision]
        return revision if revision in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content at a revision, for assertions."""
        return {path: f.content for path, f in self.commits[self.refs.get(revision, revision)].files.items()}

    def history(self, revision: str = "main") -> list[str]:
        titles, sha = [], self.resolve(revision)
        while sha is not None:
            titles.append(self.commits[sha].title)
            sha = self.commits[sha].parent
        return titles


class HubServer:
    """Context manager around the server thread. `url` is the endpoint, `tokens` maps token -> user name."""

    def __init__(self, tokens: dict[str, str] | None = None, *, part_size: int | None = None) -> None:
        self.tokens = dict(tokens or {})
        self.read_only_tokens: set[str] = set()
        self.part_size = part_size
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.uploaded_oids: list[str] = []
        self.cut_next = 0  # so many uploads lose their connection
        self.cut_after: int | None = None  # after so many complete uploads, every other one loses its connection
        self.let_through = 0  # uploads that `cut_after` did not cut
        self.fail_commits = 0
        self.before_commit = None
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.hub = self
        self._http.daemon_threads = True
        port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        # Another host name, as the Hub's file store has: the client then keeps the headers of the redirect and
        # drops the token.
        self.cdn_url = f"http://localhost:{port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def add_repo(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        """Create a repo as the Hub does, with its first commit; `files` arrive in a second one."""
        repo = self.repos[repo_id] = Repo(repo_id, private)
        name, content = INITIAL_FILE
        first = repo.add_commit("main", None, "initial commit", {name: StoredFile(content)})
        if files:
            stored = {path: StoredFile(data, lfs=path.endswith(LFS_SUFFIXES)) for path, data in files.items()}
            self.lfs.update({f.sha256: f.content for f in stored.values() if f.lfs})
            repo.add_commit("main", first, "add files", repo.commits[first].files | stored)
        return repo


class _HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


def _not_found(what: str, code: str, headers: dict | None = None) -> _HubError:
    return _HubError(404, f"{what} not found", code, headers)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    ROUTES = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("DELETE", r"/api/repos/delete", "delete_repo"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>.+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>.+)", "commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>.+)", "create_branch"),
        ("DELETE", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>.+)", "delete_branch"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/commits/(?P<revision>.+)", "commits"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?", "tree"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>.+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", "info"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/part/(?P<part>\d+)", "lfs_part"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", "lfs_complete"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)/lfs/verify", "lfs_verify"),
        ("HEAD|GET", r"/cdn/(?P<oid>[0-9a-f]{64})", "cdn"),
        ("HEAD|GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    def log_message(self, *args) -> None:
        pass

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def do_GET(self) -> None:
        self._dispatch()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _dispatch(self) -> None:
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        try:
            for methods, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, split.path)
                if match and self.command in methods.split("|"):
                    values = {k: None if v is None else unquote(v) for k, v in match.groupdict().items()}
                    # What the client asks for on its own account (statistics, ...) has no route here.
                    self.hub.requests.append(f"{self.command} {split.path}")
                    getattr(self, f"_{name}")(**values)
                    return
            self._read()
            raise _HubError(404, f"no such endpoint: {self.command} {split.path}")
        except _HubError as error:
            headers = dict(error.headers)
            headers["X-Error-Message"] = error.message
            if error.code:
                headers["X-Error-Code"] = error.code
            self._json({"error": error.message}, error.status, headers)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _token(self) -> str | None:
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return token if scheme == "Bearer" and token else None

    def _user(self) -> str:
        token = self._token()
        if token not in self.hub.tokens:
            raise _HubError(401, "Invalid username or password.")
        return self.hub.tokens[token]

    def _writer(self, repo: str) -> str:
        user = self._user()
        if repo.split("/")[0] != user or self._token() in self.hub.read_only_tokens:
            raise _HubError(403, f"You don't have the required permissions to write to {repo}.")
        return user

    def _repo(self, repo: str) -> Repo:
        found = self.hub.repos.get(repo)
        if found is None or (found.private and self.hub.tokens.get(self._token()) != repo.split("/")[0]):
            raise _HubError(401 if self._token() is None else 404, "Repository not found", "RepoNotFound")
        return found

    def _commit_of(self, repo: str, revision: str | None) -> Commit:
        found = self._repo(repo)
        sha = found.resolve(revision or "main")
        if sha is None:
            raise _not_found(f"Revision {revision}", "RevisionNotFound")
        return found.commits[sha]

    def _whoami(self) -> None:
        self._json({"type": "user", "name": self._user(), "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def _validate_yaml(self) -> None:
        content = json.loads(self._read())["content"]
        warnings = [] if content.startswith("---\n") else [{"message": "empty or missing yaml metadata in repo card"}]
        self._json({"errors": [], "warnings": warnings})

    def _create_repo(self) -> None:
        body = json.loads(self._read())
        user = self._user()
        repo_id = f"{body.get('organization') or user}/{body['name']}"
        self._writer(repo_id)
        with self.hub.lock:
            if repo_id in self.hub.repos:
                raise _HubError(409, "You already created this model repo")
            self.hub.add_repo(repo_id, private=bool(body.get("private")) or body.get("visibility") == "private")
        self._json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def _delete_repo(self) -> None:
        body = json.loads(self._read())
        repo_id = f"{body.get('organization') or self._user()}/{body['name']}"
        self._writer(repo_id)
        self._repo(repo_id)
        del self.hub.repos[repo_id]
        self._json({})

    def _info(self, repo: str, revision: str | None = None) -> None:
        commit, found = self._commit_of(repo, revision), self._repo(repo)
        self._json(
            {
                "id": repo,
                "modelId": repo,
                "author": repo.split("/")[0],
                "sha": commit.sha,
                "private": found.private,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "createdAt": DATE,
                "lastModified": DATE,
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
        )

    def _refs(self, repo: str) -> None:
        refs = self._repo(repo).refs
        branches = [(name, f"refs/heads/{name}") for name in refs if not name.startswith("refs/pr/")]
        requests = [(name, name) for name in refs if name.startswith("refs/pr/")]

        def rows(pairs):
            return [{"name": name, "ref": ref, "targetCommit": refs[name]} for name, ref in pairs]

        self._json({"branches": rows(branches), "converts": [], "tags": [], "pullRequests": rows(requests)})

    def _commits(self, repo: str, revision: str) -> None:
        commit, found, rows = self._commit_of(repo, revision), self._repo(repo), []
        while commit is not None:
            rows.append({"id": commit.sha, "title": commit.title, "message": "", "authors": [], "date": DATE})
            commit = found.commits.get(commit.parent)
        self._json(rows)

    def _tree(self, repo: str, revision: str, folder: str | None) -> None:
        commit, rows = self._commit_of(repo, revision), []
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        for path, stored in sorted(commit.files.items()):
            if not path.startswith(prefix):
                continue
            row = {"type": "file", "path": path, "size": len(stored.content), "oid": stored.blob_id}
            if stored.lfs:
                row["lfs"] = {"oid": stored.sha256, "size": len(stored.content), "pointerSize": 134}
            rows.append(row)
        if prefix and not rows:
            raise _not_found(f"Folder {folder}", "EntryNotFound")
        self._json(rows)

    def _create_branch(self, repo: str, branch: str) -> None:
        self._writer(repo)
        body = json.loads(self._read() or b"{}")
        found = self._repo(repo)
        if branch in found.refs:
            raise _HubError(409, f"Reference already exists: {branch}")
        found.refs[branch] = self._commit_of(repo, body.get("startingPoint")).sha
        self._json({})

    def _delete_branch(self, repo: str, branch: str) -> None:
        self._writer(repo)
        self._read()
        if self._repo(repo).refs.pop(branch, None) is None:
            raise _not_found(f"Branch {branch}", "RevisionNotFound")
        self._json({})

    def _preupload(self, repo: str, revision: str) -> None:
        body = json.loads(self._read())
        self._writer(repo)
        present = self._commit_of(repo, revision).files
        rows = []
        for entry in body["files"]:
            path = entry["path"]
            binary = b"\0" in base64.b64decode(entry.get("sample", ""))
            lfs = path.endswith(LFS_SUFFIXES) or binary or entry["size"] > REGULAR_FILE_LIMIT
            row = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in present:
                row["oid"] = present[path].etag
            rows.append(row)
        self._json({"files": rows})

    def _lfs_batch(self, repo: str) -> None:
        body = json.loads(self._read())
        self._writer(repo)
        objects = []
        for entry in body["objects"]:
            oid, size = entry["oid"], entry["size"]
            answer = {"oid": oid, "size": size}
            if oid not in self.hub.lfs:
                upload = {"href": f"{self.hub.url}/lfs/{oid}"}
                if self.hub.part_size and size > self.hub.part_size and "multipart" in body.get("transfers", []):
                    count = -(-size // self.hub.part_size)
                    header = {str(n): f"{self.hub.url}/lfs/{oid}/part/{n}" for n in range(1, count + 1)}
                    upload = {
                        "href": f"{self.hub.url}/lfs/{oid}/complete",
                        "header": {"chunk_size": str(self.hub.part_size), **header},
                    }
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/{repo}/lfs/verify"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _cut_if_asked(self) -> bool:
        with self.hub.lock:
            limit = self.hub.cut_after
            if self.hub.cut_next > 0:
                self.hub.cut_next -= 1
            elif limit is None:
                return False
            elif self.hub.let_through < limit:
                self.hub.let_through += 1
                return False
        # Uploads come at the same time: those that may arrive have arrived when the first one is cut.
        patience = time.monotonic() + 30
        while limit is not None and len(self.hub.uploaded_oids) < limit and time.monotonic() < patience:
            time.sleep(0.01)
        self.rfile.read(1)
        self.close_connection = True
        self.connection.close()
        return True

    def _lfs_put(self, oid: str) -> None:
        if self._cut_if_asked():
            return
        body = self._read()
        if hashlib.sha256(body).hexdigest() != oid:
            raise _HubError(400, "content does not match its oid")
        with self.hub.lock:
            self.hub.lfs[oid] = body
            self.hub.uploaded_oids.append(oid)
        self._send(200, b"", {})

    def _lfs_part(self, oid: str, part: str) -> None:
        if self._cut_if_asked():
            return
        body = self._read()
        with self.hub.lock:
            self.hub.parts.setdefault(oid, {})[int(part)] = body
        self._send(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def _lfs_complete(self, oid: str) -> None:
        wanted = [part["partNumber"] for part in json.loads(self._read())["parts"]]
        content = b"".join(self.hub.parts.get(oid, {}).get(number, b"") for number in wanted)
        if hashlib.sha256(content).hexdigest() != oid:
            raise _HubError(400, "content does not match its oid")
        with self.hub.lock:
            self.hub.lfs[oid] = content
            self.hub.uploaded_oids.append(oid)
        self._json({})

    def _lfs_verify(self, repo: str) -> None:
        body = json.loads(self._read())
        self._writer(repo)
        if len(self.hub.lfs.get(body["oid"], b"")) != body["size"]:
            raise _HubError(404, "object not found")
        self._json({})

    def _commit(self, repo: str, revision: str) -> None:
        entries = [json.loads(line) for line in self._read().splitlines() if line]
        user = self._writer(repo)
        if self.hub.before_commit is not None:
            hook, self.hub.before_commit = self.hub.before_commit, None
            hook(self.hub)
        with self.hub.lock:
            if self.hub.fail_commits > 0:
                self.hub.fail_commits -= 1
                raise _HubError(500, "Internal Error")
            head = self._commit_of(repo, revision)
            files, header = dict(head.files), {}
            for entry in entries:
                header = entry["value"] if entry["key"] == "header" else header
                self._apply(entry, files)
            if header.get("parentCommit") not in (None, head.sha):
                raise _HubError(412, "A commit has happened since. Please refresh and try again.")
            found = self._repo(repo)
            answer = {}
            ref = revision
            if self.query.get("create_pr") == ["1"]:
                number = 1 + sum(name.startswith("refs/pr/") for name in found.refs)
                ref = f"refs/pr/{number}"
                answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
            sha = found.add_commit(ref, head.sha, header.get("summary", ""), files)
        self._json(
            {"commitUrl": f"{self.hub.url}/{user}/{repo.split('/')[1]}/commit/{sha}", "commitOid": sha, **answer}
        )

    def _apply(self, entry: dict, files: dict[str, StoredFile]) -> None:
        key, value = entry["key"], entry["value"]
        if key == "file":
            files[value["path"]] = StoredFile(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.hub.lfs:
                raise _HubError(400, f"LFS object of {value['path']} was never uploaded")
            files[value["path"]] = StoredFile(self.hub.lfs[value["oid"]], lfs=True)
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise _not_found("A file with this name", "EntryNotFound")
        elif key == "deletedFolder":
            for path in [p for p in files if p.startswith(value["path"].rstrip("/") + "/")]:
                del files[path]

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        commit = self._commit_of(repo, revision)
        headers = {"X-Repo-Commit": commit.sha}
        stored = commit.files.get(path)
        if stored is None:
            raise _not_found(f"Entry {path}", "EntryNotFound", headers)
        headers["ETag"] = f'"{stored.etag}"'
        if stored.lfs:
            headers |= {
                "X-Linked-Etag": f'"{stored.sha256}"',
                "X-Linked-Size": str(len(stored.content)),
                "Location": f"{self.hub.cdn_url}/cdn/{stored.sha256}",
            }
            self._send(302, b"", headers)
        else:
            self._content(stored.content, headers)

    def _cdn(self, oid: str) -> None:
        if self._token() is not None:
            raise _HubError(400, "a token was sent to the file store")
        if oid not in self.hub.lfs:
            raise _HubError(404, "object not found")
        self._content(self.hub.lfs[oid], {"ETag": f'"{oid}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match and int(match[1]) < len(content):
            start = int(match[1])
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            self._send(206, content[start:], headers)
        else:
            self._send(200, content, {"Content-Type": "application/octet-stream", **headers})
