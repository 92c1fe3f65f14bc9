"""Text to token ids: a model's `tokenizer.json`, without the truncation and padding that the file may carry.

Truncation and windows are cut here from the whole encoding, with NumPy, instead of by the Rust object's settings: those are shared,
mutable state, so that two requests that want different limits would race. The cuts are the ones that `tokenizers` makes.

`encode_batch` gives up the GIL while it works, `encode` does not (measured with 0.22): everything goes through the batch calls.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from server.core import IntArray
from server.errors import InputTooLong, InvalidArgument, ModelRejected, UnderstudyError
from server.runtime.engine import Encoded

TextInput = str | tuple[str, str]
# Above this many characters a token of the limit, a text is refused (or cut, where truncation is asked for) before it is tokenized.
CHARACTERS_PER_TOKEN = 64
MAX_FILE_BYTES = 128 * 1024 * 1024


@dataclass(slots=True, frozen=True)
class Tokens:
    """One tokenized input. `positions` are indices into the whole encoding, int64[n]; None where nothing was cut."""

    encoded: Encoded
    encoding: Any  # tokenizers.Encoding
    positions: IntArray | None = None

    @property
    def truncated(self) -> bool:
        return self.positions is not None


class TextTokenizer:
    """A tokenizer.json and one model's token limit. Safe to use from several threads: nothing in it changes after `load`."""

    def __init__(self, tokenizer: Any, *, max_tokens: int, token_types: bool, unknown_id: int | None = None) -> None:
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.token_types = token_types
        self.unknown_id = unknown_id
        self.word_aware = bool(getattr(tokenizer.model, "continuing_subword_prefix", None))
        self.max_characters = CHARACTERS_PER_TOKEN * max_tokens
        self._typed_alone = any(tokenizer.encode("a").type_ids)
        self._added = (tokenizer.num_special_tokens_to_add(False), tokenizer.num_special_tokens_to_add(True))

    @classmethod
    def load(cls, path: Path, *, max_tokens: int, token_types: bool = False) -> TextTokenizer:
        """Reads `path`; raises ModelRejected when it is no tokenizer that works."""
        from tokenizers import Tokenizer

        size = path.stat().st_size if path.is_file() else -1
        if not 0 <= size <= MAX_FILE_BYTES:
            was = "is missing" if size < 0 else f"has {size} bytes"
            raise ModelRejected(f"{path.name} {was}; expected a tokenizer.json of at most {MAX_FILE_BYTES} bytes.", file=path.name)
        raw = path.read_bytes()
        try:
            tokenizer = Tokenizer.from_buffer(raw)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            probe = tokenizer.encode_batch(["a", ("a", "b")])
            limit_left = max_tokens - tokenizer.num_special_tokens_to_add(True)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the Rust code derives from BaseException
            raise ModelRejected(
                f"{path.name} is no tokenizer that works: {str(error)[:300]}. Expected the tokenizer.json of the `tokenizers` library; "
                "save it again with `save_pretrained` of a fast tokenizer.",
                file=path.name,
            ) from None
        if limit_left < 1 or not all(len(encoding.ids) for encoding in probe):
            raise ModelRejected(
                f"{path.name} leaves no room for text within the model's {max_tokens} tokens; check max_tokens in the manifest.",
                file=path.name,
            )
        return cls(tokenizer, max_tokens=max_tokens, token_types=token_types, unknown_id=_unknown_id(tokenizer, raw))

    def added(self, pair: bool) -> int:
        """How many special tokens the template adds."""
        return int(self._added[pair])

    def token(self, token_id: int) -> str:
        """The vocabulary's entry, as it stands there ("##ing")."""
        return self._tokenizer.id_to_token(token_id) or ""

    @property
    def inner(self) -> Any:
        """The `tokenizers.Tokenizer`; nobody changes it."""
        return self._tokenizer

    def special_tokens(self) -> list[str]:
        """Texts of the tokens that are marked as special."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special and token.content]

    def ids(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of one text; with `special`, those that the tokenizer puts around a sequence too. Raises InvalidArgument."""
        try:
            return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the Rust code derives from BaseException
            raise InvalidArgument(f"The model's tokenizer cannot encode the text: {str(error)[:200]}.") from None

    def encode(self, inputs: Sequence[TextInput], *, offsets: bool = False) -> list[Any]:
        """Whole encodings, special tokens included, nothing cut; an UnderstudyError in place of each input that cannot be encoded.

        With `offsets`, in code points; without them (and without word ids) it is a quarter faster.
        """
        encode_batch = self._tokenizer.encode_batch if offsets else self._tokenizer.encode_batch_fast
        try:
            return list(encode_batch(inputs))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the Rust code derives from BaseException
            if len(inputs) == 1:
                return [InvalidArgument(f"The model's tokenizer cannot encode the text: {str(error)[:200]}.")]
        return [self.encode([one], offsets=offsets)[0] for one in inputs]

    def tokens(self, encoding: Any, positions: IntArray | None = None, *, pair: bool = True) -> Tokens:
        """The arrays that an engine takes, of the whole encoding or of some of its positions.

        Types of a text that is no `pair` are left out where the template gives them all 0, which is what None stands for.
        """
        ids = np.array(encoding.ids, dtype=np.int64)
        type_ids = np.array(encoding.type_ids, dtype=np.int64) if self.token_types and (pair or self._typed_alone) else None
        if positions is not None:
            ids = ids[positions]
            type_ids = None if type_ids is None else type_ids[positions]
        return Tokens(Encoded(ids, type_ids), encoding, positions)

    def encode_within(self, inputs: Sequence[TextInput], fields: Sequence[str], cut: str = "") -> list[Tokens | UnderstudyError]:
        """Tokenizes each input to at most `max_tokens`.

        `cut` says what may be cut of an input that is longer: "" nothing (InputTooLong takes its place, naming `fields[i]`), "longest"
        the longer text of a pair first, "first" only the first text.
        """
        results: list[Tokens | UnderstudyError | None] = [None] * len(inputs)
        todo: list[int] = []
        texts: list[TextInput] = []
        for i, one in enumerate(inputs):
            error = self._refuse(one, fields[i], bounded=not cut)
            if error is None:
                todo.append(i)
                texts.append(self._clip(one, self.max_characters) if cut else one)
            else:
                results[i] = error
        for i, encoding in zip(todo, self.encode(texts) if texts else (), strict=True):
            results[i] = self._within(inputs[i], encoding, fields[i], cut)
        return [result for result in results if result is not None]

    def _within(self, one: TextInput, encoding: Any, field: str, cut: str) -> Tokens | UnderstudyError:
        if isinstance(encoding, UnderstudyError):
            encoding.metadata = {**encoding.metadata, "field": field}
            return encoding
        if not cut:
            length = len(encoding)
            if length > self.max_tokens:
                return too_long(field, length, self.max_tokens)
            return self.tokens(encoding, pair=isinstance(one, tuple))
        clipped = any(len(part) > self.max_characters for part in _parts(one))
        characters = self.max_characters
        while clipped and len(encoding) <= self.max_tokens:
            # A very long text of few tokens (blanks, one endless word): take more of it until the limit is reached or the text ends.
            characters *= 4
            encoding = self.encode([self._clip(one, characters)])[0]
            clipped = any(len(part) > characters for part in _parts(one))
        if len(encoding) <= self.max_tokens:
            return self.tokens(encoding)
        try:
            return self.tokens(encoding, truncated_positions(sequence_ids(encoding), self.max_tokens, cut))
        except InputTooLong as error:
            return too_long(field, int(error.metadata["tokens"]), self.max_tokens)

    def _refuse(self, one: TextInput, field: str, *, bounded: bool) -> UnderstudyError | None:
        for part in _parts(one):
            error = check_text(part, field)
            if error is not None:
                return error
            if bounded and len(part) > self.max_characters:
                return InputTooLong(
                    f"{field} has {len(part)} characters; the model takes {self.max_tokens} tokens, at most {self.max_characters} "
                    "characters. Shorten it, split it, or ask for truncation.",
                    field=field,
                    characters=len(part),
                    limit=self.max_tokens,
                )
        return None

    @staticmethod
    def _clip(one: TextInput, characters: int) -> TextInput:
        return (one[0][:characters], one[1][:characters]) if isinstance(one, tuple) else one[:characters]


def check_text(text: object, field: str) -> UnderstudyError | None:
    """The error of a text that no model can take: not a string, blank, or not encodable as UTF-8."""
    if not isinstance(text, str):
        return InvalidArgument(f"{field} is {type(text).__name__}; expected text.", field=field)
    if not text or text.isspace():
        return InvalidArgument(f"{field} is empty; expected at least one character that is not a blank. Leave the item out.", field=field)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return InvalidArgument(
                f"{field} is not valid Unicode at character {error.start}: a lone surrogate; expected text that UTF-8 can carry.",
                field=field,
                character=error.start,
            )
    return None


def too_long(field: str, tokens: int, limit: int) -> InputTooLong:
    return InputTooLong(
        f"{field} has {tokens} tokens; the model takes {limit}. Shorten it, split it, or ask for truncation.",
        field=field,
        tokens=tokens,
        limit=limit,
    )


def sequence_ids(encoding: Any) -> npt.NDArray[np.int8]:
    """int8[n]: 0 for tokens of the first text, 1 of the second, -1 for special tokens."""
    return np.fromiter((-1 if i is None else i for i in encoding.sequence_ids), dtype=np.int8, count=len(encoding))


def truncated_positions(sequences: npt.NDArray[np.int8], limit: int, cut: str) -> IntArray:
    """Positions that stay when an encoding is cut to `limit` tokens; special tokens always stay.

    As `tokenizers` does with direction right and strategy "longest_first" (cut "longest") or "only_first" (cut "first"). Raises
    InputTooLong when what may not be cut fills the limit already.
    """
    first, second = np.flatnonzero(sequences == 0), np.flatnonzero(sequences == 1)
    special = np.flatnonzero(sequences < 0)
    room = limit - len(special)
    if cut == "first" or not len(second):
        if room - len(second) < 1:
            raise InputTooLong("the text that may not be cut is too long", tokens=len(sequences), limit=limit)
        first = first[: room - len(second)]
    else:
        keep_first, keep_second = _longest_first(len(first), len(second), room)
        first, second = first[:keep_first], second[:keep_second]
    return np.sort(np.concatenate([special, first, second]))


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    short, long = sorted((first, second))
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return (short, long) if first <= second else (long, short)


def window_positions(sequences: npt.NDArray[np.int8], target: int, limit: int, stride: int) -> list[IntArray]:
    """Windows of at most `limit` tokens over the text `target` (0 or 1); everything else is repeated in each of them.

    Neighbouring windows share `stride` tokens. As `tokenizers` makes overflowing encodings. `stride` must be below the room that
    `limit` leaves for the text.
    """
    content, rest = np.flatnonzero(sequences == target), np.flatnonzero(sequences != target)
    room = limit - len(rest)
    assert 0 <= stride < room, (stride, room)
    windows = []
    for start in range(0, max(len(content), 1), room - stride):
        windows.append(np.sort(np.concatenate([rest, content[start : start + room]])))
        if start + room >= len(content):
            break
    return windows


def _parts(one: TextInput) -> tuple[str, ...]:
    return one if isinstance(one, tuple) else (one,)


def _unknown_id(tokenizer: Any, raw: bytes) -> int | None:
    unknown = getattr(tokenizer.model, "unk_token", None)
    if unknown is not None:
        found = tokenizer.token_to_id(unknown)
        return None if found is None else int(found)
    # Unigram models keep a number, which the binding does not show.
    match = re.search(rb'"unk_id"\s*:\s*(\d{1,9})', raw)
    return int(match.group(1)) if match else None
