"""Keys over several processes, on both databases: revocation spreads, budgets hold, the audit log outlives a kill; who may listen where."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from server.core import Role
from server.registry.api_keys import ApiKeys, KeySettings
from server.registry.audit import AuditLog
from server.registry.registry import Registry
from server.routing.prompting import LABEL_TOKENS
from server.settings import RegistryConfig
from tests.api.auth_calls import Answer, call, of_status, own_database, until
from tests.conftest import StartServer
from tests.providers.loopback import OpenAIServer, Reply
from tests.server_process import ROOT, ServerProcess
from understudy.v1 import admin_service_pb2, auth_pb2, inference_pb2, inference_service_pb2, model_service_pb2, stats_service_pb2

CALLER = "/understudy.v1.AdminService/GetCaller"
LOAD = "/understudy.v1.ModelService/LoadModel"
RUN = "/understudy.v1.InferenceService/Run"
BUDGET = "/understudy.v1.StatsService/GetBudget"
PRICE = 1000 * LABEL_TOKENS  # of a call, in 1e-6 US dollars: only written tokens cost, and the vendor writes as many as it may


@pytest.fixture
def url(registry_url: str) -> Iterator[str]:
    with own_database(registry_url) as found:
        yield found


@pytest.fixture
def registry(url: str) -> Iterator[Registry]:
    made = Registry(RegistryConfig(url=url))
    yield made
    made.close()


@pytest.fixture
def no_models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def config(url: str, keys: str = "required", more: str = "") -> str:
    return f"[auth]\nkeys = {json.dumps(keys)}\npoll_s = 0.2\n[registry]\nurl = {json.dumps(url)}\n{more}"


def test_keys_are_made_and_revoked_for_every_server(start_server: StartServer, url: str, registry: Registry, no_models: Path) -> None:
    keys = ApiKeys(registry)
    _, admin = keys.create(KeySettings(Role.ADMIN), "test")
    servers = [start_server(config(url), models=no_models) for _ in range(2)]
    channels = [grpc.insecure_channel(server.address) for server in servers]
    key, text = keys.create(KeySettings(Role.USER), "test")
    for channel in channels:
        until(lambda channel=channel: call(channel, CALLER, text).code, "OK")  # type: ignore[misc]
    request = admin_service_pb2.RevokeApiKeyRequest(name=key.name)
    assert call(channels[0], "/understudy.v1.AdminService/RevokeApiKey", admin, request).code == "OK"
    assert call(channels[0], CALLER, text).code == "UNAUTHENTICATED"  # at once where it was revoked
    took = until(lambda: call(channels[1], CALLER, text).metadata.get("problem"), "revoked")
    assert took < 3.0
    assert [call(channel, CALLER, admin).code for channel in channels] == ["OK", "OK"]
    for channel in channels:
        channel.close()
    for server in servers:
        server.stop()
    used = keys.get(key.id).last_use_ms
    assert used is not None and abs(used - time.time() * 1000) < 60_000  # written at the end, at the latest


def test_a_keys_budget_holds_over_servers(start_server: StartServer, url: str, registry: Registry, no_models: Path) -> None:
    vendor = OpenAIServer(lambda _number, _text: Reply("card", usage=(100, LABEL_TOKENS)))
    priced = f"""
[providers.loop]
base_url = "{vendor.base_url}"
api_key_env = "LOOP_KEY"
[providers.loop.prices.big]
output_per_million_usd = 1000.0
[skills.triage]
labels = ["card", "transfer"]
teacher = "loop/big"
[skills.unpriced]
labels = ["card", "transfer"]
teacher = "loop/other"
[budget]
stop_at = 1.0
"""
    keys = ApiKeys(registry)
    free, rich = (keys.create(KeySettings(Role.USER), "test")[1] for _ in range(2))
    poor = keys.create(KeySettings(Role.USER, budget_day=3 * PRICE, budget_month=100 * PRICE), "test")[1]
    servers = [start_server(config(url, more=priced), models=no_models, env={"LOOP_KEY": "k"}) for _ in range(2)]
    channels = [grpc.insecure_channel(server.address) for server in servers]

    def run(number: int, key: str, skill: str = "triage") -> Answer:
        request = inference_service_pb2.RunRequest(skill=skill, inputs=[inference_pb2.RunInput(text=f"where is {number}?")])
        answer = call(channels[number % 2], RUN, key, request)
        assert answer.code == "OK", answer
        (result,) = inference_service_pb2.RunResponse.FromString(answer.data).results
        return of_status("", result.error, result.error.message)

    refused = [answer for answer in (run(number, poor) for number in range(6)) if answer.reason]
    assert len(vendor.requests) == 3
    assert {answer.reason for answer in refused} == {"BUDGET_EXCEEDED"} and len(refused) == 3
    assert {answer.metadata["scope"] for answer in refused} == {f"key:{poor[4:12]}"}
    assert not run(1, free).reason and not run(2, rich).reason
    assert run(3, poor, "unpriced").reason == "BUDGET_EXCEEDED"  # an unknown cost fits into no budget
    assert not run(4, free, "unpriced").reason  # and where nothing is limited it needs none
    shown = stats_service_pb2.GetBudgetResponse.FromString(call(channels[0], BUDGET, free).data).budgets
    assert [(one.scope, one.spent.micro_usd, one.limit.micro_usd) for one in shown] == [
        (f"key:{poor[4:12]}", 3 * PRICE, 3 * PRICE),
        (f"key:{poor[4:12]}", 3 * PRICE, 100 * PRICE),
    ]
    for channel in channels:
        channel.close()
    for server in servers:
        server.stop(allow_errors=True)
    vendor.close()


def test_the_audit_log_outlives_a_killed_server(start_server: StartServer, url: str, registry: Registry, no_models: Path) -> None:
    _, key = ApiKeys(registry).create(KeySettings(Role.OPERATOR), "test")
    server = start_server(config(url), models=no_models)
    with grpc.insecure_channel(server.address) as channel:
        for number in range(50):
            call(channel, LOAD, key, model_service_pb2.LoadModelRequest(name=f"models/m{number}"))
        time.sleep(1.0)  # what is promised: a kill loses no more than the last second
        server.signal(signal.SIGKILL)
    server.wait()
    events = AuditLog(registry).page(100)
    assert [event.resource for event in events] == [f"models/m{number}" for number in reversed(range(50))]


def test_where_no_keys_are_asked_for_changes_are_written_down_as_anonymous(
    start_server: StartServer, tmp_path: Path, no_models: Path
) -> None:
    url = f"sqlite:///{tmp_path}/registry.db"
    server = start_server(config(url, "auto"), models=no_models)
    with grpc.insecure_channel(server.address) as channel:
        answer = call(channel, CALLER, "any word, as SDKs send")
        assert admin_service_pb2.GetCallerResponse.FromString(answer.data) == admin_service_pb2.GetCallerResponse(
            name="anonymous", role=auth_pb2.ROLE_ADMIN, keys_required=False
        )
        call(channel, LOAD, None, model_service_pb2.LoadModelRequest(name="models/none"))
    server.stop()
    registry = Registry(RegistryConfig(url=url))
    (event,) = AuditLog(registry).page(10)
    registry.close()
    assert (event.actor, event.resource, event.code) == ("anonymous", "models/none", "NOT_FOUND")


def understudy(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command, in a folder that holds the registry by default."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("UNDERSTUDY_")}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")])
    command = [sys.executable, "-m", "server.cli", *arguments]
    return subprocess.run(
        command, cwd=folder, env={**inherited, "PYTHONPATH": paths, **env}, capture_output=True, text=True, timeout=120, check=False
    )


def test_elsewhere_than_loopback_a_server_starts_once_there_is_a_key(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    (folder / "models").mkdir(parents=True)
    refused = understudy(folder, "serve", "--host", "0.0.0.0", "--port", "0", "--set", "server.metrics_port=0")
    assert refused.returncode == 1 and '"listening"' not in refused.stdout + refused.stderr
    assert "understudy keys create --role admin" in refused.stderr and 'auth.keys = "off"' in refused.stderr
    made = understudy(folder, "keys", "create", "--role", "admin", "--name", "first")
    key = made.stdout.strip()
    assert made.returncode == 0 and key.startswith("und_") and "\n" not in key and key not in made.stderr
    server = ServerProcess(folder, '[server]\nhost = "0.0.0.0"\n')
    address = server.wait_ready().replace("0.0.0.0", "127.0.0.1")
    assert server.events("keys travel without encryption: set server.tls, or let only a gateway with TLS reach this address")
    with grpc.insecure_channel(address) as channel:
        assert call(channel, CALLER, None).code == "UNAUTHENTICATED"
        assert call(channel, CALLER, key).code == "OK"
    jobs = understudy(folder, "jobs", "list", "--server", address)
    assert jobs.returncode == 1 and "UNAUTHENTICATED" in jobs.stderr
    assert understudy(folder, "jobs", "list", "--server", address, UNDERSTUDY_API_KEY=key).returncode == 0
    listed = json.loads(understudy(folder, "keys", "list", "--json").stdout)
    assert [(one["role"], one["display_name"], one["state"]) for one in listed] == [("admin", "first", "live")]
    kept = understudy(folder, "keys", "revoke", key[4:12])
    assert kept.returncode == 1 and "last key of an admin" in kept.stderr
    assert understudy(folder, "keys", "revoke", key, "--last-admin").returncode == 0
    with grpc.insecure_channel(address) as channel:
        until(lambda: call(channel, CALLER, key).metadata.get("problem"), "revoked")
    events = [json.loads(line) for line in understudy(folder, "keys", "audit", "--json").stdout.splitlines()]
    assert [(event["method"].rpartition(" ")[2], event["code"]) for event in events] == [
        ("revoke", "OK"),
        ("revoke", "FAILED_PRECONDITION"),
        ("create", "OK"),
    ]
    assert key[13:] not in str(events)
    server.stop()
    assert key[13:] not in "".join(server.lines)


def test_without_a_key_a_server_that_requires_them_starts_and_lets_nobody_in(
    start_server: StartServer, tmp_path: Path, no_models: Path
) -> None:
    server = start_server(config(f"sqlite:///{tmp_path}/registry.db"), models=no_models)
    assert server.events("there is no API key yet, so every call is refused")
    with grpc.insecure_channel(server.address) as channel:
        assert call(channel, CALLER, "und_aaaaaaaa_x").code == "UNAUTHENTICATED"
    server.stop()
