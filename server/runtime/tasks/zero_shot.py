"""zero-shot-classification: labels that the caller brings, judged by an entailment (NLI) model or by an embedding model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from server.core import Call, FloatArray, Label, Results, Task
from server.errors import InvalidArgument, RequestTooLarge
from server.runtime.tasks.classification import ranked_labels, sigmoid, softmax
from server.runtime.tasks.embedding import EmbedOptions, vectors
from server.runtime.tasks.stages import Account, Parts, check_items, off_loop, run_items, settle, tokenize
from server.runtime.tokenizers import TextInput, check_text

DEFAULT_TEMPLATE = "This example is {}."
MAX_LABELS = 256
MAX_PAIRS = 16_384
MAX_SCORES = 65_536  # by embedding a pair costs no run, but each score is a message of the answer
# Embedding models: scores are softmax(cosine / TEMPERATURE) over the labels; with multi_label each label's is
# sigmoid((cosine - MIDPOINT) / TEMPERATURE). Least log loss of all-MiniLM-L6-v2 on 350 requests of Snips' seven intents, where 83 % of the
# best labels are right and score 0.78 on average; cosines of right labels are 0.26 to 0.43 (quartiles), of wrong ones 0.03 to 0.16.
TEMPERATURE = 0.05
MIDPOINT = 0.2
LIGHT_SCORES = 4096


class LabelCache:
    """Vectors of label phrases, the least recently used dropped above `capacity`. Used on the event loop alone."""

    def __init__(self, capacity: int = 4096) -> None:
        self.capacity = capacity
        self._vectors: OrderedDict[str, FloatArray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._vectors)

    def get(self, phrase: str) -> FloatArray | None:
        vector = self._vectors.get(phrase)
        if vector is not None:
            self._vectors.move_to_end(phrase)
        return vector

    def put(self, phrase: str, vector: FloatArray) -> None:
        self._vectors[phrase] = vector
        self._vectors.move_to_end(phrase)
        while len(self._vectors) > self.capacity:
            self._vectors.popitem(last=False)


@dataclass(slots=True, frozen=True)
class ZeroShotOptions:
    multi_label: bool = False
    hypothesis_template: str = DEFAULT_TEMPLATE
    truncate: bool = False
    top_k: int = 0


def phrases_of(labels: Sequence[str], template: str) -> list[str]:
    """Each label in the template's place; the template is never formatted, only its one "{}" replaced: it comes from outside."""
    check_items(labels, "candidate_labels")
    if len(labels) > MAX_LABELS:
        raise RequestTooLarge(f"{len(labels)} candidate labels; expected at most {MAX_LABELS}.", field="candidate_labels", limit=MAX_LABELS)
    if template.count("{}") != 1:
        raise InvalidArgument(
            f"hypothesis_template {template[:100]!r} has {template.count('{}')} places for the label; expected one '{{}}'.",
            field="hypothesis_template",
        )
    seen: set[str] = set()
    for i, label in enumerate(labels):
        field = f"candidate_labels[{i}]"
        error = check_text(label, field)
        if error is not None:
            raise error
        if label in seen:
            raise InvalidArgument(f"{field} {label[:100]!r} is there twice; expected each label once.", field=field)
        seen.add(label)
    return [template.replace("{}", label) for label in labels]


def entailment_ids(labels: Sequence[str]) -> tuple[int, int] | None:
    """(entailment, contradiction) among a model's labels, or None when it is no NLI model.

    A label is told by its name. Where contradiction has no name of its own, the last label stands for it if entailment is the first,
    else the first, as in transformers' pipeline. A model of two labels has "not_entailment" for it.
    """
    lowered = [label.lower() for label in labels]
    entailment = next((i for i, label in enumerate(lowered) if label.startswith("entail")), None)
    if entailment is None or len(labels) < 2:
        return None
    contradiction = next((i for i, label in enumerate(lowered) if label.startswith("contradict")), None)
    if contradiction is None:
        contradiction = len(labels) - 1 if entailment == 0 else 0
    return entailment, contradiction


async def classify_zero_shot(
    parts: Parts, texts: Sequence[str], labels: Sequence[str], options: ZeroShotOptions, cache: LabelCache, *, call: Call
) -> Results[list[Label]]:
    phrases = phrases_of(labels, options.hypothesis_template)
    check_items(texts, "inputs")
    scores = len(texts) * len(labels)
    if scores > MAX_SCORES:
        message = f"{len(texts)} texts with {len(labels)} labels make {scores} scores; expected at most {MAX_SCORES}. Send fewer."
        raise RequestTooLarge(message, field="inputs", limit=MAX_SCORES)
    account = Account()
    if parts.manifest.task == Task.FEATURE_EXTRACTION:
        items, cut = await _by_embedding(parts, texts, labels, phrases, options, cache, account, call)
    else:
        items, cut = await _by_entailment(parts, texts, labels, phrases, options, account, call)
    return parts.results(items, account, cut)


async def _by_entailment(
    parts: Parts, texts: Sequence[str], labels: Sequence[str], phrases: list[str], options: ZeroShotOptions, account: Account, call: Call
) -> tuple[list[list[Label] | Exception], list[bool]]:
    ids = entailment_ids(parts.manifest.labels)
    if ids is None:
        raise parts.refuse_task("zero-shot classification", "an embedding model, or one whose labels name entailment and contradiction")
    count = len(phrases)
    if len(texts) * count > MAX_PAIRS:
        raise RequestTooLarge(
            f"{len(texts)} texts with {count} labels make {len(texts) * count} pairs; expected at most {MAX_PAIRS}. Send fewer.",
            field="inputs",
            limit=MAX_PAIRS,
        )
    pairs: list[TextInput] = [(text, phrase) for text in texts for phrase in phrases]
    fields = [f"inputs[{i}].text" for i in range(len(texts)) for _ in phrases]
    tokens = await tokenize(parts, pairs, fields, account, call=call, cut="first" if options.truncate else "")
    rows, cut = await run_items(parts, tokens, account, call=call)
    entailment, contradiction = ids

    def post(good: list[FloatArray]) -> list[list[Label]]:
        logits = np.stack(good).reshape(-1, count, len(parts.manifest.labels))
        if options.multi_label or count == 1:
            scores = softmax(logits[..., [contradiction, entailment]])[..., 1]
        else:
            scores = softmax(logits[..., entailment])
        return ranked_labels(labels, scores, options.top_k)

    # A text of which one pair failed has no scores: they are relative to each other.
    grouped = [rows[i * count : (i + 1) * count] for i in range(len(texts))]
    failed = [next((row for row in group if isinstance(row, Exception)), None) for group in grouped]
    good = [row for group, error in zip(grouped, failed, strict=True) if error is None for row in group if not isinstance(row, Exception)]
    values = iter(await off_loop(parts, len(good) <= LIGHT_SCORES, post, good) if good else ())
    items: list[list[Label] | Exception] = [next(values) if error is None else error for error in failed]
    return items, [any(cut[i * count : (i + 1) * count]) for i in range(len(texts))]


async def _by_embedding(
    parts: Parts,
    texts: Sequence[str],
    labels: Sequence[str],
    phrases: list[str],
    options: ZeroShotOptions,
    cache: LabelCache,
    account: Account,
    call: Call,
) -> tuple[list[list[Label] | Exception], list[bool]]:
    known = await _label_vectors(parts, phrases, cache, account, call)
    asked = EmbedOptions(normalize=True, truncate=options.truncate, kind="query")
    fields = [f"inputs[{i}].text" for i in range(len(texts))]
    rows, cut = await vectors(parts, texts, asked, account, call=call, fields=fields)

    def post(good: list[FloatArray]) -> list[list[Label]]:
        cosines = np.stack(good) @ known.T
        scores = sigmoid((cosines - MIDPOINT) / TEMPERATURE) if options.multi_label else softmax(cosines / TEMPERATURE)
        return ranked_labels(labels, scores, options.top_k)

    return await settle(parts, account, rows, post, LIGHT_SCORES // max(len(labels), 1), call=call), cut


async def _label_vectors(parts: Parts, phrases: list[str], cache: LabelCache, account: Account, call: Call) -> FloatArray:
    """float32[labels, D], rows of length 1; computes what the cache does not have."""
    known = {phrase: vector for phrase in phrases if (vector := cache.get(phrase)) is not None}
    missing = [phrase for phrase in phrases if phrase not in known]
    if missing:
        asked = EmbedOptions(normalize=True, kind="query")
        fields = [f"candidate_labels[{phrases.index(phrase)}]" for phrase in missing]
        rows, _ = await vectors(parts, missing, asked, account, call=call, fields=fields)
        for phrase, row in zip(missing, rows, strict=True):
            if isinstance(row, Exception):
                raise row
            # The engine's rows share a batch's memory, which would stay as long as the row.
            known[phrase] = row.copy()
            cache.put(phrase, known[phrase])
    return np.stack([known[phrase] for phrase in phrases])
