"""A student takes over in the real server, stage by stage, and a bad one does not; the teacher is real HTTP on loopback."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from server.core import FloatArray
from server.lake import table
from server.lake.schema import SHADOWS
from server.runtime.heads import Base, Features, HeadSpec, write_linear_head
from server.runtime.runtime import Runtime
from tests.conftest import StartServer
from tests.providers.loopback import OpenAIServer
from tests.routing.conftest import LABELS, SURE, TEXTS, vectors
from trainer import linear
from understudy.v1 import inference_pb2, inference_service_pb2, skill_service_pb2
from understudy.v1.inference_service_pb2_grpc import InferenceServiceStub
from understudy.v1.skill_service_pb2_grpc import SkillServiceStub

GOLD = {text: label for label in LABELS for text in TEXTS[label]}
END_S = 60.0


class Place:
    """A repository of the embedder, heads that are published in it, and the skill's server."""

    def __init__(self, models: Path, manifest: Any, weight: FloatArray, bias: FloatArray) -> None:
        self.models = models
        self._manifest = manifest
        self._weight, self._bias = weight, bias

    def publish(self, version: int, *, wrong: bool = False) -> None:
        """A head that is right on every text, or, just as sure of itself, on none."""
        spec = HeadSpec(
            name="intent",
            version=str(version),
            base=Base(name="embedder", version=self._manifest.version, sha256=self._manifest.files["model.onnx"].sha256),
            features=Features(pooling="mean", normalize=True, size=self._manifest.hidden_size),
            labels=list(LABELS),
            calibration=SURE.to_json(),
            metrics={"local_accuracy": 0.97, "local_share": 1.0, "held_out_rows": 400.0, "accuracy": 0.97},
        )
        shift = 1 if wrong else 0
        write_linear_head(
            self.models / "adapters" / "intent" / str(version), spec, np.roll(self._weight, shift, 0), np.roll(self._bias, shift, 0)
        )


@pytest.fixture
async def place(runtime: Runtime, small_models: Path, tmp_path: Path) -> Place:
    texts = list(GOLD)
    classes = np.array([LABELS.index(GOLD[text]) for text in texts])
    fitted = linear.fit(await vectors(runtime, texts), classes, len(LABELS), strengths=(100.0,))
    models = tmp_path / "models"
    shutil.copytree(small_models / "embedder", models / "embedder")
    return Place(models, runtime.manifest("embedder"), fitted.weight, fitted.bias)


@pytest.fixture
def teacher() -> Iterator[OpenAIServer]:
    running = OpenAIServer(lambda number, text: GOLD[text])
    yield running
    running.close()


def configuration(teacher: OpenAIServer, tmp_path: Path, models: str = '["embedder"]') -> str:
    return f"""
[models]
load = {models}
adapter_poll_s = 0.05
[lake]
path = {json.dumps(str(tmp_path / "lake"))}
flush_s = 0.5
[registry]
url = {json.dumps(f"sqlite:///{tmp_path / 'registry.db'}")}
[providers.loop]
base_url = "{teacher.base_url}"
api_key_env = "LOOP_KEY"
[rollout]
margin = 0.1
min_comparisons = 12
poll_s = 0.05
[skills.intent]
labels = {json.dumps(LABELS)}
teacher = "loop/big"
base = "embedder"
"""


class Caller:
    """Calls a server until something comes true."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.stub = InferenceServiceStub(channel)
        self.skills = SkillServiceStub(channel)
        self.sent = 0

    def run(self) -> list[Any]:
        inputs = [inference_pb2.RunInput(text=text) for text in GOLD]
        self.sent += 1
        request = inference_service_pb2.RunRequest(skill="intent", inputs=inputs, user=f"user {self.sent}")
        return list(self.stub.Run(request, timeout=30).results)

    def skill(self) -> Any:
        return self.skills.GetSkill(skill_service_pb2.GetSkillRequest(name="skills/intent"), timeout=30).skill

    def rollout(self) -> Any:
        return self.skills.GetRollout(skill_service_pb2.GetRolloutRequest(name="skills/intent"), timeout=30).rollout

    def events(self) -> list[Any]:
        found = self.skills.ListRolloutEvents(skill_service_pb2.ListRolloutEventsRequest(name="skills/intent"), timeout=30)
        return list(reversed(found.events))

    def until(self, stage: str, student: str) -> list[Any]:
        """Sends requests until the rollout is there; every answer on the way has to be right."""
        end = time.monotonic() + END_S
        while time.monotonic() < end:
            results = self.run()
            assert [one.output_text for one in results] == list(GOLD.values())
            now = self.rollout()
            if (now.stage, now.student) == (stage, student):
                return self.run()
        raise AssertionError(f"{now.stage} {now.percent} of {now.student} after {END_S:g} s: {now.reason}")


def test_students_take_over_by_evidence_and_a_bad_one_never_answers(
    place: Place, teacher: OpenAIServer, start_server: StartServer, tmp_path: Path
) -> None:
    served = start_server(configuration(teacher, tmp_path), models=place.models, env={"LOOP_KEY": "sk-loop"})
    with grpc.insecure_channel(served.address) as channel:
        caller = Caller(channel)
        assert caller.skill().rollout_stage == "held" and caller.run()[0].decision.candidate == "loop/big"
        place.publish(1)
        results = caller.until("full", "1")
        assert all(one.decision.candidate == "local:intent@1" for one in results)
        steps = [(one.from_stage, one.to_stage) for one in caller.events()]
        assert steps == [
            ("held", "shadow"),
            ("shadow", "canary 10"),
            ("canary 10", "canary 50"),
            ("canary 50", "canary 80"),
            ("canary 80", "full"),
        ]
        assert caller.skill().student.version == "1" and caller.skill().rollout_percent == 100

        place.publish(2, wrong=True)  # `until` checks that nobody ever gets one of its answers
        deadline = time.monotonic() + END_S
        while "2" not in caller.rollout().refused:
            assert [one.output_text for one in caller.run()] == list(GOLD.values()) and time.monotonic() < deadline
        assert (caller.rollout().stage, caller.rollout().student) == ("full", "1")
        steps = [one for one in caller.events() if one.from_stage != one.to_stage]
        assert steps[-1].from_stage == "shadow", "nobody was ever in its canary"
        assert steps[-1].evidence["worse"] > 0 and any(words in steps[-1].reason for words in ("agrees", "worse than the champion"))

        place.publish(3)
        caller.until("full", "3")
        assert [one.to_stage for one in caller.events() if one.from_stage != one.to_stage][-5:] == [
            "shadow",
            "canary 10",
            "canary 50",
            "canary 80",
            "full",
        ]
        back = caller.skills.RollbackRollout(skill_service_pb2.RollbackRolloutRequest(name="skills/intent", reason="drill"), timeout=30)
        assert (back.rollout.stage, back.rollout.student, list(back.rollout.refused)) == ("full", "1", ["2", "3"])
        drill = caller.events()[-1]
        assert (drill.actor, drill.reason, drill.to_stage, drill.student) == ("operator", "drill", "rolled_back", "3")
        assert caller.run()[0].decision.candidate == "local:intent@1"
    served.stop()
    roles = table.read(tmp_path / "lake", SHADOWS).column("role").to_pylist()
    assert {"teacher", "student"} <= set(roles)


def test_a_teacher_that_changed_is_told_from_a_student_that_went_bad(place: Place, start_server: StartServer, tmp_path: Path) -> None:
    """The student is suspended, old inputs are asked again, and the rollout is held for a person to say who is right."""
    shift = [0]
    teacher = OpenAIServer(lambda number, text: LABELS[(LABELS.index(GOLD[text]) + shift[0]) % len(LABELS)])
    try:
        served = start_server(configuration(teacher, tmp_path), models=place.models, env={"LOOP_KEY": "sk-loop"})
        with grpc.insecure_channel(served.address) as channel:
            caller = Caller(channel)
            place.publish(1)
            caller.until("full", "1")
            shift[0] = 1
            end = time.monotonic() + END_S
            while not caller.rollout().paused:
                assert time.monotonic() < end, caller.rollout()
                caller.run()
            now = caller.rollout()
            assert (now.stage, now.student) == ("full", "1") and now.alarms
            held = caller.events()[-1]
            assert "the teacher changed" in held.reason and "drift alarm" in caller.events()[-2].reason
            assert caller.run()[0].decision.local, "the student goes on meanwhile"
            resumed = caller.skills.ResumeRollout(skill_service_pb2.ResumeRolloutRequest(name="skills/intent"), timeout=30)
            assert not resumed.rollout.paused
        served.stop()
    finally:
        teacher.close()
