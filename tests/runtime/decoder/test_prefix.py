"""Pages and the prefix cache by themselves: what is found again, what is copied, who goes first, and that nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.runtime.decoder.pace import Pace
from server.runtime.decoder.pages import PagePool
from server.runtime.decoder.prefix import Match, PrefixCache

PAGE = 4


def stored(pool: PagePool, cache: PrefixCache, key: str, tokens: list[int], pure: int = 0) -> list[int]:
    """Runs a sequence that ends at once: its pages stay with the cache alone."""
    pages = [page for page in (pool.take() for _ in range(-(-len(tokens) // PAGE))) if page is not None]
    cache.insert(key, np.array(tokens), 0, pages, len(tokens), pure)
    for page in pages:
        pool.release(page)
    return pages


def found(pool: PagePool, cache: PrefixCache, key: str, tokens: list[int], *, pure: bool = False) -> Match:
    match = cache.match(key, np.array(tokens), 0, len(tokens) - 1, pure=pure)
    for page in match.pages:
        pool.release(page)
    if match.source >= 0:
        pool.release(match.source)
    return match


def test_the_longest_beginning_is_found_and_the_last_token_is_left_to_run() -> None:
    pool = PagePool(20)
    cache = PrefixCache(pool, PAGE)
    pages = stored(pool, cache, "", list(range(12)))
    assert found(pool, cache, "", list(range(12))).pages == pages[:2]
    assert found(pool, cache, "", [*range(12), 99]).pages == pages[:3]
    assert found(pool, cache, "", [*range(4), 99, *range(5, 12)]).pages == pages[:1]
    assert found(pool, cache, "", [99, *range(1, 12)]).pages == []
    assert found(pool, cache, "other@1", list(range(12))).pages == []


def test_a_page_that_is_half_the_same_is_copied() -> None:
    pool = PagePool(20)
    cache = PrefixCache(pool, PAGE)
    pages = stored(pool, cache, "", list(range(8)))
    match = found(pool, cache, "", [0, 1, 2, 3, 4, 5, 6, 99, 100])
    assert match.pages == pages[:1] and (match.source, match.copied) == (pages[1], 3)
    assert found(pool, cache, "", [0, 1, 2, 3, 4, 99, 100]).source == -1, "one token is not worth a copy"


def test_the_least_recently_used_goes_first_and_leaves_before_what_they_hang_on() -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool, PAGE)
    first = stored(pool, cache, "", list(range(12)))
    second = stored(pool, cache, "", list(range(50, 58)))
    found(pool, cache, "", [*range(8), 99])
    gone = []
    while cache.evict():
        gone.append(next(page for page in [*first, *second] if pool.holders(page) == 0 and page not in gone))
    assert gone == [first[2], second[1], second[0], first[1], first[0]]
    assert pool.free == pool.count


def test_pages_that_are_held_stay() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool, PAGE)
    pages = stored(pool, cache, "", list(range(16)))
    match = cache.match("", np.arange(9), 0, 8, pure=False)
    assert match.pages == pages[:2] and pool.available == 2 and pool.used == 2
    assert cache.evict() and cache.evict() and not cache.evict()
    assert found(pool, cache, "", list(range(16))).pages == pages[:2]
    cache.drop("")
    assert pool.free == 2
    for page in match.pages:
        pool.release(page)
    assert pool.free == 4


def test_a_page_of_the_wide_form_takes_the_place_of_one_that_is_not() -> None:
    pool = PagePool(20)
    cache = PrefixCache(pool, PAGE)
    mixed = stored(pool, cache, "", list(range(8)))
    assert found(pool, cache, "", list(range(9)), pure=True).pages == []
    clean = stored(pool, cache, "", list(range(8)), pure=8)
    assert found(pool, cache, "", list(range(9)), pure=True).pages == clean
    assert found(pool, cache, "", list(range(9))).pages == clean
    assert all(pool.holders(page) == 0 for page in mixed)


def test_mistakes_with_pages_are_noticed() -> None:
    pool = PagePool(2)
    page = pool.take()
    assert page is not None
    pool.release(page)
    with pytest.raises(AssertionError):
        pool.release(page)
    with pytest.raises(AssertionError):
        pool.hold(page)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 2), min_size=1, max_size=24), st.booleans()), max_size=40))
def test_whatever_is_stored_is_right_and_counted(events: list[tuple[int, list[int], bool]]) -> None:
    pool = PagePool(24)
    cache = PrefixCache(pool, PAGE)
    content: dict[int, tuple[int, ...]] = {}
    for kind, tokens, pure in events:
        if kind == 0:
            while pool.free < 6 and cache.evict():
                pass
            for index, page in enumerate(stored(pool, cache, "", tokens, len(tokens) if pure else 0)):
                if pool.cached(page):
                    content[page] = tuple(tokens[: (index + 1) * PAGE])
        elif kind == 1:
            for index, page in enumerate(found(pool, cache, "", tokens, pure=pure).pages):
                assert content[page] == tuple(tokens[: (index + 1) * PAGE])
        elif kind == 2:
            cache.evict()
        else:
            cache.drop("")
            assert pool.free == pool.count
        assert pool.free + pool.evictable == pool.count and len(cache) == pool.evictable


def test_the_pace_finds_what_a_token_costs() -> None:
    pace = Pace(1.2, 4)
    assert pace.chunk(8, 1) == 4, "careful before anything is known"
    for rows in (1, 8, 32):
        pace.learn(rows, 0.008 + 0.001 * rows)
    pace.learn_token(0.0003)
    assert pace.decode_seconds(20) == pytest.approx(0.028) and pace.decode_seconds(64) == pytest.approx(0.072)
    assert pace.chunk(8, 1) == pytest.approx(1.2 * 0.016 / 0.0003, abs=1)
    for i in range(100):
        rows = 1 + i % 32
        pace.record(rows, 0, 2 * (0.008 + 0.001 * rows))
        pace.record(rows, 40, 2 * (0.008 + 0.001 * rows) + 0.0006 * 40)
    assert pace.decode_seconds(8) == pytest.approx(0.032, rel=0.01), "the machine is half as quick as it was"
    assert pace.chunk(8, 1) == pytest.approx(1.2 * 0.032 / 0.0006, abs=1)
    assert pace.chunk(8, 16) == pytest.approx(2.4 * 0.032 / 0.0006, abs=2), "more prompts than answers get more of the time"
    pace.record(8, 0, 5.0)
    assert pace.decode_seconds(8) < 0.04, "a pause of the machine is no cost"


def test_a_long_prompt_lets_the_answers_show_what_they_take_alone() -> None:
    pace = Pace(1.2, 4)
    pace.learn(8, 0.016)
    chunks = []
    for _ in range(40):
        chunks.append(pace.chunk(8, 1))
        pace.record(8, chunks[-1], 0.03 if chunks[-1] else 0.016)
    assert chunks.count(0) == 3
