"""GetTimeline, ListInteractions and GetInteraction of the real server, after real traffic through a vendor on loopback."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from server.lake.ids import IdKey
from tests.conftest import StartServer
from tests.providers.loopback import OpenAIServer, Reply
from tests.server_process import ServerProcess
from understudy.client import Client
from understudy.v1 import stats_service_pb2 as pb
from understudy.v1.stats_service_pb2_grpc import StatsServiceStub

ANSWERED, REFUSED = 6, 2
WAIT_S = 40.0


@pytest.fixture
def teacher() -> Iterator[OpenAIServer]:
    running = OpenAIServer(lambda number, text: Reply(400) if "refuse" in text else Reply("card", usage=(100, 10)))
    yield running
    running.close()


def configuration(tmp_path: Path, teacher: OpenAIServer, encrypt: bool) -> str:
    return f"""
[lake]
path = {json.dumps(str(tmp_path / "lake"))}
flush_s = 0.2
encrypt = {str(encrypt).lower()}
[registry]
url = {json.dumps(f"sqlite:///{tmp_path / 'registry.db'}")}
[providers.loop]
base_url = "{teacher.base_url}"
api_key_env = "LOOP_KEY"
[providers.loop.prices."big"]
input_per_million_usd = 10.0
output_per_million_usd = 10.0
[skills.intent]
task = "text-classification"
labels = ["card", "loan"]
teacher = "loop/big"
[skills.idle]
task = "text-classification"
labels = ["card", "loan"]
teacher = "loop/big"
"""


def until(found: Callable[[], Any], wanted: Callable[[Any], bool]) -> Any:
    end = time.monotonic() + WAIT_S
    while not wanted(value := found()):
        assert time.monotonic() < end, value
        time.sleep(0.05)
    return value


def refused(call: Callable[[], Any]) -> tuple[str, str, str]:
    """Code, reason and field."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status = rpc_status.from_call(caught.value)
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    return caught.value.code().name, info.reason, info.metadata.get("field", "")


@pytest.fixture(params=[False, True], ids=["clear", "encrypted"])
def served(request: pytest.FixtureRequest, start_server: StartServer, tmp_path: Path, teacher: OpenAIServer) -> ServerProcess:
    return start_server(configuration(tmp_path, teacher, request.param), env={"LOOP_KEY": "secret"})


def test_what_was_asked_is_shown_over_time_page_by_page_and_alone(served: ServerProcess, tmp_path: Path) -> None:
    with grpc.insecure_channel(served.address) as channel, Client(served.address) as client:
        stats = StatsServiceStub(channel)
        began = time.time()
        ids = [client.run("intent", [f"Where is card {n}?"], user=f"user {n % 2}")[0].interaction_id for n in range(ANSWERED)]
        for n in range(REFUSED):
            assert client.run("intent", [f"refuse {n}"], return_errors=True).errors
        client.feedback(ids[1], thumb="up", comment="quick")
        client.feedback(ids[2], rating=1, correction="loan")

        def page(**fields: Any) -> Any:
            return stats.ListInteractions(pb.ListInteractionsRequest(**fields), timeout=20)

        def said() -> Any:
            return page(with_feedback=True).interactions

        until(lambda: page().interactions, lambda found: len(found) == ANSWERED + REFUSED)
        ids += _keys(page())[:REFUSED][::-1]  # callers are told of no id for what failed
        until(said, lambda found: len(found) == 2)
        _check_filters(page, ids)
        _check_paging(page, client, ids)
        _check_one(stats, ids)
        _check_timeline(stats, began)
        _check_refusals(stats, tmp_path)


def _keys(response: Any) -> list[str]:
    return [one.interaction.interaction_id for one in response.interactions]


def _check_filters(page: Callable[..., Any], ids: list[str]) -> None:
    assert _keys(page()) == ids[::-1], "the newest first"
    assert _keys(page(answered_by=pb.ANSWERED_BY_PROVIDER)) == ids[:ANSWERED][::-1]
    assert _keys(page(answered_by=pb.ANSWERED_BY_NOBODY)) == ids[ANSWERED:][::-1]
    assert _keys(page(answered_by=pb.ANSWERED_BY_LOCAL)) == []
    assert _keys(page(skill="skills/intent")) == ids[::-1] and _keys(page(skill="skills/idle")) == []
    assert _keys(page(max_quality=0.0)) == []
    assert _keys(page(with_feedback=True)) == [ids[2], ids[1]]
    newest = page(page_size=1).interactions[0].interaction
    assert _keys(page(until_time=newest.time)) == ids[:-1][::-1], "before it"
    assert _keys(page(since_time=newest.time)) == ids[-1:], "from it on"


def _check_paging(page: Callable[..., Any], client: Client, ids: list[str]) -> None:
    first = page(page_size=3)
    assert _keys(first) == ids[::-1][:3]
    new = client.run("idle", ["and a loan?"])[0].interaction_id
    until(lambda: page(page_size=1), lambda found: _keys(found) == [new])
    second = page(page_size=3, page_token=first.next_page_token)
    third = page(page_size=3, page_token=second.next_page_token)
    assert _keys(second) + _keys(third) == ids[::-1][3:], "what is new moves nothing"
    assert not third.next_page_token


def _check_one(stats: StatsServiceStub, ids: list[str]) -> None:
    found = stats.GetInteraction(pb.GetInteractionRequest(name=f"interactions/{ids[2]}"), timeout=20).interaction
    one = found.interaction
    assert (one.interaction_id, one.skill, one.input, list(one.labels)) == (ids[2], "intent", "Where is card 2?", ["card"])
    assert one.candidate == "loop/big" and not one.local and one.cost_micro_usd == 1100 and one.HasField("user_hash")
    assert [(said.rating, said.correction) for said in found.feedback] == [(1, "loan")]
    assert json.loads(one.hops)[0]["candidate"] == "loop/big"


def _check_timeline(stats: StatsServiceStub, began: float) -> None:
    request = pb.GetTimelineRequest(skill="skills/intent")
    request.step.FromSeconds(60)
    request.since_time.FromSeconds(int(began) - 3600)
    points = stats.GetTimeline(request, timeout=20).points
    assert [one.time.seconds % 60 for one in points] == [0] * len(points)
    assert sum(one.requests for one in points) == ANSWERED + REFUSED and sum(one.failed for one in points) == REFUSED
    assert sum(one.cost_micro_usd for one in points) == 1100 * ANSWERED and sum(one.local for one in points) == 0
    assert sum(one.liked for one in points) == 1 and sum(one.disliked for one in points) == 1
    assert all(0 < one.latency_p50.ToMicroseconds() <= one.latency_p95.ToMicroseconds() for one in points if one.requests > one.failed)
    (day,) = stats.GetTimeline(pb.GetTimelineRequest(), timeout=20).points[-1:]
    assert day.time.seconds % 86_400 == 0
    assert not stats.GetTimeline(pb.GetTimelineRequest(skill="skills/translation"), timeout=20).points


def _check_refusals(stats: StatsServiceStub, tmp_path: Path) -> None:
    now = datetime.now(UTC)

    def timeline(**fields: Any) -> Callable[[], Any]:
        return lambda: stats.GetTimeline(pb.GetTimelineRequest(**fields), timeout=20)

    def page(**fields: Any) -> Callable[[], Any]:
        return lambda: stats.ListInteractions(pb.ListInteractionsRequest(**fields), timeout=20)

    def one(name: str) -> Callable[[], Any]:
        return lambda: stats.GetInteraction(pb.GetInteractionRequest(name=name), timeout=20)

    token = stats.ListInteractions(pb.ListInteractionsRequest(page_size=1), timeout=20).next_page_token
    invalid = ("INVALID_ARGUMENT", "INVALID_ARGUMENT")
    for call, expected in [
        (timeline(step=timedelta(seconds=59)), (*invalid, "step")),
        (timeline(step=timedelta(seconds=-60)), (*invalid, "step")),
        (timeline(step=timedelta(seconds=60, microseconds=5)), (*invalid, "step")),
        (timeline(step=timedelta(minutes=1)), (*invalid, "step")),  # 30 days of minutes are too many points
        (timeline(since_time=now, until_time=now - timedelta(days=1)), (*invalid, "since_time")),
        (timeline(since_time={"seconds": -(10**12)}), (*invalid, "since_time")),
        (timeline(until_time={"seconds": 1, "nanos": -5}), (*invalid, "until_time")),
        (timeline(skill="intent"), (*invalid, "skill")),
        (timeline(skill="skills/nobody"), ("NOT_FOUND", "SKILL_NOT_FOUND", "skill")),
        (page(skill="skills/nobody"), ("NOT_FOUND", "SKILL_NOT_FOUND", "skill")),
        (page(page_size=-1), (*invalid, "page_size")),
        (page(max_quality=1.5), (*invalid, "max_quality")),
        (page(max_quality=float("nan")), (*invalid, "max_quality")),
        (page(page_token="nonsense"), (*invalid, "page_token")),
        (page(page_token="WzFd"), (*invalid, "page_token")),
        (page(page_token=token, page_size=1, answered_by=pb.ANSWERED_BY_LOCAL), (*invalid, "page_token")),
        (one("interactions/"), (*invalid, "name")),
        (one("nonsense"), (*invalid, "name")),
        (one("interactions/" + "a" * 32), ("NOT_FOUND", "INTERACTION_NOT_FOUND", "name")),
        (one("interactions/" + IdKey.open(tmp_path / "lake" / "id.key").new()), ("NOT_FOUND", "INTERACTION_NOT_FOUND", "name")),
    ]:
        assert refused(call) == expected
    assert stats.ListInteractions(pb.ListInteractionsRequest(page_size=1, page_token=token), timeout=20).interactions


def test_reading_leaves_the_serving_loop_alone(start_server: StartServer, tmp_path: Path, teacher: OpenAIServer) -> None:
    """Embeddings are answered while as many readers as may wait read; more are refused at once, and none of it is an error of ours."""
    from tests.lake.test_timeline import Filled

    filled = Filled(tmp_path)
    running = start_server(configuration(tmp_path, teacher, False), env={"LOOP_KEY": "secret"})
    since = datetime(2026, 6, 1, tzinfo=UTC)
    with grpc.insecure_channel(running.address) as channel, Client(running.address) as client:
        stats = StatsServiceStub(channel)
        request = pb.GetTimelineRequest(since_time=since, until_time=datetime(2026, 6, 12, tzinfo=UTC))
        wanted = len(filled.rows)
        client.embed(["warm"], model="embedder")
        calls = [stats.GetTimeline.future(request, timeout=60) for _ in range(60)]
        slowest = 0.0
        while not all(call.done() for call in calls):
            began = time.perf_counter()
            client.embed(["Where is my card?"], model="embedder")
            slowest = max(slowest, time.perf_counter() - began)
        codes = [call.code().name for call in calls]
        assert set(codes) == {"OK", "RESOURCE_EXHAUSTED"} and codes.count("OK") >= 34
        assert all(sum(one.requests for one in call.result().points) == wanted for call in calls if call.code() == grpc.StatusCode.OK)
        assert slowest < 1.0
        gone = stats.GetTimeline.future(request, timeout=60)
        gone.cancel()
        with pytest.raises(grpc.RpcError) as late:
            stats.GetTimeline(request, timeout=0.05)
        assert late.value.code().name == "DEADLINE_EXCEEDED"
