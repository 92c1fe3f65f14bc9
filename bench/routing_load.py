"""Load on gateways in a process of its own, ours by gRPC and others by HTTP/1.1: `python -m bench.routing_load`.

It reads one JSON plan a line and prints one JSON report a line: {"latencies": seconds, "seconds", "errors", "cpu"}. A plan:

    {"to": "grpc", "address": "127.0.0.1:50051", "skill": "answer"}  or  {"to": "http", "port": 4000, "path": "/v1/...", "model": "m"}
    with "texts", "seconds", and "rate" (open loop: requests a second at fixed moments, however slow the answers are)
    or "in_flight" (closed loop).

A latency of the open loop counts from the moment at which the request was due. Answers are looked at after the clock has stopped.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

MAX_TOKENS = 64


class Http2(asyncio.Protocol):
    """One connection that carries gRPC calls, many at once, with no more than they need: requests of a few hundred bytes.

    A client library takes longer for a call than what is measured; here a call costs as little as a request of `Http`. Windows are as large
    as HTTP/2 has them; the server's are never filled. Answers are the messages' bytes; none came: the call failed.
    """

    def __init__(self, address: str, method: str) -> None:
        fields = ((b"te", b"trailers"), (b"content-type", b"application/grpc"))
        plain = b"".join(b"\0" + _text(name) + _text(value) for name, value in fields)
        self._head = b"\x83\x86\x04" + _text(method.encode()) + b"\x01" + _text(address.encode()) + plain  # RFC 7541, nothing indexed
        self._transport: Any = None
        self._buffer = bytearray()
        self._calls: dict[int, tuple[asyncio.Future[bytes], bytearray]] = {}
        self._stream = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        settings = _frame(4, 0, 0, b"\0\x04\x7f\xff\xff\xff")
        self._transport.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + _frame(8, 0, 0, (0x7FFFFFFF - 65535).to_bytes(4, "big")))

    def call(self, request: bytes) -> asyncio.Future[bytes]:
        """Sends a message; its answer's bytes."""
        self._stream += 2
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._calls[self._stream] = future, bytearray()
        message = b"\0" + len(request).to_bytes(4, "big") + request
        self._transport.write(_frame(1, 4, self._stream, self._head) + _frame(0, 1, self._stream, message))
        return future

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        at = 0
        while len(buffer) - at >= 9:
            size = int.from_bytes(buffer[at : at + 3], "big")
            if len(buffer) - at - 9 < size:
                break
            kind, flags, stream = buffer[at + 3], buffer[at + 4], int.from_bytes(buffer[at + 5 : at + 9], "big")
            payload = bytes(buffer[at + 9 : at + 9 + size])
            at += 9 + size
            if kind in (4, 6) and not flags & 1:  # settings and pings want an answer
                self._transport.write(_frame(kind, 1, 0, payload if kind == 6 else b""))
            elif stream in self._calls and kind in (0, 1, 3):
                self._take(stream, kind, flags, payload)
        del buffer[:at]

    def _take(self, stream: int, kind: int, flags: int, payload: bytes) -> None:
        future, answer = self._calls[stream]
        if kind == 0:
            answer += payload
        if kind == 3 or flags & 1:
            del self._calls[stream]
            if kind != 3 and len(answer) >= 5:
                future.set_result(bytes(answer[5:]))
            else:
                future.set_exception(RuntimeError(f"a call without an answer: {payload!r}"))

    def connection_lost(self, error: Exception | None) -> None:
        for future, _ in self._calls.values():
            future.set_exception(ConnectionError(f"the connection ended: {error}"))

    def close(self) -> None:
        self._transport.close()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _text(value: bytes) -> bytes:
    assert len(value) < 127
    return bytes((len(value),)) + value


class Ours:
    """InferenceService.Run, an input a call, on one connection; bytes made before, answers kept as bytes."""

    def __init__(self, plan: dict[str, Any]) -> None:
        from understudy.v1 import inference_pb2, inference_service_pb2

        self._response = inference_service_pb2.RunResponse
        self._address = plan["address"]
        self._connection: Http2 | None = None
        make = inference_service_pb2.RunRequest
        self._requests = [
            make(skill=plan["skill"], inputs=[inference_pb2.RunInput(text=text)]).SerializeToString() for text in plan["texts"]
        ]

    async def open(self) -> None:
        host, _, port = self._address.partition(":")
        made = Http2(self._address, "/understudy.v1.InferenceService/Run")
        _, self._connection = await asyncio.get_running_loop().create_connection(lambda: made, host, int(port))

    async def __call__(self, number: int) -> bytes:
        assert self._connection is not None
        return await self._connection.call(self._requests[number % len(self._requests)])

    def problem(self, answer: bytes) -> str:
        """What is wrong with an answer, or ""."""
        response = self._response.FromString(answer)
        (result,) = response.results
        return str(result.error.message) if result.HasField("error") else "" if result.output_text and result.cost.micro_usd else "empty"

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


class Http:
    """POST of a chat completion over keep-alive connections, as many as there are requests in flight."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._port = plan["port"]
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._requests = [self._request(plan, text) for text in plan["texts"]]

    async def open(self) -> None:
        """Connections are opened as they are needed."""

    def _request(self, plan: dict[str, Any], text: str) -> bytes:
        messages = [{"role": "system", "content": plan["system"]}, {"role": "user", "content": text}]
        body = json.dumps({"model": plan["model"], "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0.0}).encode()
        head = f"POST {plan['path']} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def __call__(self, number: int) -> bytes:
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(self._requests[number % len(self._requests)])
        head = await reader.readuntil(b"\r\n\r\n")
        at = head.lower().index(b"content-length:")
        body = await reader.readexactly(int(head[at + 15 :].split(b"\r\n", 1)[0]))
        self._idle.append((reader, writer))
        return head.split(b"\r\n", 1)[0] + b"\n" + body

    def problem(self, answer: bytes) -> str:
        """What is wrong with an answer, or ""."""
        status, _, body = answer.partition(b"\n")
        if b" 200 " not in status:
            return (status + body).decode(errors="replace")[:300]
        return "" if json.loads(body)["choices"][0]["message"]["content"] else "empty"

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


async def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Carries a plan out."""
    target = Ours(plan) if plan["to"] == "grpc" else Http(plan)
    latencies: list[float] = []
    answers: list[bytes] = []
    errors: list[str] = []

    async def one(number: int, due: float) -> None:
        try:
            answer = await target(number)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}"[:300])
            return
        latencies.append(time.perf_counter() - due)
        answers.append(answer)

    await target.open()
    cpu, begun = time.process_time(), time.perf_counter()
    await (_open if plan.get("rate") else _closed)(plan, begun, one)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    errors += [problem for answer in answers if (problem := target.problem(answer))]
    await target.close()
    return {"latencies": latencies, "seconds": seconds, "errors": len(errors), "first_error": errors[0] if errors else "", "cpu": cpu}


async def _open(plan: dict[str, Any], begun: float, one: Callable[[int, float], Awaitable[None]]) -> None:
    running: set[asyncio.Future[None]] = set()
    for number in range(int(plan["seconds"] * plan["rate"])):
        due = begun + number / plan["rate"]
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.ensure_future(one(number, due))
        running.add(task)
        task.add_done_callback(running.discard)
    while running:
        await asyncio.wait(running)


async def _closed(plan: dict[str, Any], begun: float, one: Callable[[int, float], Awaitable[None]]) -> None:
    async def caller(first: int) -> None:
        number = first
        while time.perf_counter() - begun < plan["seconds"]:
            await one(number, time.perf_counter())
            number += plan["in_flight"]

    await asyncio.gather(*(caller(first) for first in range(plan["in_flight"])))


def main() -> None:
    print(json.dumps({"reply": "ready"}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"reply": asyncio.run(run(json.loads(line)))}), flush=True)


if __name__ == "__main__":
    main()
