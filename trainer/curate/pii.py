"""Personal data in texts: found by patterns with checks, and replaced by placeholders that stay the same within a row.

The seven kinds that a pattern can tell are found by the recognizers of this file: checksums for cards and IBANs, the standard library for
addresses of machines, words nearby for telephone numbers. Any other kind that Presidio has a pattern for ("UK_NHS", "CRYPTO", ...) is
found by Presidio's own recognizer, without its language models. Names of people are found by a token classifier where one is configured.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from server.errors import FailedPrecondition, InvalidArgument, near_names
from trainer.curate.rows import Row

Found = tuple[int, int, str]
"""Start and end (exclusive) in code points, and the kind."""

Finder = Callable[[str], Iterator[Found]]

# Nothing that the patterns find is without one of these; most texts have none and cost a microsecond.
_WORTH_A_LOOK = re.compile(r"@|://|www\.|\.(?:com|org|net|edu|gov|info|io)\b|\d[\d\s().:/-]{3,}\d|::|[0-9a-f]:[0-9a-f]", re.IGNORECASE)
_EMAIL = re.compile(r"(?<![\w@])[\w!#$%&'*+/=?^`{|}~.-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w@])")
_URL = re.compile(
    r"(?:https?|ftp)://[^\s<>\"'()\[\]]{3,2000}|(?<![\w.@-])www\d{0,3}\.[^\s<>\"'()\[\]]{3,2000}"
    r"|(?<![\w.@/-])(?:[a-z0-9-]{2,63}\.){1,4}(?:com|org|net|edu|gov|info|io)(?![\w.-]*@|[\w-])(?:/[^\s<>\"'()\[\]]{0,2000})?",
    re.IGNORECASE,
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?=[0-9a-f:.]{0,45}:[0-9a-f:.]{0,45}:)[0-9a-f:.]{3,45}(?![\w:])", re.IGNORECASE)
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]){11,30}(?![A-Za-z0-9])", re.IGNORECASE)
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){11,18}(?![\w-]|\.\d)")
_SSN = re.compile(r"(?<![\w-])(\d{3})([- .])(\d{2})\2(\d{4})(?![\w-])")
_PHONE = re.compile(
    r"(?<![\w.$€£#-])(?<!\d,)(?:\+\s?|00)?\(?\d(?:[\d ().\-/\u00a0]{5,20})\d(?:\s?(?:x|ext\.?)\s?\d{1,6})?(?![\w%]|[.,-]\d)", re.IGNORECASE
)
_PHONE_WORDS = re.compile(
    r"\b(?:phones?|tele?phone|tel|call(?:ed|ing)?|cell|mobile|mob|fax|whatsapp|sms|dial|ring|contact|reach|handy|t[ée]l[ée]phone|telefon\w*|"
    r"tel[ée]fono|number|numbers|hotline)\b",
    re.IGNORECASE,
)
_CARD_WORDS = re.compile(r"\b(?:card|visa|mastercard|amex|maestro|karte|carte|tarjeta)\b", re.IGNORECASE)
_NEARBY = 40  # code points before a number in which a word may say what it is
_DATE = re.compile(r"(?:\d{4}[-/.][01]?\d[-/.][0-3]?\d|[0-3]?\d[-/.][0-3]?\d[-/.](?:\d{4}|\d\d))(?:[ T].*)?|\d{4}\s?[-/]\s?\d{4}")
_GROUPS = re.compile(r"[\d]+")


def _emails(text: str) -> Iterator[Found]:
    for match in _EMAIL.finditer(text):
        yield match.start(), match.end(), "EMAIL_ADDRESS"


def _urls(text: str) -> Iterator[Found]:
    for match in _URL.finditer(text):
        end = match.start() + len(match.group().rstrip(".,;:!?"))
        if text[match.end() : match.end() + 1] != "@":
            yield match.start(), end, "URL"


def _ips(text: str) -> Iterator[Found]:
    for pattern in (_IPV4, _IPV6):
        for match in pattern.finditer(text):
            try:
                address = ipaddress.ip_address(match.group().rstrip("."))
            except ValueError:
                continue
            # 12::13 is an address too, and more often something else.
            if address.version == 4 or any(len(group) > 2 for group in match.group().split(":")):
                yield match.start(), match.start() + len(match.group().rstrip(".")), "IP_ADDRESS"


def _ibans(text: str) -> Iterator[Found]:
    """By the checksum of ISO 13616: the number, its first four at the end, letters as 10 to 35, is 1 modulo 97."""
    for match in _IBAN.finditer(text):
        for end in range(match.end(), match.start() + 14, -1):  # what follows may look like a part of it
            value = re.sub(r"[ -]", "", text[match.start() : end]).upper()
            if len(value) >= 15 and text[end - 1] not in " -" and int("".join(str(int(c, 36)) for c in value[4:] + value[:4])) % 97 == 1:
                yield match.start(), end, "IBAN_CODE"
                break


def _cards(text: str) -> Iterator[Found]:
    """By Luhn's checksum, and the first digits of the large schemes or a word nearby."""
    for match in _CARD.finditer(text):
        digits = [int(c) for c in match.group() if c.isdigit()]
        doubled = [n if place % 2 == 0 else (2 * n - 9 if n > 4 else 2 * n) for place, n in enumerate(reversed(digits))]
        schemes = digits[0] in (2, 3, 4, 5, 6) or digits[:4] == [1, 8, 0, 0]
        if sum(doubled) % 10 == 0 and (schemes or _CARD_WORDS.search(text, max(0, match.start() - _NEARBY), match.start())):
            yield match.start(), match.end(), "CREDIT_CARD"


def _ssns(text: str) -> Iterator[Found]:
    for match in _SSN.finditer(text):
        area, _, group, serial = match.groups()
        if area not in ("000", "666") and area < "900" and group != "00" and serial != "0000":
            yield match.start(), match.end(), "US_SSN"


def _phones(text: str) -> Iterator[Found]:
    """Seven to fifteen digits that begin as an international number, are grouped as one, or follow a word such as "call"."""
    for match in _PHONE.finditer(text):
        words, digits = match.group(), sum(c.isdigit() for c in match.group())
        if not 7 <= digits <= 15 or _DATE.fullmatch(words) or _SSN.fullmatch(words):
            continue
        groups = [len(one) for one in _GROUPS.findall(words)]
        grouped = len(groups) >= 3 and max(groups) <= 5 and min(groups) >= 2
        told = _PHONE_WORDS.search(text, max(0, match.start() - _NEARBY), match.start()) is not None
        if words[0] == "+" or words.startswith("00") or "(" in words or grouped or told:
            yield match.start(), match.end(), "PHONE_NUMBER"


# In the order in which they claim a place in the text.
OURS: dict[str, Finder] = {
    "EMAIL_ADDRESS": _emails,
    "URL": _urls,
    "IP_ADDRESS": _ips,
    "IBAN_CODE": _ibans,
    "CREDIT_CARD": _cards,
    "US_SSN": _ssns,
    "PHONE_NUMBER": _phones,
}


@dataclass(slots=True, frozen=True)
class Scrubber:
    """Finds and replaces the kinds it was made for. `others`: finders that look at every text, such as Presidio's."""

    ours: tuple[Finder, ...]
    others: tuple[Finder, ...] = ()

    @classmethod
    def of(cls, kinds: Iterable[str]) -> Scrubber:
        """Raises InvalidArgument for a kind that nobody knows, FailedPrecondition where Presidio is needed and not installed."""
        wanted = list(dict.fromkeys(kinds))
        foreign = [kind for kind in wanted if kind not in OURS]
        return cls(tuple(finder for kind, finder in OURS.items() if kind in wanted), presidio(foreign) if foreign else ())

    def find(self, text: str) -> list[Found]:
        """What was found, by place; where two overlap, the one of the earlier finder."""
        finders = (*(self.ours if _WORTH_A_LOOK.search(text) else ()), *self.others)
        taken: list[Found] = []
        for finder in finders:
            for start, end, kind in finder(text):
                if not any(start < other_end and begin < end for begin, other_end, _ in taken):
                    taken.append((start, end, kind))
        return sorted(taken)

    def scrub(self, row: Row, names: Sequence[str] = ()) -> tuple[Row, dict[str, int]]:
        """The row with placeholders such as <EMAIL_ADDRESS_1>, the same for the same words everywhere in it, and how many of each kind.

        `names`: words that name people in this row.
        """
        places = _Places(self, names)
        text, answer, rejected = places.replaced(row.text), places.replaced(row.answer), places.replaced(row.rejected)
        messages = tuple((role, places.replaced(content)) for role, content in row.messages)
        if not places.counts:
            return row, {}
        answer = row.answer if row.label else answer
        # Tokens may hold pieces of what was replaced.
        return replace(row, text=text, answer=answer, rejected=rejected, messages=messages, teacher_tokens=""), places.counts


class _Places:
    """The placeholders of one row."""

    def __init__(self, scrubber: Scrubber, names: Sequence[str]) -> None:
        self._scrubber = scrubber
        self._names = re.compile("|".join(rf"(?<!\w){re.escape(n)}(?!\w)" for n in sorted(names, key=len, reverse=True))) if names else None
        self._known: dict[str, str] = {}
        self.counts: dict[str, int] = {}

    def replaced(self, text: str) -> str:
        found = self._scrubber.find(text)
        if self._names is not None:
            spans = [(match.start(), match.end(), "PERSON") for match in self._names.finditer(text)]
            found = sorted([*found, *(s for s in spans if not any(s[0] < end and start < s[1] for start, end, _ in found))])
        pieces, last = [], 0
        for start, end, kind in found:
            pieces += [text[last:start], self._placeholder(text[start:end], kind)]
            last = end
        return "".join([*pieces, text[last:]])

    def _placeholder(self, words: str, kind: str) -> str:
        key = f"{kind}\0{words.casefold()}"
        if key not in self._known:
            self.counts[kind] = self.counts.get(kind, 0) + 1
            self._known[key] = f"<{kind}_{self.counts[kind]}>"
        return self._known[key]


def presidio(kinds: Sequence[str]) -> tuple[Finder, ...]:
    """Finders by Presidio's pattern recognizers, without its analyzer, which would want a language model.

    Raises InvalidArgument, FailedPrecondition.
    """
    try:
        from presidio_analyzer import PatternRecognizer, predefined_recognizers
    except ImportError:
        message = f"curation.pii_entities names {kinds[0]}, which Presidio finds. Run: pip install 'understudy-server[trainer]'"
        raise FailedPrecondition(message, package="presidio-analyzer") from None
    known: dict[str, PatternRecognizer] = {}
    for name in dir(predefined_recognizers):
        one = getattr(predefined_recognizers, name)
        if isinstance(one, type) and issubclass(one, PatternRecognizer) and one is not PatternRecognizer:
            try:
                recognizer = one()  # type: ignore[call-arg]
            except TypeError:  # some ask for services
                continue
            for kind in recognizer.supported_entities:
                known.setdefault(kind, recognizer)
    for kind in kinds:
        if kind not in known:
            message = f"curation.pii_entities has {kind!r}; {near_names(kind, [*OURS, *sorted(known)])}"
            raise InvalidArgument(message, field="curation.pii_entities")
    return tuple(by_recognizer(known[kind], kind) for kind in kinds)


def by_recognizer(recognizer: object, kind: str) -> Finder:
    """What a recognizer of Presidio finds of a kind, where its score is at least 0.4."""

    def find(text: str) -> Iterator[Found]:
        for one in recognizer.analyze(text, [kind], None):  # type: ignore[attr-defined]
            if one.score >= _SURE:
                yield one.start, one.end, kind

    return find


_SURE = 0.4  # Presidio's scores: patterns that want context words have less without them
