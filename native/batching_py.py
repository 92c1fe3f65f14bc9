"""Pure-Python twin of `native.batching`: the meaning of every function there, in the plainest code; the same tests run on both.

Floating point follows the same order in both: sums run in double precision from a row's first token to its last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

MEAN, CLS, LAST, NONE = 0, 1, 2, 3
PRIORITIES = 4
LOOKAHEAD = 64  # entries that `take` may step over because they do not fit, before it closes the batch
WINDOW = 256  # entries among which a padded batch looks for lengths near the head's
MAX_INT32 = 2**31 - 1


@dataclass(slots=True)
class _Entry:
    ticket: int
    tokens: int
    priority: int
    deadline_ns: int
    arrival_ns: int


class BatchQueue:
    """Waiting sequences, and the policy that makes batches of them. Not locked: its owner is.

    `max_sequences` and `max_tokens` bound what waits; an empty queue takes one sequence of any length. Within a priority the order is
    that of arrival; a waiting entry gains one priority each `ageing_ns`. `padded` says what a batch costs: the sum of its tokens when
    they are packed, count times longest when they are padded; only then is length looked at.
    """

    def __init__(self, max_sequences: int, max_tokens: int, padded: bool = False, ageing_ns: int = 500_000_000) -> None:
        if not 0 < max_sequences < 2**24 or max_tokens <= 0 or ageing_ns <= 0:
            raise ValueError("max_sequences must be in [1, 2^24), max_tokens and ageing_ns positive")
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens
        self._padded = padded
        self._ageing_ns = ageing_ns
        self._lines: list[dict[int, _Entry]] = [{} for _ in range(PRIORITIES)]
        self._tokens = 0
        self._next = 1
        self._latest_ns = 0

    @property
    def sequences(self) -> int:
        """Entries that wait."""
        return sum(len(line) for line in self._lines)

    @property
    def tokens(self) -> int:
        """Tokens that wait."""
        return self._tokens

    def ahead(self, priority: int) -> int:
        """Tokens that wait at this priority and before it, ageing left aside."""
        return sum(e.tokens for line in self._lines[: max(0, priority + 1)] for e in line.values())

    def fits(self, sequences: int, tokens: int) -> bool:
        """Whether so many more can be pushed."""
        waiting = self.sequences
        if waiting + sequences > self._max_sequences:
            return False
        return self._tokens + tokens <= self._max_tokens or (waiting == 0 and sequences == 1)

    def push(self, tokens: int, priority: int, deadline_ns: int, now_ns: int) -> int:
        """Adds a sequence; `deadline_ns` 0 means none. Returns its ticket (opaque, positive), or -1 when the queue is full.

        A clock that steps back is read as standing still.
        """
        if not 0 < tokens <= MAX_INT32 or not 0 <= priority < PRIORITIES:
            raise ValueError("tokens must be positive, priority in [0, 4)")
        if not self.fits(1, tokens):
            return -1
        ticket, self._next = self._next, self._next + 1
        self._latest_ns = max(self._latest_ns, now_ns)
        self._lines[priority][ticket] = _Entry(ticket, tokens, priority, deadline_ns, self._latest_ns)
        self._tokens += tokens
        return ticket

    def cancel(self, ticket: int) -> bool:
        """Removes an entry; False when it is no longer there."""
        for line in self._lines:
            if ticket in line:
                self._tokens -= line.pop(ticket).tokens
                return True
        return False

    def take(self, now_ns: int, token_budget: int, max_sequences: int, horizon_ns: int = 0) -> tuple[list[int], list[int]]:
        """Tickets of the next batch, and of the entries whose deadline is within `horizon_ns` of `now_ns`; both leave the queue.

        The first entry in order is always in the batch, alone if it is over the budget, so an entry is overtaken at most by those that
        entered batches while entries before it did. Packed: in order, stepping over what does not fit. Padded: nearest in length to the
        first, among those of its effective priority, as long as padding stays below half of the batch.
        """
        expired = [e for line in self._lines for e in line.values() if 0 < e.deadline_ns <= now_ns + max(horizon_ns, 0)]
        self._remove(expired)
        order = sorted(
            (e for line in self._lines for e in line.values()),
            key=lambda e: (self._effective(e, now_ns), e.arrival_ns, e.priority, e.ticket),
        )
        choose = self._choose_padded if self._padded else self._choose_packed
        chosen = choose(order, now_ns, token_budget, max_sequences) if max_sequences > 0 else []
        self._remove(chosen)
        return [e.ticket for e in chosen], [e.ticket for e in expired]

    def _effective(self, entry: _Entry, now_ns: int) -> int:
        return max(0, entry.priority - max(0, now_ns - entry.arrival_ns) // self._ageing_ns)

    def _choose_packed(self, order: list[_Entry], now_ns: int, token_budget: int, max_sequences: int) -> list[_Entry]:
        chosen: list[_Entry] = []
        total = stepped_over = 0
        for entry in order:
            if len(chosen) == max_sequences or stepped_over == LOOKAHEAD:
                break
            if chosen and total + entry.tokens > token_budget:
                stepped_over += 1
                continue
            chosen.append(entry)
            total += entry.tokens
        return chosen

    def _choose_padded(self, order: list[_Entry], now_ns: int, token_budget: int, max_sequences: int) -> list[_Entry]:
        if not order:
            return []
        head = order[0]
        level = self._effective(head, now_ns)
        window = [e for e in order[:WINDOW] if self._effective(e, now_ns) == level]
        window.sort(key=lambda e: abs(e.tokens - head.tokens))
        chosen: list[_Entry] = []
        longest = total = 0
        for entry in window:
            if len(chosen) == max_sequences:
                break
            cost = (len(chosen) + 1) * max(longest, entry.tokens)
            if chosen and (cost > token_budget or cost > 2 * (total + entry.tokens)):
                break
            chosen.append(entry)
            longest = max(longest, entry.tokens)
            total += entry.tokens
        return chosen

    def _remove(self, entries: list[_Entry]) -> None:
        for entry in entries:
            self.cancel(entry.ticket)


def pack(
    ids: Sequence[Int64], type_ids: Sequence[Int64 | None], input_ids: Int64, position_ids: Int64, token_type_ids: Int64, cu_seqlens: Int32
) -> int:
    """Writes sequences one after the other; positions count from 0 in each; returns T, the tokens written.

    `ids[i]` int64[n_i] with n_i >= 1; `type_ids[i]` the same length, or None for zeros. Out: the first T of `input_ids`, `position_ids`,
    `token_type_ids` int64, the first S+1 of `cu_seqlens` int32. Raises ValueError when something does not fit.
    """
    if len(type_ids) != len(ids) or len(cu_seqlens) < len(ids) + 1:
        raise ValueError("type_ids must have one entry a sequence and cu_seqlens one more than there are sequences")
    room = min(len(input_ids), len(position_ids), len(token_type_ids))
    cu_seqlens[0] = at = 0
    for i, row in enumerate(ids):
        types = type_ids[i]
        length = _checked(row, types)
        if at + length > room:
            raise ValueError(f"the sequences have more tokens than the buffers' {room}")
        for j in range(length):
            input_ids[at + j] = row[j]
            position_ids[at + j] = j
            token_type_ids[at + j] = 0 if types is None else types[j]
        at += length
        cu_seqlens[i + 1] = at
    return at


def pack_padded(
    ids: Sequence[Int64], type_ids: Sequence[Int64 | None], input_ids: Int64, attention_mask: Int64, token_type_ids: Int64, pad_id: int
) -> int:
    """Writes sequences as rows of L, the longest's length, padded on the right; returns L.

    Out: the first S * L of each buffer, row-major: `input_ids` (`pad_id` where padded), `attention_mask` (1 and 0), `token_type_ids`.
    """
    if len(type_ids) != len(ids):
        raise ValueError("type_ids must have one entry a sequence")
    lengths = [_checked(row, types) for row, types in zip(ids, type_ids, strict=True)]
    width = max(lengths, default=0)
    if len(ids) * width > min(len(input_ids), len(attention_mask), len(token_type_ids)):
        raise ValueError("the padded rows have more tokens than the buffers")
    for i, row in enumerate(ids):
        types = type_ids[i]
        for j in range(width):
            inside = j < lengths[i]
            input_ids[i * width + j] = row[j] if inside else pad_id
            attention_mask[i * width + j] = inside
            token_type_ids[i * width + j] = types[j] if inside and types is not None else 0
    return width


def _checked(row: Int64, types: Int64 | None) -> int:
    for part in (row, types):
        if part is not None and (part.ndim != 1 or part.dtype != np.int64 or not part.flags.c_contiguous):
            raise ValueError("a sequence must be a contiguous int64 vector")
    if len(row) == 0:
        raise ValueError("a sequence must have at least one token")
    if types is not None and len(types) != len(row):
        raise ValueError("type_ids must be as long as ids")
    return len(row)


def pool(hidden: Float32, begins: Int32, ends: Int32, specs: Int32, out: Float32) -> None:
    """One vector a sequence: out[i, :d] from hidden[begins[i]:ends[i]], float32[N, H] -> float32[S, >= d].

    `specs` int32[S, 3]: kind (MEAN, CLS: the first token, LAST, NONE: leave the row alone), normalize (0 or 1), d (1..H: the leading
    columns that are kept, before normalising). Sums are double, in token order, so a row does not depend on its neighbours.
    """
    _check_pool(hidden, begins, ends, specs, out)
    for i, (kind, normalize, size) in enumerate(specs.tolist()):
        begin, end = int(begins[i]), int(ends[i])
        if kind == NONE:
            continue
        if kind == MEAN:
            rows = hidden[begin:end, :size].tolist()
            vector = [0.0] * size
            for row in rows:
                for column in range(size):
                    vector[column] += row[column]
            vector = [total / (end - begin) for total in vector]
        else:
            vector = hidden[begin if kind == CLS else end - 1, :size].tolist()
        if normalize:
            total = 0.0
            for value in vector:
                total += value * value
            norm = math.sqrt(total)
            scale = 1.0 / (norm if norm > 1e-12 else 1e-12)
            vector = [value * scale for value in vector]
        out[i, :size] = vector


def _check_pool(hidden: Float32, begins: Int32, ends: Int32, specs: Int32, out: Float32) -> None:
    for array, kind, ndim in (
        (hidden, np.float32, 2),
        (begins, np.int32, 1),
        (ends, np.int32, 1),
        (specs, np.int32, 2),
        (out, np.float32, 2),
    ):
        if array.dtype != kind or array.ndim != ndim or not array.flags.c_contiguous:
            raise ValueError(f"expected a contiguous {np.dtype(kind).name} array of {ndim} dimensions")
    count = len(begins)
    if len(ends) != count or specs.shape != (count, 3) or len(out) < count:
        raise ValueError("begins, ends, specs and out must have one row a sequence")
    for i in range(count):
        kind, _, size = specs[i]
        if not 0 <= begins[i] < ends[i] <= len(hidden):
            raise ValueError(f"span {i} is empty or outside hidden")
        if not MEAN <= kind <= NONE or (kind != NONE and not 1 <= size <= min(hidden.shape[1], out.shape[1])):
            raise ValueError(f"spec {i} has an unknown kind or a size outside hidden or out")


def softmax(rows: Float32) -> None:
    """exp(x - max) / sum of each row of float32[S, C], in place, sums in double."""
    _check_rows(rows)
    for i, row in enumerate(rows.tolist()):
        top = -math.inf
        for value in row:
            top = value if value > top else top
        powers = [_exp(value - top) for value in row]
        total = 0.0
        for value in powers:
            total += value
        rows[i] = [value / total for value in powers]


def sigmoid(rows: Float32) -> None:
    """1 / (1 + exp(-x)) of each element of float32[S, C], in place, without overflow."""
    _check_rows(rows)
    for i, row in enumerate(rows.tolist()):
        rows[i] = [1.0 / (1.0 + _exp(-x)) if x >= 0 else (_exp(x) / (1.0 + _exp(x)) if x < 0 else math.nan) for x in row]


def _exp(value: float) -> float:
    return math.exp(value) if value == value else value


def top_k(rows: Float32, indices: Int64) -> None:
    """Columns of the k largest of each row of float32[S, C], largest first, in `indices` int64[S, k], 1 <= k <= C.

    Equal values keep column order; NaN counts as smaller than every number.
    """
    _check_rows(rows)
    if indices.ndim != 2 or indices.dtype != np.int64 or not indices.flags.c_contiguous or len(indices) != len(rows):
        raise ValueError("indices must be contiguous int64[S, k]")
    if not 1 <= indices.shape[1] <= rows.shape[1]:
        raise ValueError("k must be between 1 and the number of columns")
    for i, row in enumerate(rows.tolist()):
        order = sorted(range(len(row)), key=lambda c: (row[c] != row[c], -row[c] if row[c] == row[c] else 0.0, c))
        indices[i] = order[: indices.shape[1]]


def _check_rows(rows: Float32) -> None:
    if rows.ndim != 2 or rows.dtype != np.float32 or not rows.flags.c_contiguous or rows.shape[1] == 0:
        raise ValueError("expected contiguous float32[S, C] with C >= 1")
