"""Bar `curation`: a head trained on curated traces against one trained on all of them, at several shares of wrong labels; personal data,
near duplicates, time and memory.

The teacher is a SIMULATION that errs on purpose, towards labels with similar names. The head is the linear one on MiniLM's embeddings;
the accuracy is on Banking77's test texts and their gold labels, which no part of this sees. The patterns for personal data were made while
looking at the same 1,500 synthetic texts that they are measured on, so that their figures are upper limits; Presidio's recognizers, on the
same texts, are beside them.
"""

from __future__ import annotations

import asyncio
import csv
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from bench.harness import ROOT, SHARED, STARTER, Row, part, row_of
from bench.teacher_simulation import SimulatedTeacher
from server.config import load_config
from server.settings import CurationConfig
from trainer import linear
from trainer.curate import duplicates, pii
from trainer.curate.pipeline import Task, refine
from trainer.serving import ServedBase

CURATION = "curated >= raw accuracy with 0, 9, 30 and 50 % wrong labels; personal data P and R >= 0.95; 100,000 rows < 1 GiB"
NOISE = (0.0, 0.09, 0.3, 0.5)
_START = datetime(2026, 1, 1, tzinfo=UTC)
_KINDS = {
    "DOMAIN_NAME": "URL",
    **{kind: kind for kind in ("EMAIL_ADDRESS", "CREDIT_CARD", "IBAN_CODE", "IP_ADDRESS", "US_SSN", "PHONE_NUMBER")},
}


def _banking(name: str) -> list[tuple[str, str]]:
    with (SHARED / "data" / "banking77" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]


def _vectors(texts: Sequence[str]) -> Any:
    models = os.environ.get("UNDERSTUDY_BENCH_MODELS", str(ROOT / "models"))

    async def run() -> Any:
        base = await ServedBase.open(load_config(flags={"models.path": models}, environ={}), STARTER)
        try:
            return (await base.embed(texts, lambda done, total: None))[0]
        finally:
            await base.close()

    return asyncio.run(run())


def _raw(pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {
            "interaction_id": f"i{number:07d}",
            "time": _START + timedelta(seconds=number),
            "input_kind": "text",
            "input": text,
            "teacher_label": label,
            "training_allowed": True,
            "source_model": "simulated-teacher",
        }
        for number, (text, label) in enumerate(pairs)
    ]


class _Banking:
    """Texts with their vectors, embedded once."""

    def __init__(self) -> None:
        self.train, self.test = _banking("train"), _banking("test")
        texts = [text for text, _ in (*self.train, *self.test)]
        self._vectors = dict(zip(texts, _vectors(texts), strict=True))
        self.labels = tuple(sorted({label for _, label in self.train}))
        self._index = {label: number for number, label in enumerate(self.labels)}

    def embed(self, texts: Sequence[str], _progress: Callable[[int, int], None], /) -> tuple[str, Any, list[int]]:
        return STARTER, self.of(texts), list(range(len(texts)))

    def of(self, texts: Sequence[str]) -> Any:
        """Vectors; of a text that scrubbing has changed, its neighbour's by words is not at hand, so it must not be asked for."""
        return np.stack([self._vectors[text] for text in texts])

    def accuracy(self, pairs: Sequence[tuple[str, str]], weights: Sequence[float]) -> float:
        """On the test texts, of a head trained on these."""
        classes = np.array([self._index[label] for _, label in pairs])
        given = np.array(weights, np.float32)
        weight, bias = linear.fit_at(self.of([text for text, _ in pairs]), classes, len(self.labels), 10.0, row_weights=given)
        found = (self.of([text for text, _ in self.test]) @ weight.T + bias).argmax(1)
        return float((found == np.array([self._index[label] for _, label in self.test])).mean())


def _noise(data: _Banking, share: float) -> dict[str, Any]:
    teacher = SimulatedTeacher(dict(data.train), 1.0 - share)
    said = [(text, teacher.answer(text)) for text, _ in data.train]
    gold = dict(data.train)
    settings = CurationConfig(pii="off")  # vectors are of the texts as they are
    curated = refine(_raw(said), Task(data.labels, data.embed), settings)
    learnt = [row for row in curated.rows if not row.held_out]
    raw = [(row.text, row.label) for row in refine(_raw(said), Task(data.labels), _nothing()).rows if not row.held_out]
    wrong = {text for text, label in raw if gold[text] != label}
    left = {row.text for row in learnt}
    dropped = [text for text, _ in raw if text not in left]
    errors = next(step for step in curated.steps if step.name == "label errors")
    suspected = int(errors.notes.get("suspected", 0))
    found = sum(text in wrong for text in dropped)
    return {
        "wrong labels": round(len(wrong) / len(raw), 4),
        "raw": round(data.accuracy(raw, [1.0] * len(raw)), 4),
        "curated": round(data.accuracy([(row.text, row.label) for row in learnt], [row.weight for row in learnt]), 4),
        "without the wrong ones": round(data.accuracy(clean := [p for p in raw if p[0] not in wrong], [1.0] * len(clean)), 4),
        "rows raw": len(raw),
        "rows curated": len(learnt),
        "suspected": suspected,
        "precision of dropped": round(found / len(dropped), 3) if dropped else None,
        "recall of wrong": round(found / len(wrong), 3) if wrong else None,
    }


def _nothing() -> CurationConfig:
    return CurationConfig(pii="off", near_duplicates=1.0, label_errors="off", agreement_bonus=0.0, feedback_bonus=0.0)


def _personal() -> tuple[dict[str, Any], dict[str, Any]]:
    """Precision and recall of spans by kind; a span is found where one of its kind overlaps it. Ours and Presidio's."""
    texts = json.loads((SHARED / "data" / "pii_presidio" / "synth_dataset_v2.json").read_text(encoding="utf-8"))
    ours = _spans(texts, pii.Scrubber.of(pii.OURS).find)
    import tldextract

    tldextract.extract = tldextract.TLDExtract(suffix_list_urls=())  # its list comes from the network otherwise
    from presidio_analyzer.predefined_recognizers import PhoneRecognizer

    kinds = [kind for kind in pii.OURS if kind != "PHONE_NUMBER"]
    others = pii.Scrubber((), (*pii.presidio(kinds), pii.by_recognizer(PhoneRecognizer(), "PHONE_NUMBER")))
    return ours, _spans(texts, others.find)


def _spans(texts: Sequence[dict[str, Any]], find: Callable[[str], list[pii.Found]]) -> dict[str, Any]:
    hits, misses, false = Counter[str](), Counter[str](), Counter[str]()
    begun = time.perf_counter()
    for one in texts:
        found = find(one["full_text"])
        used = set()
        for span in one["spans"]:
            kind = _KINDS.get(span["entity_type"])
            if kind is None:
                continue
            over = [n for n, (a, b, k) in enumerate(found) if k == kind and a < span["end_position"] and span["start_position"] < b]
            used.update(over)
            (hits if over else misses)[kind] += 1
        false.update(kind for n, (_, _, kind) in enumerate(found) if n not in used)
    seconds = time.perf_counter() - begun
    right, missed, wrong = hits.total(), misses.total(), false.total()
    kinds = {
        kind: [round(hits[kind] / max(hits[kind] + false[kind], 1), 3), round(hits[kind] / max(hits[kind] + misses[kind], 1), 3)]
        for kind in sorted(set(_KINDS.values()))
    }
    return {
        "precision": round(right / (right + wrong), 4),
        "recall": round(right / (right + missed), 4),
        "spans": right + missed,
        "by kind [P, R]": kinds,
        "ms a text": round(seconds / len(texts) * 1e3, 3),
    }


def _near(data: _Banking) -> dict[str, Any]:
    """1,000 texts that somebody repeats with small changes, hidden among 9,000 others."""
    rng = random.Random(4)
    texts = [duplicates.normalised(text) for text, _ in data.train if len(text) > 40][:4000]
    own = set(duplicates.similar(texts, 0.9))
    chosen = rng.sample(range(len(texts)), 1000)
    changed = []
    for number in chosen:
        words = texts[number].split()
        at = rng.randrange(len(words))
        kind = rng.randrange(3)
        typed = [*words[:at], words[at] + "s", *words[at + 1 :]]
        changed.append(" ".join(([*words, "pls"], typed, ["hi", *words])[kind]))
    found = set(duplicates.similar([*texts, *changed], 0.8))
    copies = {(number, len(texts) + place) for place, number in enumerate(chosen)}
    return {"found of 1,000": len(copies & found), "other pairs at 0.8": len(found - copies), "own pairs at 0.9": len(own)}


_BIG = """
import json, random, resource, sys, time
from bench.measures.learn_curation import _banking, _raw
from server.settings import CurationConfig
from trainer.curate.pipeline import Task, refine
count = int(sys.argv[1])
rng = random.Random(1)
pairs = _banking("train")
words = sorted({word for text, _ in pairs for word in text.split()})
made = [(f"{text} {' '.join(rng.choices(words, k=4))}", label) for text, label in rng.choices(pairs, k=count)]
rows = _raw(made)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begun = time.perf_counter()
found = refine(rows, Task(tuple(sorted({label for _, label in pairs}))), CurationConfig())
seconds = time.perf_counter() - begun
steps = {step.name: round(step.seconds, 1) for step in found.steps}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"rows": count, "kept": len(found.rows), "seconds": round(seconds, 1), "steps": steps,
                  "peak MiB": peak >> 10, "before MiB": before >> 10}))
"""


def _big(count: int) -> dict[str, Any]:
    """Time and memory of a process that curates so many rows without a base (label errors by hashed words)."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'clients' / 'python'}"}
    done = subprocess.run([sys.executable, "-c", _BIG, str(count)], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def curation() -> Row:
    if not (SHARED / "data" / "banking77").is_dir():
        return Row("curation", CURATION, "not measured: Banking77 is not at hand", False)
    data = _Banking()
    parts = []
    for share in NOISE:
        found = _noise(data, share)
        least = found["raw"] - (0.003 if share == 0 else 0.0)
        shown = {"raw": found["raw"], "curated": found["curated"]}
        parts.append(part(f"{share:.0%} wrong labels", ">= raw", shown, found["curated"] >= least, teacher="SIMULATED", **found))
    ours, others = _personal()
    both = {key: ours[key] for key in ("precision", "recall")}
    parts.append(part("personal data", "P, R >= 0.95", both, min(both.values()) >= 0.95, ours=ours, presidio=others))
    near = _near(data)
    parts.append(part("near duplicates", ">= 900 of 1,000 found at 0.8", near["found of 1,000"], near["found of 1,000"] >= 900, **near))
    big = _big(100_000)
    shown = {"s": big["seconds"], "s per 10,000": round(big["seconds"] / 10, 1), "peak MiB": big["peak MiB"]}
    parts.append(part("100,000 rows", "< 1024 MiB", shown, big["peak MiB"] < 1024, load=os.getloadavg(), **big))
    return row_of("curation", CURATION, parts)


if __name__ == "__main__":
    row = curation()
    print(json.dumps(row.parts, indent=2))
    print(row.line())
