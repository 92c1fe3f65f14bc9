"""question-answering: spans of a context, chosen as transformers' QuestionAnsweringPipeline chooses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from server.core import Call, FloatArray, IntArray, Results, Span, Task
from server.errors import InputTooLong
from server.runtime.tasks.classification import softmax
from server.runtime.tasks.documents import Document, read_documents, run_documents
from server.runtime.tasks.stages import Account, Parts, check_count, check_items

# The pipeline's window, whatever longer a model may take: shorter windows answer better, and cost less attention.
WINDOW_TOKENS = 384
DEFAULT_STRIDE = 128
# A question that leaves less of the window than this to the context is too long.
MIN_CONTEXT_TOKENS = 8
_IMPOSSIBLE = np.float32(-10000.0)


@dataclass(slots=True, frozen=True)
class AnswerOptions:
    """`doc_stride`: tokens that neighbouring windows share; 0 (or None) for 128, or half a window where that is less."""

    top_k: int = 1
    max_answer_tokens: int = 15
    doc_stride: int | None = DEFAULT_STRIDE
    allow_no_answer: bool = False


async def answer(parts: Parts, inputs: Sequence[tuple[str, str]], options: AnswerOptions, *, call: Call) -> Results[list[Span]]:
    """`inputs`: (question, context). Answers best first, at most `top_k` an item, fewer where the context has fewer."""
    manifest = parts.manifest
    if manifest.task != Task.QUESTION_ANSWERING:
        raise parts.refuse_task("answering questions", "a model of the task question-answering")
    check_items(inputs, "inputs")
    check_count(options.top_k, "top_k", 1)
    check_count(options.max_answer_tokens, "max_answer_tokens", 1)
    check_count(options.doc_stride or 0, "doc_stride")
    limit = min(manifest.max_tokens, WINDOW_TOKENS)

    def windows(document: Document) -> list[IntArray]:
        return _windows(document, limit, options.doc_stride or min(limit // 2, DEFAULT_STRIDE))

    account = Account()
    fields = [f"inputs[{i}]" for i in range(len(inputs))]
    documents = await read_documents(parts, inputs, fields, windows, account, call=call)

    def work(i: int, document: Document, logits: list[FloatArray]) -> list[Span]:
        return _answers(inputs[i][1], document, logits, options)

    items = await run_documents(parts, documents, account, work, call=call)
    return parts.results(items, account)


def _windows(document: Document, limit: int, stride: int) -> list[IntArray]:
    context = int(np.count_nonzero(document.sequence == 1))
    room = limit - (len(document.ids) - context)
    if room < min(MIN_CONTEXT_TOKENS, context):
        tokens = int(np.count_nonzero(document.sequence == 0))
        most = tokens + room - MIN_CONTEXT_TOKENS
        raise InputTooLong(
            f"The question has {tokens} tokens; expected at most {most}, so that its window has room for the context. Shorten it.",
            field=".question",
            tokens=tokens,
            limit=most,
        )
    return document.windows(1, limit, stride if stride < room else room // 2)


def _answers(context: str, document: Document, logits: Sequence[FloatArray], options: AnswerOptions) -> list[Span]:
    """`logits`: float32[n, 2] (start, end) a window. Spans of equal text (whatever the case) are one answer, their scores added."""
    found: dict[str, Span] = {}
    no_answer = 1.0
    for positions, rows in zip(document.positions, logits, strict=True):
        start, end, null = _window_probabilities(document, positions, rows)
        no_answer = min(no_answer, null)
        for first, last, score in _best_spans(start, end, options):
            begin, stop = _characters(document, positions, first, last)
            text = context[begin:stop]
            known = found.get(text.lower())
            if known is None:
                found[text.lower()] = Span(text, score, begin, stop)
            else:
                found[text.lower()] = Span(known.text, known.score + score, known.start, known.end)
    spans = list(found.values())
    if options.allow_no_answer:
        spans.append(Span("", no_answer, 0, 0))
    return sorted(spans, key=lambda span: -span.score)[: options.top_k]


def _window_probabilities(document: Document, positions: IntArray, logits: FloatArray) -> tuple[FloatArray, FloatArray, float]:
    """Of each token to start or end the answer, float32[n]; and of "no answer", which the first token ([CLS]) stands for.

    The softmax is over the context's tokens and [CLS]; [CLS] itself is then ruled out.
    """
    ids = np.asarray(document.ids, dtype=np.int64)[positions]
    candidates = document.sequence[positions] == 1
    if document.sequence[positions[0]] < 0:
        candidates |= ids == ids[0]
    masked = np.where(candidates[:, None], logits, _IMPOSSIBLE).astype(np.float32, copy=False)
    start, end = softmax(masked[:, 0]), softmax(masked[:, 1])
    null = float(start[0] * end[0])
    start[0] = end[0] = 0.0
    start[~candidates] = 0.0
    end[~candidates] = 0.0
    return start, end, null


def _best_spans(start: FloatArray, end: FloatArray, options: AnswerOptions) -> list[tuple[int, int, float]]:
    """(first, last, probability) of the likeliest spans of at most `max_answer_tokens`, best first.

    More than asked for, as many of them may widen to the same words. Only the band of spans that may be is computed: [n, width].
    """
    width = min(options.max_answer_tokens, len(end))
    padded = np.concatenate([end, np.zeros(width - 1, dtype=np.float32)])
    scores = (start[:, None] * np.lib.stride_tricks.sliding_window_view(padded, width)).ravel()
    wanted = min(options.top_k * 2 + 10, len(scores))
    best = np.argpartition(-scores, wanted - 1)[:wanted]
    best = best[np.argsort(-scores[best], kind="stable")]
    return [(i // width, i // width + i % width, float(scores[i])) for i in best.tolist() if scores[i] > 0.0]


def _characters(document: Document, positions: IntArray, first: int, last: int) -> tuple[int, int]:
    """Code points [start, end) in the context of the words that the tokens `first` to `last` of a window stand in."""
    begin, end = int(positions[first]), int(positions[last])
    if document.word_ids[begin] is None or document.word_ids[end] is None:
        return document.offsets[begin][0], document.offsets[end][1]
    # A word that the window cuts through counts as far as the window shows it.
    while first > 0 and _same_word(document, int(positions[first - 1]), begin):
        first -= 1
    while last + 1 < len(positions) and _same_word(document, int(positions[last + 1]), end):
        last += 1
    return document.offsets[int(positions[first])][0], document.offsets[int(positions[last])][1]


def _same_word(document: Document, position: int, of: int) -> bool:
    return bool(document.sequence[position] == document.sequence[of]) and document.word_ids[position] == document.word_ids[of]
