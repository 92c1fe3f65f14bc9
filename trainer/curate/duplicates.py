"""Equal and nearly equal rows: one of each stays, and none of them stands on both sides of the held-out line.

Near ones are found by MinHash (Broder 1997) over shingles with locality-sensitive banding, and each pair that meets in a band is then
checked by its true Jaccard similarity, so that no estimate drops a row. Signatures are made for thousands of rows at a time with NumPy:
100,000 short texts take seconds, and memory holds the shingles of one part and 4 bytes a permutation and row.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from trainer.curate.rows import Row, normalised

REPEATED = "repeats another row's text"
NEAR = "nearly repeats another row"
LEAKS = "equal or nearly equal to a held-out text"
PERMUTATIONS = 128
BANDS, IN_BAND = 16, 8
_PART = 4096
_SHINGLE = 5
_MOST_SHINGLES = 2000  # of a row: of longer texts, the beginning
_MOST_IN_BUCKET = 32
_SLACK = 0.15  # five standard deviations of an estimate from 128 permutations at 0.9
_NUMBERS = re.compile(r"\d+")

Drop = Callable[[Row, str], None]
Signatures = np.ndarray[Any, np.dtype[np.uint32]]


def better(row: Row) -> tuple[bool, bool, float, Any, str]:
    """Sorts the best row last: a person's, one with an answer, the heaviest, the newest."""
    return row.corrected, bool(row.answer or row.label), row.weight, row.time, row.interaction_id


def exact(rows: Sequence[Row], drop: Drop) -> list[Row]:
    """One row for each question and answer on each side; of classifiers for each question, which have one label by now."""
    best: dict[tuple[bool, str, str], Row] = {}
    for row in rows:
        answer = "" if row.label else f"{normalised(row.answer)}\0{normalised(row.rejected)}"
        key = (row.held_out, _question(row), answer)
        other = best.get(key)
        if other is None or better(row) > better(other):
            best[key] = row
    kept = {id(row) for row in best.values()}
    return _keep(rows, kept, drop, REPEATED)


def near(rows: Sequence[Row], threshold: float, drop: Drop, check: Callable[[], None]) -> list[Row]:
    """Keeps the best of rows that are nearly equal: on one side, and with the same label or a nearly equal answer with the same numbers."""
    if threshold >= 1:
        return list(rows)
    order = sorted(rows, key=better, reverse=True)
    gone: set[int] = set()
    for first, second in similar([_whole(row) for row in order], threshold, check):
        one, other = order[first], order[second]
        if first in gone or second in gone or one.held_out != other.held_out or one.label != other.label:
            continue
        if one.label or (_numbers(one) == _numbers(other) and bool(one.answer) == bool(other.answer)):
            gone.add(second)  # the worse, for they are in order
    return _keep(rows, {id(row) for number, row in enumerate(order) if number not in gone}, drop, NEAR)


def decontaminated(rows: Sequence[Row], threshold: float, drop: Drop, check: Callable[[], None]) -> list[Row]:
    """Takes out of the training rows what is equal or nearly equal to a held-out text, whatever its answer. Held-out rows all stay."""
    held = {_question(row) for row in rows if row.held_out}
    gone = {number for number, row in enumerate(rows) if not row.held_out and _question(row) in held}
    if threshold < 1:
        for first, second in similar([_question(row) for row in rows], threshold, check):
            if rows[first].held_out != rows[second].held_out and _same_case(rows[first], rows[second]):
                gone.add(second if rows[first].held_out else first)
    return _keep(rows, {id(row) for number, row in enumerate(rows) if number not in gone}, drop, LEAKS)


def similar(texts: Sequence[str], threshold: float, check: Callable[[], None] = lambda: None) -> Iterator[tuple[int, int]]:
    """Pairs (i, j), i < j, of texts whose shingles have a Jaccard similarity of at least `threshold`, in order of i then j.

    A pair at s meets in one of 16 bands with probability 1 - (1 - s^8)^16: 0.9999 at 0.9, 0.95 at 0.8, 0.06 at 0.5.
    """
    signatures = sign(texts, check)
    found: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    for band in range(BANDS):
        found += _meeting(signatures, band, threshold - _SLACK)
        check()
    cache: dict[int, frozenset[int]] = {}
    for pair in np.unique(np.concatenate(found)).tolist() if found else ():
        first, second = divmod(pair, len(texts))
        one, other = (cache.get(number) or cache.setdefault(number, _shingles(texts[number])) for number in (first, second))
        common = len(one & other)
        if common and common >= threshold * (len(one) + len(other) - common):
            yield first, second
        if len(cache) > 4 * _PART:
            cache.clear()


def _meeting(signatures: Signatures, band: int, least: float) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Pairs with equal values in a band and an estimated similarity of at least `least`, as i * n + j.

    Of many rows with one value each is compared with the next 32 alone, so that a thousand copies do not make a million pairs.
    """
    count = len(signatures)
    values = np.zeros(count, np.uint64)
    for column in range(band * IN_BAND, (band + 1) * IN_BAND):
        values = values * np.uint64(0x9E3779B97F4A7C15) + signatures[:, column]
    order = np.argsort(values, kind="stable")
    values = values[order]
    found = []
    for distance in range(1, min(_MOST_IN_BUCKET + 1, count)):
        places = np.flatnonzero(values[:-distance] == values[distance:])
        if not len(places):
            break
        for start in range(0, len(places), _PART):
            part = places[start : start + _PART]
            one, other = order[part], order[part + distance]
            near_enough = (signatures[one] == signatures[other]).mean(axis=1) >= least
            low, high = np.minimum(one, other)[near_enough], np.maximum(one, other)[near_enough]
            found.append(low.astype(np.int64) * count + high)
    return found


def sign(texts: Sequence[str], check: Callable[[], None] = lambda: None) -> Signatures:
    """MinHash signatures uint32[n, PERMUTATIONS]; texts without shingles have numbers of their own, like nobody's."""
    rng = np.random.Generator(np.random.PCG64(17))
    # Multiply-shift hashing (Dietzfelbinger 1997): an odd factor, and the upper half of the product.
    factors = rng.integers(0, 1 << 63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    shifts = rng.integers(0, 1 << 63, PERMUTATIONS, dtype=np.uint64)
    signatures = np.empty((len(texts), PERMUTATIONS), np.uint32)
    for start in range(0, len(texts), _PART):
        check()
        part = enumerate(texts[start : start + _PART], start)
        sets = [_shingles(text) or frozenset({zlib.crc32(f"\0{number}".encode())}) for number, text in part]
        lengths = np.array([len(one) for one in sets])
        flat = np.fromiter((value for one in sets for value in one), np.uint64, int(lengths.sum()))
        begins = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        for column in range(PERMUTATIONS):
            hashed = ((flat * factors[column] + shifts[column]) >> np.uint64(32)).astype(np.uint32)
            signatures[start : start + len(sets), column] = np.minimum.reduceat(hashed, begins)
    return signatures


def _shingles(text: str) -> frozenset[int]:
    """Runs of 5 characters as numbers; a shorter text is one run."""
    last = min(max(len(text) - _SHINGLE + 1, 1 if text else 0), _MOST_SHINGLES)
    return frozenset(zlib.crc32(text[at : at + _SHINGLE].encode()) for at in range(last))


def _question(row: Row) -> str:
    """All that was asked, as one normalised text."""
    more = [*(content for _, content in row.messages[:-1]), row.instruction, *(f"{k}={v}" for k, v in row.parameters)]
    return normalised("\0".join([row.text, *more])) if any(more) else normalised(row.text)


def _whole(row: Row) -> str:
    return _question(row) if row.label else f"{_question(row)}\0{normalised(row.answer)}\0{normalised(row.rejected)}"


def _numbers(row: Row) -> list[str]:
    return sorted(_NUMBERS.findall(f"{row.text} {row.answer}"))


def _same_case(one: Row, other: Row) -> bool:
    """Questions to a writer that differ in a number are different cases of one form."""
    return bool(one.label) or sorted(_NUMBERS.findall(one.text)) == sorted(_NUMBERS.findall(other.text))


def _keep(rows: Sequence[Row], kept: set[int], drop: Drop, reason: str) -> list[Row]:
    left = []
    for row in rows:
        if id(row) in kept:
            left.append(row)
        else:
            drop(row, reason)
    return left
