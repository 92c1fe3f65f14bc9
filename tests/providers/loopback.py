"""A provider on loopback that speaks chat completions over real HTTP and misbehaves by script."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Reply:
    """What is sent for one request. `hold`: the answer waits until the test releases it; `drop`: the connection ends without one."""

    def __init__(
        self, status: int = 200, body: str | None = None, *, headers: dict[str, str] | None = None, hold: bool = False, drop: bool = False
    ) -> None:
        self.status = status
        self.body = body
        self.headers = headers or {}
        self.hold = hold
        self.drop = drop


def completion(text: str | None, *, usage: bool = True, model: str = "real-model-1") -> str:
    answer: dict[str, Any] = {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
    }
    if usage:
        answer["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return json.dumps(answer)


class Loopback:
    """`script` is asked for each request, with its number from 0 and the user's text."""

    def __init__(self, script: Callable[[int, str], Reply | str]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str] = []
        self.release = threading.Event()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer._lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                    outer.authorizations.append(self.headers.get("authorization", ""))
                reply = script(number, body["messages"][-1]["content"])
                if isinstance(reply, str):
                    reply = Reply(body=completion(reply))
                if reply.hold:
                    outer.release.wait(30)
                if reply.drop or reply.hold:
                    self.close_connection = True
                    return
                data = (reply.body if reply.body is not None else json.dumps({"error": {"message": "sk-test-key and text"}})).encode()
                self.send_response(reply.status)
                self.send_header("content-type", reply.headers.pop("content-type", "application/json"))
                self.send_header("content-length", str(len(data)))
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
