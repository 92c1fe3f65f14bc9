"""Chat templates: the same prompt as transformers', and a hostile one ends soon."""

from __future__ import annotations

import time
from typing import Any

import pytest

from server.errors import InvalidArgument, ModelRejected
from server.runtime.decoder import chat
from server.runtime.decoder.chat import ChatTemplate
from tests.runtime.decoder.chat_templates import ALL, CHATML, QWEN

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "user", "content": '  Where is <my> card? Größe & "quotes" 日本  '},
    {"role": "assistant", "content": "At home.\n"},
    {"role": "user", "content": "{{ 7 * 7 }} {% raise %} Thanks"},
]
SYSTEM = [{"role": "system", "content": "Be short."}, *TALK]
CALLED = [
    {"role": "user", "content": "Weather in Oslo?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}],
    },
    {"role": "tool", "content": '{"celsius": 3}', "tool_call_id": "1", "name": "weather"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the <weather>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def transformers_says(template: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template([messages], tools=tools, chat_template=template, add_generation_prompt=True, **TOKENS)
    return str(rendered[0])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("messages", [TALK, SYSTEM, CALLED], ids=["talk", "system", "called"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
def test_equal_to_transformers(name: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> None:
    ours = ChatTemplate(ALL[name], TOKENS)
    try:
        expected = transformers_says(ALL[name], messages, tools)
    except Exception as refusal:
        with pytest.raises(InvalidArgument) as caught:
            ours.render(messages, tools or ())
        assert caught.value.metadata["field"] == "chat"
        assert str(refusal).rstrip(".")[:40] in caught.value.message
    else:
        assert ours.render(messages, tools or ()) == expected


def test_knows_whether_tools_are_read() -> None:
    assert ChatTemplate(QWEN, TOKENS).knows_tools
    assert not ChatTemplate(CHATML, TOKENS).knows_tools


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(9999) %}{{ 'x' * 100000 }}{% endfor %}",
        "{{ 'x' * 1000000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ 'x'.ljust(99999999999) }}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception('no') }}",
        "{{ nothing.at.all }}",
        "{{ messages[99].content.strip() }}",
    ],
)
def test_hostile_templates_end_soon(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(InvalidArgument, match="chat template"):
        ChatTemplate(template).render(TALK)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("template", ["{% for %}", "{{ x", "{% unknown %}", "x" * (chat.MAX_SOURCE_BYTES + 1), "{{ (" * 5000])
def test_what_is_no_template_is_rejected(template: str) -> None:
    with pytest.raises(ModelRejected):
        ChatTemplate(template)
