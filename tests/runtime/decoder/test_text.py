"""Text streams: what comes out is the decoded text, in whole characters, up to the first stop string."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.runtime.decoder.text import TextStreams, text_stream
from tests.runtime.decoder.tokenizers_for_tests import NAMES, PIECES, ends_of_words, load

EACH = pytest.mark.parametrize("name", NAMES)
TEXTS = [
    "Once upon a time, there was a little girl named Lily. She didn't know.",
    "Zürich — naïve café, 100 €",
    "日本語のテキストと漢字、ひらがな。",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈 and so on 🎉🎉",
    "\t tabs\n\nand   spaces  ",
    "हिन्दी ไทย العربية עברית",
]
STOPS = st.text(st.sampled_from("abé日🙂 \n"), min_size=1, max_size=6)
PLAIN_STOPS = st.text(st.sampled_from("ab "), min_size=1, max_size=5)


def pushed(stream: Any, ids: list[int]) -> tuple[list[str], bool]:
    parts = []
    for token in ids:
        text, stopped = stream.push(token)
        parts.append(text)
        if stopped:
            return parts, True
    return [*parts, stream.finish()], False


@EACH
@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_decoded_text(name: str, text: str) -> None:
    tokenizer = load(name)
    ids = tokenizer.encode(text).ids if name != "stories260K" else [259 + 7 * len(text) % 200, *(3 + byte for byte in text.encode()), 400]
    parts, _ = pushed(text_stream(tokenizer)(), ids)
    assert "".join(parts) == tokenizer.decode(ids)
    if name == "gpt2":
        assert "".join(parts) == text
        assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


@EACH
@pytest.mark.parametrize("skip_special", [True, False])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tokens_at_all(name: str, skip_special: bool, data: st.DataObject) -> None:
    tokenizer = load(name)
    size = tokenizer.get_vocab_size()
    # Low ids are where bytes and special tokens are.
    ids = data.draw(st.lists(st.one_of(st.integers(0, min(size, 270) - 1), st.integers(0, size + 3)), max_size=40))
    parts, _ = pushed(TextStreams(tokenizer, skip_special)()(), ids)
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=skip_special)


def test_bytes_of_a_character_wait_for_it() -> None:
    tokenizer = load("gpt2")
    ids = tokenizer.encode("🙂").ids
    assert len(ids) > 1
    stream = text_stream(tokenizer)()
    assert [stream.push(token)[0] for token in ids] == [*[""] * (len(ids) - 1), "🙂"]
    assert stream.finish() == ""
    cut = text_stream(tokenizer)()
    assert cut.push(ids[0]) == ("", False)
    assert cut.finish() == "\N{REPLACEMENT CHARACTER}"


def test_a_decoder_that_is_not_known_by_name() -> None:
    tokenizer = ends_of_words()
    ids = [PIECES.index(piece) for piece in ("b", "c", "x</w>", "b", "x</w>", "é", "</w>", "c")]
    parts, _ = pushed(text_stream(tokenizer)(), ids)
    assert "".join(parts).split() == tokenizer.decode(ids).split()


def reference(text: str, stops: list[str], include: bool = False) -> tuple[str, bool]:
    """By trying every end: the first that completes a stop string, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            return text[:end] if include else text[: end - max(map(len, met))], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("abé日🙂 \n"), max_size=40), stops=st.lists(STOPS, min_size=1, max_size=4), include=st.booleans())
def test_stop_strings_wherever_tokens_end(text: str, stops: list[str], include: bool) -> None:
    tokenizer = load("gpt2")
    expected, stopped = reference(text, stops, include)
    words = tokenizer.encode(text).ids
    letters = [token for character in text for token in tokenizer.encode(character).ids]
    for ids in (words, letters):
        parts, met = pushed(TextStreams(tokenizer)(stops, include)(), ids)
        assert ("".join(parts), met) == (expected, stopped)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.sampled_from("ab "), max_size=30),
    stops=st.lists(PLAIN_STOPS, min_size=1, max_size=3),
)
def test_nothing_is_held_longer_than_it_must(text: str, stops: list[str]) -> None:
    stream = TextStreams(load("gpt2"))(stops)()
    out = ""
    for at in range(1, len(text) + 1):
        (token,) = load("gpt2").encode(text[at - 1]).ids
        delta, stopped = stream.push(token)
        out += delta
        if stopped:
            return
        held = max(k for stop in stops for k in range(len(stop)) if text[:at].endswith(stop[:k]))
        assert out == text[: at - held]


def test_a_stream_that_has_stopped_gives_nothing_more() -> None:
    tokenizer = load("gpt2")
    stream = text_stream(tokenizer, ["b"])()
    assert [stream.push(tokenizer.encode(c).ids[0]) for c in "abc"] == [("a", False), ("", True), ("", True)]
    assert stream.finish() == ""


def test_candidates_do_not_share_what_is_held() -> None:
    tokenizer = load("gpt2")
    make = text_stream(tokenizer, ["ab"])
    (a,), (b,) = tokenizer.encode("a").ids, tokenizer.encode("b").ids
    first, second = make(), make()
    assert first.push(a) == ("", False)
    assert second.push(b) == ("b", False)
    assert first.finish() == "a"


def test_a_token_costs_microseconds() -> None:
    """Typical: English words, two stop strings. The bound is far above what it takes (1 us), for busy machines."""
    tokenizer = load("gpt2")
    ids = tokenizer.encode(" ".join(TEXTS[:1] * 100)).ids
    make = text_stream(tokenizer, ["\n\n", "User:"])
    pushed(make(), ids)
    best = min(_seconds(make(), ids) for _ in range(5))
    assert best / len(ids) < 10e-6


def _seconds(stream: Any, ids: list[int]) -> float:
    began = time.perf_counter()
    for token in ids:
        stream.push(token)
    return time.perf_counter() - began
