"""A training run, from a lake on the disk to an adapter that the store loads: by the real base, and only if it is better."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from server.config import Config, load_config
from server.errors import FailedPrecondition, ModelRejected, SkillNotFound, TooLittleData
from server.lake import table
from server.lake.schema import INTERACTIONS
from server.quality.calibration import Calibration
from server.registry.registry import Registry
from server.runtime.adapters import AdapterStore
from tests.trainer.trainer_process import make_site
from tests.trainer_lake import WORDS, fill, texts
from trainer.context import JobContext
from trainer.curate.answers import FOREIGN_LABEL
from trainer.curate.rows import is_held_out
from trainer.report import Report
from trainer.train import train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def site(tmp_path: Path, small_models: Path) -> Path:
    # The texts are drawn from few words, and many are alike.
    alike = '[curation]\nnear_duplicates = 1.0\nlabel_errors = "off"'
    baseless = '[skills.baseless]\nlabels = ["a", "b"]\nteacher = "vendor/big"'
    labels = ["card", "password", "transfer", "unheard"]
    return make_site(tmp_path, small_models, labels=labels, more=f"{alike}\n{baseless}")


def config(site: Path) -> Config:
    return load_config(site / "understudy.toml", environ={})


def run(site: Path, skill: str = "intent", **spec: object) -> Report:
    """A job as the trainer's worker runs it: its row is there before, and ends with it."""
    registry = Registry(config(site).registry)
    job = registry.start_job(skill, "train")
    try:
        report = train(config(site), skill, JobContext(job, site / "jobs" / job), spec)
    except BaseException:
        registry.end_job(job, "failed")
        raise
    else:
        registry.end_job(job, report.state, report=report.to_json())
    finally:
        registry.close()
    return report


def test_a_good_student_is_published_and_a_worse_one_is_not(site: Path) -> None:
    fill(site / "lake", [*texts(400, 1), ("password reset twice", "weather")])
    report = run(site)
    assert (report.state, report.version, report.base) == ("succeeded", "1", "embedder@1")
    assert report.read == 401 == report.train_rows + report.held_out_rows + sum(report.dropped.values())
    assert report.labels_without_rows == ["unheard"] and report.dropped[FOREIGN_LABEL] == 1
    assert report.metrics["accuracy"] > 0.9 and report.metrics["local_share"] > 0.5

    store = AdapterStore(site / "models" / "adapters")
    store.refresh()
    head = store.current("intent")
    assert head is not None and head.manifest.metrics == report.metrics
    assert Calibration.from_json(head.manifest.calibration).rows == report.held_out_rows
    assert head.manifest.lineage["job"] == report.job and head.manifest.lineage["sources"] == {"big": 400}

    registry = Registry(config(site).registry)
    (job,) = registry.jobs("intent")
    (adapter,) = registry.adapters("intent")
    assert job.state == "succeeded" and adapter.sha256 == head.manifest.files["head.onnx"].sha256
    used = table.read(site / "lake", INTERACTIONS, names=["interaction_id", "input"]).to_pylist()
    assert [found.version for found in registry.adapters_with(used[0]["interaction_id"])] == ["1"]

    same = run(site)
    assert same.state == "rejected" and "same rows" in same.reason

    # The teacher goes mad: what it says now is noise, and the student made of it must not replace the one that serves.
    rng = random.Random(5)
    fill(site / "lake", [(text, rng.choice(sorted(WORDS))) for text, _ in texts(1500, 2)])
    worse = run(site)
    assert worse.state == "rejected" and worse.reason and worse.version == ""
    assert sorted(path.name for path in (site / "models" / "adapters" / "intent").iterdir()) == ["1"]
    assert [found.state for found in registry.jobs("intent")] == ["rejected", "rejected", "succeeded"]
    registry.close()


def test_held_out_rows_are_never_trained_on(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(site / "lake", texts(300, 3))
    from trainer import linear

    seen: list[int] = []
    fit = linear.fit

    def watch(vectors: object, *more: object, **named: object) -> object:
        seen.append(len(vectors))  # type: ignore[arg-type]
        return fit(vectors, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(linear, "fit", watch)
    report = run(site)
    held = sum(is_held_out(text) for text, _ in texts(300, 3))
    assert seen == [300 - held] and report.held_out_rows == held


def test_too_little_data_says_how_much_and_why(site: Path) -> None:
    with pytest.raises(TooLittleData) as caught:
        run(site)
    assert caught.value.metadata["count"] == "0" and caught.value.metadata["minimum"] == "100"
    fill(site / "lake", texts(250, 4), training_allowed=False)
    with pytest.raises(TooLittleData, match="training_allowed") as caught:
        run(site)
    assert caught.value.metadata["count"] == "0"
    fill(site / "lake", texts(120, 4))
    with pytest.raises(TooLittleData, match="held-out"):
        run(site)
    registry = Registry(config(site).registry)
    assert {job.state for job in registry.jobs("intent")} == {"failed"}
    registry.close()


def test_what_cannot_be_trained_is_refused(site: Path) -> None:
    with pytest.raises(SkillNotFound, match="'intent'"):
        run(site, "intnt")
    with pytest.raises(FailedPrecondition, match="base"):
        run(site, "baseless")
    fill(site / "lake", texts(300, 3))
    model = site / "models" / "embedder" / "1" / "model.onnx"
    model.chmod(0o644)
    model.write_bytes(model.read_bytes()[:-10])
    with pytest.raises(ModelRejected):
        run(site)


def test_the_command_runs_it_as_a_process(site: Path) -> None:
    fill(site / "lake", texts(300, 3))
    report = site / "report.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")])}
    command = [sys.executable, "-m", "server.cli", "train", "intent", "--config", str(site / "understudy.toml"), "--json", str(report)]
    named = {"cwd": site, "env": environment, "capture_output": True, "text": True, "check": False}
    done = subprocess.run(command, **named)
    assert done.returncode == 0, done.stderr
    assert "published as version 1" in done.stdout and "held out" in done.stdout
    assert json.loads(report.read_text())["state"] == "succeeded"
    bad = subprocess.run([*command[:4], "nothing", *command[5:]], cwd=site, env=environment, capture_output=True, text=True, check=False)
    assert bad.returncode == 1 and "There is no skill" in bad.stderr and "Traceback" not in bad.stderr


def test_a_run_that_is_stopped_closes_its_job(site: Path) -> None:
    fill(site / "lake", texts(300, 3))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")])}
    command = [sys.executable, "-m", "trainer", "train", "intent", "--config", str(site / "understudy.toml")]
    running = subprocess.Popen(command, cwd=site, env=environment, stdout=subprocess.DEVNULL)
    registry = Registry(config(site).registry)
    while not registry.jobs("intent"):
        assert running.poll() is None
    running.terminate()
    assert running.wait() in (128 + signal.SIGTERM, 0), "stopped, or done before the signal came"
    (job,) = registry.jobs("intent")
    assert job.state == ("cancelled" if running.returncode else "succeeded")
    registry.close()
