"""Measure `encoders`: students of entities and of embeddings, trained through the job's own code on recorded interactions of real data.

The interactions are written by this file as the server would record them: the teacher's answers are the data sets' gold labels, so what
is measured is the training and the export, not a teacher. Entities: WNUT17 (Derczynski et al. 2017), trained on its train and dev parts,
the served file judged on its test part. Embeddings: XQuAD's English questions and paragraphs (SQuAD), each held-out question against all
240 paragraphs, the tuned student beside the untrained base. Both are reported without a bar.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.harness import ROOT, SHARED, STARTER, Row, part, row_of
from server.config import Config, load_config
from server.lake import table
from server.lake.ids import IdKey
from server.lake.log import Log
from server.lake.schema import FEEDBACK, INTERACTIONS
from server.registry.registry import Registry
from server.runtime.references import read_reference
from trainer.context import JobContext
from trainer.encoders.examples import ENTITIES, Example
from trainer.encoders.judge import Judge
from trainer.encoders.serving import served_output
from trainer.report import Report
from trainer.train import train

ENCODERS = (
    "reported: WNUT17 entity F1 of the served int8 file and the torch model; XQuAD paragraph retrieval of the tuned student and the base"
)
_SETTINGS = """
[models]
path = {models}
[lake]
path = {lake}
[registry]
url = {registry}
[providers.vendor]
[skills.entities]
task = "token-classification"
teacher = "vendor/gold"
base = "all-minilm-l6-v2"
deliver_bar = 0.3
[skills.retrieval]
task = "feature-extraction"
teacher = "vendor/gold"
base = "all-minilm-l6-v2"
deliver_bar = 0.5
"""


def encoders() -> Row:
    for name in ("wnut17/wnut17train.conll", "xquad/xquad.en.json"):
        if not (SHARED / "data" / name).is_file():
            raise SystemExit(f"{SHARED / 'data'} has no {name}; put the data there, or set UNDERSTUDY_SHARED")
    return row_of("encoders", ENCODERS, [*entities(), *retrieval()])


def entities(spec: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """WNUT17. `spec`: of the job."""
    folder = SHARED / "data" / "wnut17"
    with _Workplace() as place:
        place.record("entities", [_answered(*one) for name in ("wnut17train", "emerging.dev") for one in _conll(folder / f"{name}.conll")])
        report = place.train("entities", spec or {"method": "full", "epochs": 5})
        if report.state != "succeeded":
            raise SystemExit(f"the student of WNUT17 was not published: {report.reason}")
        rows = [Example(str(n), text, spans=tuple(spans)) for n, (text, spans) in enumerate(_conll(folder / "emerging.test.annotated"))]
        judge = Judge(ENTITIES, rows)
        judged = judge.judge(place.ask("entities", judge))
    shown = {name: round(value, 4) for name, value in judged.figures.items()}
    held = report.metrics
    ends = [round(judged.quality.interval.low, 4), round(judged.quality.interval.high, 4)]
    return [
        part(
            "WNUT17 test, entity F1, served int8",
            "reported",
            round(judged.quality.value, 4),
            True,
            interval_95=ends,
            **shown,
            **_about(report),
        ),
        part("WNUT17 held out, entity F1, torch", "reported", round(held["torch/f1"], 4), True),
        part("WNUT17 held out, entity F1, served int8", "reported", round(held["f1"], 4), True, agreement=held["parity/agreement"]),
    ]


def retrieval(spec: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """XQuAD. `spec`: of the job."""
    articles = json.loads((SHARED / "data" / "xquad" / "xquad.en.json").read_text(encoding="utf-8"))["data"]
    pairs = [(qa["question"], one["context"]) for article in articles for one in article["paragraphs"] for qa in one["qas"]]
    with _Workplace() as place:
        inputs = [json.dumps({"text": question, "text_pair": context}, ensure_ascii=False) for question, context in pairs]
        place.record("retrieval", [{"input": one, "input_kind": "pair"} for one in inputs], thumb="up")
        report = place.train("retrieval", spec or {"method": "full", "epochs": 2, "batch": 32})
        held = report.metrics
        shown = {name: round(held[name], 4) for name in ("ndcg", "mrr")}
        found = [part("XQuAD held out, nDCG@10, base", "reported", round(held["present_ndcg"], 4), True)]
        ends = [round(held["difference_low"], 4), round(held["difference_high"], 4)]
        gain = {"gain": round(held["difference"], 4), "gain_95": ends, "state": report.state, "reason": report.reason}
        found.append(
            part("XQuAD held out, nDCG@10, tuned and served int8", "reported", shown["ndcg"], True, **shown, **gain, **_about(report))
        )
    return found


class _Workplace:
    """A folder with the starter model, a lake, a registry and their configuration, removed afterwards."""

    def __enter__(self) -> _Workplace:
        self._root = Path(tempfile.mkdtemp(prefix="understudy-encoders-"))
        shutil.copytree(ROOT / "models" / STARTER, self._root / "models" / STARTER)
        values = {"models": self._root / "models", "lake": self._root / "lake", "registry": f"sqlite:///{self._root}/registry.db"}
        path = self._root / "understudy.toml"
        path.write_text(_SETTINGS.format(**{name: json.dumps(str(value)) for name, value in values.items()}), encoding="utf-8")
        self.config: Config = load_config(path, environ={})
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._root, ignore_errors=True)

    def record(self, skill: str, rows: Iterable[dict[str, Any]], thumb: str = "") -> None:
        """Writes interactions as the router records a provider's answers, with a person's thumb on each where one is given."""
        lake = self._root / "lake"
        key = IdKey.open(lake / "id.key")
        more = {"skill": skill, "input_kind": "text", "training_allowed": True, "source_model": "gold", "candidate": "vendor/gold"}
        found = [{"time_ns": time.time_ns(), "interaction_id": key.new(), **more, **row} for row in rows]
        said = [{"time_ns": one["time_ns"], "feedback_id": key.new(), "interaction_id": one["interaction_id"]} for one in found]
        for name, records in ((INTERACTIONS, found), (FEEDBACK, [{**one, "thumb": thumb} for one in said] if thumb else [])):
            log = Log(table.log_folder(lake, name))
            log.append(records)
            log.close()
            table.convert(lake, name)

    def train(self, skill: str, spec: dict[str, Any]) -> Report:
        registry = Registry(self.config.registry)
        job = registry.start_job(skill, "train")
        registry.close()
        context = JobContext(job, self._root / "jobs" / job, log=lambda text: print(f"  {text}", flush=True))
        return train(self.config, skill, context, spec)

    def ask(self, skill: str, judge: Judge) -> Any:
        """What the published student answers."""
        folder = self._root / "models" / "adapters" / skill / "1"
        target = read_reference(folder).target
        return asyncio.run(served_output(self.config, self._root / "models", target.model, target.version, judge))


def _conll(path: Path) -> Iterable[tuple[str, list[tuple[int, int, str]]]]:
    """Texts of words joined by spaces, with their entities."""
    words: list[tuple[str, str]] = []
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        if line.strip():
            word, _, tag = line.rstrip("\n").partition("\t")
            words.append((word, tag.split(",")[0].strip()))  # the test part names alternatives behind a comma
        elif words:
            yield _joined(words)
            words = []


def _joined(words: list[tuple[str, str]]) -> tuple[str, list[tuple[int, int, str]]]:
    spans: list[tuple[int, int, str]] = []
    place = 0
    for word, tag in words:
        if tag.startswith("B-") or (tag.startswith("I-") and not spans):
            spans.append((place, place + len(word), tag[2:]))
        elif tag.startswith("I-"):
            spans[-1] = (spans[-1][0], place + len(word), spans[-1][2])
        place += len(word) + 1
    return " ".join(word for word, _ in words), spans


def _answered(text: str, spans: list[tuple[int, int, str]]) -> dict[str, Any]:
    """As server/routing/prompting.py keeps a provider's answer."""
    answer = json.dumps([{"text": text[start:end], "label": label} for start, end, label in spans], ensure_ascii=False)
    return {"input": text, "teacher_text": answer, "output_text": answer}


def _about(report: Report) -> dict[str, Any]:
    seconds = {name: round(value, 1) for name, value in report.seconds.items()}
    return {"train_rows": report.train_rows, "held_out_rows": report.held_out_rows, "parameters": report.parameters, "seconds": seconds}
