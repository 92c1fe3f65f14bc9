"""Bars `quality` and `scoring`: a quality model cross-fitted on human judgements (EVOUNA), and what scoring one answer costs.

EVOUNA's rows are a question, one system's answer and a human's verdict. Answers to one question stay in one part. The model sees question
and answer: native features, hashed n-grams, the starter's embeddings of both. It never sees the reference answer; the answering system is
unknown to it but in the report that says so, which adds that system's share of acceptable answers in the other parts.

`python -m bench.measures.routing_quality cold-start` fits the model that the server ships on the same judgements and Tulu's.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import BUILD, ROOT, SHARED, STARTER, Row, median, part, row_of, short_texts
from server.quality.agreement import medoid, normal, vote
from server.quality.curve import parts_of
from server.quality.model import COLD_START, cold_start
from server.quality.report import Report, report, write
from server.quality.scorer import Observed, score
from trainer.quality import FOLDS, Fitted, Judged, fit, judged_of, read, with_priors, with_support

QUALITY = "EVOUNA cross-fitted by question: AUROC >= 0.70 from one answer, >= 0.82 with the others' agreement; ECE <= 0.05"
SCORING = "a 1,000-token answer in <= 100 us native, >= 20x the twin; the medoid rejects a flipped number, a vote beats its members"
FOLDER = SHARED / "data" / "answer_quality_human"
TOKENS = 1000
MOST = 800  # characters of a text that are embedded
BITS = 18
# The judged answers all ended by themselves. An answer that was cut off is worth less; how much less, no label says.
PRIORS = {"cut": -1.5}


def evouna() -> tuple[list[Judged], list[str]]:
    """EVOUNA's judged answers in the file's order, and for each the system that gave it with the set that its question is of."""
    lines = list(read(FOLDER / "evouna_qa_human.jsonl.gz"))
    return judged_of(lines, {"prompt": "question", "acceptable": "correct"}), [f"{line['set']} {line['model']}" for line in lines]


def with_vectors(judged: list[Judged]) -> list[Judged]:
    """Each with the starter model's embeddings of prompt and answer, kept under build/bench between runs."""
    texts = sorted({text.strip()[:MOST] or "." for j in judged for text in (j.observed.prompt, j.observed.answer)})
    kept = BUILD / "quality" / f"vectors-{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()[:16]}.npy"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, _embed(texts).astype(np.float16))
    vectors, place = np.load(kept).astype(np.float32), {text: i for i, text in enumerate(texts)}
    out = []
    for j in judged:
        pair = [vectors[place[text.strip()[:MOST] or "."]] for text in (j.observed.prompt, j.observed.answer)]
        out.append(replace(j, observed=replace(j.observed, vectors=np.concatenate(pair))))
    return out


def with_record(judged: list[Judged], systems: list[str]) -> list[Judged]:
    """Each with the share of acceptable ones among the answers of its system to questions of the other parts of the cross-fitting."""
    part_of = parts_of(np.array([j.group for j in judged]), FOLDS, 0)
    good, names = np.array([j.acceptable for j in judged]), np.array(systems)
    records = np.zeros(len(judged))
    for name in sorted(set(systems)):
        for held in range(FOLDS):
            records[(names == name) & (part_of == held)] = good[(names == name) & (part_of != held)].mean()
    return [replace(j, observed=replace(j.observed, record=r)) for j, r in zip(judged, records.tolist(), strict=True)]


def tulu() -> list[Judged]:
    """Tulu 1's answers to instructions, each judged acceptable or not by a human; judged twice, it counts twice."""
    lines = []
    for line in read(FOLDER / "tulu1_human_eval_annotations.jsonl.gz"):
        for side in ("a", "b"):
            if line[f"completion_{side}_is_acceptable"] in ("yes", "no"):
                row = {"prompt": line["prompt"], "answer": line[f"completion_{side}"]}
                lines.append({**row, "acceptable": line[f"completion_{side}_is_acceptable"]})
    return judged_of(lines)


def quality() -> Row:
    """Cross-fits on EVOUNA and, for report, on Tulu; writes the reports with their plots under build/bench/quality."""
    judged, systems = evouna()
    judged = with_vectors(with_support(judged))
    reports = _reports("EVOUNA", judged, fit(judged, bits=BITS))
    known = with_record(judged, systems)
    reports += _reports("EVOUNA and the record of who answered", known, fit(known, bits=BITS))
    reports += _reports("EVOUNA by the text alone", judged, _plain(judged))
    instructions = tulu()
    reports += _reports("Tulu 1", instructions, fit(instructions))
    folder = BUILD / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    write(reports, folder)
    alone, agreed = reports[0], reports[1]
    parts = [
        _auroc("AUROC, one answer alone", 0.70, alone),
        _auroc("AUROC, with the others' agreement", 0.82, agreed),
        part("ECE, one answer alone", "<= 0.05", round(alone.ece, 4), alone.ece <= 0.05),
        part("ECE, with the others' agreement", "<= 0.05", round(agreed.ece, 4), agreed.ece <= 0.05),
    ]
    # Not the bar, which is meant without: who answered is no secret to the server, so a skill's own model may know it.
    parts += [_auroc(f"AUROC for report: {one.name}", 0.0, one) for one in reports[2:]]
    return row_of("quality", QUALITY, parts)


def _plain(judged: list[Judged]) -> Fitted:
    """Without embeddings: what the shipped model has."""
    return fit([replace(j, observed=replace(j.observed, vectors=None)) for j in judged])


def _reports(name: str, judged: list[Judged], fitted: Fitted) -> list[Report]:
    good, groups = np.array([j.acceptable for j in judged]), np.array([j.group for j in judged])
    found = [report(f"{name}, one answer alone", fitted.alone, good, groups.tolist())]
    if len(fitted.agreed):
        known = np.isfinite(fitted.agreed)
        found.append(report(f"{name}, with the others' agreement", fitted.agreed[known], good[known], groups[known].tolist()))
    return found


def _auroc(name: str, bar: float, one: Report) -> dict[str, Any]:
    assert one.auroc is not None and one.auroc_interval is not None
    shown = {
        "interval_95": [round(v, 4) for v in one.auroc_interval],
        "rows": one.rows,
        "ece": round(one.ece, 4),
        "brier": round(one.brier, 4),
    }
    shown |= {"risk_at_coverage": {c: round(r, 4) for c, r in one.risk.items()}, "aurc": round(one.aurc, 4)}
    return part(name, f">= {bar:g}" if bar else "none", round(one.auroc, 4), one.auroc >= bar, **shown)


def scoring() -> Row:
    """Times on one thread; agreement's properties on numbers."""
    from native import scoring as compiled
    from native import scoring_py as twin

    prompt, answer = _texts()
    rng = np.random.default_rng(0)
    rows = [-rng.exponential(size=TOKENS).astype(np.float32), *(rng.exponential(size=TOKENS).astype(np.float32) for _ in range(2))]
    weights = rng.standard_normal(1 << 15).astype(np.float32)

    def whole(module: Any) -> Callable[[], object]:
        def run() -> object:
            pair = module.Pair(prompt, answer)
            return pair.features(*rows, 1), pair.dot(weights)

        return run

    fast, slow = _best(whole(compiled), 40, 100), _best(whole(twin), 3, 7)
    model, observed = cold_start(), Observed(prompt, answer, logprobs=rows[0], entropies=rows[1], margins=rows[2])
    all_of_it = _best(lambda: score(model, observed), 40, 50)
    shown = {
        "characters": len(answer),
        "tokens": TOKENS,
        "twin_ms": round(slow * 1e3, 2),
        "with_model_and_findings_us": round(all_of_it * 1e6, 1),
    }
    parts = [
        part("microseconds, features and hashed n-grams", "<= 100", round(fast * 1e6, 1), fast <= 100e-6, **shown),
        part("twin's time over ours", ">= 20", round(slow / fast, 1), slow / fast >= 20),
        _flipped_numbers(),
        _votes(),
    ]
    return row_of("scoring", SCORING, parts)


def _texts() -> tuple[str, str]:
    """A question of 200 characters and an answer of 1,000 tokens by the starter's tokenizer, from running text."""
    texts = short_texts(400)
    running = " ".join(text.capitalize() for text in texts[20:])
    folders = sorted((ROOT / "models" / STARTER).glob("*/tokenizer.json"))
    if not folders:
        return " ".join(texts[:3])[:200], running[:4500]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folders[-1]))
    tokenizer.no_truncation()
    end = tokenizer.encode(running, add_special_tokens=False).offsets[TOKENS - 1][1]
    return " ".join(texts[:3])[:200], running[:end]


def _best(run: Callable[[], object], repeats: int, rounds: int) -> float:
    """The least of several rounds' medians: other work on the machine only adds."""
    run()
    medians = []
    for _ in range(rounds):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        medians.append(median(times))
    return min(medians)


def _sums(limit: int) -> list[str]:
    """Solutions of GSM8K, each ending in "#### <number>"."""
    rows = read(SHARED / "data" / "gsm8k" / "train.jsonl.gz")
    return [row["answer"] for row, _ in zip(rows, range(limit), strict=False)]


def _votes(members: int = 5, questions: int = 2000) -> dict[str, Any]:
    """Members of about 52 to 65 % accuracy on GSM8K's answers, simulated: a question is hard or easy for all alike, and half of its wrong
    answers are the same tempting number. The weights are accuracies seen on other questions.
    """
    rng = np.random.default_rng(5)
    strength = np.linspace(0.1, 0.7, members)
    rounds: list[tuple[list[str], list[bool], str]] = []
    for solution in _sums(2 * questions):
        reasons, _, number = solution.rpartition("#### ")
        value = int(number.replace(",", ""))
        hardness, tempting = rng.normal(), value + int(rng.integers(1, 10))
        good = (rng.random(members) < 1 / (1 + np.exp(-1.5 * (strength - hardness)))).tolist()
        said = []
        for ok in good:
            wrong = tempting if rng.random() < 0.5 else value + int(rng.integers(10, 60))
            shown = f"{value if ok else wrong:,}"
            said.append(f"{reasons}#### {shown}" if rng.random() < 0.5 else f"The answer is {shown}.")
        rounds.append((said, good, normal(number)))
    seen = np.mean([good for _, good, _ in rounds[:questions]], axis=0).tolist()
    new = rounds[questions:]
    plain = float(np.mean([normal(said[vote(said).index]) == truth for said, _, truth in new]))
    weighted = float(np.mean([normal(said[vote(said, seen).index]) == truth for said, _, truth in new]))
    each = np.mean([good for _, good, _ in new], axis=0)
    lead = round(min(plain, weighted) - float(each.max()), 3)
    shown_each = [round(float(v), 3) for v in each]
    return part(
        "vote's lead over its best member", "> 0", lead, lead > 0, members=shown_each, plain=round(plain, 3), weighted=round(weighted, 3)
    )


def _flipped_numbers(texts: int = 150) -> dict[str, Any]:
    """Four ways to say a GSM8K solution, of which the one in the middle has a wrong number: how often the medoid takes it."""
    rng = np.random.default_rng(6)
    groups: list[list[str]] = []
    for solution in _sums(2 * texts):
        text = re.sub(r"<<.*?>>", "", solution).rpartition("\n####")[0].replace("\n", " ")
        found = list(re.finditer(r"\d{2,}", text))
        if not found or len(groups) == texts:
            continue
        at = found[int(rng.integers(len(found)))]
        flipped = text[: at.start()] + str(int(at[0]) + int(rng.integers(1, 9))) + text[at.end() :]
        groups.append([f"In short: {text}", flipped, f"{text} That is the result.", f"Sure! {text} I hope that this helps."])
    vectors = _embed([text for group in groups for text in group]).reshape(len(groups), 4, -1)
    by_cosine = sum(int((v @ v.T).sum(axis=1).argmax()) == 1 for v in vectors)
    ours = sum(medoid(group, v).index == 1 for group, v in zip(groups, vectors, strict=True))
    shown = {"by_cosine_alone": by_cosine, "texts": len(groups)}
    return part("flipped numbers that the medoid chose", "0", ours, ours == 0, **shown)


def _embed(texts: list[str]) -> Any:
    """float32[n, H] of length 1, by the starter model."""
    import asyncio

    from server.config import load_config
    from trainer.serving import ServedBase

    async def run() -> Any:
        base = await ServedBase.open(load_config(), STARTER)
        try:
            return (await base.embed(texts, lambda done, total: None))[0]
        finally:
            await base.close()

    return asyncio.run(run())


def main() -> int:
    """Writes server/quality/cold_start.json."""
    judged = with_support(evouna()[0])
    shift = 1 + max(j.group for j in judged)
    instructions = [replace(j, group=j.group + shift) for j in tulu()]
    about = {
        "fitted_by": "bench/measures/routing_quality.py cold-start (trainer.quality.fit)",
        "data": [
            {"name": "EVOUNA", "source": "github.com/wangcunxiang/QA-Eval@90007d39d4ef", "licence": "Apache-2.0", "answers": len(judged)},
            {
                "name": "Tulu 1 human evaluation",
                "source": "github.com/allenai/open-instruct@e6c3044aa620",
                "licence": "Apache-2.0",
                "answers": len(instructions),
            },
        ],
        "content": "weights of a logistic regression; no text of the data",
    }
    fitted = fit([*judged, *instructions], about=about)
    with_priors(fitted.model, PRIORS).save(COLD_START)
    print(json.dumps({"bytes": Path(COLD_START).stat().st_size, "ece": fitted.model.curve.ece}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
