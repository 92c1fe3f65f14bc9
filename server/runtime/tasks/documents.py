"""Texts with offsets, read in windows: what entities and answers share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from server.core import Call, FloatArray, IntArray
from server.errors import InputTooLong, RequestTooLarge, UnderstudyError
from server.runtime.engine import Encoded
from server.runtime.tasks.stages import INLINE_CHARACTERS, Account, Parts, characters, check_call, off_loop, run
from server.runtime.tokenizers import TextInput, TextTokenizer, check_text, sequence_ids, window_positions

# A document of more windows is a job for its sender to split: it would hold the model for minutes.
MAX_WINDOWS = 256
# The same for all documents of a call: what one call may make the server hold in memory at once.
MAX_CALL_WINDOWS = 8192
MAX_CALL_DOCUMENTS = 4  # characters of a call, in documents of the greatest length
# Turning logits into spans takes some microseconds a token, in Python: more tokens than this go to a thread.
LIGHT_TOKENS = 512
T = TypeVar("T")


@dataclass(slots=True)
class Document:
    """A whole encoding, and the windows of it that run. `positions[w]` are a window's indices into the whole, int64[n]."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    word_ids: list[int | None]
    sequence: npt.NDArray[np.int8]  # 0 first text, 1 second, -1 special tokens
    special: list[int]
    positions: list[IntArray] = field(default_factory=list)
    sequences: list[Encoded] = field(default_factory=list)

    @classmethod
    def of(cls, encoding: Any) -> Document:
        return cls(encoding.ids, encoding.offsets, encoding.word_ids, sequence_ids(encoding), encoding.special_tokens_mask)

    @property
    def cut(self) -> bool:
        """Whether no window holds the last token of the text."""
        return bool(self.positions) and len(self.positions) == 1 and len(self.positions[0]) < len(self.ids)

    def windows(self, target: int, limit: int, stride: int) -> list[IntArray]:
        if len(self.ids) <= limit:
            return [np.arange(len(self.ids), dtype=np.int64)]
        return window_positions(self.sequence, target, limit, stride)


async def read_documents(
    parts: Parts,
    inputs: Sequence[TextInput],
    fields: Sequence[str],
    windows: Callable[[Document], list[IntArray]],
    account: Account,
    *,
    call: Call,
) -> list[Document | UnderstudyError]:
    """Tokenizes with offsets and cuts each document with `windows`, which may raise InputTooLong for it.

    `fields[i]` names an input; the parts of a pair are `fields[i]` + ".question" and ".context".
    """
    call.stage = "tokenize"
    started = time.perf_counter()
    longest = _longest(parts.tokenizer)
    # A document that is too long by itself gets an error of its own.
    total, most = sum(size for one in inputs if (size := characters([one])) <= longest), MAX_CALL_DOCUMENTS * longest
    if total > most:
        message = f"the call has {total} characters; expected at most {most}. Send fewer documents in one call."
        raise RequestTooLarge(message, field=fields[0].partition("[")[0], characters=total, limit=most)
    light = characters(inputs) <= INLINE_CHARACTERS
    documents = await off_loop(parts, light, _read, parts.tokenizer, inputs, fields, windows)
    account.timings.tokenize += time.perf_counter() - started
    check_call(call, "tokenize")
    count = sum(len(one.sequences) for one in documents if isinstance(one, Document))
    if count > MAX_CALL_WINDOWS:
        message = f"the call's documents make {count} windows; expected at most {MAX_CALL_WINDOWS}. Send fewer documents in one call."
        raise RequestTooLarge(message, field=fields[0].partition("[")[0], windows=count, limit=MAX_CALL_WINDOWS)
    return documents


async def run_documents(
    parts: Parts,
    documents: Sequence[Document | UnderstudyError],
    account: Account,
    work: Callable[[int, Document, list[FloatArray]], T],
    *,
    call: Call,
) -> list[T | Exception]:
    """Runs every window, and gives `work(index, document, rows of its windows)` for each document that did not fail."""
    sequences = [one for document in documents if isinstance(document, Document) for one in document.sequences]
    rows = iter(await run(parts, sequences, account, call=call) if sequences else ())

    def settle() -> list[T | Exception]:
        items: list[T | Exception] = []
        for i, document in enumerate(documents):
            if isinstance(document, UnderstudyError):
                items.append(document)
                continue
            own = [next(rows) for _ in document.sequences]
            failed = next((row for row in own if isinstance(row, Exception)), None)
            good = [row for row in own if not isinstance(row, Exception)]
            items.append(work(i, document, good) if failed is None else failed)
        return items

    call.stage = "post"
    started = time.perf_counter()
    items = await off_loop(parts, sum(len(one.ids) for one in sequences) <= LIGHT_TOKENS, settle)
    account.timings.post += time.perf_counter() - started
    return items


def _read(
    tokenizer: TextTokenizer, inputs: Sequence[TextInput], fields: Sequence[str], windows: Callable[[Document], list[IntArray]]
) -> list[Document | UnderstudyError]:
    results: list[Document | UnderstudyError] = []
    refused = [_refuse(tokenizer, one, field_name) for one, field_name in zip(inputs, fields, strict=True)]
    good = [one for one, error in zip(inputs, refused, strict=True) if error is None]
    encodings = iter(tokenizer.encode(good, offsets=True) if good else ())
    for error, field_name in zip(refused, fields, strict=True):
        results.append(error if error is not None else _cut(tokenizer, next(encodings), field_name, windows))
    return results


def _cut(
    tokenizer: TextTokenizer, encoding: Any, field_name: str, windows: Callable[[Document], list[IntArray]]
) -> Document | UnderstudyError:
    if isinstance(encoding, UnderstudyError):
        encoding.metadata = {**encoding.metadata, "field": field_name}
        return encoding
    document = Document.of(encoding)
    try:
        document.positions = windows(document)
    except InputTooLong as error:
        error.metadata = {**error.metadata, "field": f"{field_name}{error.metadata.get('field', '')}"}
        return error
    if len(document.positions) > MAX_WINDOWS:
        return InputTooLong(
            f"{field_name} has {len(document.ids)} tokens, in {len(document.positions)} windows; expected at most {MAX_WINDOWS}. Split it.",
            field=field_name,
            tokens=len(document.ids),
            limit=MAX_WINDOWS * tokenizer.max_tokens,
        )
    whole = tokenizer.tokens(encoding).encoded
    document.sequences = [
        Encoded(whole.ids[positions], None if whole.type_ids is None else whole.type_ids[positions]) for positions in document.positions
    ]
    return document


def _longest(tokenizer: TextTokenizer) -> int:
    """Characters of a document that may still fit into its windows."""
    return MAX_WINDOWS * tokenizer.max_characters // 8


def _refuse(tokenizer: TextTokenizer, one: TextInput, field_name: str) -> UnderstudyError | None:
    names = ((one[0], f"{field_name}.question"), (one[1], f"{field_name}.context")) if isinstance(one, tuple) else ((one, field_name),)
    limit = _longest(tokenizer)
    for text, name in names:
        error = check_text(text, name)
        if error is not None:
            return error
        if len(text) > limit:
            message = f"{name} has {len(text)} characters; expected at most {limit}. Split it."
            return InputTooLong(message, field=name, characters=len(text), limit=limit)
    return None
