"""Prompts and conversations to token ids, as transformers makes them, with one difference that keeps conversations safe.

Where the words of a message spell a special token ("<|im_end|>"), transformers lets it act as one; here it stays text, so that nobody ends
his own turn and speaks as somebody else. In a raw prompt, which its writer formats himself, special tokens act.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from server.core import Message, Tool
from server.errors import InputTooLong, InvalidArgument, ModelRejected
from server.runtime.decoder.chat import ChatTemplate
from server.runtime.decoder.tools import template_messages, template_tools
from server.runtime.tokenizers import TextTokenizer

# Stands for the special token number i while a template is rendered: a pair of private-use characters, which no template looks at.
_FIRST = 0xF0000
_PLACEHOLDER = re.compile("\U000ffffd([\U000f0000-\U000fffff])")


class PromptReader:
    """One model's tokenizer and template. Safe to use from several threads; its methods block for as long as tokenizing takes."""

    def __init__(self, tokenizer: TextTokenizer, template: ChatTemplate | None, *, model: str, bos_token_id: int | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._model = model
        self._bos = bos_token_id
        self._special = sorted(tokenizer.special_tokens(), key=len, reverse=True)
        try:
            self._find = re.compile(_any_of(self._special)) if self._special else None
        except RecursionError:
            raise ModelRejected(f"the special tokens of model {model!r} nest too deep; expected a few short words.", model=model) from None

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return self._template is not None

    def text(self, prompt: str) -> list[int]:
        """Tokens of a prompt, with those that the tokenizer puts around a sequence, and one at most to begin it."""
        self._check_length(len(prompt), "prompt")
        ids = self._tokenizer.ids(prompt, special=True) if prompt else self._tokenizer.ids("", special=True)
        if len(ids) > 1 and ids[0] == ids[1] == self._bos:
            del ids[0]
        if not ids:
            raise InvalidArgument("prompt is empty, and the model has no token to begin with; expected some text.", field="prompt")
        return ids

    def chat(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        """Tokens of a conversation, written by the model's template up to where the assistant speaks."""
        template = self._template
        if template is None:
            text = f"model {self._model!r} has no chat template; expected a prompt. Send the text in `prompt`, formatted by yourself."
            raise InvalidArgument(text, field="chat")
        if tools and not template.knows_tools:
            text = f"the chat template of model {self._model!r} knows no tools; expected none. Describe them in a system message."
            raise InvalidArgument(text, field="tools")
        said = sum(len(message.content) + sum(len(call.arguments) for call in message.tool_calls) for message in messages)
        self._check_length(said, "chat")
        safe = [self._guarded(message) for message in template_messages(messages)]
        prompt = template.render(safe, self._guarded(template_tools(tools)))
        ids: list[int] = []
        at = 0
        for match in _PLACEHOLDER.finditer(prompt):
            number = ord(match[1]) - _FIRST
            if number < len(self._special):
                ids += self._tokenizer.ids(prompt[at : match.start()])
                ids += self._spelled(self._special[number])
                at = match.end()
        return ids + self._tokenizer.ids(prompt[at:])

    def _guarded(self, value: Any) -> Any:
        """`value` with a placeholder for each special token that its texts spell."""
        if self._find is None:
            return value
        if isinstance(value, str):
            return self._find.sub(lambda match: f"\U000ffffd{chr(_FIRST + self._special.index(match[0]))}", value)
        if isinstance(value, Mapping):
            return {self._guarded(key): self._guarded(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._guarded(item) for item in value]
        return value

    def _spelled(self, token: str) -> list[int]:
        """A special token's text as plain tokens: in two parts, each of which is none."""
        parts = (token[:1], token[1:])
        if any(part in self._special for part in parts):
            return []
        return [one for part in parts if part for one in self._tokenizer.ids(part)]

    def _check_length(self, characters: int, field: str) -> None:
        """Far too long texts are refused before they cost the time to tokenize them."""
        if characters > self._tokenizer.max_characters:
            raise InputTooLong(
                f"{field} has {characters} characters; the model takes {self._tokenizer.max_tokens} tokens, at most "
                f"{self._tokenizer.max_characters} characters. Shorten it.",
                field=field,
                characters=characters,
                limit=self._tokenizer.max_tokens,
            )


def _any_of(words: Sequence[str]) -> str:
    """A pattern of the longest of `words` at a place. A thousand alternatives side by side would be tried one by one at every "<"."""
    tree: dict[str, Any] = {}
    for word in words:
        node = tree
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}

    def pattern(node: dict[str, Any]) -> str:
        chain = ""
        while len(node) == 1 and "" not in node:
            ((character, node),) = node.items()
            chain += re.escape(character)
        parts = [re.escape(character) + pattern(below) for character, below in node.items() if character]
        if not parts:
            return chain
        return f"{chain}(?:{'|'.join(parts)}){'?' if '' in node else ''}"

    return pattern(tree)


def special_names(config: Mapping[str, Any], tokenizer: TextTokenizer, bos: int | None, stops: Sequence[int]) -> dict[str, str]:
    """Special tokens by the names that chat templates use: from tokenizer_config.json, else from the manifest's ids."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if name.endswith("_token"):
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str):
                found[name] = text
    if bos is not None:
        found.setdefault("bos_token", tokenizer.token(bos))
    if stops:
        found.setdefault("eos_token", tokenizer.token(stops[0]))
    return found


def read_config(data: bytes) -> dict[str, Any]:
    """tokenizer_config.json as a table; empty where it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
