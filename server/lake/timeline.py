"""How skills did over time, out of the lake: counts, money, quality, latency and feedback of each stretch of time.

One pass over few columns, in batches, into sums of constant size. Nobody's payload is read, so no key is needed. Only the tables are read:
what the log has not yet handed over is not seen.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from server.lake import table
from server.lake.place import Place
from server.lake.scanning import Check, Scan
from server.lake.schema import FEEDBACK, INTERACTIONS, SHADOWS

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    Ints = np.ndarray[Any, np.dtype[np.int64]]
    Floats = np.ndarray[Any, np.dtype[np.float64]]

# What an item costs at a provider is the mean of so many of the last ones at least.
_OF_LATE = 100
# Where the time that was asked for has none, it is looked for so long before.
_BEFORE = timedelta(days=30)
_CLOCKS = timedelta(hours=1)
# Latencies are counted in buckets that grow by 5 %, from 0.1 ms to 227 s, so quantiles are right to 2.5 %.
_STEP, _LEAST_MS, _BUCKETS = 1.05, 0.1, 300
_COLUMNS = ["time", "skill", "local", "error", "cost_micro_usd", "quality", "total_ms"]


@dataclass(slots=True, frozen=True)
class Span:
    """Stretches of `step_s` seconds that begin at whole multiples of it since 1970 (UTC), from `since` on and before `until` (aware)."""

    since: datetime
    until: datetime
    step_s: int

    @property
    def first(self) -> int:
        """Number of the first stretch since 1970."""
        return int(self.since.timestamp() // self.step_s)

    @property
    def length(self) -> int:
        """How many stretches are touched."""
        return max(0, -(-math.ceil(self.until.timestamp()) // self.step_s) - self.first)

    def places(self, times: pa.ChunkedArray) -> Ints:
        """For each time its stretch, from 0."""
        import numpy as np
        import pyarrow as pa

        micros = times.cast(pa.int64()).to_numpy()
        found: Ints = np.clip(micros // (self.step_s * 1_000_000) - self.first, 0, max(self.length - 1, 0))
        return found


@dataclass(slots=True)
class Point:
    """A stretch of time; money in 1e-6 US dollars. `quality`: mean of the answers whose quality is known; latencies in seconds."""

    time: datetime
    requests: int
    local: int
    failed: int
    cost_micro_usd: int
    saved_micro_usd: int
    quality: float | None
    latency_p50_s: float | None
    latency_p95_s: float | None
    liked: int
    disliked: int


@dataclass(slots=True)
class _Sums:
    """By stretch. `asked` and `asked_cost`: items that providers answered, also for comparison, and what they cost."""

    requests: Ints
    local: Ints
    failed: Ints
    cost: Ints
    asked: Ints
    asked_cost: Ints


@dataclass(slots=True)
class _Totals:
    """Over all skills, by stretch."""

    quality: Floats
    rated: Ints
    latencies: Ints  # int64[stretches, buckets]
    liked: Ints
    disliked: Ints


@dataclass(slots=True)
class Timeline:
    """Reads once, for one caller. `skill`: "" for all together. Blocking; see server.lake.scanning.Scan for what it raises."""

    place: Place
    span: Span
    skill: str
    check: Check
    _skills: dict[str, _Sums] = field(default_factory=dict)

    def points(self) -> list[Point]:
        """In the order of time; stretches without a request are left out."""
        import numpy as np

        n = self.span.length
        zeros = np.zeros(n, np.int64)
        totals = _Totals(np.zeros(n), zeros.copy(), np.zeros((n, _BUCKETS), np.int64), zeros.copy(), zeros.copy())
        verdicts = self._verdicts()
        names = [*_COLUMNS, "interaction_id"] if verdicts else _COLUMNS
        for rows in Scan(self.place, INTERACTIONS, self.check).batches(names, self._where()):
            places = self.span.places(rows["time"])
            self._count(rows, places)
            self._total(rows, places, totals)
            if verdicts:
                _judge(rows, places, totals, verdicts)
        self._compare()
        saved = self._saved()
        requests = self._sum("requests")
        local, failed, cost = self._sum("local"), self._sum("failed"), self._sum("cost")
        return [
            Point(
                datetime.fromtimestamp((self.span.first + at) * self.span.step_s, UTC),
                int(requests[at]),
                int(local[at]),
                int(failed[at]),
                int(cost[at]),
                round(saved[at]),
                float(totals.quality[at] / totals.rated[at]) if totals.rated[at] else None,
                _quantile(totals.latencies[at], 0.5),
                _quantile(totals.latencies[at], 0.95),
                int(totals.liked[at]),
                int(totals.disliked[at]),
            )
            for at in np.flatnonzero(requests).tolist()
        ]

    def _where(self) -> Any:
        import pyarrow.dataset as ds

        where = table.between(self.span.since, self.span.until)
        return where & (ds.field("skill") == self.skill) if self.skill else where

    def _of(self, skill: str) -> _Sums:
        import numpy as np

        if skill not in self._skills:
            self._skills[skill] = _Sums(*(np.zeros(self.span.length, np.int64) for _ in range(6)))
        return self._skills[skill]

    def _sum(self, name: str) -> Ints:
        import numpy as np

        total: Ints = sum((getattr(one, name) for one in self._skills.values()), np.zeros(self.span.length, np.int64))
        return total

    def _count(self, rows: pa.Table, places: Ints) -> None:
        """Counts and money of each skill."""
        local, failed, cost = _flags(rows, "local"), _failed(rows), _ints(rows, "cost_micro_usd")
        for skill, mine in _by_skill(rows):
            sums, at = self._of(skill), places[mine]
            bad, here = failed[mine], local[mine] & ~failed[mine]
            remote = ~bad & ~here
            _add(sums.requests, at)
            _add(sums.local, at[here])
            _add(sums.failed, at[bad])
            _add(sums.cost, at, cost[mine])
            _add(sums.asked, at[remote])
            _add(sums.asked_cost, at[remote], cost[mine][remote])

    def _total(self, rows: pa.Table, places: Ints, totals: _Totals) -> None:
        """Quality and latency of what was delivered."""
        import numpy as np

        delivered = ~_failed(rows)
        quality = rows["quality"].to_numpy(zero_copy_only=False)  # null becomes NaN
        known = delivered & ~np.isnan(quality.astype(float))
        _add(totals.rated, places[known])
        np.add.at(totals.quality, places[known], quality[known].astype(float))
        took = np.nan_to_num(rows["total_ms"].to_numpy(zero_copy_only=False).astype(float))
        bucket = np.ceil(np.log(np.maximum(took, _LEAST_MS) / _LEAST_MS) / math.log(_STEP)).astype(np.int64)
        np.add.at(totals.latencies, (places[delivered], np.minimum(bucket, _BUCKETS - 1)[delivered]), 1)

    def _compare(self) -> None:
        """Adds what was asked for comparison. An answer that came in a stretch without a request counts in the one before."""
        import numpy as np

        for rows in Scan(self.place, SHADOWS, self.check).batches(["time", "skill", "role", "cost_micro_usd", "error"], self._where()):
            places, cost = self.span.places(rows["time"]), _ints(rows, "cost_micro_usd")
            taught = np.array([role == "teacher" for role in rows["role"].to_pylist()], bool) & ~_failed(rows)
            for skill, mine in _by_skill(rows):
                if skill not in self._skills:
                    continue  # its interactions lie before
                sums = self._skills[skill]
                busy = np.flatnonzero(sums.requests)
                at = busy[np.maximum(np.searchsorted(busy, places[mine], side="right") - 1, 0)]
                _add(sums.cost, at, cost[mine])
                _add(sums.asked, at[taught[mine]])
                _add(sums.asked_cost, at[taught[mine]], cost[mine][taught[mine]])

    def _saved(self) -> list[float]:
        """Of each stretch: its local answers times what an item of the same skill cost at a provider of late, summed over skills."""
        saved = [0.0] * self.span.length
        unknown = {skill for skill, sums in self._skills.items() if sums.local.any() and not sums.asked.any()}
        before = self._before(unknown) if unknown else {}
        for skill, sums in self._skills.items():
            prices = _of_late(sums.asked.tolist(), sums.asked_cost.tolist(), before.get(skill, 0.0))
            for at in sums.local.nonzero()[0].tolist():
                saved[at] += prices[at] * int(sums.local[at])
        return saved

    def _before(self, skills: set[str]) -> dict[str, float]:
        """What an item of these skills cost at providers before the time that was asked for."""
        import pyarrow as pa
        import pyarrow.dataset as ds

        among = ds.field("skill").isin(pa.array(sorted(skills), pa.string()))
        where = table.between(self.span.since - _BEFORE, self.span.since) & among & ~ds.field("error").is_valid()
        found: dict[str, list[int]] = {}
        for name, theirs in ((INTERACTIONS, ~ds.field("local")), (SHADOWS, ds.field("role") == "teacher")):
            for rows in Scan(self.place, name, self.check).batches(["skill", "cost_micro_usd"], where & theirs):
                cost = _ints(rows, "cost_micro_usd")
                for skill, mine in _by_skill(rows):
                    one = found.setdefault(skill, [0, 0])
                    one[0] += int(mine.sum())
                    one[1] += int(cost[mine].sum())
        return {skill: cost / count for skill, (count, cost) in found.items()}

    def _verdicts(self) -> dict[str, bool]:
        """Interactions that somebody liked or disliked, by the last that was said; feedback is newer than what it is about."""
        last: dict[str, tuple[datetime, bool]] = {}
        names = ["interaction_id", "time", "rating", "thumb"]
        for rows in Scan(self.place, FEEDBACK, self.check).batches(names, table.between(self.span.since - _CLOCKS, None)):
            for row in rows.to_pylist():
                verdict = _verdict(row["rating"], row["thumb"])
                if verdict is not None and (row["interaction_id"] not in last or last[row["interaction_id"]][0] <= row["time"]):
                    last[row["interaction_id"]] = (row["time"], verdict)
        return {key: verdict for key, (_, verdict) in last.items()}


def _judge(rows: pa.Table, places: Ints, totals: _Totals, verdicts: dict[str, bool]) -> None:
    for at, key in zip(places.tolist(), rows["interaction_id"].to_pylist(), strict=True):
        verdict = verdicts.get(key)
        if verdict is not None:
            (totals.liked if verdict else totals.disliked)[at] += 1


def _verdict(rating: int | None, thumb: str | None) -> bool | None:
    """True: liked; False: disliked; None: neither. A thumb says it plainly, so it goes before stars."""
    if thumb in ("up", "down"):
        return thumb == "up"
    return None if rating is None or rating == 3 else rating > 3


def _of_late(counts: list[int], costs: list[int], otherwise: float) -> list[float]:
    """Mean cost at each stretch: of the last 100 answers or more up to its end; before the first of the first ones."""
    counted, paid = [0], [0]
    for count, cost in zip(counts, costs, strict=True):
        counted.append(counted[-1] + count)
        paid.append(paid[-1] + cost)
    first = next((at for at in range(len(counts)) if counts[at]), None)
    if first is None:
        return [otherwise] * len(counts)
    found: list[float] = []
    for at in range(len(counts)):
        end = max(at, first) + 1
        begin = max(0, bisect.bisect_right(counted, counted[end] - _OF_LATE) - 1)
        found.append((paid[end] - paid[begin]) / (counted[end] - counted[begin]))
    return found


def _quantile(counts: Ints, share: float) -> float | None:
    """Seconds that this share took at most."""
    import numpy as np

    total = int(counts.sum())
    if not total:
        return None
    place = int(np.searchsorted(np.cumsum(counts), max(1, math.ceil(share * total))))
    return _LEAST_MS / 1e3 * float(_STEP ** (place - 0.5 if place else 0))


def _by_skill(rows: pa.Table) -> Iterator[tuple[str, Any]]:
    """Each skill with a mask of its rows."""
    coded = rows["skill"].combine_chunks().fill_null("").dictionary_encode()
    codes = coded.indices.to_numpy(zero_copy_only=False)
    for code, skill in enumerate(coded.dictionary.to_pylist()):
        yield skill, codes == code


def _failed(rows: pa.Table) -> Any:
    import pyarrow.compute as pc

    return pc.is_valid(rows["error"]).to_numpy()


def _flags(rows: pa.Table, name: str) -> Any:
    import pyarrow.compute as pc

    return pc.fill_null(rows[name], False).to_numpy()


def _ints(rows: pa.Table, name: str) -> Ints:
    import pyarrow.compute as pc

    found: Ints = pc.fill_null(rows[name], 0).to_numpy()
    return found


def _add(into: Ints, at: Ints, values: Any = 1) -> None:
    import numpy as np

    np.add.at(into, at, values)
