"""Which parts of a request in plain words may hold the instruction, and what remains as the content to work on.

Callers write "Translate to French: the cat sat", or a page of text and then "summarize this". A part is judged by the embedder, so
only its place is decided here, by punctuation and length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Characters. A short request is judged as a whole too; of a long one only the first and the last line are, cut to these lengths:
# an embedding costs about 15 us a character on two cores, and a request may take 5 ms.
SHORT, OPENING, PART = 200, 160, 120

_QUOTES = "\"“”„«»`'‘’"
_END = re.compile(rf"\n|:(?=\s|$)|(?<=\S)\s(?=[{_QUOTES}])|\s(?=(?:->|=>|--|-|–|—)\s)|[?!](?=\s)|\.(?=\s)")
_START = re.compile(rf"\n|(?<=[.!?])\s|(?<=[{_QUOTES}])\s|\s(?:->|=>|--|-|–|—)\s")
_QUOTED = re.compile(r'"([^"\n]+)"|“([^”\n]+)”|«([^»\n]+)»|„([^“”\n]+)[“”]|(?<!\w)\'([^\n]+?)\'(?!\w)|`([^`\n]+)`')
_EDGES = " \t\n:-–—>=" + _QUOTES


@dataclass(slots=True, frozen=True)
class Part:
    """A candidate for the instruction. `start` and `end` are its place in the request as `clean` gives it."""

    kind: str  # whole, lead, tail
    text: str  # on one line
    start: int
    end: int


def clean(text: str) -> str:
    """The request with single spaces and no blank lines; offsets of parts refer to this."""
    return re.sub(r" ?\n[ \n]*", "\n", re.sub(r"[^\S\n]+", " ", text)).strip()


def is_long(request: str) -> bool:
    """Whether most of a cleaned request must be content, so that one part alone can hold the instruction."""
    return len(request) > SHORT


def parts_of(request: str) -> list[Part]:
    """One to three parts of a cleaned request that is not empty, the whole (or the opening of a long one) first."""
    first, last_at = request, 0
    if is_long(request):
        first, last_at = request.split("\n", 1)[0], request.rfind("\n") + 1
    opening = len(first) if len(first) <= SHORT else first.rfind(" ", 0, OPENING)
    spans = [("whole", 0, opening if opening > 0 else OPENING)]
    lead = _lead_end(first)
    if lead:
        spans.append(("lead", 0, lead))
    tail = _tail_start(request, last_at)
    if tail:
        spans.append(("tail", tail, len(request)))
    return [Part(kind, request[start:end].replace("\n", " ").strip(), start, end) for kind, start, end in spans]


def _lead_end(first: str) -> int:
    """Where the first clause ends, or 0 where there is no other."""
    for found in _END.finditer(first[: PART + 1]):
        end = found.end() if found[0] in "?!." else found.start()
        if end < len(first) and len(re.findall(r"\w+", first[:end])) >= 2:
            return end
    return 0


def _tail_start(request: str, last_at: int) -> int:
    """Where the last clause begins (a place in a word's middle never), or 0 where there is no other."""
    if last_at and len(request) - last_at <= PART:
        return last_at
    low = max(len(request) - PART - 1, 0)
    starts = [found.end() for found in _START.finditer(request, low) if re.search(r"\w", request[found.end() :])]
    if starts:
        return starts[-1]
    return request.find(" ", low) + 1 if is_long(request) else 0


def content_of(request: str, part: Part) -> str:
    """What the instruction in `part` is about: a short request's only quotation, or what stands beside the part; "" where nothing does."""
    if not is_long(request):
        quoted = [next(filter(None, found.groups())) for found in _QUOTED.finditer(request)]
        if len(quoted) == 1:
            return str(quoted[0]).strip()
    return request[: part.start].strip(_EDGES) or request[part.end :].strip(_EDGES)


def without_quotes(text: str) -> str:
    """The text with its quotations taken out, so that their words are not read as instructions."""
    return _QUOTED.sub(" ", text)
