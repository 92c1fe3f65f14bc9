"""text-ranking: how well documents fit a query, by a cross-encoder or by the cosine of two embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from server.core import Call, FloatArray, Results, Task
from server.runtime.tasks.classification import sigmoid, softmax
from server.runtime.tasks.embedding import EmbedOptions, prefixed, vectors
from server.runtime.tasks.stages import Account, Parts, check_count, check_items, run_items, settle, tokenize
from server.runtime.tokenizers import TextInput, check_text

LIGHT_ROWS = 4096


@dataclass(slots=True, frozen=True)
class Ranked:
    """A document's place: its index in the request, and its relevance in [0, 1] (cross-encoders) or [-1, 1] (cosine)."""

    index: int
    score: float
    truncated: bool = False


async def rerank(parts: Parts, query: str, documents: Sequence[str], *, call: Call, top_n: int, truncate: bool) -> Results[Ranked]:
    """Documents best first, at most `top_n` (0: all); then the errors of those that failed, each with its `field`."""
    check_items(documents, "documents")
    check_count(top_n, "top_n")
    refused = check_text(query, "query")
    if refused is not None:
        raise refused
    account = Account()
    by_task = {Task.TEXT_RANKING: _by_cross_encoder, Task.FEATURE_EXTRACTION: _by_cosine}
    score = by_task.get(parts.manifest.task)
    if score is None:
        raise parts.refuse_task("reranking", "a model of the task text-ranking or feature-extraction")
    scores, cut = await score(parts, query, documents, account, call, truncate)
    good = [Ranked(i, one, cut[i]) for i, one in enumerate(scores) if not isinstance(one, Exception)]
    good.sort(key=lambda ranked: -ranked.score)
    items: list[Ranked | Exception] = [*(good[:top_n] if top_n else good), *(one for one in scores if isinstance(one, Exception))]
    return parts.results(items, account, [isinstance(item, Ranked) and item.truncated for item in items])


async def _by_cross_encoder(
    parts: Parts, query: str, documents: Sequence[str], account: Account, call: Call, truncate: bool
) -> tuple[list[float | Exception], list[bool]]:
    pairs: list[TextInput] = [(query, document) for document in documents]
    fields = [f"documents[{i}]" for i in range(len(documents))]
    tokens = await tokenize(parts, pairs, fields, account, call=call, cut="longest" if truncate else "")
    rows, cut = await run_items(parts, tokens, account, call=call)

    def post(good: list[FloatArray]) -> list[float]:
        logits = np.stack(good)
        # One output is a relevance; of several, the last is "relevant", as sentence-transformers' CrossEncoder trains them.
        scores = sigmoid(logits)[:, 0] if logits.shape[1] == 1 else softmax(logits)[:, -1]
        return [float(score) for score in scores]

    return await settle(parts, account, rows, post, LIGHT_ROWS, call=call), cut


async def _by_cosine(
    parts: Parts, query: str, documents: Sequence[str], account: Account, call: Call, truncate: bool
) -> tuple[list[float | Exception], list[bool]]:
    texts = [*prefixed(parts, [query], "query"), *prefixed(parts, documents, "passage")]
    fields = ["query", *(f"documents[{i}]" for i in range(len(documents)))]
    rows, cut = await vectors(parts, texts, EmbedOptions(normalize=True, truncate=truncate), account, call=call, fields=fields)
    query_vector = rows[0]
    if isinstance(query_vector, Exception):
        raise query_vector

    def post(good: list[FloatArray]) -> list[float]:
        return [float(score) for score in np.stack(good) @ query_vector]

    return await settle(parts, account, rows[1:], post, LIGHT_ROWS, call=call), cut[1:]
