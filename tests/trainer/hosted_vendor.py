"""A vendor on loopback that speaks OpenAI's files and fine-tuning endpoints, and refuses whatever the vendor would refuse.

Its jobs go one state further a look. It learns nothing: what is tested is what is said on the wire, and what is made of the answers.
"""

from __future__ import annotations

import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-hosted-secret-0123456789"
STATES = ["validating_files", "queued", "running", "running", "succeeded"]
_JOB_FIELDS = {"model", "training_file", "validation_file", "method", "seed", "suffix", "metadata"}


@dataclass
class Vendor:
    """What it was asked, and how it is to fail. `faults`: "METHOD /path" (no ids) -> what to do instead, in order; one use each.

    A fault: (status, body, headers); "drop" (the request is carried out and its answer lost).
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    looks: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: dict[str, list[Any]] = field(default_factory=dict)
    states: list[str] = field(default_factory=lambda: list(STATES))
    events: int = 130  # more than a page
    error: dict[str, Any] | None = None
    hold: threading.Event = field(default_factory=threading.Event)  # set: jobs may leave "running"
    lock: threading.Lock = field(default_factory=threading.Lock)
    running: threading.Event = field(default_factory=threading.Event)  # a job was seen running

    def count(self, request: str) -> int:
        return self.requests.count(request)


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@contextmanager
def vendor() -> Iterator[Vendor]:
    told = Vendor()
    told.hold.set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *given: _Handler(told, *given))
    server.daemon_threads = True
    told.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, told: Vendor, *given: Any) -> None:
        self.told = told
        super().__init__(*given)

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        if "content-length" in self.headers:
            self._answer(self.rfile.read(int(self.headers["content-length"])))
        else:
            self._answer(self._chunks())

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _answer(self, body: bytes) -> None:
        path = urllib.parse.urlsplit(self.path)
        parts = path.path.removeprefix("/v1").strip("/").split("/")
        name = f"{self.command} /" + "/".join("*" if "-" in part else part for part in parts)
        with self.told.lock:
            self.told.requests.append(name)
            fault = self.told.faults[name].pop(0) if self.told.faults.get(name) else None
        if isinstance(fault, tuple):
            self._send(*fault)
            return
        try:
            if self.headers.get("authorization") != f"Bearer {KEY}":
                raise Refused(401, "invalid_api_key", f"Incorrect API key provided: {self.headers.get('authorization')}")
            with self.told.lock:
                found = self._route(parts, dict(urllib.parse.parse_qsl(path.query)), body)
        except Refused as refused:
            error = {"message": str(refused), "type": "invalid_request_error", "param": None, "code": refused.code}
            self._send(refused.status, {"error": error}, {})
            return
        if fault == "drop":
            self.close_connection = True
            return
        self._send(200, found, {})

    def _send(self, status: int, body: Any, headers: dict[str, str]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"content-type": "application/json", "content-length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def _route(self, parts: list[str], query: dict[str, str], body: bytes) -> dict[str, Any]:
        match (self.command, parts):
            case ("POST", ["files"]):
                return self._file(body)
            case ("POST", ["fine_tuning", "jobs"]):
                return self._create(body)
            case ("GET", ["fine_tuning", "jobs"]):
                return self._list(query)
            case ("GET", ["fine_tuning", "jobs", job]):
                return self._look(job)
            case ("GET", ["fine_tuning", "jobs", job, "events"]):
                return self._events(self._job(job)["id"], query)
            case ("POST", ["fine_tuning", "jobs", job, "cancel"]):
                found = self._job(job)
                if found["status"] in ("succeeded", "failed", "cancelled"):
                    raise Refused(400, "invalid_job_state", "the job has ended")
                found["status"] = "cancelled"
                return found
        raise Refused(404, "unknown_url", f"Unknown request URL: {self.path}")

    def _file(self, body: bytes) -> dict[str, Any]:
        head = f"content-type: {self.headers['content-type']}\r\n\r\n".encode()
        form = BytesParser(policy=HTTP).parsebytes(head + body)
        fields = {part.get_param("name", header="content-disposition"): part for part in form.iter_parts()}
        if set(fields) != {"purpose", "file"} or fields["purpose"].get_content().strip() != "fine-tune":
            raise Refused(400, "invalid_form", f"expected purpose and file, got {sorted(map(str, fields))}")
        name = fields["file"].get_filename() or ""
        content = fields["file"].get_payload(decode=True)
        assert isinstance(content, bytes)
        if not name.endswith(".jsonl"):
            raise Refused(400, "invalid_file", "fine-tuning takes .jsonl files")
        lines = [json.loads(line) for line in content.decode("utf-8").splitlines()]
        for line in lines:
            talk = line["messages"]
            roles = [message["role"] for message in talk]
            fine = set(line) == {"messages"} and all(set(m) == {"role", "content"} and m["content"] for m in talk)
            if not fine or roles[-1] != "assistant" or "system" in roles[1:] or "user" not in roles:
                raise Refused(400, "invalid_training_file", f"a line is no chat: {roles}")
        if len(lines) < 10:
            raise Refused(400, "invalid_n_examples", "at least 10 examples")
        key = f"file-{len(self.told.files) + 1}"
        self.told.files[key] = content
        return {
            "id": key, "object": "file", "bytes": len(content), "created_at": 1, "filename": name, "purpose": "fine-tune",
            "status": "processed",
        }  # fmt: skip

    def _create(self, body: bytes) -> dict[str, Any]:
        asked = json.loads(body)
        if unknown := set(asked) - _JOB_FIELDS:
            raise Refused(400, "unknown_parameter", f"unknown parameters {sorted(unknown)}")
        if not str(asked["model"]).startswith(("gpt-4.1", "gpt-4o")):
            raise Refused(400, "model_not_available", f"{asked['model']} cannot be fine-tuned")
        if asked["training_file"] not in self.told.files:
            raise Refused(400, "invalid_training_file", "no such file")
        method = asked.get("method") or {}
        epochs = method["supervised"]["hyperparameters"]["n_epochs"]
        if method.get("type") != "supervised" or not isinstance(epochs, int) or not 1 <= epochs <= 50:
            raise Refused(400, "invalid_method", "method must be supervised with 1 to 50 epochs")
        if len(asked.get("suffix", "")) > 64 or not 0 <= asked["seed"] < 2**31:
            raise Refused(400, "invalid_value", "suffix or seed")
        key = f"ftjob-{len(self.told.jobs) + 1}"
        self.told.jobs[key] = {
            "id": key, "object": "fine_tuning.job", "created_at": len(self.told.jobs), "model": asked["model"],
            "status": "validating_files",
            "training_file": asked["training_file"], "validation_file": asked.get("validation_file"), "fine_tuned_model": None,
            "finished_at": None, "hyperparameters": {"n_epochs": epochs}, "organization_id": "org-1", "result_files": [],
            "seed": asked["seed"], "trained_tokens": None, "error": None, "metadata": asked.get("metadata"), "method": method,
            "suffix": asked.get("suffix"),
        }  # fmt: skip
        return self.told.jobs[key]

    def _list(self, query: dict[str, str]) -> dict[str, Any]:
        wanted = {key[len("metadata[") : -1]: value for key, value in query.items() if key.startswith("metadata[")}
        found = [job for job in self.told.jobs.values() if wanted.items() <= (job["metadata"] or {}).items()]
        return {"object": "list", "data": found[::-1], "has_more": False}

    def _job(self, job: str) -> dict[str, Any]:
        if job not in self.told.jobs:
            raise Refused(404, "fine_tune_not_found", "no such job")
        return self.told.jobs[job]

    def _look(self, key: str) -> dict[str, Any]:
        job, told = self._job(key), self.told
        if job["status"] in ("succeeded", "failed", "cancelled"):
            return job
        seen = told.looks[key] = told.looks.get(key, -1) + 1
        job["status"] = told.states[min(seen, len(told.states) - 1)]
        if job["status"] in ("succeeded", "failed") and not told.hold.is_set():
            job["status"] = "running"
        if job["status"] == "running":
            told.running.set()
        if job["status"] == "failed":
            job["error"] = told.error
        if job["status"] == "succeeded":
            content = told.files[job["training_file"]]
            job["trained_tokens"] = len(content) // 5 * job["hyperparameters"]["n_epochs"]
            job["fine_tuned_model"] = f"ft:{job['model']}:org:{job['suffix']}:{key[-1]}"
        return job

    def _events(self, key: str, query: dict[str, str]) -> dict[str, Any]:
        events = [
            {
                "id": f"ftevent-{n}", "object": "fine_tuning.job.event", "created_at": n, "level": "info",
                "message": f"Step {n}: training loss=0.5, key {KEY}", "type": "metrics", "data": {"step": n, "train_loss": 1 / (n + 1)},
            }
            for n in range(self.told.events)
        ][::-1]  # fmt: skip
        start = 1 + [event["id"] for event in events].index(query["after"]) if "after" in query else 0
        page = events[start : start + int(query.get("limit", 20))]
        return {"object": "list", "data": page, "has_more": start + len(page) < len(events)}
