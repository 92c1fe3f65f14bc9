"""Vendors on loopback: real HTTP servers that speak OpenAI's or Anthropic's format, streamed and not, and misbehave by script.

    def script(number: int, text: str) -> Reply | str:      # the request's number from 0, the last message's text
        return Reply(429, headers={"retry-after": "1"}) if number == 0 else f"echo {text}"

    server = OpenAIServer(script)            # or AnthropicServer(script); listens on a free port at once
    server.base_url                          # for [providers.x] base_url = ...
    server.requests[0]["model"]              # each body as it came; server.headers has the headers, names in lower case
    server.wait_for(2)                       # blocks until two requests have come (in async tests: await server.arrived(2))
    server.release.set()                     # lets go whatever is held
    server.close()

A `str` is a good answer with that text, a piece a word where a stream is asked for. `Reply` says everything else; what can go wrong:

    refused before it is asked               base_url=nobody_there()
    429, 500, 529, 401, ...                  Reply(429, headers={"retry-after": "2"})
    no answer, not even headers              Reply("late", hold=True)                      until release is set
    no answer, the connection closes         Reply(drop=True)
    stall before / between tokens            Reply("a b c", stall_after=0) / stall_after=2     until release is set
    cut stream                               Reply("a b c", cut_after=2)
    error inside the stream                  Reply("a b c", error_after=2, error_type="overloaded_error")
    zero tokens                              Reply("")
    garbage                                  Reply(body="no JSON"), Reply(raw=b"\\xff\\xfe...") (what a stream sends, byte for byte)
    says nothing of usage                    Reply("fine", usage=None)
    no finish                                Reply("fine", finish=None)
    calls of tools                           Reply(calls=[("call_1", "weather", '{"city": "Oslo"}')])
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_HELD_S = 30.0


class Reply:
    """What is sent for one request; see the module."""

    def __init__(
        self,
        what: int | str = 200,
        body: str | None = None,
        *,
        status: int = 200,
        headers: dict[str, str] | None = None,
        hold: bool = False,
        drop: bool = False,
        stall_after: int | None = None,
        cut_after: int | None = None,
        error_after: int | None = None,
        error_type: str = "api_error",
        raw: bytes | None = None,
        usage: tuple[int, int] | None = (100, 10),
        finish: str | None = "stop",
        calls: Sequence[tuple[str, str, str]] = (),
        thinking: str = "",
        logprobs: Sequence[float] = (),
        model: str = "real-model-1",
    ) -> None:
        self.status = what if isinstance(what, int) else status
        self.text = what if isinstance(what, str) else ""
        self.body = body
        self.headers = headers or {}
        self.hold = hold
        self.drop = drop
        self.stall_after = stall_after
        self.cut_after = cut_after
        self.error_after = error_after
        self.error_type = error_type
        self.raw = raw
        self.usage = usage
        self.finish = "tool_calls" if calls and finish == "stop" else finish
        self.calls = list(calls)
        self.thinking = thinking
        self.logprobs = list(logprobs)
        self.model = model

    def pieces(self) -> list[str]:
        """The text word by word."""
        return [piece + " " for piece in self.text.split(" ")[:-1]] + [self.text.split(" ")[-1]] if self.text else []


Script = Callable[[int, str], "Reply | str"]


class _Cut(Exception):
    """The connection is to end here."""


class Loopback:
    """What both formats share."""

    def __init__(self, script: Script) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.release = threading.Event()
        self._script = script
        self._came = threading.Condition()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                outer._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}{self.prefix}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    prefix = ""

    @property
    def authorizations(self) -> list[str]:
        """Of each request."""
        return [headers.get("authorization", "") for headers in self.headers]

    def wait_for(self, count: int) -> None:
        """Blocks until so many requests have come."""
        with self._came:
            assert self._came.wait_for(lambda: len(self.requests) >= count, 20), f"{len(self.requests)} of {count} requests came"

    async def arrived(self, count: int) -> None:
        """The same for tests on an event loop."""
        await asyncio.to_thread(self.wait_for, count)

    def close(self) -> None:
        """Lets go what is held, and stops."""
        self.release.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def whole(self, reply: Reply, request: dict[str, Any]) -> dict[str, Any]:
        """The answer in one piece."""
        raise NotImplementedError

    def events(self, reply: Reply, request: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any] | str]]:
        """The answer as events (name, data); `_paced` around its pieces."""
        raise NotImplementedError

    def error(self, kind: str) -> dict[str, Any]:
        """A body that repeats what no log may hold."""
        return {"error": {"message": "sk-test-key and Where is my card?", "type": kind, "code": None}}

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self._came:
            number = len(self.requests)
            self.requests.append(request)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self._came.notify_all()
        reply = self._script(number, _last_text(request))
        if isinstance(reply, str):
            reply = Reply(reply)
        try:
            if reply.hold:
                self.release.wait(_HELD_S)
            if reply.drop:
                raise _Cut
            if request.get("stream") and reply.status == 200 and reply.body is None:
                self._stream(handler, reply, request)
            else:
                self._send(handler, reply, request)
        except (_Cut, ConnectionError):
            handler.close_connection = True

    def _send(self, handler: BaseHTTPRequestHandler, reply: Reply, request: dict[str, Any]) -> None:
        if reply.body is not None:
            data = reply.body.encode()
        elif reply.raw is not None:
            data = reply.raw
        else:
            answer = self.whole(reply, request) if reply.status == 200 else self.error(_type_of(reply.status))
            data = json.dumps(answer).encode()
        headers = {"content-type": "application/json", "content-length": str(len(data)), "x-request-id": "req-1", **reply.headers}
        handler.send_response(reply.status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    def _stream(self, handler: BaseHTTPRequestHandler, reply: Reply, request: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("transfer-encoding", "chunked")
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        handler.end_headers()

        def write(data: bytes) -> None:
            handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            handler.wfile.flush()

        if reply.raw is not None:
            write(reply.raw)
        else:
            for event, data in self.events(reply, request):
                named = f"event: {event}\n" if event else ""
                write(f"{named}data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode())
        handler.wfile.write(b"0\r\n\r\n")

    def _paced(self, reply: Reply) -> Iterator[str | None]:
        """The pieces of the text, with what goes wrong between them; None: an error is due here."""
        pieces = reply.pieces()
        for number in range(len(pieces) + 1):
            if reply.stall_after == number:
                self.release.wait(_HELD_S)
            if reply.cut_after == number:
                raise _Cut
            if reply.error_after == number:
                yield None
                return
            if number < len(pieces):
                yield pieces[number]


class OpenAIServer(Loopback):
    """Chat completions and embeddings."""

    prefix = "/v1"

    def whole(self, reply: Reply, request: dict[str, Any]) -> dict[str, Any]:
        if "input" in request:
            vectors = [{"object": "embedding", "index": i, "embedding": vector_of(text)} for i, text in enumerate(request["input"])]
            return {"object": "list", "data": vectors, "model": reply.model, "usage": {"prompt_tokens": 5, "total_tokens": 5}}
        message: dict[str, Any] = {"role": "assistant", "content": reply.text or None}
        if reply.calls:
            message["tool_calls"] = [_call(i, call) for i, call in enumerate(reply.calls)]
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": reply.finish}
        if reply.logprobs:
            choice["logprobs"] = {"content": [_token(value, request) for value in reply.logprobs]}
        answer = {"id": "c", "object": "chat.completion", "created": 1, "model": reply.model, "choices": [choice]}
        return answer | ({"usage": _usage(reply.usage)} if reply.usage else {})

    def events(self, reply: Reply, request: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any] | str]]:
        def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> tuple[str, dict[str, Any]]:
            choice = {"index": 0, "delta": delta, "finish_reason": finish, **more}
            return "", {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": reply.model, "choices": [choice]}

        yield chunk({"role": "assistant", "content": ""})
        if reply.thinking:
            yield chunk({"reasoning_content": reply.thinking})
        logprobs = iter(reply.logprobs)
        for piece in self._paced(reply):
            if piece is None:
                yield "", self.error(reply.error_type)
                return
            value = next(logprobs, None)
            yield chunk({"content": piece}, **({} if value is None else {"logprobs": {"content": [_token(value, request)]}}))
        for index, (id, name, arguments) in enumerate(reply.calls):
            yield chunk({"tool_calls": [{"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}]})
            for part in (arguments[:4], arguments[4:]):
                yield chunk({"tool_calls": [{"index": index, "function": {"arguments": part}}]})
        if reply.finish is not None:
            yield chunk({}, reply.finish)
        if reply.usage and request.get("stream_options", {}).get("include_usage"):
            yield "", {"id": "c", "object": "chat.completion.chunk", "model": reply.model, "choices": [], "usage": _usage(reply.usage)}
        if reply.finish is not None:
            yield "", "[DONE]"


class AnthropicServer(Loopback):
    """Messages."""

    def error(self, kind: str) -> dict[str, Any]:
        return {"type": "error", "request_id": "req-1", **super().error(kind)}

    def whole(self, reply: Reply, request: dict[str, Any]) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "thinking", "thinking": reply.thinking, "signature": "s"}] if reply.thinking else []
        content += [{"type": "text", "text": reply.text}] if reply.text else []
        content += [{"type": "tool_use", "id": i, "name": name, "input": json.loads(given)} for i, name, given in reply.calls]
        used = {"input_tokens": reply.usage[0], "output_tokens": reply.usage[1]} if reply.usage else None
        start = {"id": "msg_1", "type": "message", "role": "assistant", "model": reply.model, "content": content}
        return start | {"stop_reason": _stop_reason(reply.finish), "stop_sequence": None} | ({"usage": used} if used else {})

    def events(self, reply: Reply, request: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any] | str]]:
        def event(kind: str, **fields: Any) -> tuple[str, dict[str, Any]]:
            return kind, {"type": kind, **fields}

        start = self.whole(Reply("", usage=reply.usage and (reply.usage[0], 1), model=reply.model, finish=None), request)
        yield event("message_start", message=start)
        yield event("ping")
        if reply.thinking:
            yield event("content_block_start", index=99, content_block={"type": "thinking", "thinking": "", "signature": ""})
            yield event("content_block_delta", index=99, delta={"type": "thinking_delta", "thinking": reply.thinking})
            yield event("content_block_stop", index=99)
        if reply.text or reply.stall_after is not None or reply.cut_after is not None or reply.error_after is not None:
            yield event("content_block_start", index=0, content_block={"type": "text", "text": ""})
            for piece in self._paced(reply):
                if piece is None:
                    yield "error", self.error(reply.error_type)
                    return
                yield event("content_block_delta", index=0, delta={"type": "text_delta", "text": piece})
            yield event("content_block_stop", index=0)
        for number, (id, name, arguments) in enumerate(reply.calls, start=1):
            yield event("content_block_start", index=number, content_block={"type": "tool_use", "id": id, "name": name, "input": {}})
            for part in (arguments[:4], arguments[4:]):
                yield event("content_block_delta", index=number, delta={"type": "input_json_delta", "partial_json": part})
            yield event("content_block_stop", index=number)
        if reply.finish is not None:
            used = {"usage": {"output_tokens": reply.usage[1]}} if reply.usage else {}
            yield event("message_delta", delta={"stop_reason": _stop_reason(reply.finish), "stop_sequence": None}, **used)
            yield event("message_stop")


def nobody_there() -> str:
    """An address at which connections are refused."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def vector_of(text: str) -> list[float]:
    """Eight numbers that depend on the text alone."""
    return [byte / 255 for byte in hashlib.sha256(text.encode()).digest()[:8]]


def completion(text: str | None, *, usage: bool = True, model: str = "real-model-1") -> str:
    """OpenAI's answer in one piece, as a body."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    answer: dict[str, Any] = {"id": "c", "object": "chat.completion", "created": 1, "model": model, "choices": [choice]}
    return json.dumps(answer | ({"usage": _usage((100, 10))} if usage else {}))


def _usage(counts: tuple[int, int]) -> dict[str, int]:
    return {"prompt_tokens": counts[0], "completion_tokens": counts[1], "total_tokens": sum(counts)}


def _call(index: int, call: tuple[str, str, str]) -> dict[str, Any]:
    return {"index": index, "id": call[0], "type": "function", "function": {"name": call[1], "arguments": call[2]}}


def _stop_reason(finish: str | None) -> str | None:
    names = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
    return names.get(finish, finish) if finish else None


def _type_of(status: int) -> str:
    return {401: "authentication_error", 429: "rate_limit_error", 529: "overloaded_error"}.get(status, "api_error")


def _last_text(request: dict[str, Any]) -> str:
    if "input" in request:
        return str(request["input"][0])
    content = request["messages"][-1]["content"]
    if isinstance(content, list):
        return " ".join(str(block.get("text", "")) for block in content)
    return str(content)


def _token(logprob: float, request: dict[str, Any]) -> dict[str, Any]:
    """A token as OpenAI reports it, with as many alternatives as were asked for."""
    top = [{"token": f"t{place or ''}", "logprob": logprob - place, "bytes": None} for place in range(request.get("top_logprobs", 0))]
    return {"token": "t", "logprob": logprob, "bytes": [116], "top_logprobs": top}
