"""Twin of `native.text_features` in plain Python: what the features of a text are; the same tests run on both.

A text becomes a sparse row of hashed n-grams and a dense row of form features, in one pass over its UTF-8 bytes. Lone surrogates are
kept as their three bytes, and what lies beyond MAX_BYTES is not read, so that no text takes longer than a few milliseconds.

Bytes are folded: ASCII letters to lower case, digits to "0", everything up to the space (and DEL) to a space. A token is a run of
letters, digits and bytes above 127, or one other byte. Tokens and pairs of tokens are hashed into columns [0, 2^bits), runs of four
folded bytes (spaces in a row count as one) into [2^bits, 2^(bits + 1)); a bit of the hash gives each a sign (Weinberger et al. 2009).
The value of a column is the signed root of its count, and each of the two blocks has length 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

VERSION = 1  # what was learned on features of one version cannot read those of another
MAX_BYTES = 1 << 18
BITS_LEAST, BITS_MOST = 8, 22

FORMS = (
    "log_bytes",
    "log_words",
    "log_lines",
    "log_sentences",
    "digits",
    "capitals",
    "punctuation",
    "beyond_ascii",
    "spaces",
    "word_length",
    "long_words",
    "distinct_words",
    "distinct_pairs",
    "log_questions",
    "numbers",
    "mathematics",
    "log_code",
    "log_backslashes",
    "options",
    "log_option_length",
    "option_spread",
    "numeric_options",
    "log_negations",
    "shouted",
    "log_quotes",
    "log_blanks",
)

_MASK = (1 << 64) - 1
_OFFSET, _PRIME = 0xCBF29CE484222325, 0x100000001B3
_PAIR, _RUN = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03
_SPACE, _DIGIT, _UPPER, _LOWER, _BEYOND, _SIGN = range(6)
_NEGATIONS = frozenset({b"not", b"no", b"except", b"never", b"none", b"neither", b"nor", b"false", b"incorrect", b"least"})
_MATHEMATICS = frozenset(b"=+*/^<>%|~$")
_CODE = frozenset(b"{}[]();_`#@")

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


def extract(texts: Sequence[str], bits: int) -> tuple[Int64, Int32, Float32, Float32]:
    """Features of texts: `indptr` int64[n + 1], `indices` int32[nnz], `values` float32[nnz] of a CSR matrix with 2^(bits + 1) columns,
    a row's columns in the order in which they first occur; and `forms` float32[n, len(FORMS)], zeros for a text without bytes.

    Raises ValueError for `bits` out of [8, 22], TypeError for a text that is no str.
    """
    if not BITS_LEAST <= bits <= BITS_MOST:
        raise ValueError(f"bits must be in [{BITS_LEAST}, {BITS_MOST}]")
    indptr = np.zeros(len(texts) + 1, np.int64)
    indices: list[int] = []
    values: list[float] = []
    forms = np.zeros((len(texts), len(FORMS)), np.float32)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts must be str, got {type(text).__name__}")
        counts, form = _features(text.encode("utf-8", "surrogatepass")[:MAX_BYTES], bits)
        for block in counts:
            total = sum(abs(count) for count in block.values())
            for column, count in block.items():
                if count:
                    indices.append(column)
                    values.append(math.copysign(math.sqrt(abs(count) / total), count))
        forms[i] = form
        indptr[i + 1] = len(indices)
    return indptr, np.array(indices, np.int32), np.array(values, np.float32), forms


def _kind(byte: int) -> int:
    if byte <= 32 or byte == 127:
        return _SPACE
    if byte > 127:
        return _BEYOND
    if 48 <= byte <= 57:
        return _DIGIT
    if 65 <= byte <= 90:
        return _UPPER
    return _LOWER if 97 <= byte <= 122 else _SIGN


def _fold(byte: int) -> int:
    kind = _kind(byte)
    return 32 if kind == _SPACE else 48 if kind == _DIGIT else byte + 32 if kind == _UPPER else byte


def _mix(h: int) -> int:
    """The finisher of splitmix64."""
    h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & _MASK
    return h ^ (h >> 31)


def _features(data: bytes, bits: int) -> tuple[tuple[dict[int, int], dict[int, int]], list[float]]:
    """Signed counts of both blocks by column, and the form features."""
    words: dict[int, int] = {}
    runs: dict[int, int] = {}

    def add(block: dict[int, int], key: int, first: int) -> int:
        h = _mix(key & _MASK)
        column = first + (h & ((1 << bits) - 1))
        block[column] = block.get(column, 0) + (1 if h >> 63 else -1)
        return column

    tokens = _tokens(data)
    singles: set[int] = set()
    pairs: set[int] = set()
    before = 0
    for token in tokens:
        h = _OFFSET
        for byte in token:
            h = ((h ^ _fold(byte)) * _PRIME) & _MASK
        singles.add(add(words, h, 0))
        if before:
            pairs.add(add(words, before * _PAIR + h, 0))
        before = h
    window, length, last = 32, 1, 32
    for byte in (*data, 32) if data else ():
        folded = _fold(byte)
        if folded == 32 and last == 32:
            continue
        window, length, last = ((window << 8) | folded) & 0xFFFFFFFF, length + 1, folded
        if length >= 4:
            add(runs, window * _RUN, 1 << bits)
    return (words, runs), _forms(data, tokens, len(singles), len(pairs)) if data else [0.0] * len(FORMS)


def _tokens(data: bytes) -> list[bytes]:
    tokens: list[bytes] = []
    start = -1
    for i, byte in enumerate(data):
        kind = _kind(byte)
        if kind in (_SPACE, _SIGN):
            if start >= 0:
                tokens.append(data[start:i])
                start = -1
            if kind == _SIGN:
                tokens.append(data[i : i + 1])
        elif start < 0:
            start = i
    if start >= 0:
        tokens.append(data[start:])
    return tokens


def _forms(data: bytes, tokens: list[bytes], singles: int, pairs: int) -> list[float]:
    kinds = [0] * 6
    for byte in data:
        kinds[_kind(byte)] += 1
    words = [token for token in tokens if _kind(token[0]) != _SIGN]
    letters = kinds[_UPPER] + kinds[_LOWER]
    sentences = sum(byte in b".!?" and (i + 1 == len(data) or _kind(data[i + 1]) == _SPACE) for i, byte in enumerate(data))
    options, numeric = _options(data)
    return [
        math.log1p(len(data)),
        math.log1p(len(words)),
        math.log1p(data.count(b"\n")),
        math.log1p(sentences),
        kinds[_DIGIT] / len(data),
        kinds[_UPPER] / max(letters, 1),
        kinds[_SIGN] / len(data),
        kinds[_BEYOND] / len(data),
        kinds[_SPACE] / len(data),
        sum(map(len, words)) / max(len(words), 1) / 10,
        sum(len(word) >= 8 for word in words) / max(len(words), 1),
        singles / max(len(tokens), 1),
        pairs / max(len(tokens) - 1, 1),
        math.log1p(data.count(b"?")),
        sum(all(_kind(byte) == _DIGIT for byte in word) for word in words) / max(len(words), 1),
        sum(byte in _MATHEMATICS for byte in data) / len(data),
        math.log1p(sum(byte in _CODE for byte in data)),
        math.log1p(data.count(b"\\")),
        min(len(options), 10) / 10,
        math.log1p(sum(options) / len(options)) if options else 0.0,
        math.log((1 + max(options)) / (1 + min(options))) if options else 0.0,
        numeric / max(len(options), 1),
        math.log1p(sum(bytes(map(_fold, word)) in _NEGATIONS for word in words)),
        sum(len(word) >= 2 and all(_kind(byte) == _UPPER for byte in word) for word in words) / max(len(words), 1),
        math.log1p(data.count(b'"')),
        math.log1p(data.count(b"__")),
    ]


def _options(data: bytes) -> tuple[list[int], int]:
    """Bytes of each answer option that is offered (a line "A. ..." or "b) ...", up to letter J), and how many begin like a number."""
    lengths: list[int] = []
    numeric = 0
    for line in data.split(b"\n"):
        if len(line) >= 3 and chr(line[0]) in "ABCDEFGHIJabcdefghij" and line[1] in b".)" and line[2] == 32:
            lengths.append(len(line) - 3)
            numeric += len(line) > 3 and (_kind(line[3]) == _DIGIT or line[3] in b"-$+")
    return lengths, numeric
