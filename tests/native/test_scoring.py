"""Features of answers, compiled and twin, under the same cases; the compiled one against the twin on whatever text there is."""

from __future__ import annotations

import json
import math
import os
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from native import score, scoring, scoring_py
from native.phrases import CATEGORIES, PHRASES
from native.scoring_py import FEATURES, LENGTH

BOTH = pytest.mark.parametrize("native", [scoring, scoring_py], ids=["compiled", "twin"])
Array = np.ndarray[Any, Any]
PIECES = st.sampled_from(
    ["who ", "How many ", "I'm sorry, ", "However ", "Röntgen ", "1,901.5 ", "3.", "“", '"', "```", "{", "[1, ", '"a": ', "}", "]", "\n- ",
     "\n", "不知道", "東京。", "Не ", "can’t ", "é", "\ud800", "\U0001f600", "\u200b", "Ａ", "the the the ", "A) ", "####", "\0", "?", "''"]
)  # fmt: skip
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=30).map("".join), st.text(st.characters(), max_size=60))
NUMBERS = st.one_of(st.none(), st.lists(st.floats(width=32), max_size=30).map(lambda v: np.array(v, np.float32)))


def of(native: ModuleType, answer: str, prompt: str = "", **more: Any) -> dict[str, float]:
    return dict(zip(FEATURES, native.Pair(prompt, answer).features(**more).tolist(), strict=True))


def test_compiled_module_is_the_one_in_use() -> None:
    assert scoring.__file__.endswith((".so", ".pyd"))
    if not os.environ.get("UNDERSTUDY_NO_EXTENSIONS"):
        assert vars(score)["Pair"] is vars(scoring)["Pair"]


@settings(max_examples=120, deadline=None)
@given(TEXTS, TEXTS, NUMBERS, NUMBERS, NUMBERS, st.integers(0, 3))
def test_both_see_the_same(prompt: str, answer: str, logprobs: Any, entropies: Any, margins: Any, finish: int) -> None:
    compiled, twin = scoring.Pair(prompt, answer), scoring_py.Pair(prompt, answer)
    ours, theirs = (p.features(logprobs, entropies, margins, finish) for p in (compiled, twin))
    assert np.isfinite(ours).all() and ours.shape == (len(FEATURES),) and ours.dtype == np.float32
    wrong = {name: (a, b) for name, a, b in zip(FEATURES, ours, theirs, strict=True) if not math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-5)}
    assert not wrong
    for one, other in zip(compiled.bag(12), twin.bag(12), strict=True):
        assert np.array_equal(one, other)
    weights = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    assert compiled.dot(weights) == pytest.approx(twin.dot(weights), abs=1e-5)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@BOTH
@settings(max_examples=80, deadline=None)
@given(value=JSON.filter(lambda v: isinstance(v, (list, dict))), cut=st.integers(0, 400), other=st.sampled_from('{}[],:"\\0-.eE \n'))
def test_json_is_judged_as_the_library_judges_it(native: ModuleType, value: Any, cut: int, other: str) -> None:
    text = json.dumps(value, indent=cut % 3 or None, ensure_ascii=bool(cut % 2))
    for shown in (text, text[: cut % len(text)], text[: cut % len(text)] + other + text[cut % len(text) :], f"```json\n{text}\n```"):
        body = shown.removeprefix("```json\n").removesuffix("\n```")
        try:
            expected = isinstance(json.loads(body, parse_constant=lambda _: 1 / 0), (list, dict))
        except (ValueError, ZeroDivisionError):
            expected = False
        assert of(native, shown)["json_valid"] == expected, shown


@BOTH
def test_each_feature_means_what_it_says(native: ModuleType) -> None:
    question = "Who got the first Nobel Prize in Physics, and in which year?"
    good = of(native, "Wilhelm Röntgen got the first Nobel Prize in Physics in 1901.", question)
    assert (
        good["ends_stop"] == 1 and good["unfinished"] == 0 and good["refusal"] == 0 and good["asks_who"] == 1 and good["missing_name"] == 0
    )
    assert good["echo_run"] == pytest.approx(7 / 11) and good["novel_numbers"] == 1 and good["numbers"] == pytest.approx(math.log(2))
    refused = of(native, "I'm sorry, as an AI I cannot say.", question)
    assert refused["refusal"] == pytest.approx(math.log1p(3)) and refused["refusal_early"] == 1 and refused["novel_numbers"] == 0
    assert of(native, "the cat sat on the mat " * 20)["repeat_4"] > 0.9 > 0.3 > of(native, "the cat sat on the mat " * 20)["compression"]
    assert of(native, "one line\n" * 9)["line_repeat"] == pytest.approx(8 / 9)
    assert of(native, "(a [b) c")["brackets"] == pytest.approx(math.log(2)) and of(native, 'say "x')["quotes"] == 1
    assert of(native, "```py\nx")["fences"] == 1 and of(native, "```py\nx\n```")["fences"] == 0
    assert of(native, "and so we went on to the next of the")["unfinished"] == 1
    assert of(native, "B) because")["choice"] == 1 and of(native, "Because")["choice"] == 0
    assert of(native, "Yes.")["starts_yes"] == 1 and of(native, "No, it is not.")["starts_no"] == 1
    assert of(native, "", question)["empty"] == 1 and of(native, "1,000", "it cost 1000")["novel_numbers"] == 0
    assert of(native, "Привет, мир", "say hello")["other_script"] == 1 and of(native, "東京", "首都は？")["other_script"] == 0
    assert of(native, "x", finish=LENGTH)["cut"] == 1
    assert of(native, "about forty", "How many cats are there?")["missing_number"] == 1


@BOTH
def test_the_decoder_s_numbers(native: ModuleType) -> None:
    values = np.array([-0.1, -3.0, np.nan, -0.2, -np.inf, -0.4], np.float32)
    seen = of(native, "x", logprobs=values, entropies=np.array([1, 2, 3, 6], np.float32), margins=np.array([0.5, 2, 0.1], np.float32))
    assert seen["has_logprobs"] == seen["has_entropies"] == seen["has_margins"] == 1
    assert seen["logprob_min"] == -50 and seen["logprob_q50"] == pytest.approx(-0.4) and seen["low_share"] == pytest.approx(0.4)
    assert seen["entropy_trend"] == pytest.approx(3) and seen["entropy_max"] == 6
    assert seen["margin_first"] == 0.5 and seen["margin_min"] == pytest.approx(0.1)
    nothing = of(native, "x", logprobs=np.array([np.nan], np.float32), margins=np.zeros(0, np.float32))
    assert nothing["has_logprobs"] == nothing["has_entropies"] == nothing["has_margins"] == 0 and nothing["logprob_mean"] == 0


@pytest.mark.parametrize("category", CATEGORIES)
@BOTH
def test_every_phrase_is_found(native: ModuleType, category: str) -> None:
    for phrases in PHRASES[category].values():
        for phrase in phrases:
            for text in (phrase.rstrip("*"), f"So, {phrase.rstrip('*').upper() if phrase.isascii() else phrase.rstrip('*')}!"):
                assert of(native, text)[category] > 0, text


@BOTH
def test_phrases_are_whole_words(native: ModuleType) -> None:
    assert of(native, "knot nothingness buttermilk orbit")["negation"] == of(native, "knot buttermilk orbit")["turn"] == 0


@BOTH
def test_a_bag_has_families_of_length_one(native: ModuleType) -> None:
    places, values = native.Pair("what is it", "a red house").bag(16)
    assert len(places) == 5 + 5 + 6 + 3 and float((values**2).sum()) == pytest.approx(4, abs=1e-5)
    assert (places >= 0).all() and (places < 2**16).all()
    assert native.Pair("", "").bag(4)[0].size == 0 and native.Pair("", "").dot(np.ones(16, np.float32)) == 0


def test_hostile_texts_end_soon() -> None:
    for text in ("a" * 2**20, "{" * 2**20, "ab " * 350_000, "\ud800" * 2**20, "不" * 2**19, "1,2" * 350_000, "```" * 350_000, "\n" * 2**20):
        assert np.isfinite(scoring.Pair(text, text).features()).all()
        scoring.Pair(text, text).bag(16)


@BOTH
def test_wrong_arguments_are_refused(native: ModuleType) -> None:
    pair = native.Pair("a", "b")
    for bits in (0, 25):
        with pytest.raises(ValueError, match="bits"):
            pair.bag(bits)
    with pytest.raises(ValueError, match="weights"):
        pair.dot(np.ones(100, np.float32))
