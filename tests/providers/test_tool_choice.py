"""Whether tools are called, in each vendor's words."""

from __future__ import annotations

from typing import Any

import pytest

from server.core import Message, Tool
from server.providers.anthropic import AnthropicWire
from server.providers.base import Prompt
from server.providers.openai import OpenAIWire
from server.providers.presets import presets

TOOL = Tool("weather", parameters={"type": "object"})
NAMED_BY_OPENAI = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    ("choice", "openai", "anthropic"),
    [
        ("", None, None),
        ("none", "none", {"type": "none"}),
        ("required", "required", {"type": "any"}),
        ("weather", NAMED_BY_OPENAI, {"type": "tool", "name": "weather"}),
    ],
)
def test_a_choice_is_translated(choice: str, openai: Any, anthropic: Any) -> None:
    prompt = Prompt((Message("user", "hello"),), 9, tools=(TOOL,), tool_choice=choice)
    assert OpenAIWire(presets()["openai"]).body("m", prompt, stream=False).get("tool_choice") == openai
    assert AnthropicWire(presets()["anthropic"]).body("m", prompt, stream=False).get("tool_choice") == anthropic
