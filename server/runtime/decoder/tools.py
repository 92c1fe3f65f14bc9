"""Tool calls: how conversations carry them into a chat template, and how they are found in an answer while it is written.

Two forms are read: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as often as it stands there, and an answer that is nothing
but such a JSON object or a list of them (with "parameters" for "arguments" too, as Llama writes it).
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from server.core import Format, Message, Tool, ToolCall
from server.errors import InvalidArgument

_MARK = "<tool_call>"
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_ROLES = ("system", "developer", "user", "assistant", "tool")


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as transformers' chat templates take them. Raises InvalidArgument naming the message."""
    if not messages:
        raise InvalidArgument("chat.messages is empty; expected at least one message.", field="chat.messages")
    return [_message(message, f"chat.messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Message, field: str) -> dict[str, Any]:
    if message.role not in _ROLES:
        text = f"{field}.role is {message.role[:40]!r}; expected one of {', '.join(_ROLES)}."
        raise InvalidArgument(text, field=f"{field}.role")
    if message.tool_calls and message.role != "assistant":
        raise InvalidArgument(f"{field} is of role {message.role} and has tool_calls; only assistant may.", field=f"{field}.tool_calls")
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        found["tool_calls"] = [_call(call, f"{field}.tool_calls[{index}]") for index, call in enumerate(message.tool_calls)]
    if message.tool_call_id:
        found["tool_call_id"] = message.tool_call_id
    if message.name:
        found["name"] = message.name
    return found


def _call(call: ToolCall, field: str) -> dict[str, Any]:
    if not call.name:
        raise InvalidArgument(f"{field}.name is empty; expected the name of a tool.", field=f"{field}.name")
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError) as error:
        message = f"{field}.arguments is no JSON: {str(error)[:100]}; expected a JSON object as text."
        raise InvalidArgument(message, field=f"{field}.arguments") from error
    found: dict[str, Any] = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    return {"id": call.id, **found} if call.id else found


def template_tools(tools: Iterable[Tool]) -> list[dict[str, Any]]:
    """Tools as OpenAI and transformers describe them."""
    return [
        {"type": "function", "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters}}
        for tool in tools
    ]


def forced_call(tools: Sequence[Tool], choice: str) -> Format:
    """The form of an answer that is one call: of any tool, or of the one that `choice` names, with arguments that its schema describes.

    Raises InvalidArgument where there is no such tool.
    """
    allowed = [tool for tool in tools if choice in ("required", tool.name)]
    if not allowed:
        known = ", ".join(repr(tool.name) for tool in tools[:10]) or "none"
        raise InvalidArgument(f"tool_choice is {choice[:64]!r}, which is no tool of the request; it has {known}.", field="tool_choice")
    schemas, calls = {}, []
    for index, tool in enumerate(allowed):
        # A schema's own references begin at its root, which has moved.
        schemas[f"tool{index}"] = _moved(tool.parameters or {"type": "object"}, f"#/$defs/tool{index}")
        properties = {"name": {"const": tool.name}, "arguments": {"$ref": f"#/$defs/tool{index}"}}
        calls.append({"type": "object", "properties": properties, "required": ["name", "arguments"], "additionalProperties": False})
    return Format("json_schema", json.dumps({"$defs": schemas, "anyOf": calls}))


def _moved(schema: Any, root: str) -> Any:
    if isinstance(schema, dict):
        return {
            key: root + value[1:] if key == "$ref" and isinstance(value, str) and value.startswith("#") else _moved(value, root)
            for key, value in schema.items()
        }
    return [_moved(item, root) for item in schema] if isinstance(schema, list) else schema


class ToolReader:
    """Splits one answer into its text and the tool calls at its end, piece by piece. Holds back what may be the beginning of a call."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._held = ""
        self._begun = False  # something but blanks was passed on, so that the answer is no plain JSON
        self._holding = False  # a call has begun; all that follows belongs to it

    def push(self, text: str) -> str:
        """The part of the answer that is certainly no call."""
        self._held += text
        if self._holding:
            return ""
        if not self._begun:
            start = self._held.lstrip()
            if not start:
                return ""
            if start[0] in "{[":
                self._holding = True
                return ""
            self._begun = True
        at = self._held.find(_MARK)
        if at >= 0:
            self._holding = True
        else:
            at = len(self._held) - _overlap(self._held)
        out, self._held = self._held[:at], self._held[at:]
        return out

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest of the text, and the calls; what only looked like a call is text."""
        rest, self._held = self._held, ""
        calls = self._read(rest) if self._holding else None
        return ("", calls) if calls else (rest, [])

    def _read(self, text: str) -> list[ToolCall] | None:
        documents = _CALL.findall(text) if _MARK in text else [text]
        if _MARK in text and _CALL.sub("", text).strip():
            return None
        calls: list[ToolCall] = []
        for document in documents:
            try:
                value = json.loads(document)
            except (ValueError, RecursionError):
                return None
            for one in value if isinstance(value, list) else [value]:
                call = self._of(one)
                if call is None:
                    return None
                calls.append(call)
        return calls or None

    def _of(self, value: object) -> ToolCall | None:
        if not isinstance(value, dict):
            return None
        value = value.get("function", value) if isinstance(value.get("function"), dict) else value
        name = value.get("name")
        arguments = value.get("arguments", value.get("parameters", {}))
        if not isinstance(name, str) or name not in self._names:
            return None
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                return None
        if not isinstance(arguments, dict):
            return None
        return ToolCall(f"call_{uuid.uuid4().hex[:16]}", name, json.dumps(arguments, ensure_ascii=False))


def _overlap(text: str) -> int:
    """Length of the longest end of `text` that begins the mark."""
    for size in range(min(len(_MARK) - 1, len(text)), 0, -1):
        if text.endswith(_MARK[:size]):
            return size
    return 0
