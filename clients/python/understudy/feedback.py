"""What people say of answers, without any I/O, for both clients."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Any, Literal

from understudy import convert
from understudy.calls import Page, Prepared, _call, _choice, _no_more, _prepare, _reader
from understudy.v1 import feedback_pb2 as types
from understudy.v1 import feedback_service_pb2 as pb

MOST_AT_ONCE = 1000
_THUMBS = {"": types.THUMB_UNSPECIFIED, "up": types.THUMB_UP, "down": types.THUMB_DOWN}
_WORDS: dict[int, Literal["up", "down"]] = {types.THUMB_UP: "up", types.THUMB_DOWN: "down"}


@dataclass(frozen=True, slots=True)
class Feedback:
    """What somebody says of an interaction. `rating` is 1 to 5; `metrics` are measurements of one's own, by name.

    `request_id` makes sending it again safe; `user` is who says it, as in `run`. The server gives `feedback_id` and `create_time`.
    """

    interaction_id: str
    rating: int | None = None
    thumb: Literal["up", "down"] | None = None
    correction: str | None = None
    comment: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    user: str = ""
    request_id: str = ""
    feedback_id: str = ""
    create_time: datetime | None = None


def create(said: Feedback, options: dict[str, Any]) -> Prepared[str]:
    """FeedbackService.CreateFeedback. One id for all attempts makes repeating it safe."""
    call = _call(options)
    _no_more(options)
    read = _reader(pb.CreateFeedbackResponse, lambda response: str(response.feedback.feedback_id))
    return _prepare("FeedbackService", "CreateFeedback", _request(said, str(call.get("request_id", ""))), read, call)


def create_many(said: Sequence[Feedback], options: dict[str, Any]) -> Prepared[list[str]]:
    """FeedbackService.BatchCreateFeedback, of at most 1,000. Each has an id of its own for all attempts."""
    call = _call(options)
    _no_more(options)
    request = pb.BatchCreateFeedbackRequest(requests=[_request(one) for one in said])
    read = _reader(pb.BatchCreateFeedbackResponse, lambda response: [str(one.feedback_id) for one in response.feedback])
    return _prepare("FeedbackService", "BatchCreateFeedback", request, read, call)


def in_parts(said: Iterable[Feedback]) -> Iterator[list[Feedback]]:
    """Lists of as many as go into one call."""
    left = iter(said)
    while part := list(islice(left, MOST_AT_ONCE)):
        yield part


def list_page(interaction_id: str, token: str, options: dict[str, Any]) -> Prepared[Page[Feedback]]:
    """One page of FeedbackService.ListFeedback."""
    options = dict(options)
    call = _call(options)
    _no_more(options)
    request = pb.ListFeedbackRequest(interaction_id=interaction_id, page_size=MOST_AT_ONCE, page_token=token)
    read = _reader(pb.ListFeedbackResponse, lambda found: Page([_read(one) for one in found.feedback], found.next_page_token))
    return _prepare("FeedbackService", "ListFeedback", request, read, call)


def _request(said: Feedback, request_id: str = "") -> pb.CreateFeedbackRequest:
    content = types.Feedback(interaction_id=said.interaction_id, thumb=_choice("thumb", said.thumb or "", _THUMBS), comment=said.comment)
    if said.rating is not None:
        content.rating = said.rating
    if said.correction is not None:
        content.correction = said.correction
    content.metrics.update(said.metrics)
    return pb.CreateFeedbackRequest(feedback=content, request_id=said.request_id or request_id or uuid.uuid4().hex, user=said.user)


def _read(message: types.Feedback) -> Feedback:
    return Feedback(
        interaction_id=message.interaction_id,
        rating=message.rating if message.HasField("rating") else None,
        thumb=_WORDS.get(message.thumb),
        correction=message.correction if message.HasField("correction") else None,
        comment=message.comment,
        metrics=dict(message.metrics),
        feedback_id=message.feedback_id,
        create_time=convert._time(message, "create_time"),
    )
