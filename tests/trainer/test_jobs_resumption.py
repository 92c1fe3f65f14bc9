"""A trainer that is killed in the middle: the next one takes the job up, and it ends as if nothing had been."""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the trainer's extra is not installed")

from server.config import load_config
from server.registry.jobs import Job, JobStore
from server.registry.registry import Registry
from tests.trainer.trainer_process import TrainerProcess, make_workplace
from tests.trainer_lake import fill, texts

WEIGHTS = ("model.onnx", "adapter.safetensors", "head.onnx")


def artefacts(workplace: Path) -> dict[str, str]:
    """SHA-256 of what the job published, by place in the repository."""
    found = [path for path in sorted((workplace / "models").rglob("*")) if path.name in WEIGHTS and "embedder" not in path.parts]
    return {str(path.relative_to(workplace)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def queue(store: JobStore, method: str) -> Job:
    return store.create("intent", "train", {"method": method, "seed": 11})


def curve(store: JobStore, job: Job) -> list[tuple[str, int, float]]:
    return [(point.name, point.step, point.value) for point in store.metrics(job.id)]


def kill_at(trainer: TrainerProcess, points: Path, step: int) -> None:
    """Waits for the training's step, by the file of points, and kills the trainer."""
    while trainer.process.poll() is None:
        lines = points.read_text().count("/loss") if points.exists() else 0
        if lines >= step:
            trainer.kill()
            return
        time.sleep(0.005)  # between looks at a file: nobody tells us of its growth
    pytest.fail("the job ended before its trainer was killed: " + "".join(trainer.lines)[-2000:])


@pytest.mark.parametrize("method", ["full"])
def test_a_job_whose_trainer_is_killed_ends_with_the_same_curve_and_artefact(tmp_path: Path, small_models: Path, method: str) -> None:
    whole, killed = (make_workplace(tmp_path / name, small_models) for name in ("whole", "killed"))
    fill(whole / "lake", texts(900, 1))
    shutil.copytree(whole / "lake", killed / "lake")
    registries = {place: Registry(load_config(place / "understudy.toml", environ={}).registry) for place in (whole, killed)}
    stores = {place: JobStore(registry) for place, registry in registries.items()}
    wanted, job = queue(stores[whole], method), queue(stores[killed], method)
    undisturbed = TrainerProcess(whole, "--once")
    kill_at(TrainerProcess(killed), killed / "training" / job.id / "points.jsonl", random.Random(method).randint(20, 60))
    assert stores[killed].get(job.id).state == "running"
    assert undisturbed.wait() == 0, undisturbed.lines
    second = TrainerProcess(killed)
    while not (ended := stores[killed].get(job.id)).ended and second.process.poll() is None:
        time.sleep(0.1)
    assert second.stop() == 0, second.lines
    done = stores[whole].get(wanted.id)
    assert (done.state, done.error) == (ended.state, ended.error) and ended.attempt == 2, second.lines
    assert any("goes on after step" in line.text for line in stores[killed].logs(job.id))
    assert curve(stores[killed], job) == curve(stores[whole], wanted) and len(curve(stores[whole], wanted)) > 100
    assert artefacts(killed) == artefacts(whole) and len(artefacts(whole)) == 3
    assert done.report["metrics"] == ended.report["metrics"]
    for registry in registries.values():
        registry.close()
