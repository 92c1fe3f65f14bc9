"""A hub on loopback: the part of the Hugging Face Hub's HTTP API that pulling a model needs, over a folder of files.

Speaks GET /api/models/{id}[/revision/{rev}] (with blobs=true), GET /api/models/{id}/tree/{rev} and
HEAD/GET /{id}/resolve/{rev}/{file}, with ETag, X-Repo-Commit,
Content-Range and 206, a redirect to another path for large files, and faults on demand. Uploads: POST /api/repos/create,
/api/validate-yaml, /api/models/{id}/preupload/{rev} (every file is a regular one) and /api/models/{id}/commit/{rev}.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "1234"
LARGE = 4096  # from this size on, files are "LFS": SHA-256 instead of git's blob id


class Hub:
    """What the server serves and what it saw. Faults are set by tests.

    `status`: path prefix -> (how often, status, headers); `cut`: file -> how often it ends after half of what was asked for;
    `corrupt`: files whose bytes are altered on the way; `token`: asked of every request when set.
    """

    def __init__(self) -> None:
        self.models: dict[str, dict[str, bytes]] = {}
        self.license = "apache-2.0"
        self.token = ""
        self.status: dict[str, tuple[int, int, dict[str, str]]] = {}
        self.cut: Counter[str] = Counter()
        self.corrupt: set[str] = set()
        self.no_ranges = False
        self.requests: list[tuple[str, str, str]] = []  # method, path, Range
        self.endpoint = ""

    def add(self, id: str, folder: Path) -> None:
        """Serves a folder under `id`."""
        self.models[id] = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    def gets(self, ending: str) -> list[str]:
        """The Range header of each GET of a file."""
        return [ranges for method, path, ranges in self.requests if method == "GET" and path.endswith(ending)]

    def info(self, id: str) -> dict[str, Any]:
        siblings = []
        for name, data in self.models[id].items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data)}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if len(data) >= LARGE:
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {"_id": "1", "id": id, "modelId": id, "sha": COMMIT, "siblings": siblings, "cardData": {"license": self.license}, "tags": []}

    def tree(self, id: str) -> list[dict[str, Any]]:
        files = []
        for sibling in self.info(id)["siblings"]:
            entry = {"type": "file", "path": sibling["rfilename"], "size": sibling["size"], "oid": sibling["blobId"]}
            if "lfs" in sibling:
                entry["lfs"] = {"oid": sibling["lfs"]["sha256"], "size": sibling["size"], "pointerSize": 134}
            files.append(entry)
        return files


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, ""))
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if self.refused(path):
            return None
        if path == "/api/repos/create":
            asked = json.loads(body)
            id = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            hub.models.setdefault(id, {})
            return self.told({"url": f"https://huggingface.co/{id}", "id": id})  # the client knows no other address here
        if path == "/api/validate-yaml":
            return self.told({"errors": [], "warnings": []})
        id, _, _ = path.removeprefix("/api/models/").partition("/preupload/")
        if id in hub.models:
            files = json.loads(body)["files"]
            return self.told({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        id, _, _ = path.removeprefix("/api/models/").partition("/commit/")
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                hub.models[id][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.told(
            {"success": True, "commitOid": COMMIT, "commitUrl": f"https://huggingface.co/{id}/commit/{COMMIT}", "hookOutput": ""}
        )

    def told(self, answer: dict[str, Any]) -> None:
        self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def refused(self, path: str) -> bool:
        """Answers with a fault where one is set, or where the token is not the one."""
        hub = self.hub
        for prefix, (left, status, headers) in list(hub.status.items()):
            if path.startswith(prefix) and left > 0:
                hub.status[prefix] = (left - 1, status, headers)
                self.answer(status, b"{}", headers)
                return True
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.answer(401, b'{"error": "Invalid credentials"}', {"X-Error-Code": "RepoNotFound"})
            return True
        return False

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if self.refused(path):
            return None
        if path.startswith("/api/models/"):
            id, tree, revision = path.removeprefix("/api/models/").partition("/tree/")
            if tree and id in hub.models:
                return self.answer(200, json.dumps(hub.tree(id)).encode(), {"Content-Type": "application/json"})
            id, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            return self.api(id, revision)
        if path.startswith("/cdn/"):
            return self.content(path.removeprefix("/cdn/"))
        id, _, rest = path.removeprefix("/").partition("/resolve/")
        _, _, name = rest.partition("/")
        if name not in hub.models.get(id, {}):
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        if len(hub.models[id][name]) >= LARGE:
            return self.answer(302, b"", {"Location": f"/cdn/{id}/{name}", "X-Repo-Commit": COMMIT})
        return self.content(f"{id}/{name}")

    def api(self, id: str, revision: str) -> None:
        if id not in self.hub.models:
            return self.answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        if revision not in ("", "main", COMMIT):
            return self.answer(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        return self.answer(200, json.dumps(self.hub.info(id)).encode(), {"Content-Type": "application/json"})

    def content(self, place: str) -> None:
        hub = self.hub
        id = next(id for id in hub.models if place.startswith(f"{id}/"))
        name = place.removeprefix(f"{id}/")
        data = hub.models[id][name]
        if name in hub.corrupt:
            data = bytes(byte ^ 1 for byte in data)
        total, status, headers = len(data), 200, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes=") and not hub.no_ranges:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            data, status = data[start:], 206
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        cut = hub.cut[name] > 0
        if cut:
            hub.cut[name] -= 1
        self.answer(status, data, headers, cut=cut)

    def answer(self, status: int, body: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A running hub; `endpoint` is its address."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
