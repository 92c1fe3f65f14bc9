"""A vendor on the loopback: OpenAI's chat completions with a fixed latency, whole or as server-sent events, as a process of its own.

`python -m bench.upstream` prints {"ready": true, "port": n}, then answers each line of JSON with one: {"cpu": true} gives the seconds of
processor time that it has used, {"answered": true} the number of answers. The latency is in the address: a request to
`/20/v1/chat/completions` is answered 20 milliseconds after its last byte came.

Written on asyncio's transports, so that an answer costs some 30 us of one core and it is never what is measured.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any, ClassVar

TEXT = (
    "Your card was sent to the address that we have on file for you, and it should be with you within five working days. "
    "You can follow it in the app under Cards, and if it has not come by then we will send you another one."
)
WORDS = TEXT.split(" ")
USAGE = {"prompt_tokens": 60, "completion_tokens": len(WORDS), "total_tokens": 60 + len(WORDS)}
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def completion(model: str) -> bytes:
    """A whole response."""
    message = {"role": "assistant", "content": TEXT}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    body = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": model, "choices": [choice], "usage": USAGE}
    data = json.dumps(body).encode()
    return _HEAD % (len(data), data)


def events(model: str) -> bytes:
    """A streamed response: a chunk a word, and the usage, all at once."""
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": model}
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word if at == 0 else f" {word}"} for at, word in enumerate(WORDS)]
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas] + [
        {"index": 0, "delta": {}, "finish_reason": "stop"}
    ]
    bodies = [{**base, "choices": [choice]} for choice in choices] + [{**base, "choices": [], "usage": USAGE}]
    data = b"".join(b"data: " + json.dumps(body).encode() + b"\n\n" for body in bodies) + b"data: [DONE]\n\n"
    return _STREAM_HEAD + b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)


class Connection(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    answered = 0
    made: ClassVar[dict[tuple[bytes, bool], bytes]] = {}

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            at = head.find(b"content-length:")
            size = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._buffer) < end + 4 + size:
                return
            body = self._buffer[end + 4 : end + 4 + size]
            self._buffer = self._buffer[end + 4 + size :]
            milliseconds = head.split(b" ", 2)[1].split(b"/", 2)[1]
            delay = int(milliseconds) / 1e3 if milliseconds.isdigit() else 0.0
            if delay:
                asyncio.get_running_loop().call_later(delay, self._answer, body)
            else:
                self._answer(body)

    def _answer(self, body: bytes) -> None:
        assert self._transport is not None
        if self._transport.is_closing():
            return
        after = body.partition(b'"model":')[2]
        model = after.split(b'"', 2)[1] if after else b"none"
        streamed = b'"stream": true' in body or b'"stream":true' in body
        made = self.made.get((model, streamed))
        if made is None:
            made = self.made[model, streamed] = (events if streamed else completion)(model.decode())
        Connection.answered += 1
        self._transport.write(made)


async def main() -> None:
    """Serves until its input ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print(json.dumps({"ready": True, "port": port}), flush=True)
    while line := await reader.readline():
        command = json.loads(line)
        reply = time.process_time() if "cpu" in command else Connection.answered
        print(json.dumps({"reply": reply}), flush=True)
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
