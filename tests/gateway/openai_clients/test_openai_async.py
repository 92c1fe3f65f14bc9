"""Many callers at once by OpenAI's asynchronous client, and callers that leave."""

from __future__ import annotations

import asyncio
from typing import Any

import openai

from tests import generation_models as scripted

TELL: dict[str, Any] = {"model": "scripted", "prompt": "tell", "temperature": 0}
TOLD = "".join(scripted.STORY[1:])


async def test_32_streams_at_once(aclient: openai.AsyncOpenAI) -> None:
    async def one(tokens: int) -> str:
        stream = await aclient.completions.create(stream=True, max_tokens=tokens, **TELL)
        return "".join([chunk.choices[0].text async for chunk in stream])

    whole = (await aclient.completions.create(max_tokens=72, **TELL)).choices[0].text
    assert whole.startswith(TOLD)
    sizes = [8 * (1 + index % 9) for index in range(32)]
    texts = await asyncio.gather(*(one(size) for size in sizes))
    for size, text in zip(sizes, texts, strict=True):
        assert whole.startswith(text) and len(text) >= size


async def test_whole_answers_of_many_models_at_once(aclient: openai.AsyncOpenAI) -> None:
    async def one(model: str) -> str:
        answer = await aclient.chat.completions.create(model=model, messages=[{"role": "user", "content": "hello"}], temperature=0)
        return answer.choices[0].message.content or ""

    found = await asyncio.gather(*(one(model) for model in ("scripted", "writer", "scribe", "vendor/m-3") * 4))
    said = scripted.ANSWER + scripted.CALL
    assert found == [said, "echo hello", said, "echo hello"] * 4


async def test_leaving_a_stream_ends_the_work(aclient: openai.AsyncOpenAI, site: Any) -> None:
    ended = {"method": "/understudy.v1.InferenceService/Generate", "code": "CANCELLED"}
    before = sum(ended.items() <= line.items() for line in site.server.events("call"))
    stream = await aclient.completions.create(stream=True, max_tokens=1900, **TELL)
    async for _ in stream:
        break
    await stream.close()
    # The server's own log says how the call ended: not by its last token.
    await asyncio.to_thread(site.server.wait_event, "call", before + 1, **ended)
