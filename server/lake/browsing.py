"""What a console and an operator look at: pages of interactions, the newest first, and single ones, with what came later.

Only the table is read: what the log has not yet handed over is not seen. A page reads the newest pieces that it needs, never all.
"""

from __future__ import annotations

import base64
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import reduce
from operator import and_
from typing import TYPE_CHECKING, Any, NamedTuple

from server.config import Config
from server.lake import schema, table
from server.lake.place import Place
from server.lake.reading import LakeReader, with_shadows
from server.lake.scanning import Check, Scan
from server.lake.schema import FEEDBACK, INTERACTIONS, SHADOWS

if TYPE_CHECKING:
    import pyarrow as pa

    from server.registry.registry import Registry

# Clocks of the servers of one lake are at most so far apart, and an id is made at most so long before its row's time.
_CLOCKS = timedelta(hours=1)
# Answers that are asked for comparison come seconds after their interaction.
_LATE_ANSWERS = timedelta(days=1)


@dataclass(slots=True, frozen=True)
class Wanted:
    """Which interactions: from `since` on and before `until` (aware), of a skill ("": all), answered by "local", "provider" or "nobody"
    ("": anybody), with a known quality of at most `max_quality`, with feedback only.
    """

    since: datetime
    until: datetime
    skill: str = ""
    answered_by: str = ""
    max_quality: float | None = None
    with_feedback: bool = False


class Mark(NamedTuple):
    """The place of an interaction in the order: those before it are newer."""

    time: datetime
    interaction_id: str


@dataclass(slots=True, frozen=True)
class Recorded:
    """Columns of an interaction, in clear and filled with later answers, and its feedback rows, the oldest first."""

    interaction: dict[str, Any]
    feedback: list[dict[str, Any]]

    @property
    def mark(self) -> Mark:
        """Its place."""
        return Mark(self.interaction["time"], self.interaction["interaction_id"])


class Browser:
    """Blocking; for threads. Methods raise Unavailable where the registry does not answer, FailedPrecondition for payloads that do not
    open, whatever `check` raises, and OSError or deltalake's errors where the store does not answer.
    """

    def __init__(self, config: Config, registry: Registry) -> None:
        self._place = Place.of(config.lake)
        self._registry = registry
        self._reader = LakeReader(config, registry)

    def page(self, wanted: Wanted, most: int, after: Mark | None, check: Check) -> list[Recorded]:
        """At most `most` interactions after a mark, newest first; those of erased users are left out."""
        ids = self._with_feedback(wanted, check) if wanted.with_feedback else None
        if ids is not None and not ids:
            return []
        marks = self._newest(_condition(wanted, after, ids), most, check)
        return self._recorded(marks, check)

    def one(self, interaction_id: str, check: Check) -> Recorded | None:
        """The interaction with a valid id, or None; its id says on which day to look."""
        import pyarrow.dataset as ds

        time = time_of(interaction_id)
        where = table.between(time - _CLOCKS, time + _CLOCKS) & (ds.field("interaction_id") == interaction_id)
        marks = self._newest(where, 1, check)
        return next(iter(self._recorded(marks, check)), None)

    def _newest(self, where: Any, most: int, check: Check) -> list[Mark]:
        """The first marks of the order that a condition lets through. Pieces that end before the last of them are not opened."""
        import pyarrow as pa
        import pyarrow.compute as pc

        scan = Scan(self._place, INTERACTIONS, check)
        gone = pa.array(sorted(self._gone()), pa.string())
        best: pa.Table | None = None
        for end, piece in scan.newest_first(where):
            full = best is not None and best.num_rows == most
            last = best["time"][-1].as_py() if best is not None and full else None
            if last is not None and end < last:
                break
            for rows in scan.read(piece, ["time", "interaction_id", "user_hash"], where):
                if len(gone):
                    rows = rows.filter(pc.invert(pc.is_in(rows["user_hash"], gone)))
                best = rows if best is None else pa.concat_tables([best, rows])
                order = pc.select_k_unstable(best, most, [("time", "descending"), ("interaction_id", "descending")])
                best = best.take(order).combine_chunks()
        if best is None:
            return []
        return [Mark(*pair) for pair in zip(best["time"].to_pylist(), best["interaction_id"].to_pylist(), strict=True)]

    def _recorded(self, marks: list[Mark], check: Check) -> list[Recorded]:
        """All columns of these, joined with what came later, in their order."""
        if not marks:
            return []
        wanted = {mark.interaction_id for mark in marks}
        first, last = marks[-1].time, marks[0].time
        rows = self._among(INTERACTIONS, wanted, first, last + timedelta(microseconds=1), check)
        answers = self._among(SHADOWS, wanted, first - _CLOCKS, last + _LATE_ANSWERS, check)
        said = self._among(FEEDBACK, wanted, first - _CLOCKS, None, check).sort_by([("time", "ascending"), ("feedback_id", "ascending")])
        feedback: dict[str, dict[str, dict[str, Any]]] = {}
        for one in said.to_pylist():
            feedback.setdefault(one["interaction_id"], {})[one["feedback_id"]] = one
        full = with_shadows(rows, answers).select(schema.columns(INTERACTIONS))
        found = {row["interaction_id"]: row for row in full.to_pylist()}
        # A user may have been erased since the marks were read.
        return [Recorded(found[key], list(feedback.get(key, {}).values())) for _, key in marks if key in found]

    def _among(self, name: str, ids: Collection[str], since: datetime, until: datetime | None, check: Check) -> pa.Table:
        import pyarrow as pa
        import pyarrow.dataset as ds

        where = table.between(since, until) & ds.field("interaction_id").isin(pa.array(sorted(ids), pa.string()))
        return self._reader.opened(name, Scan(self._place, name, check).rows(schema.columns(name), where))

    def _with_feedback(self, wanted: Wanted, check: Check) -> set[str]:
        """Ids of interactions of which somebody said something; feedback is newer than what it is about."""
        ids: set[str] = set()
        for rows in Scan(self._place, FEEDBACK, check).batches(["interaction_id"], table.between(wanted.since - _CLOCKS, None)):
            ids.update(rows["interaction_id"].to_pylist())
        return ids

    def _gone(self) -> set[str]:
        from server.registry.keys import UserKeys

        return UserKeys(self._registry).erased()


def time_of(interaction_id: str) -> datetime:
    """When an id was made, to the millisecond."""
    return datetime.fromtimestamp(int.from_bytes(base64.b32decode(interaction_id.upper())[:6], "big") / 1e3, UTC)


def _condition(wanted: Wanted, after: Mark | None, ids: Collection[str] | None) -> Any:
    import pyarrow as pa
    import pyarrow.dataset as ds

    time, key, here = ds.field("time"), ds.field("interaction_id"), ds.field("local")
    until = wanted.until if after is None else min(wanted.until, after.time + timedelta(microseconds=1))
    terms = [table.between(wanted.since, until)]
    if after is not None:
        terms.append((time < after.time) | (key < after.interaction_id))
    if wanted.skill:
        terms.append(ds.field("skill") == wanted.skill)
    if wanted.answered_by:
        failed = ds.field("error").is_valid()
        terms.append(failed if wanted.answered_by == "nobody" else ~failed)
        terms += {"local": [here], "provider": [~here]}.get(wanted.answered_by, [])
    if wanted.max_quality is not None:
        terms.append(ds.field("quality") <= wanted.max_quality)
    if ids is not None:
        terms.append(key.isin(pa.array(sorted(ids), pa.string())))
    return reduce(and_, terms)
