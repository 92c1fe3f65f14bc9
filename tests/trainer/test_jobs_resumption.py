"""A trainer that is killed in the middle: the next one takes the job up, and it ends as if nothing had been."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the trainer's extra is not installed")

from server.config import load_config
from server.registry.jobs import JobStore
from server.registry.registry import Registry
from tests.trainer.trainer_process import TrainerProcess, artefacts, curve, files, finish, kill_at, make_site
from tests.trainer_lake import fill, texts


def test_a_job_whose_trainer_is_killed_ends_with_the_same_curve_and_artefact(tmp_path: Path, small_models: Path) -> None:
    whole, killed = (make_site(tmp_path / name, small_models) for name in ("whole", "killed"))
    fill(whole / "lake", texts(600, 1))
    shutil.copytree(whole / "lake", killed / "lake")
    before = files(whole / "models")
    registries = {place: Registry(load_config(place / "understudy.toml", environ={}).registry) for place in (whole, killed)}
    stores = {place: JobStore(registry) for place, registry in registries.items()}
    wanted, job = (stores[place].create("intent", "train", {"method": "full", "seed": 11}).id for place in (whole, killed))
    undisturbed = TrainerProcess(whole, "--once")
    first = TrainerProcess(killed)
    assert kill_at(first, killed / "training" / job / "points.jsonl", random.Random(3).randint(15, 40)), first.lines
    assert stores[killed].get(job).state == "running"
    assert undisturbed.wait() == 0, undisturbed.lines
    second = finish(killed, stores[killed], job)
    done, ended = stores[whole].get(wanted), stores[killed].get(job)
    assert (done.state, done.error, ended.attempt) == (ended.state, ended.error, 2), second.lines
    assert any("goes on after step" in line.text for line in stores[killed].logs(job))
    assert curve(stores[killed], job) == curve(stores[whole], wanted) and len(curve(stores[whole], wanted)) > 60
    assert artefacts(killed / "models", before) == artefacts(whole / "models", before) != {}
    assert done.report["metrics"] == ended.report["metrics"]
    for registry in registries.values():
        registry.close()
