"""Encoders trained in torch, as small as the real ones are large: the loop and its resumption, the file that serves, the ladder."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the trainer's extra is not installed")

import torch

from server.config import Config, load_config
from server.errors import Cancelled, FailedPrecondition, InvalidArgument
from server.registry.registry import Registry
from server.runtime.heads import LinearHead
from server.runtime.repository import Repository
from tests.trainer.trainer_process import make_site
from tests.trainer_lake import fill, texts
from trainer.classify import export, losses
from trainer.classify.batches import TokenTable, epoch_batches
from trainer.classify.encoder import open_student, save_encoder, start_head
from trainer.classify.loop import Rows, Training
from trainer.classify.recipe import Recipe
from trainer.classify.source import find_source
from trainer.context import JobContext
from trainer.report import Report
from trainer.serving import ServedBase
from trainer.train import train

LABELS = ["card", "password", "transfer"]
RECIPE = Recipe(epochs=3, batch=16, lr=2e-3, validated=0.0)


@pytest.fixture
def site(tmp_path: Path, small_models: Path) -> Path:
    return make_site(tmp_path, small_models)


def config(site: Path) -> Config:
    return load_config(site / "understudy.toml", environ={})


def run(site: Path, **spec: object) -> Report:
    registry = Registry(config(site).registry)
    job = registry.start_job("intent", "train")
    try:
        return train(config(site), "intent", JobContext(job, site / "jobs" / job), spec)
    finally:
        registry.close()


def rows(site: Path, count: int = 96) -> Rows:
    found = texts(count, 1)
    source = find_source(config(site), "embedder")
    tokens = TokenTable(source.tokenizer, [text for text, _ in found], 32)
    classes = np.array([LABELS.index(label) for _, label in found])
    return Rows(tokens, classes, np.ones(count, np.float32), np.arange(count - 16), np.arange(count - 16, count))


def trained(site: Path, context: JobContext, recipe: Recipe = RECIPE) -> list[torch.Tensor]:
    """The parameters after a training, or after what was left of it."""
    data = rows(site)
    student = open_student(find_source(config(site), "embedder"), len(LABELS), recipe)
    start_head(student, student.embed(data.tokens, data.trained), data.classes[data.trained])
    Training(student, data, recipe, context, "student").run()
    return [parameter.detach().clone() for parameter in student.parameters()]


def test_a_killed_training_ends_with_the_same_curve_and_the_same_bits(site: Path) -> None:
    curve: dict[str, dict[int, float]] = {}

    def keep(run: str) -> Callable[[str, int, float], None]:
        return lambda name, step, value: curve.setdefault(run, {}).__setitem__(step, value) if name == "student/loss" else None

    whole = trained(site, JobContext("a", site / "whole", checkpoint_s=0.0, metric=keep("whole")))
    for kill in (3, 7, 11):  # within an epoch, in the next, and in the last
        folder = site / f"killed-{kill}"
        seen = 0

        def dies(kill: int = kill) -> bool:
            nonlocal seen
            seen += 1
            return seen > kill

        with pytest.raises(Cancelled):
            trained(site, JobContext("b", folder, checkpoint_s=0.0, metric=keep(f"{kill}"), is_cancelled=dies))
        assert max(curve[f"{kill}"]) == kill
        again = trained(site, JobContext("b", folder, checkpoint_s=0.0, metric=keep(f"{kill}")))
        assert curve[f"{kill}"] == curve["whole"]
        assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


def test_a_checkpoint_of_another_recipe_is_left_alone(site: Path) -> None:
    context = JobContext("a", site / "job", checkpoint_s=0.0)
    first = trained(site, context)
    other = trained(site, context, replace(RECIPE, seed=1))
    assert not all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_a_budget_that_is_spent_ends_a_training_after_the_epoch(site: Path) -> None:
    said: list[str] = []
    trained(site, JobContext("a", site / "job", deadline=0.0, log=said.append))
    assert said == ["student: the budget is spent after 1 of 3 epochs"]


def test_every_row_comes_once_an_epoch_and_pairs_come_together() -> None:
    classes = np.repeat(np.arange(6), 11)
    lengths = np.arange(66) % 7
    for views in (1, 2):
        batches = epoch_batches(lengths, classes, size=8, views=views, seed=(0, 0))
        assert sorted(np.concatenate(batches)) == list(range(66)) and max(map(len, batches)) == 8
    alone = sum((classes[batch] == label).sum() == 1 for batch in batches for label in set(classes[batch]))
    assert alone <= 6 + len(batches), "of each class one row is left over, and a batch may end within a group"
    assert [list(b) for b in batches] != [list(b) for b in epoch_batches(lengths, classes, size=8, views=2, seed=(0, 1))]


def test_the_contrastive_loss_is_the_formula() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)
    classes = torch.tensor([0, 0, 1, 1, 2])
    similar = (vectors @ vectors.T / 0.1).exp()
    wanted = []
    for i, j in ((0, 1), (1, 0), (2, 3), (3, 2)):
        wanted.append(-torch.log(similar[i, j] / (similar[i].sum() - similar[i, i])))
    loss = losses.supervised_contrastive(vectors, classes, torch.ones(5), 0.1)
    assert torch.allclose(loss, torch.stack(wanted).mean(), atol=1e-5)
    assert losses.supervised_contrastive(vectors, torch.arange(5), torch.ones(5), 0.1) == 0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_file_that_serves_is_the_student_that_was_trained(site: Path, method: str) -> None:
    recipe = replace(RECIPE, method=method, epochs=1, rank=4)
    source = find_source(config(site), "embedder")
    data = rows(site)
    student = open_student(source, len(LABELS), recipe)
    start_head(student, student.embed(data.tokens, data.trained), data.classes[data.trained])
    before = student.embed(data.tokens, data.validated)
    context = JobContext("a", site / "job")
    Training(student, data, recipe, context, "student").run()
    save_encoder(student, source, site / "encoder")
    vectors = student.embed(data.tokens, data.validated)
    assert np.abs(vectors - before).max() > 1e-3, "it learned"
    found = [text for text, _ in texts(96, 1)]
    draft = export.write_draft(site / "encoder", source, site / "drafts", "intent-encoder", found, "float32", context)
    assert draft.manifest.source is not None and draft.manifest.source.id == "embedder@1"

    async def serve() -> np.ndarray:
        base = await ServedBase.open(config(site), "intent-encoder", root=site / "drafts")
        try:
            return (await base.embed([found[row] for row in data.validated], lambda done, total: None))[0]
        finally:
            await base.close()

    parity = export.compare(vectors, asyncio.run(serve()), *student.linear())
    assert parity.passed and parity.different == 0 and parity.cosine_min > 0.9999
    assert not export.compare(vectors, vectors[::-1].copy(), *student.linear()).passed


def test_a_job_publishes_the_encoder_first_and_its_head_on_it(site: Path) -> None:
    fill(site / "lake", texts(400, 1))
    report = run(site, method="lora")
    assert (report.state, report.method, report.model) == ("succeeded", "lora", "intent-encoder@1"), report.reason
    head = LinearHead.load(site / "models" / "adapters" / "intent" / "1", base_sha256=None)
    encoder = Repository(site / "models").manifest("intent-encoder", "1")
    assert (head.manifest.base.name, head.manifest.base.version) == ("intent-encoder", "1")
    assert head.manifest.base.sha256 == encoder.files["model.onnx"].sha256
    assert report.metrics["parity_agreement"] == 1.0 and head.manifest.lineage["method"] == "lora"
    registry = Registry(config(site).registry)
    assert [(made.name, made.version) for made in registry.models(skill="intent")] == [("intent-encoder", "1")]
    assert registry.adapters("intent")[0].kind == "lora"
    registry.close()

    better = run(site, method="full")
    assert better.present_version == "1" and better.present_accuracy is not None and "paired" in better.details


def test_a_search_begins_with_the_recipe_and_what_it_finds_is_trained(site: Path) -> None:
    fill(site / "lake", texts(400, 1))
    report = run(site, method="full", search=True, trials=1)
    assert report.parameters["lr"] == 1e-4 or report.parameters["lr"] == 2e-4, "one trial alone is the recipe"
    assert "search" in report.seconds and not list((site / "jobs" / report.job).glob("full-trial*"))


def test_the_ladder_stops_at_the_cheapest_that_reaches_the_bar(site: Path) -> None:
    fill(site / "lake", texts(400, 1))
    with (site / "understudy.toml").open("a") as file:
        file.write("deliver_bar = 0.5\nsecond_try_bar = 0.4\n")
    easy = run(site)
    assert easy.method == "linear-head" and [entry["method"] for entry in easy.tried] == ["linear-head"] and easy.tried[0]["reaches"]


def test_where_no_student_reaches_the_bar_all_were_tried_and_it_says_so(site: Path) -> None:
    rng = random.Random(3)
    noisy = [(text, label if rng.random() < 0.6 else rng.choice(LABELS)) for text, label in texts(400, 1)]
    fill(site / "lake", noisy)
    report = run(site)
    assert [entry["method"] for entry in report.tried] == ["linear-head", "lora", "full"]
    assert not any(entry["reaches"] for entry in report.tried)


def test_what_cannot_be_trained_says_what_would_help(site: Path) -> None:
    fill(site / "lake", texts(400, 1))
    with pytest.raises(InvalidArgument, match="Allowed: auto, linear-head, lora, full"):
        run(site, method="prefix")
    (site / "understudy.toml").write_text((site / "understudy.toml").read_text().replace("embedder = ", "other = "))
    with pytest.raises(FailedPrecondition, match=r"training\.sources\.embedder"):
        run(site, method="full")
