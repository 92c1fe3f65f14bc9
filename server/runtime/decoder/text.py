"""Tokens to text, one at a time: whole characters only, stop strings cut off, and in sum the text that decoding all tokens gives.

`tokenizers` decodes whole sequences. What its decoders do to one token is known for the usual ones (byte level, SentencePiece with
bytes, Metaspace, WordPiece), so that each token's share is looked up; any other decoder is asked again with a window of tokens.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from server.runtime.decoder.contract import TextStream

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
T = TypeVar("T")


class _Decoding(Protocol):
    """One answer's decoder: tokens in, text that can no longer change out."""

    def add(self, token: int) -> str: ...

    def end(self) -> str: ...

    def follow(self) -> None:
        """Before the first token: what comes is no beginning."""


class TextStreams:
    """Makes the text streams of one model's requests. `tokenizer`: a tokenizers.Tokenizer, which is not changed.

    Special tokens are left out if `skip_special`. Everything here may be used from several threads; a stream by one at a time.
    """

    def __init__(self, tokenizer: Any, skip_special: bool = True) -> None:
        self._decoding = _decoding_of(tokenizer, skip_special)

    def __call__(self, stops: Sequence[str] = (), include_stop: bool = False, *, follows: bool = False) -> Callable[[], TextStream]:
        """A maker of streams, one a candidate. `stops` end the text; they are not part of it unless `include_stop`.

        `follows`: the text goes on from a prompt, so that a first word keeps the blank that a decoder takes off the beginning of a text.
        """
        machine = _StopMachine(stops, include_stop) if stops else None
        make = self._decoding

        def decoding() -> _Decoding:
            made = make()
            if follows:
                made.follow()
            return made

        if machine is None:
            return lambda: _Plain(decoding())
        return lambda: _Stopping(decoding(), machine)


def text_stream(tokenizer: Any, stops: Sequence[str] = (), skip_special: bool = True) -> Callable[[], TextStream]:
    """`TextStreams` for a single request."""
    return TextStreams(tokenizer, skip_special)(stops)


class _Plain:
    """A stream without stop strings."""

    __slots__ = ("_decoding",)

    def __init__(self, decoding: _Decoding) -> None:
        self._decoding = decoding

    def push(self, token: int) -> tuple[str, bool]:
        return self._decoding.add(token), False

    def finish(self) -> str:
        return self._decoding.end()


class _Stopping:
    """A stream that ends at the first stop string to be complete, whatever tokens it straddles."""

    __slots__ = ("_decoding", "_held", "_machine", "_state", "_stopped")

    def __init__(self, decoding: _Decoding, machine: _StopMachine) -> None:
        self._decoding = decoding
        self._machine = machine
        self._state = 0
        self._held = ""  # may be the beginning of a stop string
        self._stopped = False

    def push(self, token: int) -> tuple[str, bool]:
        if self._stopped:
            return "", True
        return self._feed(self._decoding.add(token))

    def finish(self) -> str:
        if self._stopped:
            return ""
        text, stopped = self._feed(self._decoding.end())
        return text if stopped else text + self._held

    def _feed(self, text: str) -> tuple[str, bool]:
        if not text:
            return "", False
        machine = self._machine
        whole = self._held + text
        state = self._state
        for at, character in enumerate(text, len(self._held) + 1):
            state = machine.step(state, character)
            if machine.matched[state]:
                self._stopped = True
                return whole[: at if machine.include else at - machine.matched[state]], True
        self._state = state
        depth = machine.depth[state]
        self._held = whole[len(whole) - depth :] if depth else ""
        return whole[: len(whole) - depth], False


class _StopMachine:
    """All stop strings at once (Aho and Corasick, 1975).

    A state is the longest beginning of a stop string that the text ends with: `depth` its length, which is what must be held back, and
    `matched` the length of the longest stop string that the text ends with, or 0.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        assert all(stops), "an empty stop string is refused before"
        self.include = include
        self.depth, self.matched = [0], [0]
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        for stop in stops:
            state = 0
            for character in stop:
                if character not in self._next[state]:
                    self._next[state][character] = len(self._next)
                    self._next.append({})
                    self.depth.append(self.depth[state] + 1)
                    self.matched.append(0)
                    self._fail.append(0)
                state = self._next[state][character]
            self.matched[state] = len(stop)
        self._link()

    def _link(self) -> None:
        line = list(self._next[0].values())
        for state in line:  # grows: breadth first
            for character, after in self._next[state].items():
                self._fail[after] = self.step(self._fail[state], character)
                self.matched[after] = self.matched[after] or self.matched[self._fail[after]]
                line.append(after)

    def step(self, state: int, character: str) -> int:
        while character not in self._next[state]:
            if not state:
                return 0
            state = self._fail[state]
        return self._next[state][character]


def _decoding_of(tokenizer: Any, skip_special: bool) -> Callable[[], _Decoding]:
    """The cheapest exact way to decode for this tokenizer."""
    steps = _steps(tokenizer)
    tokens = _Tokens(tokenizer, skip_special)
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        shares = _Cache(tokens, lambda token, _: _bytes_of(token))
        return lambda: _ByteLevel(shares)
    if not names:
        spaced = _Cache(tokens, lambda token, first: token if first else " " + token)
        return lambda: _PerToken(spaced)
    if names == ["WordPiece"]:
        pieces = _Cache(tokens, _word_piece(steps[0]["prefix"], steps[0]["cleanup"]))
        return lambda: _PerToken(pieces)
    if names == ["Metaspace"]:
        words = _Cache(tokens, _metaspace(steps[0]["replacement"], steps[0].get("prepend_scheme", "always") != "never"))
        return lambda: _PerToken(words)
    fused = _sentence_piece(steps)
    if fused is not None:
        parts = _Cache(tokens, fused.share)
        return lambda: _ByteFallback(parts, fused.strip, fused.strip_most)
    return lambda: _Window(tokenizer, tokens)


def _steps(tokenizer: Any) -> list[dict[str, Any]]:
    """The decoder's description, as in tokenizer.json, a sequence's steps in order."""
    if tokenizer.decoder is None:
        return []
    described: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    if described["type"] == "Sequence":
        return list(described["decoders"])
    return [described]


class _Tokens:
    """The vocabulary's entries as decoding sees them: None for what it leaves out."""

    def __init__(self, tokenizer: Any, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values() if skip_special else ()
        self._special = frozenset(token.content for token in added if token.special)

    def entry(self, token: int) -> str | None:
        entry: str | None = self._tokenizer.id_to_token(token) if 0 <= token < 2**32 else None
        return None if entry in self._special else entry


class _Cache(Generic[T]):
    """Each token's share of the text, made when it is first met: as the first token of an answer, and as a later one."""

    __slots__ = ("_make", "_tokens", "first", "later")

    def __init__(self, tokens: _Tokens, make: Callable[[str, bool], T]) -> None:
        self._tokens = tokens
        self._make = make
        self.first: dict[int, T | None] = {}
        self.later: dict[int, T | None] = {}

    def get(self, token: int, first: bool) -> T | None:
        shares = self.first if first else self.later
        try:
            return shares[token]
        except KeyError:
            entry = self._tokens.entry(token)
            share = shares[token] = None if entry is None else self._make(entry, first)
            return share


class _ByteLevel:
    """Tokens are bytes of UTF-8; broken sequences become replacement characters, as many as decoding the whole gives."""

    __slots__ = ("_shares", "_utf8")

    def __init__(self, shares: _Cache[bytes]) -> None:
        self._shares = shares
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        share = self._shares.get(token, False)
        return self._utf8.decode(share) if share else ""

    def end(self) -> str:
        return self._utf8.decode(b"", True)

    def follow(self) -> None:
        pass


class _PerToken:
    """Each token has its text; only the first one's differs."""

    __slots__ = ("_begun", "_shares")

    def __init__(self, shares: _Cache[str]) -> None:
        self._shares = shares
        self._begun = False

    def add(self, token: int) -> str:
        share = self._shares.get(token, not self._begun)
        if share is None:
            return ""
        self._begun = True
        return share

    def end(self) -> str:
        return ""

    def follow(self) -> None:
        self._begun = True


class _ByteFallback:
    """Pieces of text, and bytes for what has none.

    `tokenizers` reads a run of bytes as a whole: as text if it is valid UTF-8, else as one replacement character a byte. So a run is
    held until it ends.
    """

    __slots__ = ("_run", "_shares", "_strip", "_strip_left")

    def __init__(self, shares: _Cache[str | int], strip: str, strip_most: int) -> None:
        self._shares = shares
        self._strip = strip
        self._strip_left = strip_most
        self._run = bytearray()

    def add(self, token: int) -> str:
        share = self._shares.get(token, False)
        if share is None:
            return ""
        if isinstance(share, int):
            self._run.append(share)
            return ""
        text = self._ended_run() + share if self._run else share
        return self._stripped(text) if self._strip_left else text

    def end(self) -> str:
        return self._stripped(self._ended_run())

    def follow(self) -> None:
        self._strip_left = 0

    def _ended_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != self._strip:
                self._strip_left = 0
                break
            self._strip_left -= 1
            text = text[1:]
        return text


class _Window:
    """Asks the tokenizer's own decoder, with a few tokens before the new ones so that it treats them as inside a text."""

    __slots__ = ("_begin", "_ids", "_read", "_tokenizer", "_tokens")

    def __init__(self, tokenizer: Any, tokens: _Tokens) -> None:
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._ids: list[int] = []
        self._begin = self._read = 0

    def add(self, token: int) -> str:
        if self._tokens.entry(token) is None:
            return ""
        self._ids.append(token)
        text = self._news()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        del self._ids[: self._begin]
        self._read -= self._begin
        self._begin = 0
        return text

    def end(self) -> str:
        text = self._news()
        self._ids, self._begin, self._read = [], 0, 0
        return text

    def follow(self) -> None:
        """Nothing: what an unknown decoder does at a beginning is unknown."""

    def _news(self) -> str:
        before = self._decode(self._ids[: self._read])
        return self._decode(self._ids)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False)) if ids else ""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes: printable ones stand for themselves, the others for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _bytes_of(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:  # an added token, which is text
        return token.encode()


def _word_piece(prefix: str, cleanup: bool) -> Callable[[str, bool], str]:
    def share(token: str, first: bool) -> str:
        if not first:
            token = token.removeprefix(prefix) if prefix and token.startswith(prefix) else " " + token
        return _cleaned(token) if cleanup else token

    return share


_CLEANUPS = [(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" do not", " don't")]
_CLEANUPS += [(" 's", "'s"), (" 've", "'ve"), (" 're", "'re")]


def _cleaned(token: str) -> str:
    for dirty, clean in _CLEANUPS:
        token = token.replace(dirty, clean)
    return token


def _metaspace(replacement: str, prepended: bool) -> Callable[[str, bool], str]:
    return lambda token, first: token.replace(replacement, "" if first and prepended else " ")


@dataclass(frozen=True, slots=True)
class _Fused:
    """A SentencePiece-like decoder: replacements, bytes, then up to `strip_most` characters `strip` off the beginning."""

    replacements: tuple[tuple[str, str], ...]
    fallback: bool
    strip: str
    strip_most: int

    def share(self, token: str, _first: bool) -> str | int:
        for pattern, content in self.replacements:
            token = token.replace(pattern, content)
        match = _BYTE_TOKEN.match(token) if self.fallback else None
        return int(match.group(1), 16) if match else token


def _sentence_piece(steps: list[dict[str, Any]]) -> _Fused | None:
    """The steps as `_Fused`, where they are Replace*, ByteFallback?, then Fuse and at most one Strip of the beginning; else None."""
    replacements: list[tuple[str, str]] = []
    left = list(steps)
    while left and left[0]["type"] == "Replace":
        pattern = left[0]["pattern"].get("String")
        if not pattern:
            return None
        replacements.append((pattern, left.pop(0)["content"]))
    fallback = bool(left) and left[0]["type"] == "ByteFallback"
    del left[:fallback]
    fuse = bool(left) and left[0]["type"] == "Fuse"
    del left[:fuse]
    strip, most = "", 0
    if fuse and left and left[0]["type"] == "Strip" and not left[0]["stop"]:
        strip, most = left[0]["content"], int(left[0]["start"])
        del left[0]
    return None if left else _Fused(tuple(replacements), fallback, strip, most)
