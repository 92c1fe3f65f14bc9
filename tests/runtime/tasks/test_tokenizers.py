"""The text tokenizer: cuts as the `tokenizers` library makes them, refusals by item, nothing inherited from the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from server.errors import InputTooLong, InvalidArgument, ModelRejected
from server.runtime.tokenizers import TextTokenizer, Tokens, sequence_ids, truncated_positions, window_positions
from tests.runtime.tasks.models import Reference

WORDS = ["card", "lost", "my", "in", "the", "Zürich", "transfer", "late", "radio", "!"]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=60).map(" ".join)


@pytest.fixture(scope="module")
def path(embedder: Reference) -> Path:
    return embedder.folder / "tokenizer.json"


@pytest.fixture(scope="module")
def raw(path: Path) -> Any:
    return Tokenizer.from_file(str(path))


@settings(max_examples=60, deadline=None)
@given(first=texts, second=texts, limit=st.integers(6, 70), only_first=st.booleans())
def test_pairs_are_cut_as_the_library_cuts_them(raw: Any, first: str, second: str, limit: int, only_first: bool) -> None:
    raw.no_truncation()
    whole = raw.encode(first, second)
    if len(whole.ids) <= limit:
        return
    if only_first and len(raw.encode(second, add_special_tokens=False).ids) + 4 > limit:
        with pytest.raises(InputTooLong):
            truncated_positions(sequence_ids(whole), limit, "first")
        return
    positions = truncated_positions(sequence_ids(whole), limit, "first" if only_first else "longest")
    raw.enable_truncation(limit, strategy="only_first" if only_first else "longest_first")
    assert np.array(whole.ids)[positions].tolist() == raw.encode(first, second).ids


@settings(max_examples=60, deadline=None)
@given(first=texts, second=texts, room=st.integers(2, 20), data=st.data())
def test_windows_are_the_library_s_overflow(raw: Any, first: str, second: str, room: int, data: st.DataObject) -> None:
    raw.no_truncation()
    whole = raw.encode(first, second)
    limit = 3 + len(raw.encode(first, add_special_tokens=False).ids) + room
    stride = data.draw(st.integers(0, room - 1))
    ours = [np.array(whole.ids)[positions].tolist() for positions in window_positions(sequence_ids(whole), 1, limit, stride)]
    raw.enable_truncation(limit, stride=stride, strategy="only_second")
    theirs = raw.encode(first, second)
    assert ours == [theirs.ids, *(one.ids for one in theirs.overflowing)]


def test_truncation_and_padding_of_the_file_are_ignored(path: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = TextTokenizer.load(tmp_path / "tokenizer.json", max_tokens=128)
    lengths = [len(encoding.ids) for encoding in ours.encode(["card", "card " * 20])]
    assert lengths == [3, 22]


def test_each_item_fails_alone_and_says_why(path: Path) -> None:
    tokenizer = TextTokenizer.load(path, max_tokens=16)
    inputs: list[Any] = ["card", "", " \n\t", "a\ud800b", "card " * 40, "x" * 5000, None, ("card", ""), "card"]
    fields = [f"texts[{i}]" for i in range(len(inputs))]
    results = tokenizer.encode_within(inputs, fields)
    assert isinstance(results[0], Tokens) and isinstance(results[8], Tokens)
    kinds = [InvalidArgument, InvalidArgument, InvalidArgument, InputTooLong, InputTooLong, InvalidArgument]
    for i, kind in enumerate(kinds, start=1):
        error = results[i]
        assert isinstance(error, kind) and error.metadata["field"] == f"texts[{i}]" and f"texts[{i}]" in str(error)
    assert isinstance(results[7], InvalidArgument)
    too_long = results[4]
    assert isinstance(too_long, InputTooLong) and too_long.metadata["tokens"] == "42" and too_long.metadata["limit"] == "16"


def test_a_text_of_endless_blanks_is_cut_to_its_words(path: Path) -> None:
    tokenizer = TextTokenizer.load(path, max_tokens=16)
    text = "card" + " " * 100_000 + "radio " * 5000
    (tokens,) = tokenizer.encode_within([text], ["texts[0]"], cut="first")
    (expected,) = tokenizer.encode_within(["card " + "radio " * 20], ["texts[0]"], cut="first")
    assert isinstance(tokens, Tokens) and isinstance(expected, Tokens) and tokens.truncated
    assert tokens.encoded.ids.tolist() == expected.encoded.ids.tolist() and len(tokens.encoded.ids) == 16


def _without(text: str, *keys: str) -> str:
    value = json.loads(text)
    for key in keys:
        value.pop(key)
    return json.dumps(value)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: "{}",
        lambda text: "[" * 100_000,
        lambda text: text[: len(text) // 2],
        lambda text: "\x00\xff" * 1000,
        lambda text: _without(text, "model"),
        lambda text: text.replace('"WordPiece"', '"NoSuchModel"'),
        lambda text: text.replace('"[UNK]"', '"[NOPE]"'),
    ],
)
def test_hostile_files_are_refused(path: Path, tmp_path: Path, spoil: Any) -> None:
    target = tmp_path / "tokenizer.json"
    target.write_text(spoil(path.read_text(encoding="utf-8")), encoding="utf-8")
    try:
        tokenizer = TextTokenizer.load(target, max_tokens=128)
    except ModelRejected as error:
        assert "tokenizer.json" in str(error)
    else:
        # A file whose fault shows only with words that it does not know: an item's error, never a crash.
        (result,) = tokenizer.encode_within(["Ωxq"], ["texts[0]"])
        assert isinstance(result, Tokens | InvalidArgument)


def test_a_missing_file_and_a_limit_without_room_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelRejected, match="missing"):
        TextTokenizer.load(tmp_path / "tokenizer.json", max_tokens=128)
    with pytest.raises(ModelRejected, match="no room"):
        TextTokenizer.load(path, max_tokens=3)
