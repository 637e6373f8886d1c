"""A small server on loopback that answers the real Hub client: repositories with commits, branches, tags and tokens."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.file_download
import huggingface_hub.hf_api
import pytest
from huggingface_hub import constants

TOKEN = "hf_testtoken"


@dataclass
class Repo:
    """A repository: files by commit, and names for commits."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        before = self.commits.get(self.names.get(branch, ""), {})
        after = before | files
        text = repr(sorted(after.items())) + str(len(self.commits))
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit], self.names[branch] = after, commit
        return commit

    def find(self, revision: str) -> str | None:
        commit = self.names.get(revision, revision)
        return commit if commit in self.commits else None


class FakeHub:
    """The server. The fields after `requests` make it misbehave.

    Args of the fields: `fail_with` is a status to answer everything with, `cut_off` ends downloads half way, `hang_up`
    closes connections without an answer; `delay` seconds pass before a file, `trickle` seconds between its parts, and
    `stall` seconds before any answer at all.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.fail_with: int | None = None
        self.cut_off = self.hang_up = False
        self.delay = self.trickle = self.stall = 0.0
        hub = self

        class Bound(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def serve_client(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Send the Hub client of this process here."""
        # The client reads these when it is imported, so the environment comes too late.
        for module in (constants, huggingface_hub.file_download, huggingface_hub.hf_api):
            for name, value in {
                "ENDPOINT": self.url,
                "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
                "HF_HUB_CACHE": str(cache),
                "HF_HUB_DISABLE_XET": True,
                "HF_HUB_DISABLE_TELEMETRY": True,
            }.items():
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", self.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, fields: object, status: int = 200) -> None:
        self.answer(status, json.dumps(fields).encode(), {"Content-Type": "application/json"})

    def refuse(self, code: str, status: int = 404) -> None:
        self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def repo(self, name: str) -> Repo | None:
        found = self.server_hub.repos.get(name)
        if found is None or (found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self.refuse("RepoNotFound", 401 if found is None or found.private else 404)
            return None
        return found

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server_hub, unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        _wait(hub.stall)
        if hub.hang_up:
            self.close_connection = True
            return
        if hub.fail_with is not None:
            self.answer(hub.fail_with, b"broken")
            return
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", path):
            self.tree(*found.groups())
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*found.groups())
        else:
            self.answer(404)

    def info(self, name: str, revision: str) -> None:
        repo = self.repo(name)
        if repo is None:
            return
        commit = repo.find(revision)
        if commit is None and revision != "main":
            self.refuse("RevisionNotFound")
            return
        siblings = [{"rfilename": file} for file in repo.commits.get(commit or "", {})]
        self.answer_json({"id": name, "sha": commit, "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, name: str, revision: str) -> None:
        repo = self.repo(name)
        if repo is None:
            return
        files = repo.commits.get(repo.find(revision) or "", {})
        rows = [{"type": "file", "path": p, "size": len(b), "oid": _git_digest(b)} for p, b in files.items()]
        self.answer_json(rows)

    def resolve(self, name: str, revision: str, file: str) -> None:
        repo, hub = self.repo(name), self.server_hub
        if repo is None:
            return
        commit = repo.find(revision)
        if commit is None:
            self.refuse("RevisionNotFound")
            return
        body = repo.commits[commit].get(file)
        if body is None:
            self.refuse("EntryNotFound")
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_git_digest(body)}"', "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            self.answer(200, body, headers)
            return
        _wait(hub.delay)
        if hub.cut_off:
            self.answer(200, body[: len(body) // 2], headers | {"Content-Length": str(len(body))})
            self.close_connection = True
            return
        if hub.trickle:
            self.answer(200, b"", headers | {"Content-Length": str(len(body))})
            for begin in range(0, len(body), len(body) // 4 + 1):
                _wait(hub.trickle)
                self.wfile.write(body[begin : begin + len(body) // 4 + 1])
            return
        self.answer(200, body, headers)

    def do_POST(self) -> None:
        hub, path = self.server_hub, unquote(urlsplit(self.path).path)
        hub.requests.append(f"POST {path}")
        _wait(hub.stall)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if hub.fail_with is not None:
            self.answer(hub.fail_with, b"broken")
            return
        if path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            if self.repo(found[1]) is not None:
                names = [file["path"] for file in json.loads(body)["files"]]
                rows = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
                self.answer_json({"files": rows})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self.commit(found[1], found[2], body)
        else:
            self.answer(404)

    def create(self, fields: dict) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401)
            return
        name = f"{fields.get('organization') or 'me'}/{fields['name']}"
        status = 409 if name in self.server_hub.repos else 200
        if status == 200:
            self.server_hub.repos[name] = Repo(
                private=bool(fields.get("private")) or fields.get("visibility") == "private"
            )
        self.answer_json({"url": f"{self.server_hub.url}/{name}", "name": name}, status)

    def commit(self, name: str, branch: str, body: bytes) -> None:
        repo = self.repo(name)
        if repo is None:
            return
        lines = [json.loads(line) for line in body.decode().splitlines() if line]
        files = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
        pull_request = "create_pr=1" in self.path
        commit = repo.commit(files, "refs/pr/1" if pull_request else branch)
        repo.messages.append(next(x["value"]["summary"] for x in lines if x["key"] == "header"))
        url = f"{self.server_hub.url}/{name}/commit/{commit}"
        answer = {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.server_hub.url}/{name}/discussions/1"
        self.answer_json(answer)


def _wait(seconds: float) -> None:
    """Wait, also where a test has made `time.sleep` do nothing."""
    threading.Event().wait(seconds)


def _git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
