"""Classification, zero-shot and ranking beyond the pipelines' parity: options, embedding models, hostile templates, errors by item."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from server.core import Label
from server.errors import InputTooLong, InvalidArgument, RequestTooLarge, TaskNotSupported
from server.runtime.tasks.zero_shot import TEMPERATURE, LabelCache, entailment_ids, phrases_of
from tests.runtime.tasks.models import CALL, TEXTS, Reference

LONG = " ".join(TEXTS * 5)


def logits(reference: Reference, *texts: str) -> np.ndarray:
    with torch.no_grad():
        output = reference.model(**reference.tokenizer(*texts, return_tensors="pt", truncation=True))
    return np.asarray(output.logits[0].numpy())


async def test_labels_that_do_not_exclude_each_other_are_sigmoids(classifier: Reference) -> None:
    async with classifier.served(multi_label=True) as model:
        result = await model.classify([TEXTS[0], "", LONG, (TEXTS[0], TEXTS[1])], call=CALL, top_k=2)
    first, empty, long, pair = result.items
    assert isinstance(empty, InvalidArgument) and empty.metadata["field"] == "inputs[1].text" and isinstance(long, InputTooLong)
    for labels, texts in ((first, (TEXTS[0],)), (pair, (TEXTS[0], TEXTS[1]))):
        assert isinstance(labels, list)
        scores = 1 / (1 + np.exp(-logits(classifier, *texts)))
        best = sorted(zip(["north", "south", "east"], scores.tolist(), strict=True), key=lambda one: -one[1])[:2]
        assert [label.name for label in labels] == [name for name, _ in best]
        np.testing.assert_allclose([label.score for label in labels], [score for _, score in best], atol=1e-5)


async def test_zero_shot_by_embeddings_is_the_softmax_of_cosines(embedder: Reference) -> None:
    candidates = ["a lost card", "a train", "an exchange rate"]
    async with embedder.served(pooling="mean") as model:
        result = await model.classify_zero_shot([*TEXTS[:3], ""], candidates, call=CALL)
        again = await model.classify_zero_shot(TEXTS[:3], candidates, call=CALL)
        several = await model.classify_zero_shot(TEXTS[:3], candidates, call=CALL, multi_label=True, top_k=1)
        texts = np.stack([v for v in (await model.embed(TEXTS[:3], call=CALL, normalize=True)).items if isinstance(v, np.ndarray)])
        phrases = [f"This example is {label}." for label in candidates]
        vectors = np.stack([v for v in (await model.embed(phrases, call=CALL, normalize=True)).items if isinstance(v, np.ndarray)])
    powers = np.exp(texts @ vectors.T / TEMPERATURE)
    scores = powers / powers.sum(axis=1, keepdims=True)
    for i, labels in enumerate(result.items[:3]):
        assert isinstance(labels, list)
        assert [label.name for label in labels] == [candidates[j] for j in np.argsort(-scores[i])]
        np.testing.assert_allclose([label.score for label in labels], np.sort(scores[i])[::-1], atol=1e-4)
    assert isinstance(result.items[3], InvalidArgument) and result.items[3].metadata["field"] == "inputs[3].text"
    assert again.items == result.items[:3] and again.usage.input < result.usage.input, "label vectors are kept"
    assert all(isinstance(labels, list) and len(labels) == 1 and 0 <= labels[0].score <= 1 for labels in several.items)


def test_the_label_cache_is_bounded_and_keeps_what_is_used() -> None:
    cache = LabelCache(capacity=2)
    a, b, c = (np.full(4, i, dtype=np.float32) for i in range(3))
    cache.put("a", a)
    cache.put("b", b)
    assert cache.get("a") is a
    cache.put("c", c)
    assert len(cache) == 2 and cache.get("b") is None and cache.get("a") is a


def test_templates_come_from_outside() -> None:
    assert phrases_of(["x{0}", "y"], "{{}} {0.__class__}") == ["{x{0}} {0.__class__}", "{y} {0.__class__}"]
    for template in ("no place", "{} and {}", "{label}"):
        with pytest.raises(InvalidArgument, match="hypothesis_template"):
            phrases_of(["a"], template)
    with pytest.raises(InvalidArgument, match="twice"):
        phrases_of(["a", "b", "a"], "{}")
    with pytest.raises(InvalidArgument) as blank:
        phrases_of(["a", " "], "{}")
    assert blank.value.metadata["field"] == "candidate_labels[1]"
    with pytest.raises(InvalidArgument):
        phrases_of([], "{}")
    with pytest.raises(RequestTooLarge):
        phrases_of([str(i) for i in range(257)], "{}")


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        (["contradiction", "neutral", "entailment"], (2, 0)),
        (["ENTAILMENT", "NEUTRAL", "CONTRADICTION"], (0, 2)),
        (["neutral", "contradiction", "entailment"], (2, 1)),
        (["entailment", "not_entailment"], (0, 1)),
        (["positive", "negative"], None),
    ],
)
def test_entailment_is_told_by_name(labels: list[str], ids: tuple[int, int] | None) -> None:
    assert entailment_ids(labels) == ids


async def test_a_model_without_entailment_does_no_zero_shot(classifier: Reference) -> None:
    async with classifier.served() as model:
        with pytest.raises(TaskNotSupported, match="entailment"):
            await model.classify_zero_shot(TEXTS, ["a", "b"], call=CALL)


async def test_cross_encoders_rank_by_the_sigmoid_of_their_logit(ranker: Reference) -> None:
    query = "Who lost a card?"
    documents = [*TEXTS, "", LONG]
    async with ranker.served() as model:
        result = await model.rerank(query, documents, call=CALL)
        cut = await model.rerank(query, documents, call=CALL, top_n=3, truncate=True)
    expected = {i: float(1 / (1 + np.exp(-logits(ranker, query, text)[0]))) for i, text in enumerate(documents) if text}
    good = [item for item in result.items if not isinstance(item, Exception)]
    assert {ranked.index for ranked in good} == set(range(len(TEXTS)))
    assert [ranked.score for ranked in good] == sorted((ranked.score for ranked in good), reverse=True)
    for ranked in good:
        assert ranked.score == pytest.approx(expected[ranked.index], abs=1e-5)
    errors = [item for item in result.items if isinstance(item, Exception)]
    assert [type(error) for error in errors] == [InvalidArgument, InputTooLong] and errors == list(result.items[-2:])
    best = [item for item in cut.items if not isinstance(item, Exception)]
    assert len(best) == 3 and best[0].index == max(expected, key=lambda i: expected[i])
    assert all(ranked.truncated == (ranked.index == len(documents) - 1) for ranked in best)


async def test_embedding_models_rank_by_cosine(embedder: Reference) -> None:
    async with embedder.served(pooling="mean") as model:
        result = await model.rerank(TEXTS[3], TEXTS, call=CALL)
        with pytest.raises(InvalidArgument) as refused:
            await model.rerank(" ", TEXTS, call=CALL)
        with pytest.raises(InputTooLong) as too_long:
            await model.rerank(LONG, TEXTS, call=CALL)
    best = result.items[0]
    assert not isinstance(best, Exception) and best.index == 3 and best.score == pytest.approx(1.0, abs=1e-5)
    assert refused.value.metadata["field"] == too_long.value.metadata["field"] == "query"


async def test_top_k_is_no_negative_number(classifier: Reference) -> None:
    async with classifier.served() as model:
        with pytest.raises(InvalidArgument, match="top_k"):
            await model.classify(TEXTS, call=CALL, top_k=-1)
        everything = await model.classify(TEXTS[:1], call=CALL, top_k=50)
    labels = everything.items[0]
    assert isinstance(labels, list) and len(labels) == 3 and isinstance(labels[0], Label)
