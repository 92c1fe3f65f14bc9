"""What a character is, and the phrase automaton: tables that the compiled scorer reads and its twin consults, built when first used."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

# Kinds of characters, in an order that is used: words are made of what is DIGIT or more, IDEOGRAPHs one by one.
OTHER, SPACE, PUNCTUATION, DIGIT, LETTER, UPPER, IDEOGRAPH = range(7)
LATIN, GREEK, CYRILLIC, HEBREW, ARABIC, INDIC, SOUTHEAST, HAN, HANGUL, ELSE = range(1, 11)
DETAILED = 0x600  # below it every character is looked up in Unicode's data; above, by block
BMP = 0x10000
_FNV, _FNV_PRIME, _MASK = 0xCBF29CE484222325, 0x100000001B3, 2**64 - 1

_BLOCKS: tuple[tuple[int, int, int], ...] = (
    (0x0660, 0x066A, DIGIT), (0x06F0, 0x06FA, DIGIT), (0x0966, 0x0970, DIGIT), (0xFF10, 0xFF1A, DIGIT),
    (0x060C, 0x060D, PUNCTUATION), (0x061B, 0x0620, PUNCTUATION), (0x06D4, 0x06D5, PUNCTUATION), (0x0964, 0x0966, PUNCTUATION),
    (0x2000, 0x2070, PUNCTUATION), (0x20A0, 0x2C00, PUNCTUATION), (0x3000, 0x3041, PUNCTUATION),
    (0xFF00, 0xFF10, PUNCTUATION), (0xFF1A, 0xFF21, PUNCTUATION), (0xFF3B, 0xFF41, PUNCTUATION), (0xFF5B, 0xFF66, PUNCTUATION),
    (0x2000, 0x200B, SPACE), (0x2028, 0x202A, SPACE), (0x202F, 0x2030, SPACE), (0x205F, 0x2060, SPACE), (0x3000, 0x3001, SPACE),
    (0x200B, 0x2010, OTHER), (0x202A, 0x202F, OTHER), (0x2060, 0x2070, OTHER), (0xFEFF, 0xFF00, OTHER), (0xFFF0, 0x10000, OTHER),
    (0xD800, 0xF900, OTHER),
    (0xFF21, 0xFF3B, UPPER),
    (0x3041, 0x3100, IDEOGRAPH), (0x3400, 0x4DC0, IDEOGRAPH), (0x4E00, 0xA000, IDEOGRAPH), (0xF900, 0xFB00, IDEOGRAPH),
)  # fmt: skip
_SCRIPTS: tuple[tuple[int, int, int], ...] = (
    (0x0000, 0x0370, LATIN), (0x0370, 0x0400, GREEK), (0x0400, 0x0530, CYRILLIC), (0x0530, 0x0590, ELSE), (0x0590, 0x0600, HEBREW),
    (0x0600, 0x0700, ARABIC), (0x0900, 0x0E00, INDIC), (0x0E00, 0x1000, SOUTHEAST), (0x1E00, 0x1F00, LATIN), (0x1F00, 0x2000, GREEK),
    (0x3041, 0x3100, HAN), (0x3400, 0xA000, HAN), (0xAC00, 0xD7B0, HANGUL), (0x1100, 0x1200, HANGUL), (0xF900, 0xFB00, HAN),
    (0xFB50, 0xFE00, ARABIC), (0xFE70, 0xFEFF, ARABIC), (0xFF21, 0xFF5B, LATIN),
)  # fmt: skip


@cache
def characters() -> npt.NDArray[np.uint8]:
    """uint8[0x10000]: a character's kind, its script in the upper four bits (0 for what is no letter)."""
    kinds = np.full(BMP, LETTER, np.uint8)
    for c in range(DETAILED):
        kinds[c] = _by_category(chr(c))
    for begin, end, kind in _BLOCKS:
        kinds[begin:end] = kind
    scripts = np.full(BMP, ELSE, np.uint8)
    for begin, end, script in _SCRIPTS:
        scripts[begin:end] = script
    return (kinds | np.where(kinds >= LETTER, scripts << 4, 0)).astype(np.uint8)


@cache
def folded() -> npt.NDArray[np.uint16]:
    """uint16[0x600]: each character in lower case, where that is one character of this range; above it only full-width letters fold."""
    lower = [ord(c.lower()) if len(c.lower()) == 1 and ord(c.lower()) < DETAILED else ord(c) for c in map(chr, range(DETAILED))]
    return np.array(lower, np.uint16)


def _by_category(character: str) -> int:
    category = unicodedata.category(character)
    if character in "\t\n\v\f\r\x85" or category[0] == "Z":
        return SPACE
    if category in ("Lu", "Lt"):
        return UPPER
    if category[0] in "LM":
        return LETTER
    if category == "Nd":
        return DIGIT
    return PUNCTUATION if category[0] in "PSN" else OTHER


def kind_of(c: int) -> int:
    """Beyond the first plane: ideographs, emoji and symbols, else letters."""
    if c < BMP:
        return int(characters()[c]) & 15
    if c >= 0xE0000:
        return OTHER
    return IDEOGRAPH if c >= 0x20000 else PUNCTUATION if c >= 0x1F000 else LETTER


def script_of(c: int) -> int:
    """LATIN to ELSE, or 0 for what is no letter."""
    if c < BMP:
        return int(characters()[c]) >> 4
    kind = kind_of(c)
    return HAN if kind == IDEOGRAPH else ELSE if kind == LETTER else 0


def fold(c: int) -> int:
    """The character in lower case."""
    if c < DETAILED:
        return int(folded()[c])
    return c + 32 if 0xFF21 <= c <= 0xFF3A else c


def word_hash(word: Sequence[int]) -> int:
    """FNV-1a, 64 bits, over the lower-case code points; curled apostrophes are straight."""
    value = _FNV
    for c in word:
        value = ((value ^ (0x27 if c == 0x2019 else fold(c))) * _FNV_PRIME) & _MASK
    return value


WORDS: Final[dict[str, int]] = {}  # hashes of the words that the scorer knows by name; "Xx" and "9" stand for shapes
_KNOWN = (
    "who whose whom when where what which why how many much long old year date is are was were do does did can has have yes no true false"
)


def _known(word: str) -> int:
    value = _FNV
    for c in word:
        value = ((value ^ ord(c)) * _FNV_PRIME) & _MASK
    return value


WORDS.update({word: _known(word) for word in (*_KNOWN.split(), "Xx", "9", "9999")})


@cache
def automaton() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint16], npt.NDArray[np.uint8]]:
    """Aho and Corasick's machine over the phrases of `native.phrases`.

    Returns:
        classes uint8[0x10000] of characters (0: in no phrase), next states uint16[states, classes], and how many phrases of each
        category end in a state, uint8[states, categories].
    """
    from native.phrases import CATEGORIES, patterns

    found = patterns()
    alphabet = sorted({c for _, phrase in found for c in phrase})
    assert len(alphabet) < 256, "phrases use more than 255 different characters"
    classes = np.zeros(BMP, np.uint8)
    for number, c in enumerate(alphabet, start=1):
        classes[ord(c)] = number
    children: list[dict[int, int]] = [{}]
    ends: list[list[int]] = [[0] * len(CATEGORIES)]
    for category, phrase in found:
        state = 0
        for c in phrase:
            step = int(classes[ord(c)])
            if step not in children[state]:
                children[state][step] = len(children)
                children.append({})
                ends.append([0] * len(CATEGORIES))
            state = children[state][step]
        ends[state][category] += 1
    moves = np.zeros((len(children), len(alphabet) + 1), np.uint16)
    counts = np.array(ends, np.uint8)
    _link(children, moves, counts)
    return classes, moves, counts


def streamed(classes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """uint8[0x10000]: each character's class as phrases see it: in lower case, apostrophes straight, a space for what parts words."""
    found = np.where(characters() & 15 >= DIGIT, classes, classes[32]).astype(np.uint8)
    found[:DETAILED] = np.where(characters()[:DETAILED] & 15 >= DIGIT, classes[folded()], classes[32])
    found[0xFF21:0xFF3B] = classes[0xFF41:0xFF5B]
    found[[0x27, 0x2019]] = classes[0x27]
    return found


def _link(children: list[dict[int, int]], moves: npt.NDArray[np.uint16], counts: npt.NDArray[Any]) -> None:
    """Fills the moves breadth first: where a state has no child, the move of its longest proper suffix."""
    fallback = [0] * len(children)
    queue = [0]
    for state in queue:
        if state:
            moves[state] = moves[fallback[state]]
            counts[state] += counts[fallback[state]]
        for step, child in children[state].items():
            fallback[child] = int(moves[fallback[state], step]) if state else 0
            queue.append(child)
        for step, child in children[state].items():
            moves[state, step] = child
