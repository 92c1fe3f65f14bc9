"""The features of texts, compiled and twin, under the same cases; and the compiled ones against the twin on generated text."""

from __future__ import annotations

import math
import os
import time
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from native import text, text_features, text_features_py

BOTH = pytest.mark.parametrize("native", [text_features, text_features_py], ids=["compiled", "twin"])
BITS = 12
OPTIONS = "Which one is NOT prime?\nA. 7\nB. 9\nC) -11 or $3\nd. the answer\nAnswer:"


def form(native: ModuleType, content: str) -> dict[str, float]:
    return dict(zip(text.FORMS, native.extract([content], BITS)[3][0].tolist(), strict=True))


def columns(native: ModuleType, content: str, bits: int = BITS) -> dict[int, float]:
    _, indices, values, _ = native.extract([content], bits)
    return dict(zip(indices.tolist(), values.tolist(), strict=True))


def test_compiled_module_is_the_one_in_use() -> None:
    assert text_features.__file__.endswith((".so", ".pyd"))
    if not os.environ.get("UNDERSTUDY_NO_EXTENSIONS"):
        assert text.extract is text_features.extract


@BOTH
class TestWords:
    def test_both_blocks_have_length_one(self, native: ModuleType) -> None:
        found = columns(native, "Where is my card, and where is my wallet?")
        for low, high in ((0, 1 << BITS), (1 << BITS, 2 << BITS)):
            assert math.isclose(sum(v * v for c, v in found.items() if low <= c < high), 1.0, rel_tol=1e-6)

    def test_case_digits_and_spaces_do_not_matter(self, native: ModuleType) -> None:
        assert columns(native, "Pay 12 EUR") == columns(native, "pay  99\n eur ")

    def test_order_and_signs_do(self, native: ModuleType) -> None:
        assert columns(native, "a b") != columns(native, "b a")
        assert columns(native, "a + b") != columns(native, "a - b")

    def test_repetition_counts_by_its_root(self, native: ModuleType) -> None:
        words = [abs(v) for c, v in columns(native, "x x x x").items() if c < 1 << BITS]
        assert sorted(words) == pytest.approx([math.sqrt(3 / 7), math.sqrt(4 / 7)])  # three pairs, four words

    def test_rows_follow_each_other(self, native: ModuleType) -> None:
        texts = ["first text", "", "third"]
        indptr, indices, values, forms = native.extract(texts, BITS)
        assert indptr.dtype == np.int64 and indices.dtype == np.int32 and values.dtype == forms.dtype == np.float32
        assert indptr[0] == 0 and indptr[1] == indptr[2] and indptr[3] == len(indices) == len(values)
        assert forms.shape == (3, len(text.FORMS)) and not forms[1].any()
        assert dict(zip(indices[: indptr[1]].tolist(), values[: indptr[1]].tolist(), strict=True)) == columns(native, "first text")

    @pytest.mark.parametrize("bits", [-1, 0, 7, 23])
    def test_sizes_out_of_range(self, native: ModuleType, bits: int) -> None:
        with pytest.raises(ValueError, match="bits"):
            native.extract(["a"], bits)

    @pytest.mark.parametrize("bad", [None, 3, b"bytes", ["a"]])
    def test_other_things_than_texts(self, native: ModuleType, bad: object) -> None:
        with pytest.raises(TypeError, match="str"):
            native.extract(["fine", bad], BITS)


@BOTH
class TestForms:
    def test_options(self, native: ModuleType) -> None:
        found = form(native, OPTIONS)
        assert found["options"] == pytest.approx(0.4) and found["numeric_options"] == pytest.approx(0.75)
        assert found["log_option_length"] == pytest.approx(math.log1p((1 + 1 + 9 + 10) / 4))
        assert found["option_spread"] == pytest.approx(math.log(11 / 2))

    def test_counts(self, native: ModuleType) -> None:
        found = form(native, 'Is it "NOT"? No! Fill ____ in.\n\\frac{1}{2} = 0.5')
        assert found["log_sentences"] == pytest.approx(math.log1p(3)) and found["log_questions"] == pytest.approx(math.log1p(1))
        assert found["log_negations"] == pytest.approx(math.log1p(2)) and found["log_quotes"] == pytest.approx(math.log1p(2))
        assert found["log_blanks"] == pytest.approx(math.log1p(2)) and found["log_backslashes"] == pytest.approx(math.log1p(1))
        assert found["log_lines"] == pytest.approx(math.log1p(1)) and found["shouted"] == pytest.approx(1 / 11)
        assert found["numbers"] == pytest.approx(4 / 11) and found["log_words"] == pytest.approx(math.log1p(11))

    def test_shares(self, native: ModuleType) -> None:
        found = form(native, "Ab 12é")
        assert found["digits"] == pytest.approx(2 / 7) and found["beyond_ascii"] == pytest.approx(2 / 7)
        assert found["capitals"] == pytest.approx(1 / 2) and found["spaces"] == pytest.approx(1 / 7)
        assert found["word_length"] == pytest.approx(0.3)


HOSTILE = [
    "",
    "\0",
    "\ud800",
    "a\udfffb",
    "é" * 3000,
    "\n" * 1000,
    "_" * 999,
    "A. \nB. \n",
    "x" * (text.MAX_BYTES + 7),
    "é" * text.MAX_BYTES,
    "日本語の質問です。" * 20,
    OPTIONS,
]


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_give_the_same_finite_features(content: str) -> None:
    for one, other in zip(text_features.extract([content], BITS), text_features_py.extract([content], BITS), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_array_equal(one, other)


TEXTS = st.text(alphabet=st.one_of(st.sampled_from("aAbB 01.?!\n()_\\\"'=A.) "), st.characters()), max_size=120)


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXTS, max_size=4), st.integers(8, 20))
def test_compiled_equals_twin(texts: list[str], bits: int) -> None:
    for one, other in zip(text_features.extract(texts, bits), text_features_py.extract(texts, bits), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_a_megabyte_takes_milliseconds() -> None:
    content = " ".join(f"word{i} {i * 7919 % 1013}" for i in range(80_000))
    begun = time.perf_counter()
    text_features.extract([content], 17)
    assert time.perf_counter() - begun < 1.0
    assert form(text_features, content)["log_bytes"] == pytest.approx(math.log1p(text.MAX_BYTES))
