"""Two real servers on one database, a vendor on loopback that keeps the bill: 64 callers on a budget for 100 calls."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from server.routing.prompting import LABEL_TOKENS
from tests.conftest import StartServer
from tests.providers.loopback import OpenAIServer, Reply
from understudy.v1 import budget_pb2, inference_pb2, stats_service_pb2
from understudy.v1 import inference_service_pb2 as pb
from understudy.v1.inference_service_pb2_grpc import InferenceServiceStub
from understudy.v1.stats_service_pb2_grpc import StatsServiceStub

PRICE = 1000 * LABEL_TOKENS  # of a call, in 1e-6 US dollars: only written tokens cost, and the vendor writes as many as it may


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 128)  # 64 connections come at once
    running = OpenAIServer(lambda _number, _text: Reply("card", usage=(100, LABEL_TOKENS)))
    yield running
    running.close()


def detail(status: status_pb2.Status, kind: Any) -> Any:
    for one in status.details:
        message = kind()
        if one.Unpack(message):
            return message
    raise AssertionError(status)


async def use_up(address: str, skill: str, callers: int) -> tuple[int, list[status_pb2.Status]]:
    """Callers until the budget is used up: answers, and the last refusal of each caller."""
    served = 0
    refusals: list[status_pb2.Status] = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub = InferenceServiceStub(channel)

        async def caller(number: int) -> None:
            nonlocal served
            for turn in range(1000):
                request = pb.RunRequest(skill=skill, inputs=[inference_pb2.RunInput(text=f"where is my card {number} {turn}?")])
                (result,) = (await stub.Run(request, timeout=30)).results
                if not result.HasField("error"):
                    served += 1
                elif detail(result.error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 1000:
                    refusals.append(result.error)
                    return
                else:
                    await asyncio.sleep(0.01)  # only calls that run are in the way

        await asyncio.gather(*(caller(number) for number in range(callers)))
    return served, refusals


async def test_the_vendors_bill_stays_within_the_budget(
    start_server: StartServer, teacher: OpenAIServer, registry_url: str, tmp_path: Path
) -> None:
    skill = f"s{secrets.token_hex(6)}"
    servers = []
    for number in range(2):
        config = f"""
[lake]
path = {json.dumps(str(tmp_path / f"lake{number}"))}
[registry]
url = {json.dumps(registry_url)}
[providers.loop]
base_url = "{teacher.base_url}"
api_key_env = "LOOP_KEY"
max_concurrent = 64
[providers.loop.prices.big]
output_per_million_usd = 1000.0
[skills.{skill}]
labels = ["card", "transfer"]
teacher = "loop/big"
[budget.skills.{skill}]
day_usd = {PRICE * 100 / 1e6}
"""
        servers.append(start_server(config, env={"LOOP_KEY": "sk-x"}))
    outcomes = await asyncio.gather(*(use_up(one.address, skill, 32) for one in servers))
    served, refusals = sum(count for count, _ in outcomes), [one for _, some in outcomes for one in some]
    assert 95 <= served <= 100 and len(teacher.requests) == served
    assert len(refusals) == 64
    for refusal in refusals:
        info = detail(refusal, error_details_pb2.ErrorInfo)
        assert info.reason == "BUDGET_EXCEEDED" and refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert (info.metadata["scope"], info.metadata["window"]) == (f"skill:{skill}", "day") and info.metadata["resets_at"]
    spent = set()
    for one in servers:
        async with grpc.aio.insecure_channel(one.address) as channel:
            stats = StatsServiceStub(channel)
            (day,) = (await stats.GetBudget(stats_service_pb2.GetBudgetRequest())).budgets
            assert day.state in (budget_pb2.BUDGET_STATE_STOPPED, budget_pb2.BUDGET_STATE_EXHAUSTED) and not day.reserved.micro_usd
            spent.add(day.spent.micro_usd)
            (provider,) = (await stats.GetStatus(stats_service_pb2.GetStatusRequest())).providers
            assert (provider.provider, provider.circuit) == ("loop", stats_service_pb2.CIRCUIT_STATE_CLOSED)
            (skills,) = (await stats.GetStats(stats_service_pb2.GetStatsRequest())).skills
            assert skills.provider and skills.cost.micro_usd == skills.provider * PRICE == skills.all_to_teacher.micro_usd
    assert spent == {served * PRICE}
