"""understudy.v1.FeedbackService: what people say of answers, into the lake."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from server.api import calls
from server.api.wire import Context
from server.errors import InteractionNotFound, InvalidArgument, Unavailable
from server.lake.lake import Lake
from server.lake.schema import FEEDBACK
from server.registry.registry import Registry
from understudy.v1 import feedback_pb2
from understudy.v1 import feedback_service_pb2 as pb

MAX_WORDS_BYTES = 16 * 1024
MAX_REQUEST_ID_BYTES = 128
_THUMBS = {feedback_pb2.THUMB_UNSPECIFIED: "", feedback_pb2.THUMB_UP: "up", feedback_pb2.THUMB_DOWN: "down"}
_FROM_THUMB = {word: value for value, word in _THUMBS.items()}


class FeedbackServicer:
    """Feedback with a request id is kept once: its id follows from the request id, and the registry remembers it."""

    def __init__(self, lake: Lake, registry: Registry) -> None:
        self._lake = lake
        self._registry = registry

    async def CreateFeedback(self, request: pb.CreateFeedbackRequest, _context: Context) -> pb.CreateFeedbackResponse:
        """Keeps feedback. The lake has it before the answer leaves."""
        feedback = request.feedback
        check(request)
        if not self._lake.ids.valid(feedback.interaction_id):
            message = "No interaction has this id; expected the interaction_id of a RunResult of this server. Copy it from there."
            raise InteractionNotFound(message, field="feedback.interaction_id")
        request_id = request.request_id
        if request_id and (known := await asyncio.to_thread(self._registry.feedback_of, request_id)) is not None:
            return pb.CreateFeedbackResponse(feedback=_from_record(known))
        now = time.time_ns()
        record: dict[str, Any] = {
            "time_ns": now,
            "feedback_id": self._lake.ids.derived("feedback", request_id or self._lake.ids.new()),
            "request_id": request_id or calls.current_call().request_id,
            "interaction_id": feedback.interaction_id,
            "rating": feedback.rating if feedback.HasField("rating") else None,
            "thumb": _THUMBS[feedback.thumb] or None,
            "correction": feedback.correction if feedback.HasField("correction") else None,
            "comment": feedback.comment or None,
        }
        # First the lake, then the registry: a death between them leaves a row that a repeated call writes again under the same id.
        if not self._lake.append(FEEDBACK, [record]):
            raise Unavailable("The lake takes no feedback at the moment; its disk may be full. Send it again later.", retry_after_s=30.0)
        if request_id:
            record = await asyncio.to_thread(self._registry.keep_feedback, request_id, record)
        return pb.CreateFeedbackResponse(feedback=_from_record(record))


def check(request: pb.CreateFeedbackRequest) -> None:
    """Raises InvalidArgument, naming the field."""
    feedback = request.feedback
    if not feedback.interaction_id:
        raise InvalidArgument("feedback.interaction_id is empty; expected a RunResult's interaction_id.", field="feedback.interaction_id")
    if feedback.HasField("rating") and not 1 <= feedback.rating <= 5:
        raise InvalidArgument(f"feedback.rating is {feedback.rating}; expected 1 to 5.", field="feedback.rating")
    if feedback.thumb not in _THUMBS:
        raise InvalidArgument(f"feedback.thumb is {feedback.thumb}; expected a value of Thumb, 0 to 2.", field="feedback.thumb")
    for field, limit in (("correction", MAX_WORDS_BYTES), ("comment", MAX_WORDS_BYTES)):
        if len(getattr(feedback, field).encode()) > limit:
            raise InvalidArgument(f"feedback.{field} has over {limit} bytes; cut it.", field=f"feedback.{field}", limit=limit)
    if len(request.request_id.encode()) > MAX_REQUEST_ID_BYTES:
        message = f"request_id has over {MAX_REQUEST_ID_BYTES} bytes; expected a short unique id."
        raise InvalidArgument(message, field="request_id", limit=MAX_REQUEST_ID_BYTES)
    said = feedback.HasField("rating") or feedback.thumb or feedback.HasField("correction") or feedback.comment.strip()
    if not said:
        raise InvalidArgument("feedback says nothing; set rating, thumb, correction or comment.", field="feedback")


def _from_record(record: dict[str, Any]) -> feedback_pb2.Feedback:
    feedback = feedback_pb2.Feedback(
        feedback_id=record["feedback_id"],
        interaction_id=record["interaction_id"],
        rating=record["rating"],
        thumb=_FROM_THUMB[record["thumb"] or ""],
        correction=record["correction"],
        comment=record["comment"] or "",
    )
    feedback.create_time.FromNanoseconds(record["time_ns"])
    return feedback
