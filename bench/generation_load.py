"""Load on generating servers, ours by gRPC and llama.cpp's by HTTP, in a process of its own: `python -m bench.generation_load`.

It reads one JSON plan a line and prints one JSON report a line. A plan names a server and its requests; each request has the token ids
of its prompt, how many tokens to generate, and with an open loop the second at which it is sent.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Seen:
    """What one caller saw: monotonic seconds of sending and of each arrival, with the tokens that arrived."""

    sent: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    error: str = ""
    tag: Any = None

    def report(self) -> dict[str, Any]:
        return {"tag": self.tag, "sent": self.sent, "arrivals": self.arrivals, "ids": self.ids, "error": self.error}


class Ours:
    """InferenceService.Generate, greedy or as the request's `sampling` says."""

    def __init__(self, plan: dict[str, Any]) -> None:
        import grpc.aio

        from understudy.v1 import inference_service_pb2 as service
        from understudy.v1 import inference_service_pb2_grpc as stubs

        self.messages = service
        self.plan = plan
        self.channel = grpc.aio.insecure_channel(plan["address"], options=[("grpc.max_receive_message_length", -1)])
        self.stub = stubs.InferenceServiceStub(self.channel)

    async def __call__(self, request: dict[str, Any]) -> AsyncIterator[list[int]]:
        from google.protobuf import json_format

        message = json_format.ParseDict(
            {
                "model": {"name": self.plan["model"]},
                "tokenIds": {"ids": request["prompt"]},
                "sampling": {"temperature": 0.0, "maxTokens": request["tokens"], "ignoreEos": True, **request.get("sampling", {})},
                "returnTokenIds": True,
                **request.get("more", {}),
            },
            self.messages.GenerateRequest(),
        )
        async for reply in self.stub.Generate(message):
            ids = [token.id for delta in reply.deltas for token in delta.tokens]
            if ids:
                yield ids

    async def close(self) -> None:
        await self.channel.close()


class LlamaCpp:
    """POST /completion with server-sent events."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.port = plan["port"]
        self.options = plan.get("options", {})

    async def __call__(self, request: dict[str, Any]) -> AsyncIterator[list[int]]:
        from bench.peers.llama import body

        data = json.dumps({**body(request["prompt"], request["tokens"]), **self.options}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 22)
        head = f"POST /completion HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        writer.write((head + "Connection: close\r\n\r\n").encode() + data)
        try:
            status = await reader.readline()
            if b" 200 " not in status:
                raise RuntimeError((status + await reader.read(2000)).decode(errors="replace"))
            async for line in reader:
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if event.get("tokens"):
                        yield event["tokens"]
                    if event.get("stop"):
                        break
        finally:
            writer.close()

    async def close(self) -> None:
        pass


async def one(server: Any, request: dict[str, Any]) -> Seen:
    seen = Seen(time.monotonic(), tag=request.get("tag"))
    try:
        async for ids in server(request):
            seen.arrivals.append((time.monotonic(), len(ids)))
            seen.ids += ids
    except Exception as error:
        seen.error = f"{type(error).__name__}: {error}"[:500]
    return seen


async def run(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Closed loop: `streams` callers take the requests in turn. Open loop (`streams` 0): each request is sent at its second."""
    server = (Ours if plan["server"] == "ours" else LlamaCpp)(plan)
    requests = plan["requests"]
    begun = time.monotonic()
    seen: list[Seen] = []

    async def caller(mine: list[dict[str, Any]]) -> None:
        for request in mine:
            seen.append(await one(server, request))

    async def later(request: dict[str, Any]) -> None:
        await asyncio.sleep(max(0.0, request["at"] - (time.monotonic() - begun)))
        seen.append(await one(server, request))

    if plan["streams"]:
        await asyncio.gather(*(caller(requests[i :: plan["streams"]]) for i in range(plan["streams"])))
    else:
        await asyncio.gather(*(later(r) for r in requests))
    await server.close()
    return [s.report() for s in seen]


def main() -> None:
    print(json.dumps({"reply": "ready"}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"reply": asyncio.run(run(json.loads(line)))}), flush=True)


if __name__ == "__main__":
    main()
