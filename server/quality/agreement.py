"""What several answers to one question say together: a vote over short answers, a medoid over texts, the support each has from the others.

A vote counts answers that are equal once written alike. Texts are compared by their embeddings, which are passed in; embeddings hardly
see a flipped number or a negation, so pairs that differ in those count as less alike.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from native.score import FEATURES, Pair
from server.core import FloatArray

# What is left of the similarity of two texts that each have a number that the other lacks, that have the same numbers each more often than
# the other, or of which one alone negates.
NUMBERS_DIFFER, COUNTS_DIFFER, NEGATION_DIFFERS = 0.5, 0.75, 0.6
ALIKE = 0.75  # texts at least so similar are said to agree
_LONGEST_CLOSED = 60  # characters; a longer answer is a text, unless it is JSON
_LOW, _HIGH = 0.51, 0.99  # accuracies are held within: a member is never worth nothing, and never beyond appeal
_ARTICLES = (
    "a an the der die das ein eine einen dem den le la les un une des el los las una unos unas il lo gli i uno de het een o os as um uma"
)
_FUNCTION_WORDS = (
    "the a an and or of in on at to for from by with as is are was were be been it its this that these those he she they his her their "
    "has have had who which what when where how not no also known but into than then there i you we according"
)
_UNITS = {
    "percent": "%", "pct": "%", "dollars": "$", "dollar": "$", "usd": "$", "euros": "€", "euro": "€", "eur": "€",
    "kilometers": "km", "kilometres": "km", "kilometer": "km", "kilometre": "km", "meters": "m", "metres": "m", "meter": "m", "metre": "m",
    "kilograms": "kg", "kilogram": "kg", "grams": "g", "gram": "g", "pounds": "lb", "pound": "lb", "lbs": "lb", "hours": "h", "hour": "h",
    "hrs": "h", "minutes": "min", "minute": "min", "mins": "min", "seconds": "s", "second": "s", "secs": "s", "degrees": "°", "degree": "°",
    "years": "year", "days": "day", "weeks": "week", "months": "month", "miles": "mile", "inches": "inch", "feet": "foot", "ft": "foot",
}  # fmt: skip
_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty"
)
_NUMBER_WORDS = {word: number for number, word in enumerate(_SMALL.split())}
_DROPPED, _EMPTY = frozenset(_ARTICLES.split()), frozenset(_FUNCTION_WORDS.split())
_NUMBER = re.compile(r"[-−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+(?![\d.]))?|[-−]?\.\d+")
_MARKED = re.compile(r"(?:####|\\boxed\{|(?:the\s+)?(?:final\s+)?answer\s*(?:is|:))\s*(.+)", re.IGNORECASE | re.DOTALL)
_CHOICE = re.compile(r"\(?([A-Ja-j])[).:]?(?:\s|$)")
_NEGATION = FEATURES.index("negation")


@dataclass(slots=True, frozen=True)
class Agreement:
    """What the answers decided.

    `index`: the chosen answer, the first of those that say the same; `share` in [0, 1]: the weight of what agrees with it (a vote), or how
    alike the others are to it on average (a medoid); `margin`: by how much it leads the next different answer, 0 in a tie; `shares`: the
    same for each answer; `dissent`: why answers were counted as different, in words.
    """

    index: int
    share: float
    margin: float
    shares: tuple[float, ...]
    dissent: tuple[str, ...] = ()

    @property
    def tie(self) -> bool:
        """Whether the next different answer is as good."""
        return self.margin <= 1e-9 and len(self.shares) > 1


def kind_of(answer: str) -> Literal["closed", "text"]:
    """Closed answers can be compared word for word: JSON, numbers, choices, labels, names. Others are texts."""
    text = answer.strip()
    if _json(text) is not None or (_MARKED.search(text) and len(normal(text)) <= _LONGEST_CLOSED):
        return "closed"
    return "closed" if len(text) <= _LONGEST_CLOSED and len(text.split()) <= 8 and "\n" not in text else "text"


def normal(answer: str) -> str:
    """A closed answer as it is compared.

    JSON becomes canonical; of an answer that marks its result (####, boxed, "the answer is") the result is taken; numbers are parsed
    ("1,000.0" is "1000", "1/2" is "0.5"), units and number words have one name; case, articles and punctuation go.
    """
    text = unicodedata.normalize("NFKC", answer).replace("⁄", "/").strip()
    if (value := _json(text)) is not None:
        return json.dumps(_canonical(value), sort_keys=True, ensure_ascii=False)
    if found := list(_MARKED.finditer(text)):
        text = found[-1][1].strip().split("\n", 1)[0].rstrip("}. ")
    if (choice := _CHOICE.match(text)) and (text[choice.end(1) : choice.end(1) + 1] in tuple(").:") or len(text) == 1):
        return choice[1].lower()
    text = text.casefold().replace("$", " $ ").replace("%", " % ").replace("€", " € ").replace("per cent", "%")
    numbers: list[str] = []

    def keep(match: re.Match[str]) -> str:
        numbers.append(_number(match[0]))
        return f" \0{len(numbers) - 1} "

    text = _NUMBER.sub(keep, text)
    words = re.findall(r"\0\d+|[^\W_]+(?:['’][^\W_]+)*|[%$€°]", text)
    kept = [numbers[int(w[1:])] if w[0] == "\0" else str(_NUMBER_WORDS.get(w, _UNITS.get(w, w))) for w in words if w not in _DROPPED]
    if "$" in kept or "€" in kept:  # before or behind the number
        kept = [w for w in kept if w not in "$€"] + [w for w in kept if w in "$€"]
    return " ".join(kept) or text.strip()


def vote(answers: Sequence[str], weights: Sequence[float] | None = None) -> Agreement:
    """The answer that most say, for closed answers.

    Args:
        answers: at least one.
        weights: how often each answer's giver is right on such questions, in (0, 1); it counts log(p / (1 - p)) (Nitzan and Paroush
            1982, the best weights for independent givers of two choices). None: all count alike.
    """
    assert answers and (weights is None or len(weights) == len(answers)), "one weight for each answer"
    held = np.ones(len(answers)) if weights is None else np.clip(np.asarray(weights, np.float64), _LOW, _HIGH)
    counts = held if weights is None else np.log(held / (1 - held))
    said = [normal(answer) for answer in answers]
    totals: dict[str, float] = {}
    for text, count in zip(said, counts.tolist(), strict=True):
        totals[text] = totals.get(text, 0.0) + count
    whole = sum(totals.values())
    order = sorted(totals, key=lambda text: -totals[text])  # stable: among equals the one that came first
    best = order[0]
    share = totals[best] / whole
    second = totals[order[1]] / whole if len(order) > 1 else 0.0
    dissent = tuple(f"answer {i + 1} says {said[i][:40]!r}, not {best[:40]!r}" for i in range(len(said)) if said[i] != best)
    return Agreement(said.index(best), share, share - second, tuple(totals[text] / whole for text in said), dissent)


def medoid(answers: Sequence[str], vectors: FloatArray) -> Agreement:
    """The text that is most like the others.

    Args:
        answers: at least one.
        vectors: their embeddings, float32[n, H], of any length.
    """
    assert len(answers) == len(vectors) > 0, "one vector for each answer"
    n = len(answers)
    if n == 1:
        return Agreement(0, 1.0, 1.0, (1.0,))
    lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    unit = (vectors / lengths).astype(np.float64)
    alike = np.clip(unit @ unit.T, 0.0, 1.0)
    numbers, negated = [_numbers(answer) for answer in answers], [_negated(answer) for answer in answers]
    reasons: dict[tuple[int, int], str] = {}
    for i in range(n):
        for j in range(i):
            factor, why = _conflict(numbers[i], numbers[j], negated[i], negated[j])
            alike[i, j] = alike[j, i] = alike[i, j] * factor
            reasons[j, i] = why
    np.fill_diagonal(alike, 0.0)
    shares = alike.sum(axis=1) / (n - 1)
    best = int(np.argmax(shares))
    others = [i for i in range(n) if i != best and not (alike[best, i] >= ALIKE and _same(reasons, best, i))]
    margin = float(shares[best] - max(shares[others])) if others else float(shares[best])
    dissent = []
    for i in others:
        why = reasons[min(i, best), max(i, best)] or f"they are little alike ({alike[best, i]:.2f})"
        dissent.append(f"answer {i + 1} differs from answer {best + 1}: {why}")
    return Agreement(best, float(shares[best]), margin, tuple(float(s) for s in shares), tuple(dissent))


def agree(answers: Sequence[str], vectors: FloatArray | None = None, weights: Sequence[float] | None = None) -> Agreement:
    """A vote where all answers are closed or no vectors are given, else the medoid."""
    if vectors is None or all(kind_of(answer) == "closed" for answer in answers):
        return vote(answers, weights)
    return medoid(answers, vectors)


def support(prompt: str, answers: Sequence[str]) -> FloatArray:
    """float32[n] in [0, 1]: how much of each answer the others say too; NaN where there are no others.

    The mean over the other answers of the overlap coefficient: the weight of the words that both have over that of the one with fewer,
    so that a bare name and a sentence around it agree. Words of the prompt and function words say nothing; long words say more.
    """
    asked = set(_words(prompt))
    said = [{w for w in _words(answer) if w not in asked and w not in _EMPTY} for answer in answers]
    masses = [sum(map(_weight, words)) for words in said]
    found = np.full(len(answers), np.nan, np.float32)
    for i, words in enumerate(said):
        shared = [sum(map(_weight, words & other)) / max(min(masses[i], masses[j]), 1e-6) for j, other in enumerate(said) if j != i]
        if shared:
            found[i] = min(sum(shared) / len(shared), 1.0)
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def _weight(word: str) -> float:
    return 4.0 if word[0].isdigit() else min(len(word), 8.0)


def _json(text: str) -> Any:
    """The object or array that a text is, else None."""
    if text.startswith("```") and text.endswith("```"):
        text = text[3:-3].partition("\n")[2].strip()
    if not text or text[0] not in "{[" or len(text) > 1_000_000:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_canonical(inner) for inner in value]
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return value


def _number(text: str) -> str:
    """A number in its shortest form; what is too long to be one stays as it is."""
    plain = text.replace(",", "").replace("−", "-")
    if len(plain) > 40:
        return plain
    try:
        top, _, bottom = plain.partition("/")
        value = Fraction(Decimal(top)) / int(bottom) if bottom else Fraction(Decimal(top))
    except (InvalidOperation, ZeroDivisionError, ValueError):
        return plain
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.12g}"


def _numbers(text: str) -> Counter[str]:
    """How often each number stands in a text."""
    found = Counter(map(_number, _NUMBER.findall(text[:20_000])))
    found.update(str(_NUMBER_WORDS[w]) for w in _words(text[:20_000]) if w in _NUMBER_WORDS and w not in ("one", "zero"))
    return found


def _negated(text: str) -> bool:
    return bool(Pair("", text[:20_000]).features()[_NEGATION] > 0)


def _conflict(first: Counter[str], second: Counter[str], negated: bool, other_negated: bool) -> tuple[float, str]:
    """What is left of two texts' similarity, and why. A text that only leaves numbers out contradicts nothing."""
    factor, why = 1.0, []
    more, less = first - second, second - first
    if more and less:
        factor *= NUMBERS_DIFFER if set(first) != set(second) else COUNTS_DIFFER
        why.append(f"the numbers {', '.join(sorted(more)[:3])} and {', '.join(sorted(less)[:3])}")
    if negated != other_negated:
        factor *= NEGATION_DIFFERS
        why.append("one of them negates")
    return factor, "; ".join(why)


def _same(reasons: dict[tuple[int, int], str], i: int, j: int) -> bool:
    return not reasons[min(i, j), max(i, j)]
