"""Tool calls are found in an answer however it is cut into pieces; what only looks like one stays text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.core import ToolCall
from server.runtime.decoder.tools import ToolReader

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Größe"}}\n</tool_call>'
SECOND = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
NAMES = ("weather", "time")


def read(text: str, cuts: list[int]) -> tuple[str, list[ToolCall]]:
    reader = ToolReader(NAMES)
    said = ""
    at = 0
    for cut in [*sorted(cuts), len(text)]:
        said += reader.push(text[at:cut])
        at = max(at, cut)
    rest, calls = reader.finish()
    return said + rest, calls


@pytest.mark.parametrize(
    ("text", "said", "names"),
    [
        (CALL, "", ["weather"]),
        (f"Let me see.\n{CALL}\n{SECOND}", "Let me see.\n", ["weather", "time"]),
        ('{"name": "time", "parameters": {"zone": 1}}', "", ["time"]),
        ('\n [{"name": "time"}, {"function": {"name": "weather", "arguments": "{}"}}]', "", ["time", "weather"]),
        (CALL[: -len("</tool_call>")], "", ["weather"]),
        ("plain words <tool", "plain words <tool", []),
        ('{"name": "unknown", "arguments": {}}', '{"name": "unknown", "arguments": {}}', []),
        ("{not json", "{not json", []),
        ("a <tool_call>broken</tool_call>", "a <tool_call>broken</tool_call>", []),
        (f"{CALL} and so on", f"{CALL} and so on", []),
        ('{"name": "time", "arguments": [1]}', '{"name": "time", "arguments": [1]}', []),
        ("[" * 3000, "[" * 3000, []),
        ("", "", []),
    ],
)
@given(cuts=st.lists(st.integers(0, 120), max_size=8))
def test_any_cut(text: str, said: str, names: list[str], cuts: list[int]) -> None:
    got, calls = read(text, [min(cut, len(text)) for cut in cuts])
    assert got == said
    assert [call.name for call in calls] == names
    for call in calls:
        assert isinstance(json.loads(call.arguments), dict)
    assert len({call.id for call in calls}) == len(calls)


@given(st.text(alphabet="<tol_ca>x ", max_size=40))
def test_text_without_a_call_is_passed_on_as_it_comes(text: str) -> None:
    reader = ToolReader(NAMES)
    said = ""
    for character in text:
        said += reader.push(character)
    if "<tool_call>" not in text and text.strip():
        assert len(text) - len(said) < len("<tool_call>")
    assert said + reader.finish()[0] == text
