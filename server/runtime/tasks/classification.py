"""text-classification: a model's own labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from server.core import Call, FloatArray, Label, Results, Task
from server.runtime.manifest import Manifest
from server.runtime.tasks.stages import Account, Parts, check_count, check_items, run_items, settle, tokenize
from server.runtime.tokenizers import TextInput

LIGHT_ROWS = 512


def softmax(logits: FloatArray) -> FloatArray:
    """Over the last axis, float32 in and out."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), dtype=np.float32)


def sigmoid(logits: FloatArray) -> FloatArray:
    """Elementwise, float32 in and out, without overflow."""
    powers = np.exp(-np.abs(logits))
    return np.asarray(np.where(logits >= 0, 1.0, powers) / (1.0 + powers), dtype=np.float32)


def probabilities(manifest: Manifest, logits: FloatArray) -> FloatArray:
    """float32[S, labels] -> the same: sigmoid where labels do not exclude each other (or there is one), else softmax."""
    return sigmoid(logits) if manifest.multi_label or logits.shape[-1] == 1 else softmax(logits)


def ranked_labels(names: Sequence[str], scores: FloatArray, top_k: int) -> list[list[Label]]:
    """Best first, at most `top_k` (0: all) a row of `scores` float32[S, labels]; ties in the order of `names`."""
    count = min(top_k, len(names)) if top_k else len(names)
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :count]
    best = np.take_along_axis(scores, order, axis=-1).tolist()
    rows = zip(order.tolist(), best, strict=True)
    return [[Label(names[i], score) for i, score in zip(indices, values, strict=True)] for indices, values in rows]


async def classify(parts: Parts, inputs: Sequence[TextInput], *, call: Call, top_k: int, truncate: bool) -> Results[list[Label]]:
    manifest = parts.manifest
    if manifest.task not in (Task.TEXT_CLASSIFICATION, Task.ZERO_SHOT_CLASSIFICATION) or not manifest.labels:
        raise parts.refuse_task("classification", "a model of the task text-classification, or candidate labels and an embedding model")
    check_items(inputs, "inputs")
    check_count(top_k, "top_k")
    account = Account()
    fields = [f"inputs[{i}].text" for i in range(len(inputs))]
    tokens = await tokenize(parts, inputs, fields, account, call=call, cut="longest" if truncate else "")
    rows, cut = await run_items(parts, tokens, account, call=call)

    def post(good: list[FloatArray]) -> list[list[Label]]:
        return ranked_labels(manifest.labels, probabilities(manifest, np.stack(good)), top_k)

    items = await settle(parts, account, rows, post, LIGHT_ROWS, call=call)
    return parts.results(items, account, cut)
