"""Assessment: a skill's quality and difficulty from what people and teachers said, published only where they are better."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from server.config import Config, load_config
from server.errors import SkillNotFound
from server.lake import table
from server.lake.ids import IdKey
from server.lake.log import Log
from server.lake.schema import FEEDBACK, INTERACTIONS, SHADOWS
from server.registry.jobs import JobStore
from server.registry.registry import Registry
from server.routing.difficulty_book import DifficultyBook
from server.routing.judge import QualityBook
from tests.trainer.trainer_process import make_site
from trainer.assess import assess, in_words
from trainer.assessment.evidence import Saying, judge
from trainer.assessment.figures import Figures, split_by_time, why_not
from trainer.assessment.student_part import check
from trainer.context import JobContext
from trainer.report import Report

ROOT = Path(__file__).resolve().parents[2]
START = datetime(2026, 11, 1, tzinfo=UTC)
EASY = ["card", "lost", "pin", "change", "top", "up", "balance", "limit"]
HARD = ["dispute", "chargeback", "arbitration", "escrow", "lien", "custody", "probate", "annuity"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the trainer's own process: threads of small products spin against each other, and take thirty times as long."""
    with threadpool_limits(1):
        yield


@pytest.fixture
def config(tmp_path: Path, small_models: Path) -> Config:
    reply = '[skills.reply]\ntask = "text-generation"\nteacher = "vendor/big"'
    site = make_site(tmp_path, small_models, labels=["yes", "no"], more=reply)
    return load_config(site / "understudy.toml", environ={})


def fill(config: Config, name: str, rows: list[dict[str, Any]]) -> None:
    path = Path(config.lake.path)
    path.mkdir(parents=True, exist_ok=True)
    log = Log(table.log_folder(path, name))
    for row in rows:
        row.setdefault("time_ns", time.time_ns())
    log.append(rows)
    log.close()
    table.convert(path, name)


def when(number: int) -> int:
    return int((START + timedelta(minutes=number)).timestamp()) * 1_000_000_000


def run(config: Config, skill: str) -> Report:
    lines: list[str] = []
    report = assess(config, skill, JobContext("job", Path(config.lake.path).parent / "job", log=lines.append), {})
    assert "\n".join(lines) == in_words(report)
    return report


def labelled(config: Config, count: int, fails: Any, *, quality: float = 0.9, shadow: bool = False, seed: int = 1) -> None:
    """Answers of student 3 beside the teacher's; `fails(hard, rng)` says whether the student errs."""
    rng = random.Random(seed)
    path = Path(config.lake.path)
    path.mkdir(parents=True, exist_ok=True)
    ids = IdKey.open(path / "id.key")
    rows, later = [], []
    for n in range(count):
        hard = rng.random() < 0.4
        words = [rng.choice(HARD if hard else EASY) for _ in range(3)] + [rng.choice(EASY + HARD), f"{chr(97 + n % 26)}{chr(97 + n // 26)}"]
        gold = rng.choice(["yes", "no"])
        said = {"yes": "no", "no": "yes"}[gold] if fails(hard, rng) else gold
        key = ids.new()
        row = {
            "interaction_id": key, "time_ns": when(n), "skill": "intent", "task": "text-classification", "input_kind": "text",
            "input": " ".join(words), "student": "intent", "student_version": "3", "student_label": said, "student_quality": quality,
            "local": shadow, "labels": [said if shadow else gold], "training_allowed": True,
        }  # fmt: skip
        if shadow:
            later.append({"interaction_id": key, "time_ns": when(n), "skill": "intent", "role": "teacher", "label": gold})
        rows.append(row if shadow else {**row, "teacher_label": gold})
    fill(config, INTERACTIONS, rows)
    if later:
        fill(config, SHADOWS, later)


@pytest.mark.parametrize("shadow", [False, True])
def test_difficulty_is_learned_from_comparisons_and_served(config: Config, shadow: bool) -> None:
    labelled(config, 900, lambda hard, rng: rng.random() < (0.8 if hard else 0.05), shadow=shadow)
    report = run(config, "intent")
    part = report.details["difficulty"]
    assert (report.state, part["state"], part["version"], part["present_version"]) == ("succeeded", "published", "1", "")
    assert part["after"]["brier"] < part["before"]["brier"] - 0.05 and part["after"]["auroc"] > 0.75
    assert report.details["quality"]["state"] == "skipped"

    book = DifficultyBook(Path(config.models.path) / "adapters")
    book.refresh()
    model = book.current("intent")
    assert model is not None and model.spec.base is not None and model.spec.base.name == "embedder"
    easy, hard = (float(model.scores([text])[0][0]) for text in ("lost card change pin", "escrow lien custody probate"))
    assert easy < 0.3 < 0.5 < hard

    # The same again is not better, and what is there stays.
    again = run(config, "intent").details["difficulty"]
    assert again["state"] == "kept" and again["present_version"] == "1"
    assert [path.name for path in (Path(config.models.path) / "adapters" / "intent" / "difficulty").iterdir()] == ["1"]


def test_what_cannot_be_told_is_not_published(config: Config) -> None:
    labelled(config, 500, lambda hard, rng: rng.random() < 0.28)  # the prior's own guess of such texts, and nothing to tell them apart
    part = run(config, "intent").details["difficulty"]
    assert part["state"] == "kept" or part["after"]["brier"] < part["before"]["brier"]
    labelled(config, 500, lambda hard, rng: rng.random() < 0.5, seed=2)
    for _ in range(2):
        part = run(config, "intent").details["difficulty"]
    assert part["state"] == "kept" and part["reason"]


def test_a_student_that_promises_too_much_is_told(config: Config) -> None:
    labelled(config, 300, lambda hard, rng: rng.random() < 0.3, quality=0.95)
    report = run(config, "intent")
    student = report.details["student"]
    assert student["state"] == "drifted" and student["version"] == "intent@3" and "promised 95.0%" in student["reason"]
    assert report.reason.startswith("the student's calibration has drifted")


def test_a_student_that_keeps_its_word_holds(config: Config) -> None:
    labelled(config, 400, lambda hard, rng: rng.random() < 0.1, quality=0.9)
    student = run(config, "intent").details["student"]
    assert student["state"] == "holds" and student["rows"] == 400 and student["kept"] == pytest.approx(0.9, abs=0.05)


def written(config: Config, count: int, seed: int = 3) -> None:
    """Answers of words with people's thumbs: those that apologise are disliked."""
    rng = random.Random(seed)
    path = Path(config.lake.path)
    path.mkdir(parents=True, exist_ok=True)
    ids = IdKey.open(path / "id.key")
    rows, said = [], []
    for n in range(count):
        bad = rng.random() < 0.4
        words = " ".join(rng.choice(EASY) for _ in range(4))
        answer = f"I am sorry, I cannot help with {words}." if bad else f"Open the app and choose {words}; that settles it."
        key = ids.new()
        rows.append({
            "interaction_id": key, "time_ns": when(n), "skill": "reply", "task": "text-generation", "input_kind": "text",
            "input": f"how {words} {n}", "local": n % 2 == 0, "output_text": answer, "finish_reason": "stop",
        })  # fmt: skip
        kind = "down" if bad != (rng.random() < 0.05) else "up"
        said.append({"feedback_id": ids.new(), "interaction_id": key, "time_ns": when(n), "thumb": kind})
    fill(config, INTERACTIONS, rows)
    fill(config, FEEDBACK, said)


def test_quality_is_recalibrated_from_feedback_and_served(config: Config) -> None:
    written(config, 700)
    report = run(config, "reply")
    part = report.details["quality"]
    assert part["state"] == "published" and part["rows"] == 700
    assert part["after"]["brier"] < 0.12 < part["before"]["brier"] and part["after"]["auroc"] > 0.9
    model, own = QualityBook(Path(config.models.path) / "adapters").of("reply")
    assert own and model.calibrated
    file = Path(config.models.path) / "adapters" / "reply" / "quality.json"
    before = file.read_bytes()
    assert run(config, "reply").details["quality"]["state"] == "kept" and file.read_bytes() == before


def test_little_data_is_a_reason_and_no_error(config: Config) -> None:
    report = run(config, "intent")
    assert report.state == "rejected" and "0 later texts are judged" in report.reason
    labelled(config, 40, lambda hard, rng: False)
    assert run(config, "intent").state == "rejected"
    with pytest.raises(SkillNotFound):
        run(config, "other")


def said(**more: Any) -> Saying:
    base: dict[str, Any] = {
        "id": "i", "time": START, "prompt": "p", "local": False, "student": "", "teacher": "", "correction": "", "opinion": None,
        "quality": None, "version": "", "finish": "",
    }  # fmt: skip
    return Saying(**{**base, **more})


def test_people_come_before_teachers() -> None:
    (one,) = judge([said(student="yes", teacher="no")], {})
    assert (one.ok, one.by, one.strong_ok) == (False, "teacher", None)
    one, two = judge([said(student="yes", teacher="no", correction="yes")], {})
    assert (one.ok, one.by, one.strong_ok, two.student, two.ok) == (True, "person", False, False, False)
    (one,) = judge([said(student="yes", local=True, opinion=False)], {})
    assert (one.ok, one.by) == (False, "person")
    # The thumb was of what was delivered, which was the teacher's.
    one, two = judge([said(student="yes", teacher="yes", opinion=False)], {})
    assert (one.ok, one.by, one.strong_ok) == (True, "teacher", False) and not two.ok
    assert judge([said(student="yes")], {}) == []
    long = "This is an answer of quite a few more words than a label would ever have"
    assert judge([said(student=long, teacher=long + " indeed")], {}) == []
    vectors = {long: np.ones(4, np.float32), long + " indeed": np.ones(4, np.float32)}
    assert judge([said(student=long, teacher=long + " indeed")], vectors)[0].ok


def test_later_rows_are_news() -> None:
    times = [START + timedelta(hours=n) for n in range(8)]
    held = split_by_time(times, np.array([0, 1, 2, 3, 4, 5, 0, 6]))
    assert held.tolist() == [False] * 7 + [True]  # the seventh repeats the first


@pytest.mark.parametrize(
    ("before", "after", "better"),
    [
        ((0.05, 0.20, 0.7), (0.05, 0.19, 0.7), True),
        ((0.05, 0.20, 0.7), (0.05, 0.20, 0.9), False),
        ((0.05, 0.20, 0.7), (0.08, 0.19, 0.7), False),
        ((0.05, 0.20, 0.7), (0.05, 0.19, 0.6), False),
        ((0.05, 0.20, None), (0.05, 0.19, None), True),
    ],
)
def test_better_means_all_three(before: tuple[float, float, float], after: tuple[float, float, float], better: bool) -> None:
    one, two = (Figures(100, 0.5, ece, brier, auroc) for ece, brier, auroc in (before, after))
    assert (why_not(one, two) == "") is better


def test_an_old_students_answers_say_nothing_of_the_new_one() -> None:
    sayings = [said(student="yes", teacher="no", quality=0.9, version="s@1") for _ in range(90)]
    sayings += [said(student="yes", teacher="yes", quality=0.97, version="s@2") for _ in range(60)]
    found = check(judge(sayings, {}), None)
    assert (found["version"], found["rows"], found["state"]) == ("s@2", 60, "holds")


def test_the_command_runs_it_as_a_job(config: Config) -> None:
    labelled(config, 200, lambda hard, rng: rng.random() < 0.1)
    folder = Path(config.lake.path).parent
    command = [sys.executable, "-m", "server.cli", "assess", "intent", "--config", str(folder / "understudy.toml"), "--json", "-"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (job,) = JobStore(Registry(config.registry)).find(skill="intent")
    assert (job.kind, job.state, job.id) == ("assess", "succeeded", report["job"]) and report["details"]["student"]["state"] == "holds"


def test_what_agrees_with_a_teacher_that_errs_is_promised_less() -> None:
    sayings = [said(student="yes", teacher="yes" if n % 10 else "no", quality=1.0, version="s@1") for n in range(200)]
    judged = judge(sayings, {})
    assert check(judged, 0.02)["state"] == "drifted" and check(judged, 0.02, teacher=0.9)["state"] == "holds"
