"""Bar `resumption`: trainers killed with -9 at random steps of real jobs, and what the jobs end with against undisturbed runs.

Each job is the whole of it: rows of a lake, curation, training, export, proof, publication, by `python -m trainer work`. Bases are small
and random, so that a run takes seconds; what is compared has no tolerance: every point of each curve, SHA-256 of each weight and graph.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import Row, part, row_of
from server.config import load_config
from server.registry.jobs import Job, JobStore
from server.registry.registry import Registry
from tests.trainer.trainer_process import TrainerProcess, artefacts, curve, files, finish, kill_at, make_site

BAR = "trainer killed at a random step: the job ends with the same loss curve (same seed) and artefact"
KILLS = 3
_ROWS = 600
_SENTENCES = 400  # a fifth is held out, and a student is measured on 50 at least


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of training. `make` fills a folder: configuration, repository, lake."""

    name: str
    skill: str
    spec: dict[str, Any]
    make: Callable[[Path], None]


def resumption() -> Row:
    parts = [_measure(case, random.Random(number)) for number, case in enumerate(_cases())]
    return row_of("resumption", BAR, parts)


def _cases() -> list[Case]:
    return [
        Case("encoder, full", "intent", {"method": "full", "seed": 1}, _classifying),
        Case("encoder, LoRA", "intent", {"method": "lora", "seed": 2}, _classifying),
        Case("LLaMA, LoRA SFT", "kind", {"method": "lora", "seed": 3}, _writing),
    ]


def _measure(case: Case, rng: random.Random) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="understudy-resumption-") as folder:
        new = Path(folder) / "site"
        case.make(new)
        before = files(new / "models")
        whole = _run(new, Path(folder), case, before, None)
        steps = sum(name.endswith("/loss") for name, _, _ in whole["curve"])
        if not steps:
            return part(case.name, "each ends as the undisturbed run", whole["state"], False, error=whole["error"])
        runs: list[dict[str, Any]] = []
        while len(runs) < KILLS:
            run = _run(new, Path(folder), case, before, rng.randint(2, max(3, steps - 2)))
            if run["killed_at"] is not None:
                runs.append(run)
    same = [run["curve"] == whole["curve"] and run["artefacts"] == whole["artefacts"] and run["state"] == whole["state"] for run in runs]
    measured = {
        "kills": len(runs),
        "same_curve": sum(run["curve"] == whole["curve"] for run in runs),
        "same_artefact": sum(run["artefacts"] == whole["artefacts"] for run in runs),
    }
    more = {"steps": steps, "killed_at": [run["killed_at"] for run in runs], "files": len(whole["artefacts"]), "state": whole["state"]}
    met = all(same) and steps > 0 and bool(whole["artefacts"])
    return part(case.name, "each ends as the undisturbed run", measured, met, **more, error=whole["error"])


def _run(new: Path, folder: Path, case: Case, before: set[Path], kill: int | None) -> dict[str, Any]:
    """One job from a new copy of the site, at the same place: paths are in the configuration."""
    place = folder / "run"
    shutil.rmtree(place, ignore_errors=True)
    new.rename(place)
    shutil.copytree(place, new)
    text = (place / "understudy.toml").read_text().replace(str(new), str(place))
    (place / "understudy.toml").write_text(text)
    registry = Registry(load_config(place / "understudy.toml", environ={}).registry)
    store = JobStore(registry)
    job = store.create(case.skill, "train", case.spec).id
    killed_at = None
    if kill is not None:
        points = place / "training" / job / "points.jsonl"
        if kill_at(TrainerProcess(place), points, kill, lambda: store.get(job).ended) and store.get(job).state == "running":
            killed_at = kill
    finish(place, store, job)
    found: Job = store.get(job)
    run = {"killed_at": killed_at, "curve": curve(store, job), "artefacts": artefacts(place / "models", before), "state": found.state}
    registry.close()
    return {**run, "error": found.error.message if found.error is not None else found.report.get("reason", "")}


def _classifying(folder: Path) -> None:
    from tests.small_models import build_repository
    from tests.trainer_lake import fill, texts

    with tempfile.TemporaryDirectory() as made:
        models = build_repository(Path(made)).root
        make_site(folder, models)
        source = folder / "checkpoint"
        shutil.copytree(models.parent / "checkpoints" / "embedder", source)
        toml = (folder / "understudy.toml").read_text().replace(str(models.parent / "checkpoints" / "embedder"), str(source))
        (folder / "understudy.toml").write_text(toml)
    fill(folder / "lake", texts(_ROWS, 1))


def _writing(folder: Path) -> None:
    from tests.trainer import generation_bases as bases

    folder.mkdir(parents=True)
    bases.write_base(folder / "checkpoint")
    bases.add_base(folder / "models", folder / "checkpoint")
    bases.site(folder, folder / "models", folder / "checkpoint")
    bases.fill(folder / "lake", bases.texts(_SENTENCES, 1))
