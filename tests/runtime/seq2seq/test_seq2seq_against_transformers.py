"""Answers equal those of transformers' generate, token by token, whatever runs beside them."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from server.core import Call, Task
from server.runtime.graphs.calibrate import default_texts
from server.runtime.manifest import Seq2Seq
from server.runtime.seq2seq.beam import Answer
from server.runtime.seq2seq.contract import Generated, Seq2SeqOptions
from server.runtime.seq2seq.model import LoadedSeq2Seq, open_seq2seq
from server.runtime.seq2seq.rules import make_rules
from server.runtime.sessions import Sessions
from tests.runtime.seq2seq.conftest import Export, Exported
from tests.seq2seq_models import FAMILIES

LENGTHS = (5, 1, 20, 9, 13, 2, 30)
SETTINGS: list[dict[str, Any]] = [
    {"num_beams": 1},
    {"num_beams": 1, "repetition_penalty": 1.5, "no_repeat_ngram_size": 1},
    {"num_beams": 1, "renormalize_logits": True, "bad_words_ids": [[5]], "min_length": 6, "forced_bos_token_id": 3},
    {"num_beams": 2},
    {"num_beams": 4},
    {"num_beams": 4, "early_stopping": True},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0},
    {"num_beams": 3, "length_penalty": 0.5, "no_repeat_ngram_size": 2},
    {"num_beams": 4, "min_length": 9, "repetition_penalty": 1.3},
    {"num_beams": 4, "forced_bos_token_id": 17},
    {
        "num_beams": 2,
        "bad_words_ids": [[5], [9, 11], [20]],
        "suppress_tokens": [30, 31],
        "begin_suppress_tokens": [40, 50],
        "renormalize_logits": True,
        "early_stopping": True,
    },
    {"num_beams": 4, "encoder_no_repeat_ngram_size": 2, "length_penalty": -0.5, "min_new_tokens": 4},
]


def sources(seed: int, vocabulary: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(5, vocabulary, length) for length in LENGTHS]


def generate(one: Exported, texts: list[np.ndarray], settings: dict[str, Any]) -> list[tuple[list[int], float | None]]:
    """What transformers answers: tokens after the start token up to the end token, and the scores of beam search."""
    spec = spec_of(one)
    width = max(map(len, texts))
    ids = torch.full((len(texts), width), spec.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.from_numpy(text)
        mask[i, : len(text)] = 1
    result = one.original.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, return_dict_in_generate=True, output_scores=True, **settings
    )
    scores = result.sequences_scores.tolist() if settings["num_beams"] > 1 else [None] * len(texts)
    answers = []
    for tokens, score in zip(result.sequences[:, 1:].tolist(), scores, strict=True):
        ends = [i for i, token in enumerate(tokens) if token in spec.eos_token_ids]
        answers.append((tokens[: ends[0] + 1 if ends else None], score))
    return answers


def spec_of(one: Exported) -> Seq2Seq:
    spec = one.manifest.seq2seq
    assert spec is not None
    return spec


def cleared(one: Exported) -> dict[str, Any]:
    """Settings that undo those of the model, so that the test's own alone are at work; the forced end stays."""
    config = one.original.generation_config
    forced = config.forced_eos_token_id
    neutral: dict[str, Any] = {"num_beams": 1, "min_length": 0, "length_penalty": 1.0, "early_stopping": False, "no_repeat_ngram_size": 0}
    neutral |= {"bad_words_ids": None, "renormalize_logits": False, "forced_bos_token_id": None, "forced_eos_token_id": forced}
    return neutral


@pytest.mark.parametrize("family", ["bart", "t5", "marian", "m2m_100"])
async def test_every_setting_gives_the_same_tokens(family: str, exported: Export) -> None:
    one = exported(family)
    model = await open_seq2seq(one.files, Sessions())
    try:
        for seed, more in enumerate(SETTINGS):
            settings = {**cleared(one), **more, "max_length": 18}
            kept = {key: value for key, value in settings.items() if value is not None}
            rules = make_rules(spec_of(one).model_copy(update={"generation": kept}))
            texts = sources(seed, spec_of(one).vocabulary)
            # Each text is a call of its own: they meet in the engine.
            flights = await asyncio.gather(*(model.engine.run([text], rules, Call(str(i))) for i, text in enumerate(texts)))
            for flight, (tokens, score) in zip(flights, generate(one, texts, settings), strict=True):
                (answer,) = flight.outcomes
                assert isinstance(answer, Answer)
                assert answer.tokens == tokens, more
                assert score is None or answer.score == pytest.approx(score, rel=1e-4, abs=1e-4)
    finally:
        await model.close(drain=True)


CHOICES: dict[str, tuple[Seq2SeqOptions, dict[str, Any]]] = {
    "mbart": (Seq2SeqOptions("fr_XX", "ro_RO"), {"src_lang": "fr_XX"}),
    "nllb": (Seq2SeqOptions("fra_Latn", "deu_Latn"), {"src_lang": "fra_Latn"}),
    "m2m_100": (Seq2SeqOptions("de", "fr"), {"src_lang": "de"}),
    "marian": (Seq2SeqOptions(target_language="deu"), {}),
    "t5": (Seq2SeqOptions(target_language="fr"), {}),
}
BEFORE = {"marian": ">>deu<< ", "t5": "translate English to French: "}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")  # transformers on its own tokenizers
async def test_texts_and_languages_give_the_same_answers(family: str, exported: Export) -> None:
    one = exported(family)
    options, source_options = CHOICES.get(family, (Seq2SeqOptions(), {}))
    tokenizer = one.tokenizer(**source_options)
    texts = [*default_texts()[3::29], "Ünïcödé — “quotes”, 日本語 and  two  blanks ", "a"][:10]
    settings: dict[str, Any] = {}
    if family in ("mbart", "nllb", "m2m_100"):
        code = options.target_language
        settings["forced_bos_token_id"] = tokenizer.get_lang_id(code) if family == "m2m_100" else tokenizer.convert_tokens_to_ids(code)
    if family == "t5":
        settings |= {"num_beams": 2, "max_length": 24}
    if family == "t5_gated":
        options, settings = Seq2SeqOptions(max_tokens=19), {"max_length": 20}
    model = await open_seq2seq(one.files, Sessions())
    try:
        assert one.manifest.task is (Task.SUMMARIZATION if family in ("bart", "pegasus") else Task.TRANSLATION)
        results = await model.generate(texts, Call("a"), options)
    finally:
        await model.close(drain=True)
    for text, item in zip(texts, results.items, strict=True):
        assert isinstance(item, Generated)
        given = tokenizer(BEFORE.get(family, "") + text, return_tensors="pt")
        tokens = one.original.generate(input_ids=given.input_ids, attention_mask=given.attention_mask, do_sample=False, **settings)[
            0, 1:
        ].tolist()
        while len(tokens) > len(item.tokens):
            assert tokens.pop() == spec_of(one).pad_token_id
        assert list(item.tokens) == tokens, text
        unspecial = [token for token in tokens if token not in spec_of(one).languages.values()]
        assert item.text == tokenizer.decode(unspecial, skip_special_tokens=True).strip()
    assert results.usage.output == sum(len(item.tokens) for item in results.items if isinstance(item, Generated))


async def test_many_callers_at_once_get_what_each_would_get_alone(exported: Export) -> None:
    one = exported("bart")
    texts = default_texts()[:48]
    model: LoadedSeq2Seq = await open_seq2seq(one.files, Sessions())
    try:
        variants = [Seq2SeqOptions(num_beams=1 + i % 5, max_tokens=10 + i % 20) for i in range(len(texts))]
        alone = [await model.generate([text], Call("a"), options) for text, options in zip(texts, variants, strict=True)]
        together = await asyncio.gather(*(model.generate([t], Call("b"), o) for t, o in zip(texts, variants, strict=True)))
    finally:
        await model.close(drain=True)
    for before, after in zip(alone, together, strict=True):
        (first,), (second,) = before.items, after.items
        assert isinstance(first, Generated)
        assert isinstance(second, Generated)
        assert (first.text, first.tokens) == (second.text, second.tokens)
