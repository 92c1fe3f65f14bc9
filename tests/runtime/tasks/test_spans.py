"""Entities and answers beyond the pipelines' parity: offsets in code points, limits, errors by item."""

from __future__ import annotations

import pytest

from server.core import Span
from server.errors import InputTooLong, InvalidArgument
from tests.runtime.tasks.models import CALL, QUESTIONS, TEXTS, Reference


async def test_offsets_count_code_points(tagger: Reference, reader: Reference) -> None:
    text = "\U0001f600\U0001f468\u200d\U0001f469 " + TEXTS[3] + " \U0001f600 " + TEXTS[4]
    async with tagger.served() as model:
        result = await model.extract_entities([text], call=CALL)
    (found,) = result.items
    assert isinstance(found, list) and found
    assert all(entity.text == text[entity.start : entity.end] for entity in found)
    async with reader.served() as model:
        answers = await model.answer([("Who lost a card?", text)], call=CALL, top_k=3)
    (spans,) = answers.items
    assert isinstance(spans, list) and len(spans) == 3
    assert all(span.text == text[span.start : span.end] for span in spans)


async def test_long_texts_are_read_whole_unless_cut(tagger: Reference) -> None:
    long = " ".join(TEXTS * 6)
    async with tagger.served() as model:
        whole = await model.extract_entities([long, TEXTS[0]], call=CALL)
        cut = await model.extract_entities([long], call=CALL, truncate=True)
        tokens = await model.extract_entities([long], call=CALL, aggregation="none")
        with pytest.raises(InvalidArgument, match="stride"):
            await model.extract_entities([long], call=CALL, stride=190)
        with pytest.raises(InvalidArgument, match="average"):
            await model.extract_entities([long], call=CALL, aggregation="median")
    everything, beginning, every_token = whole.items[0], cut.items[0], tokens.items[0]
    assert isinstance(everything, list) and isinstance(beginning, list) and isinstance(every_token, list)
    assert everything[-1].end > len(long) * 0.9 > beginning[-1].end
    assert list(whole.truncated) == [False, False] and list(cut.truncated) == [True]
    starts = [entity.start for entity in every_token]
    assert starts == sorted(set(starts)), "each token once, though windows overlap"


async def test_bad_items_spoil_no_other(tagger: Reference, reader: Reference) -> None:
    endless = "word " * 200_000
    async with tagger.served() as model:
        result = await model.extract_entities(["", TEXTS[0], "\ud800", endless], call=CALL)
        alone = await model.extract_entities([TEXTS[0]], call=CALL)
    assert [type(item) for item in result.items] == [InvalidArgument, list, InvalidArgument, InputTooLong]
    assert result.items[1] == alone.items[0]
    question, context = QUESTIONS[0]
    async with reader.served() as model:
        answers = await model.answer(
            [(question, context), ("", context), (question, " "), ("why " * 300, context), (question, endless)], call=CALL
        )
        good = await model.answer([(question, context)], call=CALL)
    assert [type(item) for item in answers.items] == [list, InvalidArgument, InvalidArgument, InputTooLong, InputTooLong]
    fields = [item.metadata["field"] for item in answers.items[1:] if isinstance(item, InvalidArgument)]
    assert fields[:3] == ["inputs[1].question", "inputs[2].context", "inputs[3].question"]
    assert answers.items[0] == good.items[0]


async def test_answers_are_bounded_and_may_be_none(reader: Reference) -> None:
    async with reader.served() as model:
        short = await model.answer(QUESTIONS, call=CALL, max_answer_tokens=1, top_k=5)
        either = await model.answer(QUESTIONS, call=CALL, allow_no_answer=True, top_k=10_000)
        tiny = await model.answer([("Who?", "Anna")], call=CALL, top_k=10)
        for bad in ({"top_k": 0}, {"max_answer_tokens": 0}, {"doc_stride": -1}):
            with pytest.raises(InvalidArgument):
                await model.answer(QUESTIONS, call=CALL, **bad)
    for spans in short.items:
        assert isinstance(spans, list) and spans and all(" " not in span.text for span in spans)
        assert [span.score for span in spans] == sorted((span.score for span in spans), reverse=True)
    for spans in either.items:
        assert isinstance(spans, list) and sum(span == Span("", span.score, 0, 0) for span in spans) == 1
    (only,) = tiny.items
    assert isinstance(only, list) and {span.text for span in only} <= {"Anna"}


async def test_usage_counts_every_window(tagger: Reference) -> None:
    long = " ".join(TEXTS * 6)
    async with tagger.served() as model:
        result = await model.extract_entities([long], call=CALL, stride=32)
    assert result.usage.input > len(tagger.tokenizer(long)["input_ids"])
