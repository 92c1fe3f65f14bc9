"""The gateway through LiteLLM's client. Run by test_openai_others.py in a process of its own.

Arguments: base URL, the local model's answer.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import litellm

BASE_URL, SAID = sys.argv[1:]
TALK = [{"role": "user", "content": "Where is my order?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
HOW: dict[str, Any] = {"api_base": BASE_URL, "api_key": "none", "num_retries": 0}


def chat() -> None:
    for model, said in (("scripted", SAID), ("writer", "echo Where is my order?"), ("vendor/m-2", "echo Where is my order?")):
        whole = litellm.completion(model=f"openai/{model}", messages=TALK, temperature=0, **HOW)
        assert whole.choices[0].message.content == said, whole
        assert whole.usage.total_tokens > 0
        chunks = list(litellm.completion(model=f"openai/{model}", messages=TALK, temperature=0, stream=True, **HOW))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said, chunks


def tools() -> None:
    whole = litellm.completion(model="openai/scripted", messages=TALK, temperature=0, tools=[TOOL], **HOW)
    assert json.loads(whole.choices[0].message.tool_calls[0].function.arguments) == {"city": "Oslo"}, whole


def embeddings() -> None:
    found = litellm.embedding(model="openai/embedder", input=["a card", "money"], **HOW)
    assert len(found.data) == 2 and len(found.data[0]["embedding"]) == 32, found


def rerank() -> None:
    # LiteLLM's generic client of /rerank is Cohere's.
    found = litellm.rerank(
        model="cohere/ranker", query="card", documents=["a card", "money"], top_n=1, api_base=BASE_URL.removesuffix("/v1"), api_key="none"
    )
    assert len(found.results) == 1 and found.results[0]["index"] in (0, 1), found


def errors() -> None:
    try:
        litellm.completion(model="openai/nope", messages=TALK, **HOW)
    except litellm.exceptions.NotFoundError:
        return
    raise AssertionError("no error")


async def asynchronous() -> None:
    stream = await litellm.acompletion(model="openai/scripted", messages=TALK, temperature=0, stream=True, **HOW)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == SAID


for part in (chat, tools, embeddings, rerank, errors):
    part()
    print(part.__name__, "good", flush=True)
asyncio.run(asynchronous())
print("asynchronous good")
