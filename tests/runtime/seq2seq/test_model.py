"""Options, languages and texts: what is refused, and how it is said."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.core import Call, FinishReason
from server.errors import Draining, InputTooLong, InvalidArgument, ManifestInvalid, ModelRejected
from server.runtime.repository import ModelFiles
from server.runtime.seq2seq.contract import Generated, Seq2SeqOptions
from server.runtime.seq2seq.model import LoadedSeq2Seq, open_seq2seq
from server.runtime.seq2seq.rules import make_rules
from server.runtime.sessions import Sessions
from tests.runtime.seq2seq.conftest import Export


@pytest.fixture
async def opened(exported: Export) -> AsyncIterator[Any]:
    models: list[LoadedSeq2Seq] = []

    async def open_one(family: str) -> LoadedSeq2Seq:
        models.append(await open_seq2seq(exported(family).files, Sessions()))
        return models[-1]

    yield open_one
    for model in models:
        await model.close(drain=False)


def text_of(item: object) -> str:
    assert isinstance(item, Generated), item
    return item.text


@pytest.mark.parametrize(
    ("family", "options", "field", "says"),
    [
        ("nllb", Seq2SeqOptions("eng_Latn", "french"), "target_language", "fra_Latn"),
        ("nllb", Seq2SeqOptions("xx", "fra_Latn"), "source_language", "eng_Latn"),
        ("marian", Seq2SeqOptions(), "target_language", "deu, fra"),
        ("marian", Seq2SeqOptions("fr", "deu"), "source_language", "en"),
        ("t5", Seq2SeqOptions(), "target_language", "en-de, en-fr"),
        ("t5", Seq2SeqOptions("en", "it"), "target_language", "de, fr"),
        ("bart", Seq2SeqOptions(target_language="fr"), "target_language", "no choice of languages"),
        ("bart", Seq2SeqOptions(num_beams=33), "num_beams", "1 to 32"),
        ("bart", Seq2SeqOptions(num_beams=-1), "num_beams", "1 to 32"),
        ("bart", Seq2SeqOptions(max_tokens=97), "max_tokens", "1 to 96"),
        ("bart", Seq2SeqOptions(length_penalty=float("nan")), "length_penalty", "nan"),
        ("bart", Seq2SeqOptions(length_penalty=11.0), "length_penalty", "-10 to 10"),
        ("bart", Seq2SeqOptions(no_repeat_ngram_size=-1), "no_repeat_ngram_size", "0 to 1000"),
    ],
)
async def test_an_option_that_the_model_cannot_keep_is_named(
    family: str, options: Seq2SeqOptions, field: str, says: str, opened: Any
) -> None:
    model = await opened(family)
    with pytest.raises(InvalidArgument) as refused:
        await model.generate(["a text"], Call("a"), options)
    assert refused.value.metadata["field"] == field
    assert says in refused.value.message


async def test_texts_are_refused_one_by_one(opened: Any) -> None:
    model = await opened("bart")
    long = "many words of it " * 60
    results = await model.generate(["a text", "", long, "\ud800", "another"], Call("a"), Seq2SeqOptions(max_tokens=20))
    kinds = [type(item) for item in results.items]
    assert kinds == [Generated, InvalidArgument, InputTooLong, InvalidArgument, Generated]
    error = results.items[2]
    assert isinstance(error, InputTooLong)
    assert error.metadata["field"] == "texts[2]"
    assert error.metadata["limit"] == "96"
    assert int(error.metadata["tokens"]) > 96
    assert list(results.truncated) == [False] * 5
    with pytest.raises(InvalidArgument):
        await model.generate([], Call("a"))

    cut = await model.generate(["a text", long], Call("a"), Seq2SeqOptions(truncate=True, max_tokens=20))
    assert list(cut.truncated) == [False, True]
    assert all(isinstance(item, Generated) for item in cut.items)
    assert cut.usage.input == 96 + results.usage.input - len(model._texts.tokenizer.encode(["another"])[0]) - 2


async def test_languages_change_the_answer_and_have_defaults(opened: Any) -> None:
    nllb = await opened("nllb")
    assert {"eng_Latn", "fra_Latn"} <= set(nllb.target_languages) == set(nllb.source_languages)
    answers = {}
    for pair in (("", ""), ("eng_Latn", "fra_Latn"), ("eng_Latn", "deu_Latn"), ("deu_Latn", "fra_Latn")):
        (item,) = (await nllb.generate(["a text of some words"], Call("a"), Seq2SeqOptions(*pair))).items
        assert isinstance(item, Generated)
        answers[pair] = list(item.tokens)
    assert answers["", ""] == answers["eng_Latn", "fra_Latn"]
    assert len({tuple(tokens) for tokens in answers.values()}) == 3

    marian = await opened("marian")
    assert (marian.source_languages, marian.target_languages) == (["en"], ["deu", "fra"])
    asked = await marian.generate(["some words", "other words"], Call("a"), Seq2SeqOptions(target_language="fra"))
    named = await marian.generate([">>fra<< some words", ">>fra<<other words"], Call("a"), Seq2SeqOptions(target_language="deu"))
    assert [text_of(item) for item in asked.items] == [text_of(item) for item in named.items]

    t5 = await opened("t5")
    assert (t5.source_languages, t5.target_languages) == (["en"], ["de", "fr"])


async def test_lengths_and_reasons(opened: Any) -> None:
    model = await opened("bart")
    short = await model.generate(["a text"], Call("a"), Seq2SeqOptions(max_tokens=3))
    (item,) = short.items
    assert isinstance(item, Generated)
    assert len(item.tokens) == 3
    assert item.finish is FinishReason.LENGTH
    assert short.usage.output == 3
    assert short.model == model.manifest.name
    seen = set()
    for text in ("a text", "the order", "why", "rain in May", "ten"):
        for beams in (1, 2, 6):
            (item,) = (await model.generate([text], Call("a"), Seq2SeqOptions(num_beams=beams))).items
            assert isinstance(item, Generated)
            seen.add(item.finish)
            assert item.tokens[-1] == 2
    assert seen <= {FinishReason.STOP, FinishReason.LENGTH}


async def test_closing_refuses_new_texts(opened: Any) -> None:
    model = await opened("bart")
    last = asyncio.create_task(model.generate(["a text"] * 3, Call("a")))
    await asyncio.sleep(0)
    await model.close(drain=True)
    assert len((await last).items) == 3
    with pytest.raises(Draining):
        await model.generate(["a text"], Call("a"))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"num_beams": 0.5}, "num_beams"),
        ({"num_beams": 99}, "num_beams"),
        ({"max_length": True}, "max_length"),
        ({"length_penalty": "high"}, "length_penalty"),
        ({"length_penalty": float("inf")}, "length_penalty"),
        ({"early_stopping": "later"}, "early_stopping"),
        ({"bad_words_ids": [5]}, "bad_words_ids"),
        ({"bad_words_ids": [[10**6]]}, "bad_words_ids"),
        ({"forced_bos_token_id": -1}, "forced_bos_token_id"),
        ({"suppress_tokens": ["a"]}, "suppress_tokens"),
        ({"penalty_alpha": 0.5}, "penalty_alpha"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(change: dict[str, Any], key: str, exported: Export) -> None:
    spec = exported("bart").manifest.seq2seq
    assert spec is not None
    with pytest.raises(ManifestInvalid) as refused:
        make_rules(spec.model_copy(update={"generation": change}))
    assert refused.value.metadata["key"] == f"seq2seq.generation.{key}"


async def test_a_version_that_contradicts_itself_is_not_opened(exported: Export, tmp_path: Path) -> None:
    files = exported("bart").files
    spec = files.manifest.seq2seq
    assert spec is not None

    def changed(**update: Any) -> ModelFiles:
        return replace(files, manifest=files.manifest.model_copy(update={"seq2seq": spec.model_copy(update=update)}))

    for bad in ({"source_suffix": [10**6]}, {"languages": {"fr": -5}}, {"eos_token_ids": []}, {"decoder_start_token_id": 10**6}):
        with pytest.raises(ManifestInvalid):
            await open_seq2seq(changed(**bad), Sessions())
    with pytest.raises(ModelRejected):
        await open_seq2seq(changed(encoder=spec.decoder, decoder=spec.encoder), Sessions())
    with pytest.raises(ModelRejected):
        await open_seq2seq(changed(unknown_token_id=spec.vocabulary - 1, layers=1), Sessions())
    with pytest.raises(ModelRejected):
        await open_seq2seq(changed(encoder="absent.onnx"), Sessions())
    broken = tmp_path / "tokenizer.json"
    shutil.copyfile(files.paths["manifest.json"] if "manifest.json" in files.paths else files.paths[spec.encoder], broken)
    with pytest.raises(ModelRejected):
        await open_seq2seq(replace(files, paths={**files.paths, "tokenizer.json": broken}), Sessions())
