"""A running server that asks for keys: every method below and at its role, limits, AdminService, the audit log, no secret in a log."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from server.api.auth_roles import rule_of
from server.core import Role
from server.registry.api_keys import ApiKeys, KeySettings
from server.registry.audit import AuditLog
from server.registry.registry import Registry
from server.settings import RegistryConfig
from tests.api.auth_calls import SOON_S, Answer, call, methods, of_status, path_of, until
from tests.providers.loopback import OpenAIServer, Reply
from tests.server_process import ServerProcess
from understudy.client import Client
from understudy.errors import Unauthenticated
from understudy.v1 import admin_pb2, auth_pb2, inference_pb2, inference_service_pb2, model_service_pb2
from understudy.v1 import admin_service_pb2 as pb
from understudy.v1.inference_service_pb2_grpc import InferenceServiceStub

ADMIN = "/understudy.v1.AdminService/"
EMBED = "/understudy.v1.InferenceService/Embed"
RUN = "/understudy.v1.InferenceService/Run"
LOAD = "/understudy.v1.ModelService/LoadModel"
CONFIG = """
[auth]
keys = "required"
[registry]
url = {url}
[providers.loop]
base_url = "{vendor}"
api_key_env = "LOOP_KEY"
[skills.triage]
task = "text-classification"
labels = ["a", "b"]
teacher = "loop/big"
[skills.other]
task = "text-classification"
labels = ["a", "b"]
teacher = "loop/big"
"""


class Site:
    """The server, its registry and a key of each role."""

    def __init__(self, folder: Path, models: Path) -> None:
        url = f"sqlite:///{folder}/registry.db"
        self.registry = Registry(RegistryConfig(url=url))
        self.keys = ApiKeys(self.registry)
        self.audit = AuditLog(self.registry)
        self.of = {role: self.keys.create(KeySettings(role, role.name), "test")[1] for role in Role}
        self.limited = self.keys.create(KeySettings(Role.USER, skills=("triage",)), "test")[1]
        self.slow = self.keys.create(KeySettings(Role.USER, requests_per_minute=2), "test")[1]
        self.vendor = OpenAIServer(lambda _number, _text: Reply("a"))
        config = CONFIG.format(url=json.dumps(url), vendor=self.vendor.base_url)
        self.server = ServerProcess(folder / "server", config, models=models, env={"LOOP_KEY": "k"})
        self.channel = grpc.insecure_channel(self.server.wait_ready())

    def call(self, path: str, key: str | None, request: object = None, **more: object) -> Answer:
        return call(self.channel, path, key, request, **more)  # type: ignore[arg-type]

    def secrets(self) -> list[str]:
        return [key[13:] for key in (*self.of.values(), self.limited, self.slow)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, small_models: Path) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("auth"), small_models)
    yield made
    made.channel.close()
    made.server.stop(allow_errors=True)
    made.vendor.close()
    text = "".join(made.server.lines)
    for secret in made.secrets():
        assert secret not in text, "a key came into the server's log"
    made.registry.close()


@pytest.mark.parametrize("method", methods(), ids=lambda method: f"{method.containing_service.name}.{method.name}")
def test_every_method_takes_its_role_and_no_less(method: object, site: Site) -> None:
    path = path_of(method)  # type: ignore[arg-type]
    needed = rule_of(path).role
    answer = site.call(path, None)
    assert (answer.code, answer.reason, answer.metadata["problem"]) == ("UNAUTHENTICATED", "UNAUTHENTICATED", "missing")
    for role, key in site.of.items():
        answer = site.call(path, key)
        if role < needed:
            assert (answer.code, answer.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED"), role
            assert answer.metadata == {"role": role.name, "required_role": needed.name}
        else:
            assert answer.code not in ("UNAUTHENTICATED", "PERMISSION_DENIED", "UNKNOWN", "INTERNAL"), (role, answer)


def test_health_and_reflection_take_no_key(site: Site) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    stub = health_pb2_grpc.HealthStub(site.channel)
    assert stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    assert "understudy.v1.AdminService" in ProtoReflectionDescriptorDatabase(site.channel).get_services()


@pytest.mark.parametrize("given", ["Bearer und_aaaaaaaa_" + "A" * 43, "Bearer nonsense", "Basic eDp5", "Bearer {key}x", "bearer  "])
def test_refusals_say_how_to_mend_it_and_never_the_key(given: str, site: Site) -> None:
    key = site.of[Role.USER]
    answer = site.call(EMBED, None, metadata=[("authorization", given.format(key=key))])
    assert answer.code == "UNAUTHENTICATED" and "key" in answer.message
    for secret in (key[13:], "A" * 43):
        assert secret not in answer.message and secret not in str(answer.metadata)


def test_two_keys_at_once_are_none(site: Site) -> None:
    both = [("authorization", f"Bearer {site.of[role]}") for role in (Role.VIEWER, Role.ADMIN)]
    assert site.call(ADMIN + "GetCaller", None, metadata=both).code == "UNAUTHENTICATED"


def test_the_caller_learns_who_it_is(site: Site) -> None:
    answer = pb.GetCallerResponse.FromString(site.call(ADMIN + "GetCaller", site.limited).data)
    assert answer == pb.GetCallerResponse(
        name=f"apiKeys/{site.limited[4:12]}", role=auth_pb2.ROLE_USER, skills=["skills/triage"], keys_required=True
    )


def test_a_limited_key_asks_its_skills_alone(site: Site) -> None:
    def run(skill: str, key: str) -> Answer:
        return site.call(RUN, key, inference_service_pb2.RunRequest(skill=skill, inputs=[inference_pb2.RunInput(text="x")]))

    assert run("triage", site.limited).code == "OK"
    refused = run("other", site.limited)
    assert (refused.code, refused.metadata) == ("PERMISSION_DENIED", {"skill": "other", "allowed": "triage"})
    assert run("other", site.of[Role.USER]).code == "OK"
    embed = inference_service_pb2.EmbedRequest(texts=["x"])
    assert site.call(EMBED, site.limited, embed).code == "PERMISSION_DENIED"
    assert site.call("/inference.GRPCInferenceService/ModelInfer", site.limited).code == "PERMISSION_DENIED"
    assert site.call("/understudy.v1.SkillService/ListSkills", site.limited).code == "OK"


def test_in_a_stream_each_message_is_admitted_by_itself(site: Site) -> None:
    requests = [
        inference_service_pb2.RunManyRequest(id=name, request={"skill": name, "inputs": [{"text": "x"}]})
        for name in ("triage", "other", "triage")
    ]
    stub: Any = InferenceServiceStub(site.channel)  # type: ignore[no-untyped-call]
    answers = list(stub.RunMany(iter(requests), metadata=[("authorization", f"Bearer {site.limited}")], timeout=30))
    codes = sorted((answer.id, of_status("", answer.error, "").reason) for answer in answers)
    assert codes == [("other", "PERMISSION_DENIED"), ("triage", ""), ("triage", "")]


def test_calls_beyond_the_rate_are_told_when_to_come_again(site: Site) -> None:
    answers = [site.call(ADMIN + "GetCaller", site.slow) for _ in range(3)]
    assert [answer.code for answer in answers] == ["OK", "OK", "RESOURCE_EXHAUSTED"]
    last = answers[-1]
    assert last.reason == "RATE_LIMITED" and last.retry_s is not None and 0 < last.retry_s <= 30


def test_a_key_is_made_used_listed_and_revoked(site: Site) -> None:
    admin = site.of[Role.ADMIN]
    wish = admin_pb2.ApiKey(
        display_name="shop", role=auth_pb2.ROLE_USER, skills=["skills/triage", "skills/triage"], requests_per_minute=600
    )
    wish.budget_day_micro_usd = 0
    wish.name = "apiKeys/mine"  # output only: ours to say
    made = pb.CreateApiKeyResponse.FromString(site.call(ADMIN + "CreateApiKey", admin, pb.CreateApiKeyRequest(api_key=wish)).data)
    key = made.api_key
    assert made.secret.startswith(f"und_{key.name.removeprefix('apiKeys/')}_")
    assert (key.creator, list(key.skills), key.budget_day_micro_usd) == (f"apiKeys/{admin[4:12]}", ["skills/triage"], 0)
    assert not key.HasField("budget_month_micro_usd") and not key.HasField("expire_time") and not key.HasField("last_use_time")
    assert site.call(ADMIN + "GetCaller", made.secret).code == "OK"  # at once, on the server that made it
    found = pb.GetApiKeyResponse.FromString(site.call(ADMIN + "GetApiKey", admin, pb.GetApiKeyRequest(name=key.name)).data).api_key
    assert found == key
    names: list[str] = []
    page = pb.ListApiKeysResponse(next_page_token="")
    while not names or page.next_page_token:
        request = pb.ListApiKeysRequest(page_size=2, page_token=page.next_page_token)
        page = pb.ListApiKeysResponse.FromString(site.call(ADMIN + "ListApiKeys", admin, request).data)
        assert len(page.api_keys) <= 2
        names += [one.name for one in page.api_keys]
    assert names[0] == key.name and len(names) == len(set(names)) == len(site.keys.page(100))
    for _ in range(2):
        revoked = site.call(ADMIN + "RevokeApiKey", admin, pb.RevokeApiKeyRequest(name=key.name))
        assert pb.RevokeApiKeyResponse.FromString(revoked.data).api_key.HasField("revoke_time")
    answer = site.call(ADMIN + "GetCaller", made.secret)
    assert (answer.code, answer.metadata["problem"]) == ("UNAUTHENTICATED", "revoked")

    def kept() -> list[str]:  # events are written off the calls' path: within moments
        return [event.method.rpartition("/")[2] for event in site.audit.page(100) if event.resource == key.name]

    until(kept, ["RevokeApiKey", "RevokeApiKey", "CreateApiKey"])


@pytest.mark.parametrize(
    ("wish", "field"),
    [
        (admin_pb2.ApiKey(), "api_key.role"),
        (admin_pb2.ApiKey(role=9), "api_key.role"),  # type: ignore[arg-type]
        (admin_pb2.ApiKey(role=auth_pb2.ROLE_USER, skills=["triage"]), "api_key.skills[0]"),
        (admin_pb2.ApiKey(role=auth_pb2.ROLE_USER, requests_per_minute=-1), "api_key.requests_per_minute"),
        (admin_pb2.ApiKey(role=auth_pb2.ROLE_USER, expire_time={"seconds": 5}), "api_key.expire_time"),
        (admin_pb2.ApiKey(role=auth_pb2.ROLE_USER, expire_time={"seconds": -(2**62)}), "api_key.expire_time"),
    ],
)
def test_a_key_that_cannot_be_is_refused_by_field(wish: admin_pb2.ApiKey, field: str, site: Site) -> None:
    answer = site.call(ADMIN + "CreateApiKey", site.of[Role.ADMIN], pb.CreateApiKeyRequest(api_key=wish))
    assert (answer.code, answer.metadata.get("field")) == ("INVALID_ARGUMENT", field)


def test_the_last_admin_cannot_be_revoked_by_a_call(site: Site) -> None:
    admin = site.of[Role.ADMIN]
    answer = site.call(ADMIN + "RevokeApiKey", admin, pb.RevokeApiKeyRequest(name=f"apiKeys/{admin[4:12]}"))
    assert answer.code == "FAILED_PRECONDITION"
    pasted = site.call(ADMIN + "RevokeApiKey", admin, pb.RevokeApiKeyRequest(name=admin))
    assert pasted.code == "INVALID_ARGUMENT" and admin[13:] not in pasted.message
    assert site.call(ADMIN + "GetApiKey", admin, pb.GetApiKeyRequest(name="apiKeys/aaaaaaaa")).reason == "API_KEY_NOT_FOUND"


def test_changes_and_refusals_are_in_the_audit_log_in_order(site: Site) -> None:
    operator, viewer, admin = site.of[Role.OPERATOR], site.of[Role.VIEWER], site.of[Role.ADMIN]
    names = [f"models/none-{number}" for number in range(5)]
    for name in names:
        site.call(LOAD, operator, model_service_pb2.LoadModelRequest(name=name), metadata=[("x-request-id", name)])
    site.call(LOAD, viewer, model_service_pb2.LoadModelRequest(name="models/refused"), metadata=[("x-request-id", "refused-1")])
    seen: list[admin_pb2.AuditEvent] = []
    token = ""
    wanted = {*names, "refused-1"}
    ends = time.monotonic() + SOON_S
    while time.monotonic() < ends:  # written off the calls' path: within moments
        request = pb.ListAuditEventsRequest(page_size=3, page_token=token)
        page = pb.ListAuditEventsResponse.FromString(site.call(ADMIN + "ListAuditEvents", admin, request).data)
        seen += page.audit_events
        token = page.next_page_token
        if wanted <= {event.request_id for event in seen}:
            break
        if not token:
            seen = []
    ours = [event for event in seen if event.request_id in wanted]
    assert [event.request_id for event in ours] == ["refused-1", *names[::-1]]
    assert {event.actor for event in ours[1:]} == {f"apiKeys/{operator[4:12]}"}
    assert (ours[0].code, ours[0].actor, ours[1].code, ours[1].resource) == (
        "PERMISSION_DENIED",
        f"apiKeys/{viewer[4:12]}",
        "NOT_FOUND",
        names[-1],
    )
    assert all(event.peer.startswith("ipv4:127.0.0.1:") and event.HasField("time") for event in ours)
    mine = pb.ListAuditEventsRequest(actor=f"apiKeys/{viewer[4:12]}", page_size=1000)
    found = pb.ListAuditEventsResponse.FromString(site.call(ADMIN + "ListAuditEvents", admin, mine).data).audit_events
    assert found and {event.actor for event in found} == {mine.actor}


def test_the_client_sends_its_key_or_the_environments(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    address = site.server.address
    with Client(address, api_key=site.of[Role.USER]) as client:
        assert client.embed(["x"]).shape[0] == 1
    monkeypatch.setenv("UNDERSTUDY_API_KEY", site.of[Role.USER])
    with Client(address) as client:
        assert client.embed(["x"]).shape[0] == 1
    with Client(address, api_key="") as client, pytest.raises(Unauthenticated):
        client.embed(["x"])
    monkeypatch.delenv("UNDERSTUDY_API_KEY")
    with Client(address) as client, pytest.raises(Unauthenticated):
        client.embed(["x"])
