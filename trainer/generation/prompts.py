"""A skill's rows as the tokens that the served student sees and should write: by the server's own prompts, template and tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from server.core import Message, Work
from server.routing.candidates import Brief
from server.routing.prompting import messages_of, plain_prompt
from server.routing.skills import Skill
from server.runtime.decoder.load import read_text_parts
from server.runtime.decoder.text import TextStreams
from server.runtime.repository import ModelFiles
from trainer.curate.rows import Row

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how SentencePiece writes a byte
_MARK = "\U000e0041"  # stands for an answer in a rendered conversation; no template writes it


def work_of(row: Row) -> Work:
    """What the caller sent: a conversation, a pair (which the lake keeps as JSON), or a text."""
    if row.messages:
        return Work(messages=tuple(Message(role, content) for role, content in row.messages))
    if row.text.startswith('{"text": '):
        try:
            value = json.loads(row.text)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and set(value) == {"text", "text_pair"} and all(isinstance(one, str) for one in value.values()):
            return Work(value["text"], value["text_pair"])
    return Work(row.text)


def brief_of(skill: Skill, row: Row) -> Brief:
    """What was asked of the skill with it."""
    return Brief(skill, skill.labels, dict(row.parameters), row.instruction)


class Prompts:
    """One skill over one base. Blocks as long as tokenizing takes."""

    def __init__(self, skill: Skill, files: ModelFiles) -> None:
        """Raises ModelRejected where tokenizer or template cannot be read."""
        decoder = files.manifest.decoder
        assert decoder is not None, "a manifest of form decoder"
        self._skill = skill
        self._reader, self._tokenizer = read_text_parts(files)
        self._streams = TextStreams(self._tokenizer.inner)
        self.limit = files.manifest.max_tokens
        self.stop = self._stop(decoder.stop_token_ids)

    @property
    def chats(self) -> bool:
        """Whether the base has a chat template; without one the same words stand one to a line."""
        return self._reader.chats

    def prompt(self, row: Row) -> list[int]:
        """What the student is given. Raises InvalidArgument where the template does not take the conversation; InputTooLong."""
        return self.of(messages_of(brief_of(self._skill, row), work_of(row)))

    def of(self, messages: Sequence[Message]) -> list[int]:
        """The same, of a whole conversation; errors as `prompt`'s."""
        return self._reader.chat(messages, ()) if self.chats else self._reader.text(plain_prompt(messages))

    def answer(self, text: str) -> list[int]:
        """What it should write: the answer's tokens and the one that ends it. They read as `text` behind a prompt, to the letter."""
        ids = self._tokenizer.ids(text)
        if self.read(ids) != text:
            # Tokenizers that put a space before a text would have the answer begin with one: behind a line break they do not.
            head, joint = self._tokenizer.ids("\n"), self._tokenizer.ids(f"\n{text}")
            inner = joint[len(head) :] if joint[: len(head)] == head else ids
            ids = inner if self.read(inner) == text else ids
        return [*ids, self.stop] if self.stop is not None else ids

    def read(self, ids: Sequence[int]) -> str:
        """Tokens as the server shows them to a caller behind a prompt; the one that ends an answer says nothing."""
        stream = self._streams(follows=True)()
        return "".join(stream.push(one)[0] for one in ids if one != self.stop) + stream.finish()

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text that `read` gives, the one that ends an answer left out."""
        stream = self._streams(follows=True)()
        return [stream.push(one)[0] for one in ids if one != self.stop]

    def vocabulary(self) -> dict[str, int]:
        """Each token by what it adds behind a prompt. Bytes of characters, and special tokens, are left out."""
        inner, make = self._tokenizer.inner, self._streams(follows=True)
        found: dict[str, int] = {}
        for token in range(inner.get_vocab_size()):
            text = make().push(token)[0]
            if text and "\ufffd" not in text and not _BYTE.fullmatch(inner.id_to_token(token) or ""):
                found.setdefault(text, token)
        return found

    def _stop(self, stops: Sequence[int]) -> int | None:
        """The token that ends an assistant's turn: the first stop token that the template writes behind one."""
        if not self.chats or len(stops) < 2:
            return stops[0] if stops else None
        turns = (Message("user", "a"), Message("assistant", _MARK), Message("user", "b"))
        after = self._tokenizer.inner.decode(self._reader.chat(turns, ()), skip_special_tokens=False).partition(_MARK)[2]
        places = {after.find(text): stop for stop in stops if (text := self._tokenizer.token(stop)) in after}
        return places[min(places)] if places else stops[0]
