"""The batching functions, compiled and twin, under the same cases; and the compiled ones against the twin on generated input."""

from __future__ import annotations

import math
import os
import time
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from native import batch, batching, batching_py

SECOND = 1_000_000_000
BOTH = pytest.mark.parametrize("native", [batching, batching_py], ids=["compiled", "twin"])


def test_compiled_module_is_the_one_in_use() -> None:
    assert batching.__file__.endswith((".so", ".pyd"))
    if not os.environ.get("UNDERSTUDY_NO_EXTENSIONS"):
        assert batch.BatchQueue is batching.BatchQueue
        assert batch.pool is batching.pool


def vectors(lengths: list[int], seed: int = 0) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 30_000, n) for n in lengths]


# The queue.


@BOTH
class TestQueue:
    def test_arrival_order_within_the_budget(self, native: ModuleType) -> None:
        queue = native.BatchQueue(100, 10_000)
        tickets = [queue.push(10, 1, 0, now) for now in range(6)]
        assert queue.take(10, 40, 100) == (tickets[:4], [])
        assert (queue.sequences, queue.tokens) == (2, 20)
        assert queue.take(10, 40, 1) == (tickets[4:5], [])
        assert queue.take(10, 40, 9) == (tickets[5:], [])
        assert queue.take(10, 40, 9) == ([], [])

    def test_a_lower_priority_yields_then_ages(self, native: ModuleType) -> None:
        queue = native.BatchQueue(100, 10_000, ageing_ns=SECOND)
        bulk = queue.push(10, 2, 0, 0)
        live = queue.push(10, 1, 0, 5)
        critical = queue.push(10, 0, 0, 6)
        assert queue.take(7, 20, 10)[0] == [critical, live]
        late = queue.push(10, 1, 0, SECOND // 2)
        assert queue.take(SECOND, 10, 10)[0] == [bulk]  # one level up by now, and older
        assert queue.take(SECOND, 10, 10)[0] == [late]

    def test_the_first_in_line_is_never_passed_over(self, native: ModuleType) -> None:
        queue = native.BatchQueue(1000, 100_000)
        queue.push(5, 1, 0, 0)
        large = queue.push(90, 1, 0, 1)
        for now in range(2, 50):
            queue.push(20, 1, 0, now)
        first, _ = queue.take(60, 60, 100)
        assert large not in first and len(first) == 3
        second, _ = queue.take(61, 60, 100)
        assert second == [large]  # over the budget: alone, but at once

    def test_expired_are_returned_once_and_free_their_room(self, native: ModuleType) -> None:
        queue = native.BatchQueue(3, 100)
        late = queue.push(10, 1, 50, 0)
        fine = queue.push(10, 1, 51, 0)
        none = queue.push(10, 2, 0, 0)
        assert queue.push(10, 1, 0, 0) == -1
        assert queue.take(50, 10, 10) == ([fine], [late])
        assert queue.sequences == 1 and not queue.cancel(late)
        assert queue.take(SECOND * 100, 10, 10) == ([none], [])

    def test_cancelled_are_never_taken_and_stale_tickets_do_nothing(self, native: ModuleType) -> None:
        queue = native.BatchQueue(2, 100)
        first, second = queue.push(10, 1, 0, 0), queue.push(20, 1, 0, 0)
        assert queue.cancel(first) and not queue.cancel(first)
        third = queue.push(30, 1, 0, 0)
        assert third not in (first, second) and not queue.cancel(first)
        assert queue.take(1, 100, 10) == ([second, third], [])
        assert not queue.cancel(-1) and not queue.cancel(2**62)

    def test_bounds(self, native: ModuleType) -> None:
        queue = native.BatchQueue(4, 100)
        assert queue.fits(1, 5_000) and not queue.fits(2, 5_000)  # an empty queue takes one of any length
        assert queue.push(60, 1, 0, 0) > 0
        assert queue.push(41, 1, 0, 0) == -1 and queue.push(40, 1, 0, 0) > 0
        assert not queue.fits(1, 1) and queue.fits(0, 0)
        for wrong in ((0, 1), (-1, 1), (2**31, 1), (5, -1), (5, 4)):
            with pytest.raises(ValueError):
                queue.push(*wrong, 0, 0)
        for args in ((0, 10), (10, 0), (2**24, 10)):
            with pytest.raises(ValueError):
                native.BatchQueue(*args)
        with pytest.raises(ValueError):
            native.BatchQueue(1, 1, ageing_ns=0)

    def test_padded_batches_hold_neighbours_in_length(self, native: ModuleType) -> None:
        queue = native.BatchQueue(100, 100_000, padded=True)
        lengths = [10, 400, 12, 390, 9, 11]
        tickets = [queue.push(n, 1, 0, i) for i, n in enumerate(lengths)]
        first, _ = queue.take(9, 1_000, 32)
        assert sorted(first) == sorted(tickets[i] for i in (0, 2, 4, 5))
        assert queue.take(9, 1_000, 32)[0] == [tickets[1], tickets[3]]

    def test_padded_batches_stay_within_the_budget_padding_included(self, native: ModuleType) -> None:
        queue = native.BatchQueue(1000, 100_000, padded=True)
        rng = np.random.default_rng(1)
        length_of = {queue.push(int(n), 1, 0, i): int(n) for i, n in enumerate(rng.integers(1, 200, 300))}
        seen = 0
        while queue.sequences:
            taken, _ = queue.take(1_000, 512, 16)
            lengths = [length_of[t] for t in taken]
            assert 1 <= len(taken) <= 16 and len(taken) * max(lengths) <= 512 and len(taken) * max(lengths) <= 2 * sum(lengths)
            seen += len(taken)
        assert seen == 300


actions = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(1, 60), st.integers(0, 3), st.integers(0, 40)),
        st.tuples(st.just("take"), st.integers(1, 120), st.integers(0, 8), st.integers(-1, 10)),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0), st.just(0)),
    ),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(actions, st.booleans(), st.lists(st.integers(0, 9), min_size=80, max_size=80))
def test_both_queues_decide_alike(steps: list[tuple[str, int, int, int]], padded: bool, ticks: list[int]) -> None:
    compiled = batching.BatchQueue(20, 400, padded=padded, ageing_ns=15)
    twin = batching_py.BatchQueue(20, 400, padded=padded, ageing_ns=15)
    pushed: list[tuple[int, int]] = []
    names: dict[int, int] = {}
    now = 0
    for (kind, a, b, c), tick in zip(steps, ticks, strict=False):
        now += tick
        if kind == "push":
            deadline = now + c - 5 if c else 0
            pair = compiled.push(a, b, max(deadline, 0), now), twin.push(a, b, max(deadline, 0), now)
            assert (pair[0] == -1) == (pair[1] == -1)
            if pair[0] != -1:
                assert pair[0] not in names
                pushed.append(pair)
                names[pair[0]] = pair[1]
        elif kind == "take":
            chosen, expired = compiled.take(now, a, b, c)
            assert ([names[t] for t in chosen], [names[t] for t in expired]) == twin.take(now, a, b, c)
        elif pushed:
            pair = pushed[a % len(pushed)]
            assert compiled.cancel(pair[0]) == twin.cancel(pair[1])
        assert (compiled.sequences, compiled.tokens) == (twin.sequences, twin.tokens)
        assert [compiled.ahead(p) for p in range(-1, 5)] == [twin.ahead(p) for p in range(-1, 5)]


# Packing.


def buffers(size: int, rows: int) -> tuple[Any, Any, Any, Any]:
    return np.full(size, -9), np.full(size, -9), np.full(size, -9), np.full(rows + 1, -9, np.int32)


@BOTH
@pytest.mark.parametrize("lengths", [[1], [3, 1, 7], [512], [1] * 2000, []], ids=str)
def test_pack_lays_sequences_end_to_end(native: ModuleType, lengths: list[int]) -> None:
    rows = vectors(lengths)
    types: list[Any] = [None if i % 2 else np.full(n, i % 3) for i, n in enumerate(lengths)]
    ids, positions, kinds, cu = buffers(sum(lengths) + 3, len(lengths))
    assert native.pack(rows, types, ids, positions, kinds, cu) == sum(lengths)
    assert cu.tolist() == [0, *np.cumsum(lengths).tolist()]
    for i, row in enumerate(rows):
        span = slice(cu[i], cu[i + 1])
        assert np.array_equal(ids[span], row)
        assert positions[span].tolist() == list(range(len(row)))
        assert kinds[span].tolist() == [0 if i % 2 else i % 3] * len(row)
    assert (ids[sum(lengths) :] == -9).all()


@BOTH
def test_pack_padded_lays_rows_of_one_length(native: ModuleType) -> None:
    rows = vectors([2, 5, 1])
    types: list[Any] = [None, np.arange(5), None]
    ids, mask, kinds, _ = buffers(20, 3)
    assert native.pack_padded(rows, types, ids, mask, kinds, 7) == 5
    grid = ids[:15].reshape(3, 5)
    assert mask[:15].reshape(3, 5).tolist() == [[1, 1, 0, 0, 0], [1] * 5, [1, 0, 0, 0, 0]]
    assert [row[: len(r)].tolist() for row, r in zip(grid, rows, strict=True)] == [r.tolist() for r in rows]
    assert (grid[mask[:15].reshape(3, 5) == 0] == 7).all()
    assert kinds[:15].tolist() == [0] * 5 + [0, 1, 2, 3, 4] + [0] * 5


@BOTH
@pytest.mark.parametrize(
    "row",
    [np.zeros(0, np.int64), np.zeros(2, np.int32), np.zeros((1, 2), np.int64), np.arange(6)[::2], np.zeros(2)],
    ids=["empty", "int32", "matrix", "strided", "float"],
)
def test_packing_refuses_what_is_no_sequence(native: ModuleType, row: Any) -> None:
    ids, other, kinds, cu = buffers(50, 4)
    for function, last in ((native.pack, cu), (native.pack_padded, 0)):
        for rows, types in (([row], [None]), ([np.arange(max(1, len(row)))], [row])):
            with pytest.raises(ValueError):
                function(rows, types, ids, other, kinds, last)


@BOTH
def test_packing_refuses_what_does_not_fit(native: ModuleType) -> None:
    rows = vectors([3, 4])
    ids, other, kinds, cu = buffers(6, 2)
    with pytest.raises(ValueError):
        native.pack(rows, [None, None], ids, other, kinds, cu)
    with pytest.raises(ValueError):
        native.pack(rows, [None, None], *buffers(7, 1))
    with pytest.raises(ValueError):
        native.pack(rows, [None], *buffers(7, 2))
    with pytest.raises(ValueError):
        native.pack_padded(rows, [None, None], *buffers(7, 2)[:3], 0)
    with pytest.raises(ValueError):
        native.pack(rows, [None, None], ids.astype(np.int32), other, kinds, cu)
    with pytest.raises(ValueError):
        native.pack([np.arange(2)], [np.arange(3)], *buffers(9, 1))


# Pooling.


def pooled(native: ModuleType, hidden: Any, lengths: list[int], spec: tuple[int, int, int]) -> Any:
    ends = np.cumsum(lengths).astype(np.int32)
    begins = (ends - lengths).astype(np.int32)
    out = np.full((len(lengths), hidden.shape[1]), np.nan, np.float32)
    native.pool(hidden, begins, ends, np.array([spec] * len(lengths), np.int32), out)
    return out


@BOTH
@pytest.mark.parametrize("size", [24, 8, 1])
@pytest.mark.parametrize("normalize", [0, 1])
def test_pool_equals_the_formula(native: ModuleType, size: int, normalize: int) -> None:
    lengths = [1, 5, 512, 3]
    hidden = np.random.default_rng(2).standard_normal((sum(lengths), 24)).astype(np.float32)
    parts = np.split(hidden.astype(np.float64), np.cumsum(lengths)[:-1])
    formulas = {native.MEAN: lambda p: p.mean(0), native.CLS: lambda p: p[0], native.LAST: lambda p: p[-1]}
    for kind, formula in formulas.items():
        got = pooled(native, hidden, lengths, (kind, normalize, size))
        for row, part in zip(got, parts, strict=True):
            want = formula(part)[:size]
            want = want / np.linalg.norm(want) if normalize else want
            np.testing.assert_allclose(row[:size], want, rtol=2e-7, atol=1e-9)
            assert np.isnan(row[size:]).all()


@BOTH
def test_a_row_pools_to_the_same_bits_alone_and_among_others(native: ModuleType) -> None:
    lengths = [7, 1, 30, 2]
    hidden = np.random.default_rng(3).standard_normal((sum(lengths), 33)).astype(np.float32)
    together = pooled(native, hidden, lengths, (native.MEAN, 1, 33))
    at = 0
    for i, n in enumerate(lengths):
        alone = pooled(native, np.ascontiguousarray(hidden[at : at + n]), [n], (native.MEAN, 1, 33))
        assert alone.tobytes() == together[i].tobytes()
        at += n


@BOTH
def test_pool_mixes_specs_and_survives_zeros_and_nan(native: ModuleType) -> None:
    hidden = np.zeros((3, 4), np.float32)
    hidden[2] = np.nan
    begins, ends = np.array([0, 1, 2], np.int32), np.array([1, 2, 3], np.int32)
    specs = np.array([(native.MEAN, 1, 4), (native.NONE, 0, 0), (native.CLS, 1, 2)], np.int32)
    out = np.full((3, 4), 9, np.float32)
    native.pool(hidden, begins, ends, specs, out)
    assert out[0].tolist() == [0] * 4 and out[1].tolist() == [9] * 4
    assert np.isnan(out[2, :2]).all() and out[2, 2:].tolist() == [9, 9]


@BOTH
@pytest.mark.parametrize(
    ("begin", "end", "spec"),
    [(0, 0, (0, 0, 4)), (2, 1, (0, 0, 4)), (-1, 1, (0, 0, 4)), (0, 4, (0, 0, 4)), (0, 1, (4, 0, 4)), (0, 1, (0, 0, 5)), (0, 1, (0, 0, 0))],
)
def test_pool_refuses_spans_and_specs_outside(native: ModuleType, begin: int, end: int, spec: tuple[int, int, int]) -> None:
    hidden, out = np.zeros((3, 4), np.float32), np.zeros((1, 4), np.float32)
    arrays = [np.array(a, np.int32) for a in ([begin], [end], [spec])]
    with pytest.raises(ValueError):
        native.pool(hidden, *arrays, out)
    with pytest.raises(ValueError):
        native.pool(hidden.astype(np.float64), *arrays, out)


# Rows of scores.

finite = st.floats(-80, 80, width=32)
grids = st.integers(1, 12).flatmap(lambda c: st.lists(st.lists(finite, min_size=c, max_size=c), min_size=1, max_size=6))


@settings(max_examples=100, deadline=None)
@given(grids)
def test_rows_agree_with_the_twin(grid: list[list[float]]) -> None:
    rows = np.array(grid, np.float32)
    for name in ("softmax", "sigmoid"):
        ours, twins = rows.copy(), rows.copy()
        getattr(batching, name)(ours)
        getattr(batching_py, name)(twins)
        np.testing.assert_allclose(ours, twins, rtol=1e-6)
    for k in (1, rows.shape[1]):
        a, b = np.zeros((len(rows), k), np.int64), np.zeros((len(rows), k), np.int64)
        batching.top_k(rows, a)
        batching_py.top_k(rows, b)
        assert a.tolist() == b.tolist()


@BOTH
def test_rows_at_the_edges(native: ModuleType) -> None:
    rows = np.array([[1e30, -1e30, 0], [0, 0, 0]], np.float32)
    native.softmax(rows)
    assert rows[0].tolist() == [1, 0, 0] and rows[1].tolist() == pytest.approx([1 / 3] * 3)
    rows = np.array([[1000, -1000, 0, math.nan]], np.float32)
    native.sigmoid(rows)
    assert rows[0, :3].tolist() == [1, 0, 0.5] and np.isnan(rows[0, 3])
    best = np.zeros((1, 4), np.int64)
    native.top_k(np.array([[1, math.nan, 3, 1]], np.float32), best)
    assert best.tolist() == [[2, 0, 3, 1]]
    nan = np.full((1, 3), math.nan, np.float32)
    native.softmax(nan)
    assert np.isnan(nan).all()
    for bad in (np.zeros((2, 0), np.float32), np.zeros(3, np.float32), np.zeros((2, 2))):
        for function in (native.softmax, native.sigmoid):
            with pytest.raises(ValueError):
                function(bad)
    for shape in ((1, 0), (1, 5), (2, 2)):
        with pytest.raises(ValueError):
            native.top_k(np.zeros((1, 4), np.float32), np.zeros(shape, np.int64))


def seconds(function: Any, rounds: int) -> float:
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def test_packing_and_pooling_are_ten_times_faster_than_the_twin() -> None:
    lengths = [8 + i % 16 for i in range(64)]
    rows, types = vectors(lengths), [None] * 64
    hidden = np.random.default_rng(0).standard_normal((sum(lengths), 384)).astype(np.float32)
    ends = np.cumsum(lengths).astype(np.int32)
    begins = (ends - lengths).astype(np.int32)
    specs, out = np.array([(0, 1, 384)] * 64, np.int32), np.empty((64, 384), np.float32)
    work = buffers(sum(lengths), 64)

    def run(native: ModuleType) -> None:
        native.pack(rows, types, *work)
        native.pool(hidden, begins, ends, specs, out)

    assert seconds(lambda: run(batching_py), 2) >= 10 * seconds(lambda: run(batching), 20)
