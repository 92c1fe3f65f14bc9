"""understudy.v1.FeedbackService: what people say of answers, into the lake."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from server.api import calls
from server.api.paging import page_token, read_page
from server.api.wire import Context
from server.errors import FailedPrecondition, InteractionNotFound, InvalidArgument, Unavailable
from server.lake.lake import Lake
from server.lake.reading import LakeReader
from server.lake.schema import FEEDBACK
from server.registry.registry import Registry
from understudy.v1 import feedback_pb2
from understudy.v1 import feedback_service_pb2 as pb

MAX_WORDS_BYTES = 16 * 1024
MAX_REQUEST_ID_BYTES = 128
MAX_USER_BYTES = 256
MAX_METRICS = 32
MAX_BATCH = 1000
_METRIC = re.compile(r"[A-Za-z0-9._/-]{1,64}")
_THUMBS = {feedback_pb2.THUMB_UNSPECIFIED: "", feedback_pb2.THUMB_UP: "up", feedback_pb2.THUMB_DOWN: "down"}
_FROM_THUMB = {word: value for value, word in _THUMBS.items()}
# Clocks of the servers of one lake are at most so far apart: feedback that seems older than its interaction is found all the same.
_CLOCKS = timedelta(hours=1)


class FeedbackObserver(Protocol):
    """Hears of feedback that is new, on the event loop, once it is in the log; must be quick and must not raise."""

    def feedback_kept(self, interaction_id: str, *, rating: int | None, thumb: str | None, correction: str | None) -> None:
        """`thumb`: "up" or "down"."""
        ...


class FeedbackServicer:
    """Feedback with a request id is kept once: its id follows from the request id, and the registry remembers it.

    `reader` reads it again for ListFeedback.
    """

    def __init__(
        self, lake: Lake, registry: Registry, reader: LakeReader | None = None, *, observer: FeedbackObserver | None = None
    ) -> None:
        self._lake = lake
        self._registry = registry
        self._reader = reader
        self._observer = observer

    async def CreateFeedback(self, request: pb.CreateFeedbackRequest, _context: Context) -> pb.CreateFeedbackResponse:
        """Keeps feedback. The lake has it before the answer leaves."""
        (kept,) = await self._keep([("", request)])
        return pb.CreateFeedbackResponse(feedback=kept)

    async def BatchCreateFeedback(self, request: pb.BatchCreateFeedbackRequest, _context: Context) -> pb.BatchCreateFeedbackResponse:
        """Keeps all of it in one record batch of the log, or, where one is wrong, nothing."""
        if not 1 <= len(request.requests) <= MAX_BATCH:
            message = f"requests has {len(request.requests)} items; expected 1 to {MAX_BATCH}. Send the rest in another call."
            raise InvalidArgument(message, field="requests", limit=MAX_BATCH)
        kept = await self._keep([(f"requests[{index}].", one) for index, one in enumerate(request.requests)])
        return pb.BatchCreateFeedbackResponse(feedback=kept)

    async def ListFeedback(self, request: pb.ListFeedbackRequest, _context: Context) -> pb.ListFeedbackResponse:
        """Reads the table: what the log has not yet handed over is not seen."""
        size, after = read_page(request.page_size, request.page_token)
        self._known(request.interaction_id, "interaction_id")
        if self._reader is None:
            raise FailedPrecondition("This server does not read its lake; feedback is taken and not listed here.")
        rows = await asyncio.to_thread(_rows_of, self._reader, request.interaction_id)
        later = [row for row in rows if after is None or _place(row) > (after[1], after[0])]
        response = pb.ListFeedbackResponse(feedback=[to_feedback(row) for row in later[:size]])
        if len(later) > size:
            time_ns, feedback_id = _place(later[size - 1])
            response.next_page_token = page_token(feedback_id, time_ns)
        return response

    async def _keep(self, requests: Sequence[tuple[str, pb.CreateFeedbackRequest]]) -> list[feedback_pb2.Feedback]:
        """Feedback as it is kept, in order. Each request comes with the beginning of its fields' names."""
        for place, request in requests:
            check(request, place)
            self._known(request.feedback.interaction_id, f"{place}feedback.interaction_id")
        ids = {request.request_id for _, request in requests if request.request_id}
        known = await asyncio.to_thread(self._remembered, ids) if ids else {}
        fresh: dict[str, dict[str, Any]] = {}
        records: list[dict[str, Any]] = []
        for _, request in requests:
            before = known.get(request.request_id) if request.request_id else None
            record = before or self._record(request)
            records.append(fresh.setdefault(record["feedback_id"], record) if before is None else record)
        # First the lake, then the registry: a death between them leaves rows that a repeated call writes again under the same ids.
        if fresh and not self._lake.append(FEEDBACK, list(fresh.values())):
            raise Unavailable("The lake takes no feedback at the moment; its disk may be full. Send it again later.", retry_after_s=30.0)
        if ids:
            records = await asyncio.to_thread(self._remember, [one.request_id for _, one in requests], records, known)
        for record in fresh.values():
            self._tell(record)
        return [to_feedback(record) for record in records]

    def _known(self, interaction_id: str, field: str) -> None:
        """Raises InteractionNotFound for an id that this lake never gave out."""
        if not self._lake.ids.valid(interaction_id):
            message = "No interaction has this id; expected the interaction_id of a RunResult of this server. Copy it from there."
            raise InteractionNotFound(message, field=field)

    def _record(self, request: pb.CreateFeedbackRequest) -> dict[str, Any]:
        feedback, ids = request.feedback, self._lake.ids
        return {
            "time_ns": time.time_ns(),
            "feedback_id": ids.derived("feedback", request.request_id or ids.new()),
            "request_id": request.request_id or calls.current_call().request_id,
            "interaction_id": feedback.interaction_id,
            "rating": feedback.rating if feedback.HasField("rating") else None,
            "thumb": _THUMBS[feedback.thumb] or None,
            "correction": feedback.correction if feedback.HasField("correction") else None,
            "comment": feedback.comment or None,
            "metrics": json.dumps(dict(feedback.metrics), sort_keys=True) if feedback.metrics else None,
            "user_hash": ids.pseudonym(request.user) or None,
        }

    def _remembered(self, request_ids: set[str]) -> dict[str, dict[str, Any]]:
        found = {key: self._registry.feedback_of(key) for key in request_ids}
        return {key: record for key, record in found.items() if record is not None}

    def _remember(
        self, request_ids: Sequence[str], records: Sequence[dict[str, Any]], known: dict[str, dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """What is kept under each request id: of two callers at once, the first one's."""
        return [
            self._registry.keep_feedback(key, record) if key and key not in known else record
            for key, record in zip(request_ids, records, strict=True)
        ]

    def _tell(self, record: dict[str, Any]) -> None:
        if self._observer is not None:
            said = {name: record[name] for name in ("rating", "thumb", "correction")}
            self._observer.feedback_kept(record["interaction_id"], **said)


def check(request: pb.CreateFeedbackRequest, place: str = "") -> None:
    """Raises InvalidArgument, naming the field, which begins with `place`."""
    feedback = request.feedback

    def refuse(field: str, problem: str, **more: Any) -> InvalidArgument:
        return InvalidArgument(f"{place}{field} {problem}", field=f"{place}{field}", **more)

    if not feedback.interaction_id:
        raise refuse("feedback.interaction_id", "is empty; expected a RunResult's interaction_id.")
    if feedback.HasField("rating") and not 1 <= feedback.rating <= 5:
        raise refuse("feedback.rating", f"is {feedback.rating}; expected 1 to 5.")
    if feedback.thumb not in _THUMBS:
        raise refuse("feedback.thumb", f"is {feedback.thumb}; expected a value of Thumb, 0 to 2.")
    for field in ("correction", "comment"):
        if len(getattr(feedback, field).encode()) > MAX_WORDS_BYTES:
            raise refuse(f"feedback.{field}", f"has over {MAX_WORDS_BYTES} bytes; cut it.", limit=MAX_WORDS_BYTES)
    if len(feedback.metrics) > MAX_METRICS:
        raise refuse("feedback.metrics", f"has {len(feedback.metrics)} names; expected at most {MAX_METRICS}.", limit=MAX_METRICS)
    for name, value in feedback.metrics.items():
        if not _METRIC.fullmatch(name):
            raise refuse("feedback.metrics", f"has the name {name[:64]!r}; expected 1 to 64 letters, digits, '.', '_', '-' or '/'.")
        if not math.isfinite(value):
            raise refuse("feedback.metrics", f"has {value} for {name!r}; expected a finite number.")
    for field, limit in (("request_id", MAX_REQUEST_ID_BYTES), ("user", MAX_USER_BYTES)):
        if len(getattr(request, field).encode()) > limit:
            raise refuse(field, f"has over {limit} bytes; expected a short opaque id.", limit=limit)
    said = feedback.HasField("rating") or feedback.thumb or feedback.HasField("correction") or feedback.comment.strip() or feedback.metrics
    if not said:
        raise refuse("feedback", "says nothing; set rating, thumb, correction, comment or metrics.")


def _rows_of(reader: LakeReader, interaction_id: str) -> list[dict[str, Any]]:
    """Feedback on an interaction as records, oldest first, each id once; of days before the interaction nothing is read."""
    import pyarrow.compute as pc

    milliseconds = int.from_bytes(base64.b32decode(interaction_id.upper())[:6], "big")
    since = datetime.fromtimestamp(milliseconds / 1e3, UTC) - _CLOCKS
    found = reader.feedback(since=since)
    rows = found.filter(pc.equal(found["interaction_id"], interaction_id)).to_pylist()
    for row in rows:
        row["time_ns"] = round(row["time"].timestamp() * 1e6) * 1000
    return sorted({row["feedback_id"]: row for row in rows}.values(), key=_place)


def _place(record: dict[str, Any]) -> tuple[int, str]:
    return record["time_ns"], record["feedback_id"]


def to_feedback(record: dict[str, Any]) -> feedback_pb2.Feedback:
    """A record, or a row of table feedback with `time_ns`, as a message."""
    feedback = feedback_pb2.Feedback(
        feedback_id=record["feedback_id"],
        interaction_id=record["interaction_id"],
        rating=record["rating"],
        thumb=_FROM_THUMB[record["thumb"] or ""],
        correction=record["correction"],
        comment=record["comment"] or "",
        metrics=json.loads(record.get("metrics") or "{}"),
    )
    feedback.create_time.FromNanoseconds(record["time_ns"])
    return feedback
