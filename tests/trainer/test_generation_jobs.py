"""Jobs that train a student that writes: from a lake to a version that the server's own runtime answers with."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from server.config import Config
from server.errors import Cancelled, FailedPrecondition, InvalidArgument, TooLittleData
from server.quality.model import QualityModel
from server.registry.registry import Registry
from server.routing.skills import Skill, read_skill
from server.runtime.lora.repository import ADAPTERS
from server.runtime.references import read_reference
from server.runtime.repository import Repository
from tests.trainer.generation_bases import ANSWERS, BASE, add_base, fill, job, site, texts, write_base
from trainer.context import JobContext
from trainer.curate.rows import Row, is_held_out
from trainer.generation import export, proof, tune
from trainer.generation.base import load_torch, open_base
from trainer.generation.dataset import rows_of_job
from trainer.generation.material import Material, Opinion, Pair, gather
from trainer.generation.prefer import prefer
from trainer.generation.prompts import Prompts
from trainer.generation.recipe import Recipe, recipe_for
from trainer.generation.served import ServedStudent
from trainer.generation.student import make_student, trained
from trainer.generation.trials import searched
from trainer.generation.tune import fine_tune
from trainer.train import train

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Tiny products gain nothing by threads, and lose much where other work runs beside them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def odds_of(pieces: Sequence[str], place: int, other: str) -> str:
    """What a teacher tells that would have written `other` at `place` three times in ten."""
    tables = [{piece: 0.98} if index != place else {piece: 0.7, other: 0.3} for index, piece in enumerate(pieces)]
    return json.dumps([[p, math.log(t[p]), [[x, math.log(v)] for x, v in t.items()]] for p, t in zip(pieces, tables, strict=True)])


def test_a_student_learns_the_odds_that_its_teacher_told(bases: Path, tmp_path: Path) -> None:
    config = place(bases, tmp_path)
    skill = read_skill("kind", config.skills["kind"])
    prompts = Prompts(skill, Repository(Path(config.models.path)).open(BASE))
    pieces = {answer: prompts.pieces(prompts.answer(answer)) for answer in ANSWERS.values()}
    card, rain = pieces.values()
    where = next(index for index, (one, other) in enumerate(zip(card, rain, strict=False)) if one != other)
    told = {answer: odds_of(own, where, (rain if own is card else card)[where]) for answer, own in pieces.items()}
    material = gather([replace(one, teacher_tokens=told[one.answer]) for one in rows(400)], prompts, skill.max_tokens)
    doubts = {}
    for distil, epochs in ((0.0, 10.0), (1.0, 20.0)):
        context = job(config, tmp_path / f"jobs-{distil}")
        recipe = replace(recipe_for("full", 48, len(material.train), 16, {"epochs": epochs}), distil=distil)
        student = make_student(load_torch(open_base(config, "kind", context.folder)), recipe)
        fine_tune(student, material.train, material.watched, recipe, context)
        found = []
        for one in material.train[:80]:
            other = prompts.vocabulary()[(rain if one.row.answer == ANSWERS["card"] else card)[where]]
            with torch.no_grad():
                logits = student(input_ids=torch.tensor([[*one.prompt, *one.answer[:where]]])).logits[0, -1]
            found.append(float(torch.softmax(logits, -1)[other]))
        doubts[distil] = float(np.mean(found))
    assert doubts[0.0] < 0.1 and 0.2 < doubts[1.0] < 0.4, doubts


def test_teachers_odds_come_from_the_lake(bases: Path, tmp_path: Path) -> None:
    config = place(bases, tmp_path)
    prompts = Prompts(read_skill("kind", config.skills["kind"]), Repository(Path(config.models.path)).open(BASE))
    told = odds_of(prompts.pieces(prompts.answer(ANSWERS["card"])), -1, "")
    asked = texts(300)
    fill(tmp_path / "lake", asked, teacher_tokens=told)
    report = train(config, "kind", job(config, tmp_path / "jobs"), {"method": "lora", "epochs": 0.2})
    usable = sum(answer == ANSWERS["card"] and not is_held_out(text) for text, answer in asked)
    assert 0 < report.details["teacher's odds"]["rows"] <= usable, "of other answers the tokens are others"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`models` with the tiny base, and its `checkpoint`."""
    folder = tmp_path_factory.mktemp("bases")
    write_base(folder / "checkpoint")
    add_base(folder / "models", folder / "checkpoint")
    return folder


def place(bases: Path, folder: Path, **skill: object) -> Config:
    shutil.copytree(bases / "models", folder / "models")
    return site(folder, folder / "models", bases / "checkpoint", **skill)


def rows(count: int, seed: int = 0) -> list[Row]:
    return [Row(f"id{i}", text, "", is_held_out(text), answer=answer) for i, (text, answer) in enumerate(texts(count, seed))]


def material_of(config: Config, count: int = 80) -> tuple[Skill, Material]:
    skill = read_skill("kind", config.skills["kind"])
    return skill, gather(rows(count), Prompts(skill, Repository(Path(config.models.path)).open(BASE)), skill.max_tokens)


def test_a_job_publishes_what_answers_better_than_before(bases: Path, tmp_path: Path) -> None:
    config = place(bases, tmp_path)
    ids = fill(tmp_path / "lake", texts(330))
    curves: list[tuple[str, int, float]] = []
    context = job(config, tmp_path / "jobs", metric=lambda *point: curves.append(point))
    report = train(config, "kind", context, {"method": "lora", "epochs": 6.0})
    assert (report.state, report.version, report.reason, report.method) == ("succeeded", "1", "", "lora")
    assert report.metrics["exact_match"] > 0.8
    assert report.metrics["parity_max_error"] <= proof.EXACT
    assert report.present_accuracy is not None
    assert report.present_accuracy < 0.2
    card = Path(report.card).read_text(encoding="utf-8")
    assert "pipeline_tag" in card and "exact_match" in card
    losses = [value for name, _, value in curves if name == "fine-tune/train/loss"]
    assert losses[-1] < losses[0] / 5
    reference = read_reference(tmp_path / "models" / "adapters" / "kind" / "1")
    assert (reference.kind, reference.target.shown) == ("decoder-adapter", f"{BASE}@1/kind@1")
    assert QualityModel.from_json(reference.quality).calibrated
    folder = tmp_path / "models" / ADAPTERS / BASE / "kind" / "1"
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "adapter.safetensors", "adapter.onnx_adapter"}
    registry = Registry(config.registry)
    (adapter,) = registry.adapters("kind")
    assert (adapter.version, adapter.kind, adapter.job_id) == ("1", "decoder-adapter", context.job)
    assert [one.version for one in registry.adapters_with(ids[0])] == ["1"]
    registry.close()
    again = train(config, "kind", job(config, tmp_path / "jobs"), {"method": "lora", "epochs": 6.0})
    assert (again.state, "same rows" in again.reason) == ("rejected", True)


def test_a_student_that_learnt_nothing_is_not_published(bases: Path, tmp_path: Path) -> None:
    config = place(bases, tmp_path)
    fill(tmp_path / "lake", texts(300))
    report = train(config, "kind", job(config, tmp_path / "jobs"), {"method": "lora", "epochs": 0.1, "rate": 1e-6})
    assert report.state == "rejected"
    assert "reach the bar" in report.reason
    assert not (tmp_path / "models" / "adapters" / "kind").exists()
    assert not (tmp_path / "models" / ADAPTERS / BASE).exists()


async def test_every_method_serves_what_it_trained(bases: Path, tmp_path: Path) -> None:
    config = place(bases, tmp_path)
    base = open_base(config, "kind", tmp_path / "scratch")
    for method in ("lora", "full", "prefix", "prompt"):
        recipe = Recipe(method, rank=4, positions=6, rate=5e-3, epochs=2.0)
        _, material = material_of(config)
        student = make_student(load_torch(base), recipe)
        fine_tune(student, material.train, material.watched, recipe, JobContext("job", tmp_path / "job"))
        made = export.draft(student, base, "kind", recipe, tmp_path / method, ["where is my card"])
        served = await ServedStudent.of(config, made)
        prompts = [one.prompt for one in material.held_out[:6]]
        found = await proof.parity(served, student, prompts, 12, exact=True)
        untrained = await proof.parity(served, load_torch(base), prompts, 12, exact=True)
        await served.close()
        assert (found.reason, found.tokens > 40) == ("", True), method
        assert untrained.reason, method
        target = export.publish(made, base, "kind", tmp_path / "published")
        assert (target.adapter, target.model) == (("", "kind-student") if method == "full" else ("kind", BASE))


class Died(BaseException):
    """As far as a test's process can die."""


@pytest.mark.parametrize("apart", [1, 3])
def test_a_killed_training_ends_as_if_nothing_had_been(bases: Path, tmp_path: Path, apart: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points of a curve that are `apart` steps from each other are means over those: half of one must not be lost."""
    arguments = tune.arguments
    monkeypatch.setattr(tune, "arguments", lambda *given, **more: arguments(*given, **more, logging_steps=apart))
    config = place(bases, tmp_path)
    base = open_base(config, "kind", tmp_path / "scratch")
    _, material = material_of(config)
    recipe = Recipe("lora", rank=4, rate=5e-3, epochs=6.0, batch=8, micro=4, seed=3)

    def run(folder: Path, die_at: int, checkpoint_s: float) -> tuple[dict[tuple[str, int], float], dict[str, Any]]:
        curves: dict[tuple[str, int], float] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if done == die_at:
                raise Died

        context = JobContext("job", folder, checkpoint_s=checkpoint_s, progress=progress)
        context.metric = lambda name, step, value: curves.__setitem__((name, step), value)
        student = make_student(load_torch(base), recipe)
        with suppress(Died):
            fine_tune(student, material.train, material.watched, recipe, context)
        return curves, {name: value.detach().clone() for name, value in trained(student).items()}

    whole, weights = run(tmp_path / "whole", 0, 1e9)
    last = max(step for _, step in whole)
    die = random.randrange(4, last - 4)
    die += apart > 1 and die % apart == 1  # the step before is no point
    before, _ = run(tmp_path / "killed", die, 0.0)
    checkpoints = tmp_path / "killed" / "lora" / "checkpoints"
    (checkpoints / f"checkpoint-{last}").mkdir()  # one that was being written
    after, resumed = run(tmp_path / "killed", 0, 1e9)
    assert min(step for _, step in after) >= die - apart, "it went on, and did not begin again"
    assert before | after == whole
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_preferences_move_a_student_towards_what_people_said(bases: Path, tmp_path: Path) -> None:
    config = place(bases, tmp_path)
    base = open_base(config, "kind", tmp_path / "scratch")
    skill, material = material_of(config)
    prompts = Prompts(skill, base.files)
    good, bad = prompts.answer("card"), prompts.answer("weather")
    asked = [one.prompt for one in material.train[:32]]
    assert base.files.tokenizer is not None

    def margin(student: Any) -> float:
        def likelihood(prompt: list[int], answer: list[int]) -> float:
            with torch.no_grad():
                odds = torch.log_softmax(student(torch.tensor([[*prompt, *answer]])).logits[0], -1)
            return float(sum(odds[len(prompt) - 1 + place, token] for place, token in enumerate(answer)))

        return float(np.mean([likelihood(prompt, good) - likelihood(prompt, bad) for prompt in asked[:8]]))

    for preference, method in (("dpo", "lora"), ("kto", "full")):
        said = Material(watched=material.watched)
        if preference == "dpo":
            said.pairs = [Pair(prompt, good, bad) for prompt in asked]
        else:
            said.opinions = [Opinion(prompt, good if i % 2 else bad, bool(i % 2)) for i, prompt in enumerate(asked)]
        recipe = Recipe(method, rank=4, rate=5e-2 if method == "lora" else 1e-2, batch=8, micro=8, preference=preference)
        student = make_student(load_torch(base), recipe)
        before = margin(student)
        told = prefer(student, said, recipe, JobContext("job", tmp_path / preference), base.files.tokenizer)
        assert told.steps == 8
        assert margin(student) > before + 0.5, preference
        assert set(trained(student)) == set(trained(make_student(load_torch(base), recipe)))


def test_rows_of_a_job_stay_those_of_its_first_attempt(bases: Path, tmp_path: Path) -> None:
    config = place(bases, tmp_path)
    fill(tmp_path / "lake", texts(20))
    context = job(config, tmp_path / "jobs")
    registry = Registry(config.registry)
    first = rows_of_job(config, "kind", context, registry)
    fill(tmp_path / "lake", [("you are the user", ""), ("is it a new card", '{"kind": "card"}')])
    assert [row.interaction_id for row in rows_of_job(config, "kind", context, registry).rows] == [row.interaction_id for row in first.rows]
    kept = (context.folder / "dataset.json").read_text()
    assert not any(row.text in kept for row in first.rows), "texts are in the lake alone"
    (context.folder / "lora").mkdir()
    table = json.loads(kept)
    (context.folder / "dataset.json").write_text(json.dumps({**table, "digest": "of rows that were erased since"}))
    assert len(rows_of_job(config, "kind", context, registry).rows) == len(first.rows) + 1
    assert not (context.folder / "lora").exists()
    registry.close()


def test_what_cannot_be_trained_says_how_to_mend_it(bases: Path, tmp_path: Path, small_models: Path) -> None:
    config = place(bases, tmp_path)
    fill(tmp_path / "lake", texts(40))
    with pytest.raises(TooLittleData, match="60 are needed") as little:
        train(config, "kind", job(config, tmp_path / "jobs"), {})
    assert (little.value.metadata["rows"], little.value.metadata["minimum"]) == ("40", "60")
    with pytest.raises(InvalidArgument, match="expected auto, lora, full, prefix, prompt"):
        train(config, "kind", job(config, tmp_path / "jobs"), {"method": "qlora"})
    with pytest.raises(InvalidArgument, match=r"adapter_rank 16.*Lower it"):
        fill(tmp_path / "lake", texts(300, seed=5))
        train(config, "kind", job(config, tmp_path / "jobs"), {"method": "lora", "rank": 17})
    cancelled = job(config, tmp_path / "jobs")
    cancelled.is_cancelled = lambda: True
    with pytest.raises(Cancelled):
        train(config, "kind", cancelled, {})
    shutil.copytree(small_models / "embedder", tmp_path / "models" / "embedder")

    def refused(kind: type[Exception], words: str, checkpoint: Path, **skill: object) -> None:
        other = site(tmp_path, tmp_path / "models", checkpoint, **skill)
        with pytest.raises(kind, match=words):
            load_torch(open_base(other, "kind", tmp_path / "scratch"))

    checkpoint = bases / "checkpoint"
    refused(InvalidArgument, r"student_model is 'embedder'.*writes no text.*tiny", checkpoint, student_model="embedder")
    refused(InvalidArgument, r"student_model is 'nobody'.*tiny", checkpoint, student_model="nobody")
    refused(FailedPrecondition, r"training\.sources\.tiny", tmp_path / "nothing")
    write_base(tmp_path / "deeper", layers=3)
    refused(FailedPrecondition, r"have layers 3; the served base tiny@1 has 2.*training\.sources\.tiny", tmp_path / "deeper")


async def test_weights_of_another_base_are_found_out_before_anything_is_published(bases: Path, tmp_path: Path) -> None:
    shutil.copytree(bases / "models", tmp_path / "models")
    write_base(tmp_path / "twin", seed=1)
    config = site(tmp_path, tmp_path / "models", tmp_path / "twin")
    fill(tmp_path / "lake", texts(300))
    from trainer.generation.run import same_weights

    base = open_base(config, "kind", tmp_path / "scratch")
    _, material = material_of(config)
    prompts = [one.prompt for one in material.held_out[:4]]
    with pytest.raises(FailedPrecondition, match="not those of the served base"):
        await same_weights(config, base, load_torch(base), prompts)
    good = site(tmp_path, tmp_path / "models", bases / "checkpoint")
    right = open_base(good, "kind", tmp_path / "scratch")
    await same_weights(good, right, load_torch(right), prompts)


def test_a_search_keeps_what_its_trials_found_better(bases: Path, tmp_path: Path) -> None:
    config = place(bases, tmp_path, method="lora")
    fill(tmp_path / "lake", texts(330))
    curves: dict[str, dict[int, float]] = {}
    context = job(config, tmp_path / "jobs", metric=lambda name, step, value: curves.setdefault(name, {}).__setitem__(step, value))
    report = train(config, "kind", context, {"search": True, "trials": 4, "rate": 1e-4, "epochs": 2.0})
    storage = JournalStorage(JournalFileBackend(str(context.folder / "lora" / "search.log")))
    study = optuna.load_study(study_name="search", storage=storage)
    assert list(curves["search/value"].values()) == [trial.value for trial in study.trials] and len(study.trials) == 4
    assert study.trials[0].params["rate"] == 1e-4, "the recipe is the first"
    parameters = report.tried[0]["parameters"]
    assert {name: parameters[name] for name in ("rate", "epochs", "rank")} == study.best_params
    assert 1e-4 / 6 <= parameters["rate"] <= 6e-4 and 1.0 <= parameters["epochs"] <= 2.0
    assert parameters["rank"] <= config.generation.adapter_rank
    assert any(name.startswith("lora-trial-3/") for name in curves) and not list(context.folder.glob("lora-trial-*"))
    assert report.seconds["search lora"] > 0


def test_without_watched_rows_nothing_is_searched(bases: Path, tmp_path: Path) -> None:
    config = place(bases, tmp_path)
    _, material = material_of(config)
    said: list[str] = []
    recipe = Recipe("lora", rank=4)
    context = JobContext("a", tmp_path / "job", log=said.append)
    base = open_base(config, "kind", tmp_path / "job")
    assert searched(base, recipe, replace(material, watched=[]), context, {}, 16, 0.0) == recipe
    assert said and "no search" in said[0]
