"""Bar `routing`: how well a learned difficulty decides which MMLU questions go to the strong model, on RouteLLM's own answers.

GPT-4-1106-preview is the strong model, Mixtral-8x7B the weak one, whose answers were marked by RouteLLM's authors. Each evaluation fits
the model that a skill would have (trainer/difficulty.py) and ranks rows by the predicted gain; penalties, scales and blends are chosen
inside the training rows, and near-identical prompts never lie on both sides. What is fixed was looked at on these rows while the model
was designed, coarsely: its parts, the kernel's width, the form features and their weight beside words. Without the data set nothing can
be measured.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.harness import BUILD, ROOT, SHARED, STARTER, Row, median, part, row_of
from server.routing.difficulty import DifficultyModel, prior
from server.runtime.heads import Base, Features
from trainer.difficulty import About, Labelled, apgr, cpt, expected_error, fit, folds_of, near_identical, recovery

ROUTING = (
    "MMLU of the RouteLLM evaluation, strong-model share against recovered gap: APGR >= 0.68 cross-fitted in-domain, >= 0.63 learning "
    "from 1,500 labels alone, >= 0.57 leaving the subject out; MT-Bench reported"
)
SOURCE = SHARED / "data" / "routellm_evals"
PICTURE = ROOT / "bench" / "results" / "routing_difficulty.svg"
LABELS, DRAWS, BOOTSTRAPS = 1500, 10, 1000
# Subjects are left out a dozen folds at a time, four or five together: every row is scored by a model that saw nothing of its subject (and
# nothing of three or four others), at a fifth of the fits.
SUBJECT_FOLDS = 12


@dataclass(frozen=True)
class Evaluation:
    """Rows of a benchmark: prompts, quality of the weak and of the strong model in [0, 1], subjects, vectors, near-identical groups."""

    texts: list[str]
    weak: np.ndarray[Any, Any]
    strong: np.ndarray[Any, Any]
    subjects: np.ndarray[Any, Any]
    vectors: np.ndarray[Any, Any]
    groups: np.ndarray[Any, Any]

    def labelled(self, rows: np.ndarray[Any, Any]) -> list[Labelled]:
        return [Labelled(self.texts[i], float(self.weak[i]), float(self.strong[i])) for i in rows]


def routing() -> Row:
    if not (SOURCE / "mmlu.jsonl.gz").is_file():
        raise SystemExit(f"{SOURCE} has no mmlu.jsonl.gz; put the RouteLLM evaluation data there, or set UNDERSTUDY_SHARED")
    data, about = load_mmlu()
    parts = [_accuracies(data)]
    curves: dict[str, Any] = {}
    parts += _in_domain(data, about, curves)
    parts += _few_labels(data, about)
    parts += _subject_out(data, about, curves)
    lengths = np.array([one.gain for one in prior(data.texts)])
    parts.append(_ranked("prior, no label at all (length)", "reported", lengths, data.weak, data.strong))
    curves["length alone"] = recovery(lengths, data.weak, data.strong)
    curves["oracle"] = recovery(data.strong - data.weak, data.weak, data.strong)
    parts.append(part("oracle", "reported", round(apgr(curves["oracle"]), 4), True, cpt80=round(100 * cpt(curves["oracle"], 0.8), 1)))
    chance = np.random.default_rng(0).random(len(data.texts))
    parts.append(_ranked("random order", "reported", chance, data.weak, data.strong))
    model = fit(data.labelled(np.arange(len(data.texts))), data.vectors, about, groups=data.groups)
    parts += _mt_bench(model)
    parts += _speed(model, data)
    PICTURE.write_text(picture(curves), encoding="utf-8")
    return row_of("routing", ROUTING, parts)


def load_mmlu() -> tuple[Evaluation, About]:
    """The rows that RouteLLM kept, with vectors of the starter by the code that serves."""
    with gzip.open(SOURCE / "mmlu.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if not row["contaminated"]]
    texts = [row["prompt"] for row in rows]
    vectors, base, features = embedded(texts)
    weak, strong = (np.array([float(row[key]) for row in rows]) for key in ("weak_correct", "strong_correct"))
    subjects = np.array([row["domain"] for row in rows])
    groups = near_identical(texts, vectors)
    return Evaluation(texts, weak, strong, subjects, vectors, groups), About("mmlu", "1", base, features)


def embedded(texts: Sequence[str]) -> tuple[np.ndarray[Any, Any], Base, Features]:
    """Vectors float32[n, H] by the starter, kept under build/bench by what they depend on."""
    from server.config import Config
    from server.routing.difficulty_book import embed
    from server.runtime.loader import make_loader
    from server.runtime.observer import NullObserver
    from server.runtime.repository import Repository
    from server.runtime.runtime import Runtime

    async def run() -> tuple[np.ndarray[Any, Any], Base, Features]:
        config = Config()
        runtime = Runtime(Repository(ROOT / "models"), make_loader(config.runtime, NullObserver()))
        await runtime.load(STARTER)
        try:
            manifest = runtime.manifest(STARTER)
            base = Base(name=STARTER, version=manifest.version, sha256=manifest.files["model.onnx"].sha256)
            features = Features(pooling="mean", normalize=True, size=manifest.hidden_size)
            key = hashlib.sha256("\0".join([base.sha256, *texts]).encode("utf-8", "surrogatepass")).hexdigest()[:24]
            kept = BUILD / "routing-difficulty" / f"{key}.npy"
            if kept.is_file():
                return np.load(kept), base, features
            blocks = []
            for start in range(0, len(texts), 256):
                block = await embed(runtime, base, features, texts[start : start + 256])
                assert block is not None
                blocks.append(block)
            vectors = np.concatenate(blocks)
            assert np.isfinite(vectors).all(), "a prompt has no vector"
            kept.parent.mkdir(parents=True, exist_ok=True)
            np.save(kept, vectors)
            return vectors, base, features
        finally:
            await runtime.close()

    return asyncio.run(run())


def _accuracies(data: Evaluation) -> dict[str, Any]:
    seen = [len(data.texts), round(100 * float(data.weak.mean()), 2), round(100 * float(data.strong.mean()), 2)]
    return part("rows, weak %, strong %", "[14037, 68.09, 80.59], as published with the data", seen, seen == [14037, 68.09, 80.59])


def _ranked(name: str, bar: str, score: Any, weak: Any, strong: Any, least: float = 0.0) -> dict[str, Any]:
    """A part: APGR with its bootstrap interval over rows, CPT50 and CPT80 in per cent of strong calls."""
    curve = recovery(score, weak, strong)
    found = apgr(curve)
    low, high = interval(score, weak, strong)
    shown = {"interval_95": [low, high], "cpt50": round(100 * cpt(curve, 0.5), 1), "cpt80": round(100 * cpt(curve, 0.8), 1)}
    return part(name, bar, round(found, 4), found >= least, **shown)


def resampled(score: Any, weak: Any, strong: Any, seed: int, times: int) -> list[float]:
    """APGR on as many bootstrap samples of the rows; equal scores stay in an order drawn once."""
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(len(score)), -np.asarray(score, np.float64)))
    gain = (np.asarray(strong) - np.asarray(weak))[order]
    found = []
    for _ in range(times):
        count = np.bincount(rng.integers(0, len(gain), len(gain)), minlength=len(gain))
        share = np.concatenate([[0.0], np.cumsum(count)]) / len(gain)
        recovered = np.concatenate([[0.0], np.cumsum(count * gain)])
        if recovered[-1] > 0:
            found.append(float(np.trapezoid(recovered / recovered[-1], share)))
    return found


def interval(score: Any, weak: Any, strong: Any) -> tuple[float, float]:
    low, high = np.quantile(resampled(score, weak, strong, 7, BOOTSTRAPS), [0.025, 0.975])
    return round(float(low), 4), round(float(high), 4)


def _held_out(data: Evaluation, about: About, fold: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Value and gain of every row by a model of the other folds; `alone`: the gain without the embedding."""
    found = {name: np.zeros(len(data.texts)) for name in ("value", "gain", "alone")}
    for one in np.unique(fold):
        held = np.flatnonzero(fold == one)
        rest = np.flatnonzero((fold != one) & ~np.isin(data.groups, data.groups[held]))
        model = fit(data.labelled(rest), data.vectors[rest], about, groups=data.groups[rest])
        texts = [data.texts[i] for i in held]
        found["value"][held], found["gain"][held] = model.scores(texts, data.vectors[held])
        found["alone"][held] = model.scores(texts)[1]
    return found


def _in_domain(data: Evaluation, about: About, curves: dict[str, Any]) -> list[dict[str, Any]]:
    found = _held_out(data, about, folds_of(data.groups, 5, 1))
    curves["in-domain"] = recovery(found["gain"], data.weak, data.strong)
    error = expected_error(found["value"], 1 - data.weak)
    return [
        _ranked("APGR in-domain, 5 folds", ">= 0.68", found["gain"], data.weak, data.strong, 0.68),
        _ranked("the same without the embedding", "reported", found["alone"], data.weak, data.strong),
        _ranked("the same, ranked by difficulty instead of gain", "reported", found["value"], data.weak, data.strong),
        part("ECE of the difficulty, 5 folds", "reported", round(error, 4), True),
    ]


def _few_labels(data: Evaluation, about: About) -> list[dict[str, Any]]:
    """Draws of 1,500 rows, each tested on every row that is not near-identical to one of them."""
    rng = np.random.default_rng(2)
    seen: dict[str, list[float]] = {"gain": [], "alone": [], "cpt50": [], "cpt80": [], "bootstrap": []}
    for draw in range(DRAWS):
        train = rng.permutation(len(data.texts))[:LABELS]
        test = np.flatnonzero(~np.isin(data.groups, data.groups[train]))
        model = fit(data.labelled(train), data.vectors[train], about, groups=data.groups[train])
        texts, weak, strong = [data.texts[i] for i in test], data.weak[test], data.strong[test]
        gain = model.scores(texts, data.vectors[test])[1]
        curve = recovery(gain, weak, strong)
        seen["gain"].append(apgr(curve))
        seen["cpt50"].append(100 * cpt(curve, 0.5))
        seen["cpt80"].append(100 * cpt(curve, 0.8))
        seen["alone"].append(apgr(recovery(model.scores(texts)[1], weak, strong)))
        seen["bootstrap"] += resampled(gain, weak, strong, draw, BOOTSTRAPS // DRAWS)
    mean = {name: float(np.mean(values)) for name, values in seen.items()}
    shown = {
        "interval_95_of_one_draw": [round(float(q), 4) for q in np.quantile(seen["bootstrap"], [0.025, 0.975])],
        "draws": [round(value, 4) for value in seen["gain"]],
        "cpt50": round(mean["cpt50"], 1),
        "cpt80": round(mean["cpt80"], 1),
    }
    return [
        part(f"APGR from 1,500 labels, mean of {DRAWS} draws", ">= 0.63", round(mean["gain"], 4), mean["gain"] >= 0.63, **shown),
        part("the same from 1,500 without the embedding", "reported", round(mean["alone"], 4), True),
    ]


def _subject_out(data: Evaluation, about: About, curves: dict[str, Any]) -> list[dict[str, Any]]:
    names, inverse, counts = np.unique(data.subjects, return_inverse=True, return_counts=True)
    place = np.empty(len(names), np.int64)
    place[np.argsort(-counts, kind="stable")] = np.arange(len(names)) % SUBJECT_FOLDS
    found = _held_out(data, about, place[inverse])
    curves["subject left out"] = recovery(found["gain"], data.weak, data.strong)
    return [
        _ranked("APGR, subject left out (4 or 5 at a time)", ">= 0.57", found["gain"], data.weak, data.strong, 0.57),
        _ranked("subject left out, without the embedding", "reported", found["alone"], data.weak, data.strong),
    ]


def _mt_bench(model: DifficultyModel) -> list[dict[str, Any]]:
    """MT-Bench by the model of all of MMLU: the first turn decides, both turns' scores of the judge count. 72 questions: chance is wide."""
    questions = [json.loads(line) for line in (SOURCE / "mt_bench_questions.jsonl").read_text(encoding="utf-8").splitlines()]
    questions = [one for one in questions if not one["contaminated"]]
    scores: dict[tuple[int, bool], list[float]] = {}
    for line in (SOURCE / "mt_bench_judgements.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        scores.setdefault((row["question_id"], "gpt-4" in row["model"]), []).append(row["score"] / 10)
    weak, strong = (np.array([np.mean(scores[one["question_id"], side]) for one in questions]) for side in (False, True))
    texts = [one["turns"][0] for one in questions]
    vectors = embedded(texts)[0]
    parts = [
        _ranked("MT-Bench by the model of MMLU", "reported", model.scores(texts, vectors)[1], weak, strong),
        _ranked("MT-Bench by the prior", "reported", [one.gain for one in prior(texts)], weak, strong),
    ]
    seen = {"questions": len(texts), "weak": round(10 * float(weak.mean()), 3), "strong": round(10 * float(strong.mean()), 3)}
    return [{**one, **seen} for one in parts]


def _speed(model: DifficultyModel, data: Evaluation) -> list[dict[str, Any]]:
    """Microseconds of the median prompt: an estimate (without the embedding's own time), and the features by C and by the twin."""
    from native import text_features, text_features_py

    rows = np.random.default_rng(3).permutation(len(data.texts))[:300]

    def median_us(one: Any) -> float:
        times = []
        for i in rows:
            begun = time.perf_counter()
            one(i)
            times.append(1e6 * (time.perf_counter() - begun))
        return round(median(times), 1)

    estimate = median_us(lambda i: model.predict([data.texts[i]], data.vectors[i : i + 1]))
    compiled = median_us(lambda i: text_features.extract([data.texts[i]], model.spec.bits))
    twin = median_us(lambda i: text_features_py.extract([data.texts[i]], model.spec.bits))
    return [
        part("estimate of one prompt, us", "< 1000", estimate, estimate < 1000, landmarks=len(model.parameters.landmarks)),
        part("features of one prompt, us", "reported", compiled, True, twin_us=twin, ratio=round(twin / compiled)),
    ]


def picture(curves: dict[str, Any]) -> str:
    """Recovered gap over the share of strong calls as SVG, up to 150 % (an oracle passes 100 %)."""
    width, height, left, top, most = 560, 420, 60, 20, 1.5
    colours = {"in-domain": "#1b6ca8", "subject left out": "#c8553d", "length alone": "#8a8a8a", "oracle": "#3a7d44"}

    def x(share: float) -> float:
        return left + share * (width - left - 20)

    def y(recovered: float) -> float:
        return top + (1 - recovered / most) * (height - top - 50)

    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">']
    lines.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for tick in (0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5):
        lines.append(f'<line x1="{left}" y1="{y(tick):.1f}" x2="{x(1):.1f}" y2="{y(tick):.1f}" stroke="#ddd"/>')
        lines.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.0%}</text>')
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1.0):
        lines.append(f'<text x="{x(tick):.1f}" y="{y(0) + 18:.1f}" text-anchor="middle">{tick:.0%}</text>')
    lines.append(f'<text x="{x(0.5):.1f}" y="{height - 8}" text-anchor="middle">calls to the strong model (MMLU)</text>')
    lines.append(f'<text x="{left - 45}" y="{top - 6}">recovered gap</text>')
    lines.append(f'<line x1="{x(0):.1f}" y1="{y(0):.1f}" x2="{x(1):.1f}" y2="{y(1):.1f}" stroke="black" stroke-dasharray="4 4"/>')
    for place, (name, curve) in enumerate([("random", None), *curves.items()]):
        colour = colours.get(name, "black")
        if curve is not None:
            at = np.linspace(0, len(curve) - 1, 200).astype(int)
            points = " ".join(f"{x(i / (len(curve) - 1)):.1f},{y(curve[i]):.1f}" for i in at)
            lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        label = name if curve is None else f"{name} (APGR {apgr(curve):.3f})"
        lines.append(f'<text x="{x(1) - 190:.1f}" y="{y(0) - 95 + 18 * place:.1f}" fill="{colour}">{label}</text>')
    return "\n".join([*lines, "</svg>", ""])
