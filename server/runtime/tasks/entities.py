"""token-classification: named things in a text, grouped as transformers' TokenClassificationPipeline groups them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from server.core import Call, Entity, FloatArray, IntArray, Results, Task
from server.errors import InvalidArgument
from server.runtime.tasks.classification import softmax
from server.runtime.tasks.documents import Document, read_documents, run_documents
from server.runtime.tasks.stages import Account, Parts, check_items
from server.runtime.tokenizers import TextTokenizer

AGGREGATIONS = ("none", "simple", "first", "average", "max")
OUTSIDE = "O"
DEFAULT_STRIDE = 128


@dataclass(slots=True)
class _Piece:
    """A token, a word or a group on its way to an entity. `label` carries its B-/I- until groups are made."""

    label: str
    score: float
    start: int
    end: int


@dataclass(slots=True)
class _Token:
    scores: FloatArray
    start: int
    end: int
    is_subword: bool


async def extract_entities(
    parts: Parts, texts: Sequence[str], *, call: Call, aggregation: str, truncate: bool, stride: int | None
) -> Results[list[Entity]]:
    """Longer texts than the model's limit are read in windows that share `stride` tokens (None: 128, or half a window), or cut."""
    manifest = parts.manifest
    if manifest.task != Task.TOKEN_CLASSIFICATION:
        raise parts.refuse_task("extracting entities", "a model of the task token-classification")
    if aggregation not in AGGREGATIONS:
        raise InvalidArgument(
            f"aggregation_strategy is {aggregation!r}; expected one of {', '.join(AGGREGATIONS)}.", field="aggregation_strategy"
        )
    check_items(texts, "texts")
    room = manifest.max_tokens - parts.tokenizer.added(pair=False)
    if stride is None:
        stride = min(DEFAULT_STRIDE, room // 2)
    if not 0 <= stride < room:
        raise InvalidArgument(f"stride is {stride}; expected 0 to {room - 1} for this model.", field="stride", limit=room - 1)
    account = Account()
    fields = [f"texts[{i}]" for i in range(len(texts))]

    def windows(document: Document) -> list[IntArray]:
        every = document.windows(0, manifest.max_tokens, stride)
        return every[:1] if truncate else every

    documents = await read_documents(parts, texts, fields, windows, account, call=call)

    def work(i: int, document: Document, logits: list[FloatArray]) -> list[Entity]:
        return _entities(parts, texts[i], document, logits, aggregation)

    items = await run_documents(parts, documents, account, work, call=call)
    return parts.results(items, account, [isinstance(one, Document) and one.cut for one in documents])


def _entities(parts: Parts, text: str, document: Document, logits: Sequence[FloatArray], aggregation: str) -> list[Entity]:
    """`logits`: float32[n, labels] a window."""
    labels = parts.manifest.labels
    found: list[_Piece] = []
    for positions, rows in zip(document.positions, logits, strict=True):
        tokens = _tokens(parts.tokenizer, text, document, positions, softmax(rows), aggregation)
        if aggregation in ("none", "simple"):
            pieces = [_piece(labels, token, token.scores) for token in tokens]
        else:
            pieces = [_word(labels, word, aggregation) for word in _words(tokens)]
        if aggregation != "none":
            pieces = _groups(pieces)
        found.extend(piece for piece in pieces if piece.label != OUTSIDE)
    if len(document.positions) > 1:
        found = _without_overlaps(found)
    return [Entity(piece.label, piece.score, text[piece.start : piece.end], piece.start, piece.end) for piece in found]


def _tokens(
    tokenizer: TextTokenizer, text: str, document: Document, positions: IntArray, scores: FloatArray, aggregation: str
) -> list[_Token]:
    tokens = []
    by_word = aggregation not in ("none", "simple")
    for row, position in enumerate(positions.tolist()):
        if document.special[position]:
            continue
        start, end = document.offsets[position]
        subword = False
        if by_word:
            token_id = document.ids[position]
            if token_id == tokenizer.unknown_id:
                subword = False
            elif tokenizer.word_aware:
                # "##ing" is longer than the text that it covers; a word's first piece is not.
                subword = len(tokenizer.token(token_id)) != end - start
            else:
                subword = start > 0 and " " not in text[start - 1 : start + 1]
        tokens.append(_Token(scores[row], start, end, subword))
    return tokens


def _piece(labels: Sequence[str], token: _Token, scores: FloatArray) -> _Piece:
    best = int(scores.argmax())
    return _Piece(labels[best], float(scores[best]), token.start, token.end)


def _words(tokens: Sequence[_Token]) -> list[list[_Token]]:
    words: list[list[_Token]] = []
    for token in tokens:
        if words and token.is_subword:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def _word(labels: Sequence[str], word: list[_Token], aggregation: str) -> _Piece:
    if aggregation == "first":
        scores = word[0].scores
    elif aggregation == "max":
        scores = max(word, key=lambda token: float(token.scores.max())).scores
    else:
        scores = np.mean(np.stack([token.scores for token in word]), axis=0)
    piece = _piece(labels, word[0], scores)
    piece.end = word[-1].end
    return piece


def _tag(label: str) -> tuple[str, str]:
    """(B or I, class). Labels that have neither prefix continue their neighbour."""
    return (label[0], label[2:]) if label.startswith(("B-", "I-")) else ("I", label)


def _groups(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Joins neighbours of one class; a B- always starts anew."""
    groups: list[list[_Piece]] = []
    for piece in pieces:
        begin, tag = _tag(piece.label)
        if groups and begin != "B" and _tag(groups[-1][-1].label)[1] == tag:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return [
        _Piece(group[0].label.split("-", 1)[-1], float(np.mean([piece.score for piece in group])), group[0].start, group[-1].end)
        for group in groups
    ]


def _without_overlaps(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Of entities that overlap (windows do), keeps the longest, then the most certain."""
    kept: list[_Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.start):
        last = kept[-1] if kept else None
        if last is None or not last.start <= piece.start < last.end:
            kept.append(piece)
        elif (piece.end - piece.start, piece.score) > (last.end - last.start, last.score):
            kept[-1] = piece
    return kept
