"""The gateway through LangChain. Run by test_openai_others.py in a process of its own.

Arguments: base URL, the local model's answer, its part before a tool call.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Literal

import pydantic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

BASE_URL, SAID, BEFORE = sys.argv[1:]
HOW: dict[str, Any] = {"base_url": BASE_URL, "api_key": "none", "max_retries": 0}
ASK = "Where is my order?"


class Trip(pydantic.BaseModel):
    """A trip."""

    city: Literal["Oslo", "Rome"]


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"cold in {city}"


def chat() -> None:
    for model, said in (("scripted", SAID), ("writer", f"echo {ASK}"), ("sorter", None)):
        asked = ChatOpenAI(model=model, temperature=0, **HOW)
        whole = asked.invoke(ASK)
        assert whole.content == said or (said is None and whole.content in ("card", "transfer", "password")), whole
        assert whole.usage_metadata is not None and whole.usage_metadata["total_tokens"] > 0
        assert "".join(str(piece.content) for piece in asked.stream(ASK)) == whole.content


def tools() -> None:
    asked = ChatOpenAI(model="scripted", temperature=0, **HOW).bind_tools([weather])
    whole = asked.invoke(ASK)
    (call,) = whole.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Oslo"}), whole
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert asked.invoke([HumanMessage(ASK), whole, result]).content == BEFORE


def structured() -> None:
    for method in ("json_schema", "function_calling"):
        asked = ChatOpenAI(model="scripted", temperature=1, seed=3, max_tokens=300, **HOW)  # type: ignore[call-arg]
        found = asked.with_structured_output(Trip, method=method).invoke(ASK)  # type: ignore[arg-type]
        assert isinstance(found, Trip), found


def embeddings() -> None:
    # LangChain counts OpenAI's tokens unless it is told that the model is another one.
    model = OpenAIEmbeddings(model="embedder", check_embedding_ctx_length=False, **HOW)
    assert [len(vector) for vector in model.embed_documents(["a card", "money"])] == [32, 32]
    assert len(model.embed_query("a card")) == 32


async def asynchronous() -> None:
    model = ChatOpenAI(model="scripted", temperature=0, **HOW)
    assert (await model.ainvoke(ASK)).content == SAID
    assert "".join([str(piece.content) async for piece in model.astream(ASK)]) == SAID


for part in (chat, tools, structured, embeddings):
    part()
    print(part.__name__, "good", flush=True)
asyncio.run(asynchronous())
print("asynchronous good")
