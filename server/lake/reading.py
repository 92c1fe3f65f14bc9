"""What trainers and reports read: interactions joined with the answers that came later and with what people said, payloads opened."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from server.config import Config
from server.errors import FailedPrecondition, InvalidArgument
from server.lake import schema, table
from server.lake.place import Place
from server.lake.schema import FEEDBACK, INTERACTIONS, SHADOWS

if TYPE_CHECKING:
    import pyarrow as pa
    from deltalake import DeltaTable

    from server.registry.registry import Registry

# Columns of an interaction that a later answer fills where they are null, by the shadow's role: column -> the shadow's column.
_FILLED = {
    "teacher": {"teacher_label": "label", "teacher_text": "text", "teacher_source_model": "source_model"},
    "student": {"student_label": "label", "student_text": "text", "student_quality": "quality"},
}
# What the joins add. `teacher_source_model`: whose words teacher_label and teacher_text are.
_JOINED = ("teacher_source_model", "rating", "thumb", "correction", "comment", "feedback_metrics", "feedback_time", "feedback_count")
_FOR_JOINS = (
    "interaction_id",
    "user_hash",
    "sealed",
    "time",
    "student_quality",
    "student",
    "student_version",
    "training_allowed",
    "teacher_label",
    "teacher_text",
    "student_label",
    "student_text",
    "source_model",
    "local",
)


class LakeReader:
    """Reads the tables of the configured lake, whole or a skill's; one at any time, also beside writers, which it never disturbs.

    `registry` holds the users' keys; without one it is the configuration's, opened when a row needs it.

    Every method raises Unavailable where the registry is needed and does not answer, FailedPrecondition for payloads that do not open.
    """

    def __init__(self, config: Config, registry: Registry | None = None) -> None:
        self._place = Place.of(config.lake)
        self._config = config
        self._registry = registry
        self._encrypted = config.lake.encrypt

    def interactions(
        self,
        *,
        skill: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        columns: Sequence[str] | None = None,
        include_erased: bool = False,
    ) -> pa.Table:
        """Interactions from `since` on and before `until` (aware times), oldest first.

        Columns are the table's and, from the joins: where they are null, teacher_label, teacher_text, student_label, student_text,
        student_quality, student and student_version from the last shadow of that role, and `training_allowed` of the teacher's shadow with
        them; `teacher_source_model`; rating, thumb, correction, comment (the last that was given of each), `feedback_metrics` (JSON, later
        values over earlier ones), `feedback_time` (the last), `feedback_count` (repeated feedback counts once).
        """
        wanted = list(columns) if columns is not None else [*schema.columns(INTERACTIONS), *_JOINED]
        unknown = [name for name in wanted if name not in {*schema.columns(INTERACTIONS), *_JOINED}]
        if unknown:
            raise InvalidArgument(f"The lake has no column {unknown[0]!r}; see docs/lake.md for those it has.", field="columns")
        needed = {*wanted, *_FOR_JOINS}
        own = [name for name in schema.columns(INTERACTIONS) if name in needed]
        rows = self._read(INTERACTIONS, own, skill, since, until, include_erased)
        rows = rows.sort_by([("time", "ascending"), ("interaction_id", "ascending")])
        if not set(wanted).isdisjoint({*_FILLED["teacher"], *_FILLED["student"], "student", "student_version", "training_allowed"}):
            rows = with_shadows(rows, self._read(SHADOWS, schema.columns(SHADOWS), skill, None, None, include_erased))
        if not set(wanted).isdisjoint(_JOINED[1:]):
            said = [name for name in schema.columns(FEEDBACK) if name != "date"]
            rows = with_feedback(rows, self._read(FEEDBACK, said, None, None, None, include_erased))
        return rows.select(wanted)

    def feedback(self, *, since: datetime | None = None, until: datetime | None = None, include_erased: bool = False) -> pa.Table:
        """The rows of table feedback as they are, opened."""
        return self._read(FEEDBACK, schema.columns(FEEDBACK), None, since, until, include_erased)

    def shadows(
        self, *, skill: str | None = None, since: datetime | None = None, until: datetime | None = None, include_erased: bool = False
    ) -> pa.Table:
        """The rows of table shadows as they are, opened."""
        return self._read(SHADOWS, schema.columns(SHADOWS), skill, since, until, include_erased)

    def version(self) -> int:
        """Delta version of table interactions; -1 while it has no commit."""
        found = self._table(INTERACTIONS)
        return int(found.version()) if found is not None else -1

    def _table(self, name: str) -> DeltaTable | None:
        return table.open_table(self._place, name)

    def _read(
        self, name: str, columns: list[str], skill: str | None, since: datetime | None, until: datetime | None, include_erased: bool
    ) -> pa.Table:
        where = table.between(since, until)
        needed = list(dict.fromkeys([*columns, "interaction_id", "user_hash", "sealed"]))
        rows = table.read(self._place, name, equals={"skill": skill} if skill else None, names=needed, where=where)
        return self.opened(name, rows, include_erased=include_erased).select(columns)

    def opened(self, name: str, rows: pa.Table, *, include_erased: bool = False) -> pa.Table:
        """Rows of a table without those of erased users (or with them, empty), and with payloads in clear."""
        import pyarrow as pa
        import pyarrow.compute as pc

        users = set(pc.unique(rows["user_hash"]).to_pylist()) - {None, ""}
        if not users:
            return rows
        keys = self._keys(users)
        gone = {user for user, key in keys.items() if key is None}
        lost = pc.and_(pc.equal(rows["sealed"], "v1"), pc.invert(pc.is_in(rows["user_hash"], pa.array(sorted(keys), pa.string()))))
        if pc.any(pc.fill_null(lost, False)).as_py():
            message = "The lake holds payloads of users whom the registry does not know. Point registry.url to the registry of this lake."
            raise FailedPrecondition(message, table=name)
        erased = pc.fill_null(pc.is_in(rows["user_hash"], pa.array(sorted(gone), pa.string())), False)
        if gone and not include_erased:
            rows = rows.filter(pc.invert(erased))
        sealed = pc.fill_null(pc.equal(rows["sealed"], "v1"), False)
        payloads = [column for column in schema.PAYLOADS[name] if column in rows.column_names]
        if not payloads or not ((gone and include_erased) or pc.any(sealed).as_py()):
            return rows
        return _opened(name, rows, payloads, keys)

    def _keys(self, users: Iterable[str]) -> dict[str, bytes | None]:
        from server.registry.keys import UserKeys
        from server.registry.registry import Registry

        if self._registry is None:
            self._registry = Registry(self._config.registry)
        return UserKeys(self._registry).find(set(users))


def _opened(name: str, rows: pa.Table, payloads: list[str], keys: Mapping[str, bytes | None]) -> pa.Table:
    import pyarrow as pa

    from server.lake.sealing import Sealers

    sealers = Sealers(keys)
    users, ids, marks = (rows[column].to_pylist() for column in ("user_hash", "interaction_id", "sealed"))
    for column in payloads:
        values = rows[column].to_pylist()
        for index, user in enumerate(users):
            if values[index] is None or not user:
                continue
            if user in keys and keys[user] is None:
                values[index] = None
            elif marks[index] == "v1":
                sealer = sealers.get(user)
                assert sealer is not None, "users without a key were refused before"
                values[index] = sealer.open(name, column, ids[index], values[index])
        at = rows.schema.get_field_index(column)
        rows = rows.set_column(at, rows.schema.field(at), pa.array(values, rows.schema.field(at).type))
    return rows


def with_shadows(rows: pa.Table, shadows: pa.Table) -> pa.Table:
    """Interactions filled with the last answers that came later, and with `teacher_source_model`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # Whose words the teacher's are is known of a delivered answer of a provider; a student's delivered answer says nothing of it.
    answered = pc.is_valid(pc.coalesce(rows["teacher_label"], rows["teacher_text"]))
    remote = pc.and_(answered, pc.invert(pc.fill_null(rows["local"], False)))
    model = pc.if_else(remote, rows["source_model"], pa.scalar(None, pa.string()))
    rows = rows.append_column("teacher_source_model", model)
    shadows = shadows.filter(pc.is_null(shadows["error"])).sort_by("time")
    ids = rows["interaction_id"].to_pylist()
    for role, filled in _FILLED.items():
        mine = shadows.filter(pc.equal(shadows["role"], role))
        if not mine.num_rows:
            continue
        last = {key: index for index, key in enumerate(mine["interaction_id"].to_pylist())}
        found = mine.take(pa.array([last.get(key) for key in ids], pa.int64()))
        # A row that has the answer already keeps all of it: an answer is never put together from two.
        empty = pc.is_null(pc.coalesce(rows[f"{role}_label"], rows[f"{role}_text"]))
        there = pc.and_(empty, pc.is_valid(found["interaction_id"]))
        values = {column: found[source] for column, source in filled.items()}
        if role == "student":
            name = pc.replace_substring_regex(found["candidate"], "^local:", "")
            values["student"] = pc.replace_substring_regex(name, "@.*$", "")
            version = pc.replace_substring_regex(name, "^[^@]*@?", "")
            values["student_version"] = pc.if_else(pc.equal(version, ""), pa.scalar(None, pa.string()), version)
        else:
            values["training_allowed"] = found["training_allowed"]
        for column, value in values.items():
            at = rows.schema.get_field_index(column)
            rows = rows.set_column(at, rows.schema.field(at), pc.if_else(there, value, rows[column]))
    return rows


def with_feedback(rows: pa.Table, feedback: pa.Table) -> pa.Table:
    """Interactions with the columns that feedback adds."""
    import pyarrow as pa

    said: dict[str, dict[str, Any]] = {}
    for row in feedback.sort_by([("time", "ascending"), ("feedback_id", "ascending")]).to_pylist():
        about = said.setdefault(row["interaction_id"], {"ids": set(), "metrics": {}})
        about["ids"].add(row["feedback_id"])
        about["time"] = row["time"]
        about["metrics"].update(_numbers(row["metrics"]))
        about.update({name: row[name] for name in ("rating", "thumb", "correction", "comment") if row[name] is not None})
    found = [said.get(key, {}) for key in rows["interaction_id"].to_pylist()]
    kinds = {"rating": pa.int64(), "thumb": pa.string(), "correction": pa.string(), "comment": pa.string()}
    for name, kind in kinds.items():
        rows = rows.append_column(name, pa.array([one.get(name) for one in found], kind))
    metrics = [json.dumps(one["metrics"], sort_keys=True) if one.get("metrics") else None for one in found]
    rows = rows.append_column("feedback_metrics", pa.array(metrics, pa.string()))
    rows = rows.append_column("feedback_time", pa.array([one.get("time") for one in found], pa.timestamp("us", tz="UTC")))
    return rows.append_column("feedback_count", pa.array([len(one.get("ids", ())) for one in found], pa.int64()))


def _numbers(metrics: str | None) -> dict[str, Any]:
    try:
        found = json.loads(metrics) if metrics else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
