"""An answer that must be a call: its form names the tools, and holds their schemas with references that still point home."""

from __future__ import annotations

import json

import jsonschema
import pytest

from server.core import Tool
from server.errors import InvalidArgument
from server.runtime.decoder.tools import ToolReader, forced_call

PLACE = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"], "additionalProperties": False}
NESTED = {"$defs": {"Place": PLACE}, "type": "object", "properties": {"to": {"$ref": "#/$defs/Place"}}, "required": ["to"]}
TREE = {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}, "additionalProperties": False}
TOOLS = [Tool("trip", parameters=NESTED), Tool("tree", parameters=TREE), Tool("now")]
CALLS = [
    ("trip", {"to": {"city": "Oslo"}}, True),
    ("trip", {"to": {"city": "Paris"}}, False),
    ("trip", {}, False),
    ("tree", {"children": [{"children": []}, {}]}, True),
    ("tree", {"children": [{"leaves": []}]}, False),
    ("now", {}, True),
    ("later", {}, False),
]


@pytest.mark.parametrize(("name", "arguments", "good"), CALLS, ids=[f"{i}-{one[0]}" for i, one in enumerate(CALLS)])
def test_the_form_takes_good_calls_alone(name: str, arguments: dict[str, object], good: bool) -> None:
    form = forced_call(TOOLS, "required")
    assert form.kind == "json_schema"
    call = {"name": name, "arguments": arguments}
    assert jsonschema.Draft202012Validator(json.loads(form.source)).is_valid(call) is good
    if good:  # and what it takes is read as a call
        reader = ToolReader(tool.name for tool in TOOLS)
        assert reader.push(json.dumps(call)) == ""
        assert [(one.name, json.loads(one.arguments)) for one in reader.finish()[1]] == [(name, arguments)]


def test_a_named_tool_is_the_only_one() -> None:
    valid = jsonschema.Draft202012Validator(json.loads(forced_call(TOOLS, "now").source)).is_valid
    assert valid({"name": "now", "arguments": {}}) and not valid({"name": "trip", "arguments": {"to": {"city": "Oslo"}}})
    with pytest.raises(InvalidArgument, match="'later', which is no tool"):
        forced_call(TOOLS, "later")
