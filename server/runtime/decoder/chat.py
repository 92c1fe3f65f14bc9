"""A model's own chat template: messages and tools to the text of a prompt, as transformers' `apply_chat_template` writes it.

Templates are Jinja programs that come with a model, so they run in Jinja's sandbox with bounds of our own: on time, loop turns, output,
and the sizes of what operators and methods make.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.errors import InvalidArgument, ModelRejected

MAX_SOURCE_BYTES = 256 * 1024
MAX_OUTPUT_CHARACTERS = 16 * 1024 * 1024
MAX_TURNS = 1_000_000  # of all loops and macros of one rendering
MAX_SECONDS = 2.0
_MAX_NUMBER = 1_000_000  # of a repetition, a width, a power: above it, one operation may fill the memory
_TURNS_A_LOOK = 64


class ChatTemplate:
    """One compiled template. Safe to use from several threads.

    `knows_tools`: the template reads `tools`, so that they reach the model.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None) -> None:
        """`tokens`: special tokens by the names that templates use: bos_token, eos_token, ... Raises ModelRejected."""
        if len(source.encode("utf-8", "replace")) > MAX_SOURCE_BYTES:
            raise ModelRejected(f"the chat template has more than {MAX_SOURCE_BYTES} bytes; expected a template of a few kilobytes.")
        self._tokens = dict(tokens or {})
        self._environment = _Environment()
        try:
            tree = self._environment.parse(source)
            self.knows_tools = "tools" in meta.find_undeclared_variables(tree)
            _count_turns(tree)
            self._template = self._environment.from_string(tree)
        except (TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
            raise ModelRejected(f"the chat template is none that Jinja reads: {_short(error)}.") from error

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt, up to where the assistant begins to speak. Blocks: for long conversations call it in a thread.

        `messages` and `tools` have the forms that transformers documents. Raises InvalidArgument (field "chat") where the template
        refuses the messages or passes its bounds.
        """
        budget = self._environment.begin()
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(
                messages=list(messages), tools=list(tools) or None, documents=None, add_generation_prompt=True, **self._tokens
            ):
                size += len(part)
                if size > MAX_OUTPUT_CHARACTERS:
                    raise SecurityError(f"it writes more than {MAX_OUTPUT_CHARACTERS} characters")
                budget.look()
                parts.append(part)
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError, MemoryError) as error:
            message = f"the model's chat template does not take this conversation: {_short(error)}. Check the roles and their order."
            raise InvalidArgument(message, field="chat") from error
        return "".join(parts)


class _Budget:
    """What one rendering may still use."""

    __slots__ = ("_end", "_turns")

    def __init__(self) -> None:
        self._end = time.monotonic() + MAX_SECONDS
        self._turns = 0

    def turn(self) -> None:
        self._turns += 1
        if self._turns % _TURNS_A_LOOK == 0:
            self.look()

    def look(self) -> None:
        if self._turns > MAX_TURNS:
            raise SecurityError(f"its loops take more than {MAX_TURNS} turns")
        if time.monotonic() > self._end:
            raise SecurityError(f"it takes more than {MAX_SECONDS} s")


class _Environment(ImmutableSandboxedEnvironment):
    """As transformers sets it up, and bounded."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = _strftime_now
        self._now = threading.local()  # the budget of the rendering that runs on this thread

    def begin(self) -> _Budget:
        budget = self._now.budget = _Budget()
        return budget

    def turn(self) -> None:
        """Called by every loop's body and every macro; see `_count_turns`."""
        self._now.budget.turn()

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for one, other in ((left, right), (right, left)):
            if operator == "**" and (_size(one) > _MAX_NUMBER or _size(other) > 64):
                raise SecurityError("a power is too large")
            if operator == "*" and hasattr(one, "__len__") and len(one) * max(_size(other), 0) > _MAX_NUMBER:
                raise SecurityError("a repetition is too large")
            if operator == "*" and _size(one) > 1 << 64:
                raise SecurityError("a product is too large")
            if operator == "+" and hasattr(one, "__len__") and len(one) > MAX_OUTPUT_CHARACTERS:
                raise SecurityError("a sum is too large")
        if operator == "%" and isinstance(left, str):
            raise SecurityError("formatting with % is not offered")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if any(_size(value) > _MAX_NUMBER for value in (*args, *kwargs.values())):
            raise SecurityError("a number is too large")
        return super().call(context, function, *args, **kwargs)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it stands for its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _count_turns(tree: nodes.Template) -> None:
    """Every loop's body and every macro first calls `_Environment.turn`: nothing else in Jinja can repeat itself."""
    repeating: tuple[type[Any], ...] = (nodes.For, nodes.Macro, nodes.CallBlock)
    for kind in repeating:
        for node in list(tree.find_all(kind)):
            call = nodes.Call(nodes.EnvironmentAttribute("turn"), [], [], None, None, lineno=node.lineno)
            node.body.insert(0, nodes.ExprStmt(call, lineno=node.lineno))
    assert tree.environment is not None, "parsed by an environment"
    tree.set_environment(tree.environment)


def _size(value: object) -> int:
    return abs(value) if isinstance(value, int) else int(min(abs(value), 1e18)) if isinstance(value, float) and value == value else 0


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """As transformers': Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: object) -> None:
    raise TemplateError(str(message)[:500])


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__).rstrip(".")[:300]
