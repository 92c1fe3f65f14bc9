"""feature-extraction: vectors as the model gives them, sizes that it allows, errors that belong to one item."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest
import torch

from server.core import Call, FloatArray
from server.errors import Cancelled, DeadlineExceeded, InputTooLong, InvalidArgument, TaskNotSupported
from server.runtime.tasks.stages import MAX_SEQUENCES
from tests.runtime.tasks.models import CALL, TEXTS, Reference


def expected(reference: Reference, text: str, pooling: str) -> FloatArray:
    with torch.no_grad():
        hidden = reference.model(**reference.tokenizer(text, return_tensors="pt", truncation=True)).last_hidden_state[0].numpy()
    pooled = {"mean": hidden.mean(axis=0), "cls": hidden[0], "last": hidden[-1]}[pooling]
    return np.asarray(pooled, dtype=np.float32)


def unit(vector: FloatArray) -> FloatArray:
    return vector / np.float32(np.linalg.norm(vector))


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
async def test_vectors_are_the_model_s(embedder: Reference, pooling: str) -> None:
    async with embedder.served(pooling=pooling, normalize=True) as model:
        plain = await model.embed(TEXTS, call=CALL, normalize=False)
        scaled = await model.embed(TEXTS, call=CALL)
        other = await model.embed(TEXTS[:1], call=CALL, pooling="cls", normalize=False)
    for text, vector, direction in zip(TEXTS, plain.items, scaled.items, strict=True):
        reference = expected(embedder, text, pooling)
        np.testing.assert_allclose(vector, reference, atol=2e-5)
        np.testing.assert_allclose(direction, unit(reference), atol=1e-5)
    np.testing.assert_allclose(other.items[0], expected(embedder, TEXTS[0], "cls"), atol=2e-5)
    assert plain.usage.input == sum(len(embedder.tokenizer(text)["input_ids"]) for text in TEXTS)
    assert plain.timings.run > 0 and (plain.model, plain.version) == ("parity", "1")


async def test_sizes_that_the_model_was_trained_for_and_no_others(embedder: Reference) -> None:
    async with embedder.served(pooling="mean", normalize=True, dimensions=[16, 32]) as model:
        short = await model.embed(TEXTS[:2], call=CALL, dimensions=16)
        full = await model.embed(TEXTS[:2], call=CALL, dimensions=64)
        with pytest.raises(InvalidArgument, match="16, 32, 64") as refused:
            await model.embed(TEXTS[:1], call=CALL, dimensions=20)
    assert refused.value.metadata["field"] == "dimensions"
    for text, vector, whole in zip(TEXTS, short.items, full.items, strict=False):
        np.testing.assert_allclose(vector, unit(expected(embedder, text, "mean")[:16]), atol=1e-5)
        np.testing.assert_allclose(whole, unit(expected(embedder, text, "mean")), atol=1e-5)
    async with embedder.served(pooling="mean") as model:
        with pytest.raises(InvalidArgument, match="gives vectors of 64"):
            await model.embed(TEXTS[:1], call=CALL, dimensions=32)


async def test_prefixes_belong_to_the_kind_of_text(embedder: Reference) -> None:
    async with embedder.served(pooling="mean", query_prefix="query: ", passage_prefix="passage: ") as model:
        query = await model.embed(TEXTS[:1], call=CALL, kind="query")
        passage = await model.embed(TEXTS[:1], call=CALL, kind="passage")
        empty = await model.embed([""], call=CALL, kind="query")
        with pytest.raises(InvalidArgument, match="input_type"):
            await model.embed(TEXTS[:1], call=CALL, kind="poem")
    np.testing.assert_allclose(query.items[0], expected(embedder, "query: " + TEXTS[0], "mean"), atol=2e-5)
    np.testing.assert_allclose(passage.items[0], expected(embedder, "passage: " + TEXTS[0], "mean"), atol=2e-5)
    assert isinstance(empty.items[0], InvalidArgument)


async def test_truncation_is_asked_for(embedder: Reference) -> None:
    long = " ".join(TEXTS * 5)
    async with embedder.served(pooling="mean") as model:
        refused = await model.embed([TEXTS[0], long], call=CALL)
        cut = await model.embed([TEXTS[0], long], call=CALL, truncate=True)
    error = refused.items[1]
    assert isinstance(error, InputTooLong) and error.metadata["limit"] == "192" and error.metadata["field"] == "texts[1]"
    assert isinstance(refused.items[0], np.ndarray) and list(refused.truncated) == [False, False]
    assert list(cut.truncated) == [False, True]
    np.testing.assert_allclose(cut.items[1], expected(embedder, long, "mean"), atol=2e-5)


async def test_bad_items_spoil_no_other(embedder: Reference) -> None:
    texts: list[Any] = ["", TEXTS[0], "\udfff", "  ", TEXTS[1], "\x00\x01"]
    async with embedder.served(pooling="mean") as model:
        result = await model.embed(texts, call=CALL)
        alone = await model.embed([TEXTS[1]], call=CALL)
        nothing_good = await model.embed(["", ""], call=CALL)
    kinds = [type(item) for item in result.items]
    assert kinds[0] is kinds[2] is kinds[3] is InvalidArgument and kinds[1] is kinds[4] is np.ndarray
    np.testing.assert_array_equal(result.items[4], alone.items[0])
    assert all(isinstance(item, InvalidArgument) for item in nothing_good.items) and nothing_good.usage.input == 0


async def test_a_large_request_takes_turns_and_keeps_its_order(embedder: Reference) -> None:
    texts = [f"{text} {i}" for i in range(300) for text in TEXTS[:4]]
    async with embedder.served(pooling="mean") as model:
        many, few = await asyncio.gather(model.embed(texts, call=CALL), model.embed(texts[-3:], call=CALL))
    assert len(texts) > MAX_SEQUENCES and len(many.items) == len(texts)
    np.testing.assert_allclose(np.stack(many.items[-3:]), np.stack(few.items), atol=1e-6)  # type: ignore[arg-type]


async def test_nobody_waits_for_late_or_left_calls(embedder: Reference) -> None:
    async with embedder.served(pooling="mean") as model:
        with pytest.raises(DeadlineExceeded) as late:
            await model.embed(TEXTS, call=Call("late", deadline=time.monotonic() - 1))
        assert late.value.metadata["stage"] in ("queue", "tokenize")
        with pytest.raises(Cancelled):
            await model.embed(TEXTS, call=Call("left", cancelled=True))
        with pytest.raises(InvalidArgument, match="texts is empty"):
            await model.embed([], call=CALL)
        with pytest.raises(TaskNotSupported, match="feature-extraction"):
            await model.classify(TEXTS, call=CALL)
        with pytest.raises(TaskNotSupported):
            await model.extract_entities(TEXTS, call=CALL)
        with pytest.raises(TaskNotSupported):
            await model.answer([("a", "b")], call=CALL)
