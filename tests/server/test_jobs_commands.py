"""`understudy train --detach`, `jobs` and `schedule`, on the registry of a configuration and through a server's address."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from server.api.training_desk import TrainingDesk
from server.cli import app
from server.commands.jobs import draw
from server.config import Config, load_config
from server.errors import InvalidArgument, JobNotFound, SkillNotFound, UnderstudyError
from server.registry.jobs import JobStore, News, Point
from server.registry.registry import Registry


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "understudy.toml").write_text(f"""
[registry]
url = {json.dumps(f"sqlite:///{tmp_path / 'registry.db'}")}
[training]
path = {json.dumps(str(tmp_path / "training"))}
[skills.intent]
labels = ["a", "b"]
base = "embedder"
""")
    return load_config(tmp_path / "understudy.toml", environ={})


@pytest.fixture
def store(config: Config) -> Iterator[JobStore]:
    registry = Registry(config.registry)
    yield JobStore(registry)
    registry.close()


@pytest.fixture
def address(config: Config) -> Iterator[str]:
    """A server of the service alone, over the same registry."""
    from understudy.v1 import training_service_pb2 as pb

    registry = Registry(config.registry)
    desk = TrainingDesk(config, registry)
    methods = pb.DESCRIPTOR.services_by_name["TrainingService"].methods
    server = grpc.server(ThreadPoolExecutor(2))
    table = {one.name: _handler(getattr(desk, one.name), one) for one in methods if not one.server_streaming}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("understudy.v1.TrainingService", table),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()
    registry.close()


def _handler(call: Callable[[Any], Any], method: Any) -> Any:
    from google.protobuf.message_factory import GetMessageClass

    reads = GetMessageClass(method.input_type).FromString
    return grpc.unary_unary_rpc_method_handler(
        lambda request, context: call(request), request_deserializer=reads, response_serializer=lambda message: message.SerializeToString()
    )


def run(*words: str, where: Path | None = None) -> str:
    arguments = [*words, *(["--config", str(where / "understudy.toml")] if where else [])]
    done = CliRunner().invoke(app, arguments, catch_exceptions=True)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_job_from_its_order_to_its_curve(store: JobStore, tmp_path: Path) -> None:
    job = run("train", "intent", "--method", "lora", "--seed", "3", "--detach", where=tmp_path).split()[0]
    assert store.get(job).spec == {"method": "lora", "seed": 3}
    assert job[:12] in run("jobs", "list", where=tmp_path) and "queued" in run("jobs", "show", job[:6], where=tmp_path)
    taken = store.lease("us", 60, max_attempts=3)
    assert taken is not None
    points = [Point("lora/loss", step, 2.0 / (step + 1), 0) for step in range(30)]
    store.beat(job, "us", 60, News([(0, "hello")], points, {"fit": (30, 30)}))
    store.end(job, "us", "rejected", report={"reason": "no better", "metrics": {"accuracy": 0.5}})
    assert "hello" in run("jobs", "logs", "-f", job, where=tmp_path)
    shown = run("jobs", "show", job, where=tmp_path)
    assert "no better" in shown and "fit: 30 of 30" in shown and "accuracy 0.5" in shown
    drawn = run("jobs", "curve", job, where=tmp_path)
    assert "lora/loss  (last: 0.06667)" in drawn and f"{job}/report.html" in drawn
    listed = json.loads(run("jobs", "list", "--state", "rejected", "--json", where=tmp_path))
    assert [one["name"] for one in listed["training_jobs"]] == [f"trainingJobs/{job}"]


def test_bad_orders(store: JobStore, tmp_path: Path) -> None:
    with pytest.raises(SkillNotFound):
        run("train", "intnt", "--detach", where=tmp_path)
    with pytest.raises(InvalidArgument, match="linear-head"):
        run("train", "intent", "--method", "magic", "--detach", where=tmp_path)
    with pytest.raises(JobNotFound):
        run("jobs", "show", "f00", where=tmp_path)
    with pytest.raises(InvalidArgument, match="queued"):
        run("jobs", "list", "--state", "done", where=tmp_path)
    with pytest.raises(InvalidArgument, match="daily at"):
        run("schedule", "set", "intent", "sometimes", where=tmp_path)


def test_schedules(store: JobStore, tmp_path: Path) -> None:
    assert "No schedules" in run("schedule", "list", where=tmp_path)
    assert "next at" in run("schedule", "set", "intent", "daily at 04:15", where=tmp_path)
    assert "daily at 04:15" in run("schedule", "list", where=tmp_path)
    assert "no schedule" in run("schedule", "remove", "intent", where=tmp_path)


def test_the_same_through_a_server(store: JobStore, address: str) -> None:
    job = run("train", "intent", "--server", address).split()[0]
    assert store.get(job).skill == "intent"
    assert f"{job}: cancelled" in run("jobs", "cancel", job[:8], "--server", address)
    assert "cancelled" in run("jobs", "list", "--server", address)
    with pytest.raises(UnderstudyError, match="UNKNOWN"):  # this server has none of ours around it, which makes a status of errors
        run("jobs", "show", "f" * 32, "--server", address)


def test_a_curve_in_characters() -> None:
    lines = draw("loss", [(step, 10.0 - step) for step in range(10)], width=10, height=5)
    assert lines[0] == "loss  (last: 1)" and lines[1].startswith("        10 |*") and lines[5].rstrip().endswith("*")
    assert draw("flat", [(3, 1.0)])[0] == "flat  (last: 1)"
