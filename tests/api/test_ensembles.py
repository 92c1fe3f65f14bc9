"""EnsembleService of the real server, with vendors on loopback over real HTTP: waves, early stop, quorum, deadline, budget, fallback."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from grpc_status import rpc_status

from tests.conftest import StartServer
from tests.generation_models import NAME
from tests.providers.loopback import OpenAIServer, Reply
from tests.server_process import ServerProcess
from understudy.aio import AsyncClient
from understudy.client import Client
from understudy.ensembles import Member
from understudy.errors import UnderstudyError
from understudy.v1 import ensemble_service_pb2 as pb
from understudy.v1 import stats_service_pb2
from understudy.v1.ensemble_service_pb2_grpc import EnsembleServiceStub
from understudy.v1.stats_service_pb2_grpc import StatsServiceStub

VENDORS = ("ada", "bob", "cyd", "dee", "eve")
CALL_COST = 120  # 100 tokens in, 10 out, by the prices below
QUESTION = "What is 6 times 7?"
Answers = Callable[[str], Reply | str]


class Vendors:
    """Five vendors whose answers a test sets by name."""

    def __init__(self) -> None:
        self.says: dict[str, Reply | str] = {}
        self.servers = {name: OpenAIServer(self._script(name)) for name in VENDORS}

    def _script(self, name: str) -> Callable[[int, str], Reply | str]:
        return lambda _number, _text: self.says.get(name, "42")

    def asked(self) -> dict[str, int]:
        """Requests by vendor, of those that were asked."""
        return {name: len(server.requests) for name, server in self.servers.items() if server.requests}

    def fresh(self) -> None:
        for server in self.servers.values():
            server.requests.clear()
            server.release.clear()
        self.says.clear()


@pytest.fixture(scope="module")
def all_vendors() -> Iterator[Vendors]:
    found = Vendors()
    yield found
    for server in found.servers.values():
        server.close()


@pytest.fixture
def vendors(all_vendors: Vendors) -> Iterator[Vendors]:
    all_vendors.fresh()
    yield all_vendors
    for server in all_vendors.servers.values():
        server.release.set()


def config(vendors: Vendors, folder: Path, more: str = "") -> str:
    parts = [f"[lake]\npath = {json.dumps(str(folder / 'lake'))}", f'[registry]\nurl = "sqlite:///{folder}/registry.db"', more]
    for name, server in vendors.servers.items():
        prices = "prices.m = { input_per_million_usd = 1.0, output_per_million_usd = 2.0 }"
        parts.append(
            f'[providers.{name}]\nkind = "compatible"\nbase_url = "{server.base_url}"\nmax_retries = 0\ncircuit_failures = 1000\n{prices}'
        )
    parts.append('[skills.sums]\ntask = "text-generation"\nteacher = "eve/m"\nmax_tokens = 10')
    return "\n".join(parts)


@pytest.fixture(scope="module")
def served(all_vendors: Vendors, small_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("ensembles")
    running = ServerProcess(folder, config(all_vendors, folder), models=small_models)
    running.wait_ready()
    yield running
    running.stop(allow_errors=True)


@pytest.fixture
def stub(served: ServerProcess) -> Iterator[EnsembleServiceStub]:
    with grpc.insecure_channel(served.address) as channel:
        yield EnsembleServiceStub(channel)


def request(*members: str | dict[str, Any], **more: Any) -> Any:
    listed = [{"model": one} if isinstance(one, str) else one for one in members]
    return ParseDict({"skill": "sums", "input": {"text": QUESTION}, "members": listed, **more}, pb.RunEnsembleRequest())


def paid(*names: str) -> list[str]:
    return [f"{name}/m" for name in names or VENDORS]


def run(stub: EnsembleServiceStub, *members: str | dict[str, Any], timeout: float = 20.0, **more: Any) -> Any:
    return stub.RunEnsemble(request(*members, **more), timeout=timeout)


def refused(stub: EnsembleServiceStub, *members: str | dict[str, Any], **more: Any) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    from google.rpc import error_details_pb2

    with pytest.raises(grpc.RpcError) as caught:
        run(stub, *members, **more)
    status = rpc_status.from_call(caught.value)
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return caught.value.code(), status.message, dict(info.metadata)


def outcomes(response: Any) -> list[tuple[str, int, str]]:
    return [(one.model, one.wave, one.outcome) for one in response.answers]


def test_three_of_five_that_agree_are_asked_and_no_more(stub: EnsembleServiceStub, vendors: Vendors) -> None:
    response = run(stub, *paid())
    assert response.result.output_text == "42" and response.confidence == 1.0 and response.waves == 1 and not response.fell_back
    assert vendors.asked() == {"ada": 1, "bob": 1, "cyd": 1}
    assert response.result.cost.micro_usd == 3 * CALL_COST and response.result.usage.input_tokens == 300
    assert [one.outcome for one in response.answers] == ["chosen", "agreed", "agreed", "skipped", "skipped"]
    assert "could not change" in response.stop_reason and response.answers[3].reason == response.stop_reason
    assert [hop.outcome for hop in response.result.decision.hops] == ["member", "member", "delivered"]
    assert response.result.interaction_id and all(one.elapsed.nanos > 0 for one in response.answers[:3])


def test_dissent_takes_another_wave(stub: EnsembleServiceStub, vendors: Vendors) -> None:
    vendors.says["bob"] = "43"
    response = run(stub, *paid())
    assert vendors.asked() == {"ada": 1, "bob": 1, "cyd": 1, "dee": 1} and response.waves == 2
    assert response.result.output_text == "42" and response.confidence == 0.75
    assert [one.outcome for one in response.answers] == ["chosen", "dissented", "agreed", "agreed", "skipped"]
    assert "'43'" in response.answers[1].reason


def test_a_members_failure_does_no_harm_while_a_quorum_can_come(stub: EnsembleServiceStub, vendors: Vendors) -> None:
    vendors.says |= {"ada": Reply(500), "cyd": Reply(drop=True)}
    response = run(stub, *paid())
    assert response.result.output_text == "42" and not response.fell_back and response.confidence == 1.0
    assert [one.outcome for one in response.answers].count("failed") == 2 and "500" in response.answers[0].reason
    vendors.fresh()
    vendors.says |= {name: Reply(500) for name in ("ada", "bob", "cyd")}
    code, message, _ = refused(stub, *paid("ada", "bob", "cyd"), membersOnly=True)
    assert code is grpc.StatusCode.UNAVAILABLE and all(f"{name}/m" in message for name in ("ada", "bob"))
    assert sum(vendors.asked().values()) <= 3


def test_a_quorum_is_not_kept_waiting(stub: EnsembleServiceStub, vendors: Vendors) -> None:
    vendors.says |= {"dee": Reply("42", hold=True), "eve": Reply("42", hold=True)}
    began = time.monotonic()
    response = run(stub, *paid(), waveSize=5, quorum=3)
    assert time.monotonic() - began < 10 and response.result.output_text == "42"
    late = [one for one in response.answers if one.outcome == "cut_off"]
    assert {one.model for one in late} == {"dee/m", "eve/m"} and all(one.cost.micro_usd > 0 for one in late)
    assert "enough" in response.stop_reason


def test_at_its_time_what_has_come_decides(stub: EnsembleServiceStub, vendors: Vendors) -> None:
    vendors.says |= {"dee": Reply("42", hold=True), "eve": Reply("43", hold=True)}
    response = run(stub, *paid(), waveSize=5, threshold=0.9, maxLatency="1s", membersOnly=True)
    assert response.result.output_text == "42" and response.confidence == 1.0 and response.waves == 1
    late = [one for one in response.answers if one.model in paid("dee", "eve")]
    assert all(one.outcome in ("failed", "cut_off") and one.elapsed.ToSeconds() < 2 for one in late)


def test_the_callers_deadline_leaves_time_for_the_route(stub: EnsembleServiceStub, vendors: Vendors) -> None:
    vendors.says |= {name: Reply("late", hold=True) for name in ("ada", "bob", "cyd")}
    response = run(stub, *paid("ada", "bob", "cyd"), timeout=3.0)
    assert response.fell_back and response.result.decision.candidate == "eve/m" and response.result.output_text == "42"
    vendors.fresh()
    vendors.says |= {name: Reply("late", hold=True) for name in ("ada", "bob", "cyd")}
    code, _, info = refused(stub, *paid("ada", "bob", "cyd"), timeout=2.0, membersOnly=True)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED and info["stage"] == "provider"


def test_without_a_majority_the_skills_route_answers_and_asks_nobody_twice(stub: EnsembleServiceStub, vendors: Vendors) -> None:
    vendors.says |= {"ada": "41", "bob": "43", "eve": "44"}
    response = run(stub, *paid("ada", "bob"))
    assert response.fell_back and response.result.output_text == "44" and vendors.asked() == {"ada": 1, "bob": 1, "eve": 1}
    assert response.confidence == response.result.quality and response.result.cost.micro_usd == 3 * CALL_COST
    assert [hop.outcome for hop in response.result.decision.hops] == ["below_bar", "below_bar", "delivered"]
    vendors.fresh()
    vendors.says |= {"ada": "41", "bob": "43", "eve": "44"}
    response = run(stub, *paid("ada", "bob", "eve"))
    assert response.fell_back and response.result.output_text == "44", "the teacher has answered as a member"
    assert vendors.asked() == {"ada": 1, "bob": 1, "eve": 1} and response.result.cost.micro_usd == 3 * CALL_COST
    code, message, _ = refused(stub, *paid("ada", "bob"), membersOnly=True)
    assert code is grpc.StatusCode.FAILED_PRECONDITION and "members_only" in message


def test_weights_outvote_a_majority(stub: EnsembleServiceStub, vendors: Vendors) -> None:
    vendors.says |= {"bob": "43", "cyd": "43"}
    members: list[dict[str, Any]] = [{"model": "ada/m", "accuracy": 0.9}, {"model": "bob/m", "accuracy": 0.3}]
    members.append({"model": "cyd/m", "accuracy": 0.3})
    response = run(stub, *members, strategy="ENSEMBLE_STRATEGY_WEIGHTED")
    assert response.result.output_text == "42" and response.answers[0].weight == pytest.approx(math.log(9 * 9), abs=1e-3)
    assert run(stub, *members, strategy="ENSEMBLE_STRATEGY_CONSENSUS").result.output_text == "43"


def test_best_of_n_asks_the_paid_only_where_the_free_do_not_do(stub: EnsembleServiceStub, vendors: Vendors) -> None:
    members = [*paid("ada", "bob"), {"model": f"local:{NAME}", "samples": 3}]
    response = run(stub, *members, strategy="ENSEMBLE_STRATEGY_BEST_OF_N", threshold=0.0)
    local = [one for one in response.answers if one.model.startswith("local:")]
    assert vendors.asked() == {} and response.result.decision.local and response.waves == 1
    assert {one.sample for one in local} == {0, 1, 2} and all(one.wave == 1 and one.HasField("quality") for one in local)
    chosen = next(one for one in local if one.outcome == "chosen")
    assert chosen.quality == max(one.quality for one in local) == response.confidence
    response = run(stub, *members, strategy="ENSEMBLE_STRATEGY_BEST_OF_N", threshold=1.0)
    assert vendors.asked() == {"ada": 1, "bob": 1} and response.waves == 3, "the paid ones one by one"
    assert not response.result.decision.local and not response.fell_back, "below the bar the standard is taken"


def test_a_specialist_is_one_member(stub: EnsembleServiceStub, vendors: Vendors) -> None:
    good = {"model": "bob/m", "accuracy": 0.95, "observations": 400}
    bad = {"model": "ada/m", "accuracy": 0.4, "observations": 400}
    response = run(stub, bad, good, strategy="ENSEMBLE_STRATEGY_SPECIALIST")
    assert vendors.asked() == {"bob": 1} and response.result.decision.candidate == "bob/m"
    assert response.result.decision.propensity > 0.999 and response.confidence == pytest.approx(0.95, abs=0.02)
    vendors.says["bob"] = Reply(500)
    response = run(stub, bad, good, strategy="ENSEMBLE_STRATEGY_SPECIALIST")
    assert outcomes(response) == [("bob/m", 1, "failed"), ("ada/m", 2, "chosen")] and response.waves == 2


def test_limits_hold_for_the_whole_call(stub: EnsembleServiceStub, vendors: Vendors) -> None:
    code, message, info = refused(stub, *paid(), maxCost={"microUsd": "10"}, membersOnly=True)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "max_cost" in message and info["field"] == "max_cost"
    assert vendors.asked() == {}, "a wave that cannot reach its quorum is not begun"


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"members": []}, "INVALID_ARGUMENT", "members holds 0"),
        ({"members": [{"model": "ada/m"}, {"model": "ada/m"}]}, "INVALID_ARGUMENT", "samples of one"),
        ({"members": [{"model": "ada/m", "samples": 33}]}, "INVALID_ARGUMENT", "samples"),
        ({"members": [{"model": "ada/m", "samples": 20}, {"model": "bob/m", "samples": 20}]}, "INVALID_ARGUMENT", "40 calls"),
        ({"members": [{"model": "ada/m", "accuracy": 1.5}]}, "INVALID_ARGUMENT", "accuracy"),
        ({"members": [{"model": "adda/m"}]}, "NOT_FOUND", "did you mean 'ada'"),
        ({"members": [{"model": "local:scriptd"}]}, "NOT_FOUND", f"did you mean '{NAME}'"),
        ({"members": [{"model": "local:tagger"}]}, "FAILED_PRECONDITION", "token-classification"),
        ({"members": [{"model": f"local:{NAME}@7"}]}, "NOT_FOUND", "version 1"),
        ({"members": [{"model": "local:"}]}, "INVALID_ARGUMENT", "local:<model>"),
        ({"skill": "summs"}, "NOT_FOUND", "sums"),
        ({"input": {"text": " "}}, "INVALID_ARGUMENT", "input.text"),
        ({"input": {}}, "INVALID_ARGUMENT", "input is empty"),
        ({"quorum": 3}, "INVALID_ARGUMENT", "quorum"),
        ({"threshold": 1.5}, "INVALID_ARGUMENT", "threshold"),
        ({"strategy": 9}, "INVALID_ARGUMENT", "strategy 9"),
        ({"preference": "ROUTE_PREFERENCE_LOCAL_ONLY"}, "INVALID_ARGUMENT", "contradict"),
        ({"members": [{"model": "ada/m", "samples": 3}], "temperature": 0.0}, "INVALID_ARGUMENT", "temperature"),
        ({"skill": "sentence-similarity", "input": {"pair": {"text": "a", "textPair": "b"}}}, "INVALID_ARGUMENT", "numbers"),
    ],
)
def test_what_is_wrong_is_named(stub: EnsembleServiceStub, vendors: Vendors, change: dict[str, Any], code: str, words: str) -> None:
    wanted = {"skill": "sums", "input": {"text": QUESTION}, "members": [{"model": "ada/m"}, {"model": "bob/m"}], **change}
    with pytest.raises(grpc.RpcError) as caught:
        stub.RunEnsemble(ParseDict(wanted, pb.RunEnsembleRequest()), timeout=10)
    assert caught.value.code().name == code and words in (caught.value.details() or "")
    assert vendors.asked() == {}


def test_a_budget_is_never_passed_by_calls_at_once(start_server: StartServer, vendors: Vendors, tmp_path: Path) -> None:
    limit = 400  # millionths of a US dollar
    vendors.says |= {"ada": Reply("41", usage=(5, 10)), "bob": Reply("43", usage=(5, 10)), "cyd": Reply("42", usage=(5, 10))}
    found: list[Any] = []

    def ask(stub: EnsembleServiceStub) -> None:
        try:
            found.append(run(stub, *paid("ada", "bob", "cyd"), membersOnly=True, threshold=0.3, waveSize=3))
        except grpc.RpcError as error:
            found.append(error)

    served = start_server(config(vendors, tmp_path, f"[budget]\nstop_at = 1.0\n[budget.total]\nday_usd = {limit / 1e6}"))
    with grpc.insecure_channel(served.address) as channel:
        stub = EnsembleServiceStub(channel)
        ask(stub)  # alone it has room; of those at once, each may take from the others what they need, and give it back unasked
        alone = sum(vendors.asked().values())
        threads = [threading.Thread(target=ask, args=(stub,)) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        budgets = StatsServiceStub(channel).GetBudget(stats_service_pb2.GetBudgetRequest(), timeout=10).budgets
    asked = sum(vendors.asked().values())
    assert 2 <= alone <= asked and asked * 25 <= limit, f"{alone} calls alone, {asked} in all"
    assert [one.spent.micro_usd for one in budgets] == [asked * 25] and budgets[0].reserved.micro_usd == 0
    refusals = [one for one in found if isinstance(one, grpc.RpcError)]
    assert any(one.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "budget" in (one.details() or "") for one in refusals)


def test_the_client_and_the_command_show_who_said_what(served: ServerProcess, vendors: Vendors) -> None:
    vendors.says["bob"] = "43"
    with Client(served.address) as client:
        found = client.ensemble("sums", QUESTION, ["ada/m", Member("bob/m"), "cyd/m"], quorum=3, user="x")
        assert found.text == "42" and found.confidence == pytest.approx(2 / 3) and found.answer.cost_usd == 3 * CALL_COST / 1e6
        assert [one.outcome for one in found.members] == ["chosen", "dissented", "agreed"] and not found.fell_back
        vendors.fresh()
        vendors.says |= {name: Reply(500) for name in VENDORS}
        with pytest.raises(UnderstudyError) as caught:
            client.ensemble("sums", QUESTION, ["ada/m", "bob/m"], timeout_s=10)
        assert caught.value.code == "UNAVAILABLE" and vendors.asked() == {"ada": 1, "bob": 1, "eve": 1}, "what may be paid is not repeated"
    vendors.fresh()
    vendors.says["bob"] = "43"
    command = [sys.executable, "-m", "server.cli", "ensemble", "sums", QUESTION, "--address", served.address, "--quorum", "3"]
    for name in ("ada", "bob", "cyd"):
        command += ["--member", f"{name}/m"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "42" and "dissented" in done.stdout and "consensus: ada/m, confidence 0.67; 1 wave" in lines[-1]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["members"][1]["text"] == "43"
    done = subprocess.run([*command, "-m", "bob/m*x"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "MODEL*SAMPLES" in done.stderr
    done = subprocess.run([*command, "--strategy", "best"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "best_of_n" in done.stderr


async def test_the_asynchronous_client_asks_too(served: ServerProcess, vendors: Vendors) -> None:
    async with AsyncClient(served.address) as client:
        found = await client.ensemble("sums", QUESTION, [f"local:{NAME}", "ada/m", "bob/m"], threshold=0.6)
    assert found.text == "42" and found.strategy == "consensus"
