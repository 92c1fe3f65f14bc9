"""A trainer as a process of its own, and the site that it shares with a test."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from server.registry.jobs import JobStore

ROOT = Path(__file__).resolve().parents[2]
LABELS = ("card", "password", "transfer")


def make_site(
    folder: Path, small_models: Path, *, labels: Sequence[str] = LABELS, registry_url: str = "", more: str = "", skill: str = ""
) -> Path:
    """A folder with a configuration, a model repository with one base, whose torch weights are at hand, and no lake yet.

    `skill`: more lines of the skill "intent"; `more`: of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(small_models / "embedder", folder / "models" / "embedder")
    source = small_models.parent / "checkpoints" / "embedder"
    (folder / "understudy.toml").write_text(f"""
[models]
path = {json.dumps(str(folder / "models"))}
[lake]
path = {json.dumps(str(folder / "lake"))}
[registry]
url = {json.dumps(registry_url or f"sqlite:///{folder / 'registry.db'}")}
[training]
path = {json.dumps(str(folder / "training"))}
[training.sources]
embedder = {json.dumps(str(source))}
[providers.vendor]
[skills.intent]
labels = {json.dumps(list(labels))}
teacher = "vendor/big"
base = "embedder"
{skill}
{more}
""")
    return folder


class TrainerProcess:
    """`python -m trainer work` in a site; its log is kept."""

    def __init__(self, site: Path, *options: str) -> None:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "trainer", "work", "--config", str(site / "understudy.toml"), "--set", "log.format=json"]
        quick = {"path": site / "training", "poll_s": 0.1, "lease_s": 3.0, "checkpoint_s": 0.2}
        command += [word for key, value in quick.items() for word in ("--set", f"training.{key}={value}")]
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [*command, *options], cwd=site, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    def kill(self) -> None:
        """As a power cut would."""
        self.process.kill()
        self._end()

    def stop(self, timeout_s: float = 120.0) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = 300.0) -> int:
        """The exit code."""
        try:
            self.process.wait(timeout_s)
        finally:
            if self.process.poll() is None:
                self.process.kill()
            self._end()
        return self.process.returncode

    def _end(self) -> None:
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


def artefacts(models: Path, before: set[Path]) -> dict[str, str]:
    """SHA-256 of the weights and graphs that were published into a repository since `before`, by place; manifests name jobs and times."""
    found = [path for path in sorted(files(models) - before) if path.suffix not in (".json", ".md")]
    return {str(path): hashlib.sha256((models / path).read_bytes()).hexdigest() for path in found}


def files(models: Path) -> set[Path]:
    """Files of a repository."""
    return {path.relative_to(models) for path in models.rglob("*") if path.is_file()}


def curve(store: JobStore, job: str) -> list[tuple[str, int, float]]:
    """All points of a job."""
    return [(point.name, point.step, point.value) for point in store.metrics(job)]


def kill_at(trainer: TrainerProcess, points: Path, step: int, ended: Callable[[], bool] = lambda: False) -> bool:
    """Kills a trainer once its job's file of points has so many losses; False where the trainer, or the job by `ended`, ended before."""
    while trainer.process.poll() is None:
        told = points.read_text() if points.exists() else ""
        if told.count('/loss"') >= step:
            trainer.kill()
            return True
        if ended():
            trainer.stop()
            return False
        time.sleep(0.002)  # between looks at a file: nobody tells us of its growth
    trainer.wait()
    return False


def finish(site: Path, store: JobStore, job: str) -> TrainerProcess:
    """Another trainer, until the job has ended."""
    trainer = TrainerProcess(site)
    while not store.get(job).ended and trainer.process.poll() is None:
        time.sleep(0.1)
    assert trainer.stop() == 0, trainer.lines
    return trainer
