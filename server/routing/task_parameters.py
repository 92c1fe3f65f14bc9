"""What a request in plain words says besides its task: languages, labels, lengths.

Read by rules from the instruction, never from quotations; what is not said stays empty. They do not take part in the choice of the task.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from server.routing.task_languages import CODES, NAMES
from server.routing.task_request import Part, without_quotes

_SMALL = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
_NUMBERS = {name: number for number, name in enumerate(_SMALL.split(), 1)}
_NUMBERS |= {"a": 1, "single": 1, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "hundred": 100}
_UNITS = {"word": "words", "sentence": "sentences", "line": "sentences", "character": "characters", "paragraph": "paragraphs"}
_UNITS |= {"bullet": "bullets", "point": "bullets"}
_LENGTH = re.compile(
    rf"\b(?P<number>\d[\d,]{{0,6}}|{'|'.join(_NUMBERS)})[\s-]+(?:[a-z]+[\s-]+)?(?P<unit>{'|'.join(_UNITS)})s?\b(?!\s+of\s+view)",
    re.IGNORECASE,
)
_TOP = re.compile(rf"\b(?:top|best|first)[\s-]+(\d{{1,4}}|{'|'.join(n for n in _NUMBERS if n != 'a')})\b", re.IGNORECASE)
_LANGUAGE = re.compile(rf"(?<!\w)(?:{'|'.join(sorted(map(re.escape, NAMES), key=len, reverse=True))})(?!\w)", re.IGNORECASE)
# Codes that are English words too stand for languages beside an arrow alone.
_PLAIN_CODES = "|".join(code for code in CODES if code not in {"it", "is", "no", "la", "el", "hi", "id", "he", "as", "so"})
_ARROW = r"\s*(?:->|=>|→|–>|>|-|/|2)\s*"
_CODES = re.compile(
    rf"(?<!\w)(?:({'|'.join(CODES)}){_ARROW}({'|'.join(CODES)})|({_PLAIN_CODES})\s+to\s+({_PLAIN_CODES}))(?!\w)", re.IGNORECASE
)
_TO_CODE = re.compile(rf"\b(?:to|into)\s+({_PLAIN_CODES})(?!\w)", re.IGNORECASE)
_FROM = re.compile(r"\b(?:from|out of|speak|read|understand|know|desde|del|de l'|du|aus dem|vom)\s+(?:the\s+)?$", re.IGNORECASE)
_THEN_TO = re.compile(r"^[\w\s,]{0,24}?(?:->|=>|→|\b(?:to|into|in|auf|ins|en|al)\b)\s*(?:the\s+)?$", re.IGNORECASE)

_LISTED = re.compile(r"[\[{(]([^\[\]{}()\n]{3,200})[\]})]")
_QUOTED = re.compile(r"\"([^\"\n]{1,60})\"|“([^”\n]{1,60})”|(?<!\w)'([^\n]{1,60}?)'(?!\w)")
_CLAUSE = re.compile(r"[?.!:;\n]+|\s(?:-|–|—|->|=>)\s|[\"“”]")
_SEPARATOR = re.compile(r"\s*[,/|]\s*(?:(?:or|and|and/or|oder|und|ou|et|o|y)\s+)?|\s+(?:or|vs\.?|versus|oder|ou|o)\s+", re.IGNORECASE)
_LAST_AND = re.compile(r"\s+(?:and|und|et|y)\s+", re.IGNORECASE)
_BEFORE_LIST = re.compile(
    r"^.*\b(?:into|as|between|one of|either|labels?|categories|category|classes|options?|topics?|tags?|set|is it|is this|shows?|from|with)"
    r"\s+(?:an?\s+|the\s+)?",
    re.IGNORECASE,
)
_AFTER_LIST = re.compile(
    r",?\s*(?:\b(?:pick|choose|select|which|where|for|please|does|do|in the|on the|applies|to the)\b.*)$", re.IGNORECASE
)
_ARTICLE = re.compile(r"^(?:an?|the|ein|eine|un|une|una)\s+", re.IGNORECASE)

_TRANSLATES = {"translation"}
_SPEAKS = {"text-to-speech", "automatic-speech-recognition"}
_LABELLED = {"zero-shot-classification", "zero-shot-image-classification"}
_WRITES = {"summarization", "text-generation", "image-to-text"}
_RANKS = {"text-ranking", "fill-mask"}


@dataclass(slots=True, frozen=True)
class TaskParameters:
    """Empty, or None, where the request does not say. Languages are ISO 639-1 codes; `max_*` bound the answer.

    `aspect` is the kind of the task that the nearest phrase stands for, such as "sentiment" or "spam" of text-classification.
    """

    source_language: str = ""
    target_language: str = ""
    labels: tuple[str, ...] = ()
    max_words: int | None = None
    max_sentences: int | None = None
    max_characters: int | None = None
    max_paragraphs: int | None = None
    max_bullets: int | None = None
    top_k: int | None = None
    aspect: str = ""


def read_parameters(request: str, task: str, parts: Sequence[Part], aspect: str = "") -> TaskParameters:
    """What the cleaned `request` says for `task`. `parts`: where the instruction may be, the likeliest first."""
    source = target = ""
    labels: tuple[str, ...] = ()
    lengths: dict[str, int] = {}
    top_k = None
    for part in parts:
        said = without_quotes(part.text)
        if task in _TRANSLATES and not (source or target):
            source, target = languages_in(said)
        if task in _SPEAKS and not (source or target):
            spoken = languages_in(said)[1]
            source, target = (spoken, "") if task == "automatic-speech-recognition" else ("", spoken)
        if task in _WRITES and not lengths:
            lengths = lengths_in(said)
        if task in _RANKS and top_k is None:
            top_k = _top_in(said)
        if task in _LABELLED and not labels:
            labels = labels_in(request[part.start : part.end + 200])
    return TaskParameters(source, target, labels, **lengths, top_k=top_k, aspect=aspect)


def languages_in(said: str) -> tuple[str, str]:
    """(source, target) as ISO 639-1 codes. Of two languages the first is the source, unless the words say otherwise."""
    pair = _CODES.search(said)
    if pair:
        return (pair[1] or pair[3]).lower(), (pair[2] or pair[4]).lower()
    found = [(NAMES[match[0].lower()], match.start(), match.end()) for match in _LANGUAGE.finditer(said)]
    if not found:
        to_code = _TO_CODE.search(said)
        return "", to_code[1].lower() if to_code else ""
    if len(found) == 1:
        code, start, _ = found[0]
        return (code, "") if _FROM.search(said[:start]) else ("", code)
    (first, start, end), (second, later, _) = found[0], found[1]
    from_second = bool(_FROM.search(said[:later])) and not _FROM.search(said[:start]) and not _THEN_TO.match(said[end:later])
    return (second, first) if from_second else (first, second)


def lengths_in(said: str) -> dict[str, int]:
    """Bounds by the fields' names of TaskParameters, such as {"max_words": 50}; the first of each unit counts."""
    found: dict[str, int] = {}
    for match in _LENGTH.finditer(said):
        number = _number(match["number"])
        if number:
            found.setdefault(f"max_{_UNITS[match['unit'].lower()]}", number)
    return found


def labels_in(said: str) -> tuple[str, ...]:
    """The first list of two labels or more: in brackets, in quotation marks, or a clause such as "sports, politics or finance"."""
    for match in _LISTED.finditer(said):
        items = _items(match[1])
        if len(items) >= 2:
            return items
    quoted = list(_QUOTED.finditer(said))
    if len(quoted) >= 2 and re.fullmatch(r"\s*(?:,|or|and|,\s*(?:or|and)|/|vs\.?)\s*", said[quoted[0].end() : quoted[1].start()]):
        return tuple(next(filter(None, match.groups())) for match in quoted)
    for clause in _CLAUSE.split(said):
        items = _items(clause)
        if len(items) >= 2:
            return items
    return ()


def _items(clause: str) -> tuple[str, ...]:
    """The items of a list, or () where the clause is a sentence."""
    pieces = [piece for piece in _SEPARATOR.split(_AFTER_LIST.sub("", clause.strip())) if piece.strip()]
    if not pieces:
        return ()
    pieces[0] = _BEFORE_LIST.sub("", pieces[0])
    *front, last = pieces
    ends = _LAST_AND.split(last)
    pieces = [*front, *ends] if len(ends) == 2 else pieces
    items = [_ARTICLE.sub("", piece.strip(" \t'\"`*")) for piece in pieces]
    if any(not 1 <= len(item.split()) <= 4 for item in items) or len({item.lower() for item in items}) != len(items):
        return ()
    return tuple(items)


def _top_in(said: str) -> int | None:
    match = _TOP.search(said)
    return _number(match[1]) if match else None


def _number(text: str) -> int:
    digits = text.replace(",", "")
    return int(digits) if digits.isdigit() else _NUMBERS[text.lower()]
