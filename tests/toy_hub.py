"""A Hugging Face hub of one process: what making and filling a model repository asks, and faults."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN = "hf_of_nobody_at_all"


class ToyHub:
    """repos: {name: {"private", "files": {path: bytes}, "commits": [id]}}.  requests: "METHOD path" in order.

    write: what the token may. fails: {part of a request: status} of those that it answers with an error.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.write, self.fails = True, dict[str, int]()
        self.url, self.damages = "", ""  # a path whose bytes it keeps wrongly

    def add(self, name: str, private: bool = False, **files: bytes) -> None:
        self.repos[name] = {"private": private, "files": files, "commits": ["0" * 40]}

    def info(self, name: str) -> tuple[int, Any]:
        if (repo := self.repos.get(name)) is None:
            return 404, {"error": "Repository not found"}
        siblings = []
        for path, data in repo["files"].items():
            sha256 = hashlib.sha256(data).hexdigest()
            large = {"lfs": {"size": len(data), "sha256": sha256, "pointerSize": 1}} if is_large(path) else {}
            siblings.append({"rfilename": path, "size": len(data), "blobId": git_name(data), **large})
        entry = {"id": name, "private": repo["private"], "sha": repo["commits"][-1], "siblings": siblings}
        return 200, entry

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        self.requests.append(f"{method} {path}")
        path = path.partition("?")[0]
        for part, status in self.fails.items():
            if part in f"{method} {path}":
                return status, {"error": f"{token}, {self.url}?X-Signature=secret"}
        if path.startswith("/put/"):  # what LFS gives is its own secret
            self.objects[path.removeprefix("/put/")] = body
            return 200, {}
        if token != TOKEN:
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "orgs": []}
        if method == "GET":
            return self.info(path.removeprefix("/api/models/").split("/revision/")[0])
        if not self.write:
            return 403, {"error": "Forbidden"}
        if path.endswith("/commit/main"):
            return self._commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
        asked = json.loads(body)
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            name = f"{asked['organization']}/{asked['name']}"
            self.add(name, asked.get("visibility") == "private", **{".gitattributes": b"*"})
            return 200, {"url": f"{self.url}/{name}"}
        if path.endswith("/preupload/main"):
            have = self.repos[path.removeprefix("/api/models/").removesuffix("/preupload/main")]["files"]
            return 200, {"files": [self._mode(file["path"], have) for file in asked["files"]]}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._place(one) for one in asked["objects"]]}
        return 404, {"error": path}

    def _mode(self, path: str, have: dict[str, bytes]) -> dict[str, Any]:
        large, data = is_large(path), have.get(path)
        oid = {} if data is None else {"oid": hashlib.sha256(data).hexdigest() if large else git_name(data)}
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **oid}

    def _place(self, one: dict[str, Any]) -> dict[str, Any]:
        if one["oid"] in self.objects:
            return one
        return {**one, "actions": {"upload": {"href": f"{self.url}/put/{one['oid']}"}}}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        repo, lines = self.repos[name], [json.loads(line) for line in body.splitlines()]
        if lines[0]["value"].get("parentCommit", repo["commits"][-1]) != repo["commits"][-1]:
            return 412, {"error": "A commit has happened since"}
        for line in lines[1:]:
            value = line["value"]
            data = self.objects[value["oid"]] if "oid" in value else base64.b64decode(value["content"])
            repo["files"][value["path"]] = data[:-1] + b"?" if value["path"] == self.damages else data
        repo["commits"].append(f"{len(repo['commits']):040x}")
        url = f"{self.url}/{name}/commit/{repo['commits'][-1]}"
        return 200, {"commitUrl": url, "commitOid": repo["commits"][-1]}


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".onnx", ".gguf"))


def git_name(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def toy_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyHub]:
    """It serves, and huggingface_hub of this process asks it, logged in with TOKEN."""
    from huggingface_hub import constants

    hub = ToyHub()

    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, value = hub.answer(self.command, self.path, token, body)
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
