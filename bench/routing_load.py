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


class Ours:
    """InferenceService.Run, an input a call; bytes made before, answers kept as bytes."""

    def __init__(self, plan: dict[str, Any]) -> None:
        import grpc.aio

        from understudy.v1 import inference_pb2, inference_service_pb2

        self._response = inference_service_pb2.RunResponse
        self._channel = grpc.aio.insecure_channel(plan["address"])
        self._call: Any = self._channel.unary_unary("/understudy.v1.InferenceService/Run")
        make = inference_service_pb2.RunRequest
        self._requests = [
            make(skill=plan["skill"], inputs=[inference_pb2.RunInput(text=text)]).SerializeToString() for text in plan["texts"]
        ]

    async def __call__(self, number: int) -> bytes:
        return bytes(await self._call(self._requests[number % len(self._requests)]))

    def problem(self, answer: bytes) -> str:
        """What is wrong with an answer, or ""."""
        response = self._response.FromString(answer)
        (result,) = response.results
        return str(result.error.message) if result.HasField("error") else "" if result.output_text and result.cost.micro_usd else "empty"

    async def close(self) -> None:
        await self._channel.close()


class Http:
    """POST of a chat completion over keep-alive connections, as many as there are requests in flight."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._port = plan["port"]
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._requests = [self._request(plan, text) for text in plan["texts"]]

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
