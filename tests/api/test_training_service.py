"""TrainingService of a real server: what it takes, what it refuses and how, and the logs of a job that somebody works on meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from server.registry.jobs import JobStore, News, Point
from server.registry.registry import Registry
from server.settings import RegistryConfig
from tests.conftest import StartServer
from tests.server_process import ServerProcess
from understudy.v1 import training_pb2
from understudy.v1 import training_service_pb2 as pb
from understudy.v1.training_service_pb2_grpc import TrainingServiceStub

CONFIG = """
[registry]
url = "sqlite:///{registry}"
[lake]
path = "{lake}"
flush_s = 0.1
[providers.vendor]
kind = "compatible"
base_url = "http://127.0.0.1:9"
[skills.intent]
labels = ["a", "b"]
teacher = "vendor/big"
base = "embedder"
schedule = "daily at 02:30"
min_rows = 5
[skills.eager]
labels = ["a", "b"]
base = "embedder"
[skills.baseless]
labels = ["a", "b"]
teacher = "vendor/big"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def server_address(place: Path, small_models: Path) -> Iterator[str]:
    fill(place / "lake")
    config = CONFIG.format(registry=place / "registry.db", lake=place / "lake")
    server = ServerProcess(place / "server", config, models=small_models)
    server.wait_ready()
    yield server.address
    server.stop()


@pytest.fixture(scope="module")
def stub(server_address: str) -> Iterator[TrainingServiceStub]:
    with grpc.insecure_channel(server_address) as channel:
        yield TrainingServiceStub(channel)


@pytest.fixture
def store(place: Path) -> Iterator[JobStore]:
    registry = Registry(RegistryConfig(url=f"sqlite:///{place}/registry.db"))
    yield JobStore(registry)
    registry.close()


def fill(lake: Path) -> None:
    """Six rows that may be learned from: four in the table, two in the log of a writer that has gone."""
    from server.lake import table
    from server.lake.ids import IdKey
    from server.lake.log import Log
    from server.lake.schema import INTERACTIONS

    key = IdKey.open(lake / "id.key")
    for count in (4, 2):
        log = Log(table.log_folder(lake, INTERACTIONS))
        row = {"skill": "intent", "input": "hello", "input_kind": "text", "training_allowed": True, "source_model": "big"}
        log.append([{**row, "time_ns": time.time_ns(), "interaction_id": key.new(), "teacher_label": "a"} for _ in range(count)])
        log.close()
        if count == 4:
            table.convert(lake, INTERACTIONS)


def create(stub: TrainingServiceStub, skill: str = "intent", request_id: str = "", **more: object) -> training_pb2.TrainingJob:
    job = training_pb2.TrainingJob(skill=f"skills/{skill}", **more)  # type: ignore[arg-type]
    return stub.CreateTrainingJob(pb.CreateTrainingJobRequest(training_job=job, request_id=request_id)).training_job


def refusal(call: object) -> tuple[str, str, dict[str, str], str]:
    """(code, reason, metadata, message) of the error that a call ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()  # type: ignore[operator]
    status = rpc_status.from_call(caught.value)
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return caught.value.code().name, info.reason, dict(info.metadata), status.message


def test_a_job_is_made_seen_listed_and_cancelled(stub: TrainingServiceStub) -> None:
    job = create(stub, method="linear-head", seed=7, request_id="first")
    assert (job.skill, job.method, job.seed) == ("skills/intent", "linear-head", 7)
    assert (job.kind, job.state) == (training_pb2.TRAINING_JOB_KIND_TRAIN, training_pb2.TRAINING_JOB_STATE_QUEUED)
    assert create(stub, method="linear-head", seed=7, request_id="first").name == job.name
    assert stub.GetTrainingJob(pb.GetTrainingJobRequest(name=job.name)).training_job == job
    code, reason, metadata, _ = refusal(lambda: create(stub, method="linear-head", seed=7))
    assert (code, reason, f"trainingJobs/{metadata['job']}") == ("ALREADY_EXISTS", "ALREADY_EXISTS", job.name)
    other = create(stub, method="lora")
    page = stub.ListTrainingJobs(pb.ListTrainingJobsRequest(skill="skills/intent", page_size=1))
    assert [one.name for one in page.training_jobs] == [other.name] and page.next_page_token
    page = stub.ListTrainingJobs(pb.ListTrainingJobsRequest(skill="skills/intent", page_size=1, page_token=page.next_page_token))
    assert [one.name for one in page.training_jobs] == [job.name] and not page.next_page_token
    for one in (job, other):
        ended = stub.CancelTrainingJob(pb.CancelTrainingJobRequest(name=one.name)).training_job
        assert ended.state == training_pb2.TRAINING_JOB_STATE_CANCELLED and ended.end_time.seconds
    cancelled = pb.ListTrainingJobsRequest(states=[training_pb2.TRAINING_JOB_STATE_CANCELLED])
    assert len(stub.ListTrainingJobs(cancelled).training_jobs) == 2


def test_bad_orders_are_refused_with_what_is_allowed(stub: TrainingServiceStub) -> None:
    code, reason, _, message = refusal(lambda: create(stub, "intnt"))
    assert (code, reason) == ("NOT_FOUND", "SKILL_NOT_FOUND") and "'intent'" in message
    code, reason, metadata, message = refusal(lambda: create(stub, method="magic"))
    assert (code, metadata["field"]) == ("INVALID_ARGUMENT", "method") and "linear-head" in message and "lora" in message
    assert refusal(lambda: create(stub, seed=-1))[2]["field"] == "seed"
    assert refusal(lambda: create(stub, kind=9))[2]["field"] == "training_job.kind"
    assert refusal(lambda: create(stub, "baseless"))[0] == "FAILED_PRECONDITION"
    code, reason, metadata, message = refusal(lambda: create(stub, "eager"))
    assert (code, reason) == ("FAILED_PRECONDITION", "TOO_LITTLE_DATA")
    assert (metadata["count"], metadata["minimum"]) == ("0", "100") and "100 are needed" in message
    for call in (
        lambda: stub.GetTrainingJob(pb.GetTrainingJobRequest(name="trainingJobs/none")),
        lambda: stub.CancelTrainingJob(pb.CancelTrainingJobRequest(name="trainingJobs/none")),
        lambda: list(stub.StreamTrainingJobLogs(pb.StreamTrainingJobLogsRequest(name="trainingJobs/none"))),
        lambda: stub.ListTrainingJobMetrics(pb.ListTrainingJobMetricsRequest(parent="trainingJobs/none")),
    ):
        assert refusal(call)[:2] == ("NOT_FOUND", "JOB_NOT_FOUND")
    assert refusal(lambda: stub.GetTrainingJob(pb.GetTrainingJobRequest(name="none")))[2]["field"] == "name"
    assert refusal(lambda: stub.ListTrainingJobs(pb.ListTrainingJobsRequest(page_token="?")))[0] == "INVALID_ARGUMENT"
    assert refusal(lambda: stub.ListTrainingJobs(pb.ListTrainingJobsRequest(states=[77])))[2]["field"] == "states"


def test_logs_are_followed_to_the_end_and_go_on_after_a_number(stub: TrainingServiceStub, store: JobStore) -> None:
    job = create(stub, method="full")
    heard: list[pb.StreamTrainingJobLogsResponse] = []
    first = threading.Event()

    def follow() -> None:
        for response in stub.StreamTrainingJobLogs(pb.StreamTrainingJobLogsRequest(name=job.name)):
            heard.append(response)
            if response.lines:
                first.set()

    following = threading.Thread(target=follow)
    following.start()
    taken = store.lease("us", 60, max_attempts=3)
    assert taken is not None and job.name == f"trainingJobs/{taken.id}"
    points = [Point("loss", step, 1 / (step + 1), 1000 + step) for step in range(5)]
    store.beat(taken.id, "us", 60, News([(1000, "one"), (2000, "two")], points, {"fit": (1, 2)}))
    assert first.wait(30)
    store.beat(taken.id, "us", 60, News([(3000, "three")]))
    store.end(taken.id, "us", "rejected", report={"reason": "not better", "metrics": {"accuracy": 0.5, "odd": float("nan")}})
    following.join(30)
    assert not following.is_alive()
    assert [(line.number, line.text) for response in heard for line in response.lines] == [(1, "one"), (2, "two"), (3, "three")]
    assert heard[-1].state == training_pb2.TRAINING_JOB_STATE_REJECTED
    again = list(stub.StreamTrainingJobLogs(pb.StreamTrainingJobLogsRequest(name=job.name, after=2)))
    assert [line.text for response in again for line in response.lines] == ["three"]

    page = stub.ListTrainingJobMetrics(pb.ListTrainingJobMetricsRequest(parent=job.name, page_size=3))
    rest = stub.ListTrainingJobMetrics(pb.ListTrainingJobMetricsRequest(parent=job.name, page_token=page.next_page_token))
    assert [point.step for point in (*page.points, *rest.points)] == [0, 1, 2, 3, 4] and page.points[1].value == 0.5
    ended = stub.GetTrainingJob(pb.GetTrainingJobRequest(name=job.name)).training_job
    assert (ended.rejection, dict(ended.metrics), ended.progress[0].stage) == ("not better", {"accuracy": 0.5}, "fit")
    assert ended.report["reason"] == "not better"


def test_schedules_of_the_configuration_and_of_commands(stub: TrainingServiceStub) -> None:
    def listed() -> dict[str, tuple[str, str]]:
        return {one.name: (one.spec, one.origin) for one in stub.ListSchedules(pb.ListSchedulesRequest()).schedules}

    name = "skills/intent/schedule"
    assert listed() == {name: ("daily at 02:30", "configuration")}
    new = training_pb2.Schedule(name=name, spec="weekly on sunday at 04:00")
    made = stub.SetSchedule(pb.SetScheduleRequest(schedule=new)).schedule
    assert made.origin == "command" and made.next_time.seconds > time.time()
    assert listed()[name] == ("weekly on sunday at 04:00", "command")
    bad = training_pb2.Schedule(name=name, spec="now and then")
    code, _, metadata, message = refusal(lambda: stub.SetSchedule(pb.SetScheduleRequest(schedule=bad)))
    assert (code, metadata["field"]) == ("INVALID_ARGUMENT", "schedule") and "when N new good rows" in message
    unknown = training_pb2.Schedule(name="skills/none/schedule", spec="weekly")
    assert refusal(lambda: stub.SetSchedule(pb.SetScheduleRequest(schedule=unknown)))[0] == "NOT_FOUND"
    stub.DeleteSchedule(pb.DeleteScheduleRequest(name=name))
    assert listed()[name] == ("daily at 02:30", "configuration")
    assert refusal(lambda: stub.DeleteSchedule(pb.DeleteScheduleRequest(name=name)))[0] == "FAILED_PRECONDITION"


def test_the_clients_know_jobs(stub: TrainingServiceStub, server_address: str, store: JobStore) -> None:
    from understudy.aio import AsyncClient
    from understudy.client import Client
    from understudy.errors import NotFound

    with Client(server_address) as client:
        job = client.jobs.create("intent", method="prefix", seed=4, job_request_id="by-client")
        assert (job.state, job.skill, job.method, job.done) == ("queued", "intent", "prefix", False)
        taken = store.lease("us", 60, max_attempts=3)
        assert taken is not None and taken.id == job.id
        store.beat(job.id, "us", 60, News([], [Point("loss", 1, 0.5, 1000)], {"fit": (1, 2)}))
        store.end(job.id, "us", "succeeded", report={"version": "8", "metrics": {"accuracy": 0.75}})
        done = client.jobs.wait(job.id)
        assert (done.state, done.version, done.metrics, done.progress) == ("succeeded", "8", {"accuracy": 0.75}, {"fit": (1, 2)})
        assert client.jobs.curves(job.id) == {"loss": [(1, 0.5)]} and client.jobs.cancel(job.id).state == "succeeded"
        assert job.id in [one.id for one in client.jobs.list("intent")]
        with pytest.raises(NotFound):
            client.jobs.get("none")

    async def same() -> None:
        async with AsyncClient(server_address) as client:
            assert await client.jobs.get(job.id) == done == await client.jobs.wait(job.id)
            assert job.id in [one.id for one in await client.jobs.list("intent", limit=1000)]
            assert await client.jobs.curves(job.id) == {"loss": [(1, 0.5)]}

    asyncio.run(same())


def test_the_skills_are_written_down(stub: TrainingServiceStub, place: Path) -> None:
    registry = Registry(RegistryConfig(url=f"sqlite:///{place}/registry.db"))
    found = {skill.name: skill for skill in registry.skills()}
    assert {"intent", "eager", "baseless"} <= set(found) and found["intent"].config["teacher"] == "vendor/big"
    registry.close()


def test_a_server_with_a_bad_schedule_does_not_start(start_server: StartServer) -> None:
    server = start_server('[skills.x]\nlabels = ["a", "b"]\nbase = "embedder"\nschedule = "hourly"', ready=False)
    assert server.wait(120) == 1
    assert "skills.x.schedule" in "".join(server.lines) and "Traceback" not in "".join(server.lines)
