"""Languages, labels and lengths in plain words."""

from __future__ import annotations

import pytest

from server.routing.task_languages import CODES, NAMES
from server.routing.task_parameters import labels_in, languages_in, lengths_in, read_parameters
from server.routing.task_request import clean, content_of, parts_of


@pytest.mark.parametrize(
    ("said", "languages"),
    [
        ("translate to French", ("", "fr")),
        ("translate from English to Spanish", ("en", "es")),
        ("translate to Spanish from English", ("en", "es")),
        ("into German, from the Dutch", ("nl", "de")),
        ("German to English please", ("de", "en")),
        ("en -> de", ("en", "de")),
        ("de-en", ("de", "en")),
        ("fr to pt", ("fr", "pt")),
        ("it -> en", ("it", "en")),
        ("translate it to Italian", ("", "it")),
        ("translate this to pl", ("", "pl")),
        ("translate it to me", ("", "")),
        ("I don't speak Vietnamese, what does this say", ("vi", "")),
        ("turn the Spanish text into English", ("es", "en")),
        ("übersetze ins Französische", ("", "fr")),
        ("traduis en anglais", ("", "en")),
        ("traduce al inglés", ("", "en")),
        ("in 日本語", ("", "ja")),
        ("a friend of mine", ("", "")),
    ],
)
def test_languages(said: str, languages: tuple[str, str]) -> None:
    assert languages_in(said) == languages


def test_every_language_has_a_name_and_no_name_two_codes() -> None:
    assert set(NAMES.values()) == set(CODES) and len(set(CODES)) == len(CODES)
    assert all(name == name.lower() for name in NAMES)


@pytest.mark.parametrize(
    ("said", "lengths"),
    [
        ("in two sentences", {"max_sentences": 2}),
        ("at most 150 words", {"max_words": 150}),
        ("under 1,500 characters", {"max_characters": 1500}),
        ("a one-sentence summary", {"max_sentences": 1}),
        ("a 50-word abstract", {"max_words": 50}),
        ("five bullet points", {"max_bullets": 5}),
        ("one paragraph of 80 words", {"max_paragraphs": 1, "max_words": 80}),
        ("in a single line", {"max_sentences": 1}),
        ("from three points of view", {}),
        ("in other words, briefly", {}),
    ],
)
def test_lengths(said: str, lengths: dict[str, int]) -> None:
    assert lengths_in(said) == lengths


@pytest.mark.parametrize(
    ("said", "labels"),
    [
        ("sort this into sports, politics or finance", ("sports", "politics", "finance")),
        ("pick one of: urgent, not urgent", ("urgent", "not urgent")),
        ("from [news, opinion]", ("news", "opinion")),
        ('choose between "late delivery" and "wrong item"', ("late delivery", "wrong item")),
        ("tag as travel / cooking / tech", ("travel", "cooking", "tech")),
        ("is it a kitchen, a bathroom or a bedroom?", ("kitchen", "bathroom", "bedroom")),
        ("labels: red; they are many", ()),
        ("Which label fits best? I like it. It works.", ()),
        ("categories: lead, customer and partner", ("lead", "customer", "partner")),
        ("labels: a, A", ()),
    ],
)
def test_labels(said: str, labels: tuple[str, ...]) -> None:
    assert labels_in(said) == labels


def test_only_what_belongs_to_the_task_is_read() -> None:
    request = clean("Summarize the German report in 40 words: one, two or three")
    parts = parts_of(request)
    found = read_parameters(request, "summarization", parts)
    assert (found.max_words, found.target_language, found.labels) == (40, "", ())
    assert read_parameters(request, "fill-mask", parts).max_words is None


def test_quotations_are_content() -> None:
    request = clean('how do you say "I speak French" in Italian')
    parts = parts_of(request)
    assert read_parameters(request, "translation", parts).target_language == "it"
    assert content_of(request, parts[0]) == "I speak French"


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("translate this", ["whole"]),
        ("Translate to French: the cat sat", ["whole", "lead"]),
        ("the cat sat on the mat\n\ntranslate to French", ["whole", "lead", "tail"]),
        ("word " * 200, ["whole", "tail"]),
        ("x" * 500, ["whole"]),
        ("Summarize:\n" + "A long line. " * 60, ["whole", "tail"]),
    ],
)
def test_parts(text: str, kinds: list[str]) -> None:
    request = clean(text)
    parts = parts_of(request)
    assert [part.kind for part in parts] == kinds
    assert all(part.text == request[part.start : part.end].replace("\n", " ").strip() and len(part.text) <= 200 for part in parts)
