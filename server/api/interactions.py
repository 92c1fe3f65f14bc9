"""What StatsService reads from the lake: the timeline, pages of interactions, one interaction.

Reading takes from milliseconds to seconds and must not hurt the serving loop: it runs in two threads of its own, so many wait for them and
no more, and whoever waits no longer is not read for.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from server.api import calls
from server.api.feedback import to_feedback
from server.config import Config
from server.core import Call
from server.errors import Cancelled, DeadlineExceeded, InteractionNotFound, InvalidArgument, Overloaded, Unavailable
from server.lake.browsing import Browser, Mark, Recorded, Wanted
from server.lake.ids import IdKey
from server.lake.place import Place
from server.lake.scanning import Check
from server.lake.timeline import Point, Span, Timeline
from server.registry.registry import Registry
from server.routing.skills import SkillBook
from understudy.v1 import interaction_pb2
from understudy.v1 import stats_service_pb2 as pb

T = TypeVar("T")

DEFAULT_PAGE, LARGEST_PAGE = 50, 500
MAX_POINTS = 1000
LEAST_STEP_S = 60
READERS = 2
MAX_WAITING = 32
READ_S = 30.0
_BUSY_RETRY_S = 1.0
_DAY_S = 86_400
_EARLIEST, _LATEST = datetime(1970, 1, 2, tzinfo=UTC), datetime(9998, 1, 1, tzinfo=UTC)
_ANSWERED_BY = {
    pb.ANSWERED_BY_UNSPECIFIED: "",
    pb.ANSWERED_BY_LOCAL: "local",
    pb.ANSWERED_BY_PROVIDER: "provider",
    pb.ANSWERED_BY_NOBODY: "nobody",
}
_SKILLS, _INTERACTIONS = "skills/", "interactions/"


class Reading:
    """Two threads that read, and a bounded number of callers who wait for them. For one event loop."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="lake-read")
        self._waiting = 0
        self._closed = False

    async def run(self, read: Callable[[Check], T]) -> T:
        """What `read` returns. Its `check` raises once the caller has left, the deadline (at most 30 s) has passed, or `close` was called.

        Raises Overloaded where too many wait, Unavailable where the lake's store does not answer.
        """
        if self._waiting >= READERS + MAX_WAITING:
            raise Overloaded(
                f"{self._waiting} calls read the lake or wait for it; expected fewer at once. Call again after the delay.",
                retry_after_s=_BUSY_RETRY_S,
                limit=READERS + MAX_WAITING,
            )
        check = self._check(calls.current_call())
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, _read, read, check)
        finally:
            self._waiting -= 1

    async def close(self) -> None:
        """Ends what reads and waits for it."""
        self._closed = True
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)

    def _check(self, call: Call) -> Check:
        end = time.monotonic() + READ_S
        if call.deadline is not None:
            end = min(end, call.deadline)

        def check() -> None:
            if call.cancelled or self._closed:
                raise Cancelled("the caller has left, or the server stops.")
            if time.monotonic() > end:
                message = "Reading the lake took too long; expected less at once: ask for a shorter time or one skill, or compact the lake."
                raise DeadlineExceeded(message, stage="lake")

        return check


def _read(read: Callable[[Check], T], check: Check) -> T:
    from deltalake.exceptions import DeltaError

    check()  # it may have waited long
    try:
        try:
            return read(check)
        except FileNotFoundError:  # an erasure removed the files of the version that was being read
            return read(check)
    except (OSError, DeltaError) as error:
        message = f"The lake does not answer ({type(error).__name__}); call again later. `understudy lake verify` looks at it."
        raise Unavailable(message, retry_after_s=10.0) from error


@dataclass(slots=True)
class Interactions:
    """The three methods, for StatsServicer. `ids`: the lake's; `skills`: whom one may ask for."""

    config: Config
    registry: Registry
    ids: IdKey
    skills: SkillBook
    reading: Reading

    async def timeline(self, request: pb.GetTimelineRequest) -> pb.GetTimelineResponse:
        """See the proto. Raises InvalidArgument, SkillNotFound, Unavailable, Overloaded, DeadlineExceeded; so do the others."""
        skill = self._skill(request.skill)
        since, until = _times(request, timedelta(days=30))
        span = Span(since, until, _step(request))
        if span.length > MAX_POINTS + 1:  # one more where the first begins before `since_time`
            message = f"since_time to until_time has {span.length} steps; expected at most {MAX_POINTS}: a longer step or less time."
            raise InvalidArgument(message, field="step", limit=MAX_POINTS)
        place = Place.of(self.config.lake)
        points = await self.reading.run(lambda check: Timeline(place, span, skill, check).points())
        return pb.GetTimelineResponse(points=[_point(one) for one in points])

    async def page(self, request: pb.ListInteractionsRequest) -> pb.ListInteractionsResponse:
        """A page, newest first. Its token names the last interaction, so that new ones move nothing."""
        if request.page_size < 0:
            raise InvalidArgument(f"page_size is {request.page_size}; expected 0 or more.", field="page_size", limit=LARGEST_PAGE)
        size = min(request.page_size or DEFAULT_PAGE, LARGEST_PAGE)
        wanted, after = self._wanted(request), None
        if request.page_token:
            after, wanted = _from_token(request, wanted)
        browser = Browser(self.config, self.registry)
        found = await self.reading.run(lambda check: browser.page(wanted, size + 1, after, check))
        response = pb.ListInteractionsResponse(interactions=[_recorded(one) for one in found[:size]])
        if len(found) > size:
            response.next_page_token = _to_token(request, wanted, found[size - 1].mark)
        return response

    async def get(self, request: pb.GetInteractionRequest) -> pb.GetInteractionResponse:
        """One of them."""
        key = request.name.removeprefix(_INTERACTIONS)
        if not request.name.startswith(_INTERACTIONS) or not key or "/" in key:
            raise InvalidArgument(f"name is {request.name[:160]!r}; expected interactions/<id>.", field="name")
        browser = Browser(self.config, self.registry)
        found = await self.reading.run(lambda check: browser.one(key, check)) if self.ids.valid(key) else None
        if found is None:
            message = (
                "No interaction has this id; expected the interaction_id of an answer. One of the last seconds is not in the table yet "
                f"(lake.flush_s is {self.config.lake.flush_s:g}); one of an erased user is gone."
            )
            raise InteractionNotFound(message, field="name")
        return pb.GetInteractionResponse(interaction=_recorded(found))

    def _skill(self, resource: str) -> str:
        if not resource:
            return ""
        name = resource.removeprefix(_SKILLS)
        if not resource.startswith(_SKILLS) or not name or "/" in name:
            raise InvalidArgument(f"skill is {resource[:160]!r}; expected skills/<skill>, or nothing for all.", field="skill")
        return self.skills.get(name).name

    def _wanted(self, request: pb.ListInteractionsRequest) -> Wanted:
        if request.answered_by not in _ANSWERED_BY:
            raise InvalidArgument(f"answered_by is {request.answered_by}; expected a value of AnsweredBy, 0 to 3.", field="answered_by")
        quality = request.max_quality if request.HasField("max_quality") else None
        if quality is not None and not 0 <= quality <= 1:
            raise InvalidArgument(f"max_quality is {quality}; expected 0 to 1.", field="max_quality")
        since, until = _times(request, timedelta(days=7))
        return Wanted(since, until, self._skill(request.skill), _ANSWERED_BY[request.answered_by], quality, request.with_feedback)


def _times(request: Any, back: timedelta) -> tuple[datetime, datetime]:
    """since_time and until_time: unset, `back` before the end, and now."""
    until = _time(request.until_time, "until_time") if request.HasField("until_time") else datetime.now(UTC)
    since = _time(request.since_time, "since_time") if request.HasField("since_time") else max(until - back, _EARLIEST)
    if since >= until:
        message = f"since_time is {since.isoformat()} and until_time {until.isoformat()}; expected since_time to be earlier."
        raise InvalidArgument(message, field="since_time")
    return since, until


def _time(stamp: Timestamp, field: str) -> datetime:
    if not (_EARLIEST.timestamp() <= stamp.seconds <= _LATEST.timestamp() and 0 <= stamp.nanos < 1_000_000_000):
        raise InvalidArgument(f"{field} has {stamp.seconds} seconds and {stamp.nanos} nanos; expected a time from 1970 on.", field=field)
    return datetime.fromtimestamp(stamp.seconds, UTC) + timedelta(microseconds=stamp.nanos // 1000)


def _step(request: pb.GetTimelineRequest) -> int:
    if not request.HasField("step"):
        return _DAY_S
    step: Duration = request.step
    if step.seconds < LEAST_STEP_S or step.nanos:
        message = f"step is {step.seconds + step.nanos / 1e9:g} s; expected whole seconds, {LEAST_STEP_S} or more."
        raise InvalidArgument(message, field="step", limit=LEAST_STEP_S)
    return step.seconds


def _filters(request: pb.ListInteractionsRequest) -> str:
    """A digest of what must stay the same from page to page."""
    same = pb.ListInteractionsRequest()
    same.CopyFrom(request)
    same.ClearField("page_size")
    same.ClearField("page_token")
    return hashlib.blake2b(same.SerializeToString(deterministic=True), digest_size=6).hexdigest()


def _to_token(request: pb.ListInteractionsRequest, wanted: Wanted, mark: Mark) -> str:
    since, last = (_micros(time) for time in (wanted.since, mark.time))
    return base64.urlsafe_b64encode(json.dumps([_filters(request), since, last, mark.interaction_id]).encode()).decode()


def _from_token(request: pb.ListInteractionsRequest, wanted: Wanted) -> tuple[Mark, Wanted]:
    """The mark after which the page begins, and what the first page asked for: "7 days ago" was then."""
    try:
        filters, since, last, key = json.loads(base64.urlsafe_b64decode(request.page_token.encode("ascii")))
        mark, first = Mark(_from_micros(last), str(key)), _from_micros(since)
    except (binascii.Error, ValueError, TypeError, OverflowError):
        message = "page_token is none of ours; expected next_page_token of the page before."
        raise InvalidArgument(message, field="page_token") from None
    if filters != _filters(request):
        message = "page_token is of a list with other filters; expected those of the page before. Begin again without page_token."
        raise InvalidArgument(message, field="page_token")
    return mark, replace(wanted, since=first)


def _micros(time: datetime) -> int:
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def _from_micros(micros: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=int(micros))


def _point(point: Point) -> pb.TimelinePoint:
    message = pb.TimelinePoint(
        requests=point.requests,
        local=point.local,
        failed=point.failed,
        cost_micro_usd=point.cost_micro_usd,
        saved_micro_usd=point.saved_micro_usd,
        quality=point.quality,
        liked=point.liked,
        disliked=point.disliked,
    )
    message.time.FromDatetime(point.time)
    for field, seconds in (("latency_p50", point.latency_p50_s), ("latency_p95", point.latency_p95_s)):
        if seconds is not None:
            getattr(message, field).FromMicroseconds(round(seconds * 1e6))
    return message


def _recorded(one: Recorded) -> pb.RecordedInteraction:
    columns = {name: value for name, value in one.interaction.items() if name != "time" and value is not None}
    found = pb.RecordedInteraction(interaction=interaction_pb2.Interaction(**columns))
    found.interaction.time.FromDatetime(one.interaction["time"])
    found.feedback.extend(to_feedback({**row, "time_ns": _micros(row["time"]) * 1000}) for row in one.feedback)
    return found
