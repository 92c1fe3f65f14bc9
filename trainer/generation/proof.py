"""Does the exported student compute what the trained one does, and is it good enough on rows that no training saw?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from server.core import FloatArray
from server.errors import TooLittleData
from server.quality.agreement import kind_of, normal
from server.quality.model import QualityModel
from server.quality.scorer import score
from server.routing.schema_check import checker
from server.routing.skills import Skill
from trainer.generation.served import Said, ServedStudent, observed_rows, torch_greedy

EXACT = 1e-3  # most that log-probabilities of a float32 base may differ
# Of a quantized base, on greedy tokens: one answer alone runs the int4 form, whose build allows this KL (graphs/decoder/parity.py).
QUANTIZED_TOP1, QUANTIZED_KL = 0.9, 0.3
# A text counts as the wanted one from this share of common words on (F1, as SQuAD measures spans).
ALIKE = 0.8
MIN_SHARE = 0.05


@dataclass(slots=True, frozen=True)
class Parity:
    """Over `tokens` greedy tokens behind held-out prompts: the largest difference of a log-probability, the share of tokens that torch
    would have written too, the mean KL(torch || served) in nats over the tokens that the server names, and the share of answers that are
    torch's to the letter. `reason`: why it is too far, or "".
    """

    tokens: int
    max_error: float
    top1: float
    kl: float
    same_texts: float
    reason: str = ""

    def to_json(self) -> dict[str, float]:
        """For manifests."""
        return {
            "parity_max_error": self.max_error,
            "parity_top1": self.top1,
            "parity_kl": self.kl,
            "parity_same_texts": self.same_texts,
            "parity_tokens": float(self.tokens),
        }


async def parity(served: ServedStudent, student: Any, prompts: Sequence[Sequence[int]], max_tokens: int, exact: bool) -> Parity:
    """Compares greedy answers token by token. `exact`: the base is float32, and so must be the agreement."""
    answers = await served.greedy(prompts, max_tokens)
    expected = torch_greedy(student, prompts, [[token for token, _ in answer] for answer in answers])
    worst, same, texts, total, kl = 0.0, 0, 0, 0, 0.0
    for answer, wanted in zip(answers, expected, strict=True):
        right = 0
        for (token, top), row in zip(answer, wanted, strict=False):
            ids = np.fromiter(top, np.int64)
            got = np.fromiter(top.values(), np.float32)
            worst = max(worst, float(np.abs(row[ids] - got).max()))
            kl += max(0.0, float((np.exp(row[ids], dtype=np.float64) * (row[ids] - got)).sum()))
            # Torch's own choice, or one that is as likely: two equal maxima are no disagreement.
            right += bool(row[token] >= row.max() - EXACT)
        same, total = same + right, total + len(answer)
        texts += right == len(answer)
    count = max(total, 1)
    found = Parity(total, worst, same / count, kl / count, texts / max(len(answers), 1))
    if exact and not (worst <= EXACT and same == total):
        reason = f"log-probabilities differ by {worst:.2g} (at most {EXACT:g}), and {found.top1:.2%} of the greedy tokens are torch's"
    elif not exact and not (found.top1 >= QUANTIZED_TOP1 and found.kl <= QUANTIZED_KL):
        limits = f"at least {QUANTIZED_TOP1:.0%} and at most {QUANTIZED_KL:g} are asked"
        reason = f"{found.top1:.2%} of the greedy tokens are torch's, the KL is {found.kl:.2g}; {limits}"
    else:
        return found
    return Parity(total, worst, found.top1, found.kl, found.same_texts, reason)


@dataclass(slots=True)
class Marks:
    """How answers compare with the wanted ones, row by row: bool[n] and float[n]. `valid`: None where the skill has no schema."""

    exact: np.ndarray[Any, np.dtype[np.bool_]]
    acceptable: np.ndarray[Any, np.dtype[np.bool_]]
    f1: FloatArray
    valid: np.ndarray[Any, np.dtype[np.bool_]] | None
    errors: Counter[str] = field(default_factory=Counter)

    def metrics(self) -> dict[str, float]:
        """Means."""
        found = {"exact_match": self.exact.mean(), "acceptable": self.acceptable.mean(), "token_f1": self.f1.mean()}
        if self.valid is not None:
            found["schema_valid"] = self.valid.mean()
        return {name: float(value) for name, value in found.items()} | {"failed": sum(self.errors.values()) / len(self.exact)}


def mark(skill: Skill, said: Sequence[Said], wanted: Sequence[str]) -> Marks:
    """Compares texts with the wanted ones."""
    check = checker(skill.json_schema) if skill.json_schema else None
    texts = [one.text for one in said]
    valid = None if check is None else np.array([not one.error and not check(one.text) for one in said], bool)
    return Marks(
        exact=np.array([text.strip() == want.strip() for text, want in zip(texts, wanted, strict=True)], bool),
        acceptable=np.array([same(text, want) for text, want in zip(texts, wanted, strict=True)], bool),
        f1=np.array([token_f1(text, want) for text, want in zip(texts, wanted, strict=True)], np.float32),
        valid=valid,
        errors=Counter(one.error for one in said if one.error),
    )


def same(answer: str, wanted: str) -> bool:
    """Whether an answer will do for the wanted one: closed ones say the same, texts have most words in common."""
    if not answer.strip():
        return False
    if kind_of(wanted) == "closed":
        return normal(answer) == normal(wanted)
    return token_f1(answer, wanted) >= ALIKE


def token_f1(answer: str, wanted: str) -> float:
    """F1 of the words that both have, as in SQuAD (arXiv 1606.05250)."""
    mine, theirs = answer.casefold().split(), wanted.casefold().split()
    common = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * common / (len(mine) + len(theirs)) if common else 0.0


def mcnemar(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> dict[str, float]:
    """The exact paired test of two students on the same rows: rows that one alone has right, and the two-sided probability of such a split
    if both were equally good (binomial, McNemar 1947).
    """
    mine, theirs = int((first & ~second).sum()), int((~first & second).sum())
    count = mine + theirs
    tail = sum(math.comb(count, k) for k in range(min(mine, theirs) + 1)) / 2**count if count else 1.0
    return {"only_first": float(mine), "only_second": float(theirs), "p": min(1.0, 2 * tail)}


@dataclass(slots=True, frozen=True)
class Judged:
    """The student's quality model, fitted to its held-out answers, and what it delivers at the bar: `qualities` are cross-fitted."""

    model: QualityModel
    qualities: FloatArray
    share: float
    delivered: float


def judge(skill: Skill, rows: Sequence[Any], said: Sequence[Said], acceptable: np.ndarray[Any, Any]) -> Judged:
    """Fits how likely an answer of this student is acceptable, from what the server sees of it.

    Where all answers were acceptable, or none, nothing can be told apart: each gets the share that (n + 1) / (n + 2) estimates (Laplace).
    Raises TooLittleData below the quality package's minimum of rows.
    """
    from trainer.quality import Judged as One
    from trainer.quality import fit

    seen = observed_rows(skill, rows, said)
    if acceptable.all() or not acceptable.any():
        model = _constant((int(acceptable.sum()) + 1) / (len(rows) + 2), len(rows))
        qualities = np.array([score(model, one).value or 0.0 for one in seen], np.float32)
    else:
        lines = [One(one, bool(ok), number) for number, (one, ok) in enumerate(zip(seen, acceptable, strict=True))]
        fitted = fit(lines, bits=8, calibrated=True, about={"source": "held-out rows of a training job", "rows": len(rows)})
        model, qualities = fitted.model, fitted.alone
    delivered = qualities >= skill.deliver_bar
    right = float(acceptable[delivered].mean()) if delivered.any() else 0.0
    return Judged(model, qualities, float(delivered.mean()), right)


def _constant(quality: float, rows: int) -> QualityModel:
    """A model that says the same of every answer; its rules (empty, cut off, invalid) hold all the same."""
    from dataclasses import replace

    from server.quality.curve import Curve
    from server.quality.model import cold_start

    cold = cold_start()
    return replace(
        cold,
        weights=np.zeros_like(cold.weights),
        hashed=np.zeros(0, np.float32),
        bias=0.0,
        curve=Curve("isotonic", (0.0,), (quality,), 0.0, rows),
        embedded=np.zeros((2, 0), np.float32),
        second=np.zeros(0),
        second_curve=None,
        calibrated=True,
        about={"source": "held-out rows of a training job, all judged alike", "rows": rows},
    )


def verdict(skill: Skill, judged: Judged, mine: Marks, present: Marks | None) -> str:
    """Why the student is not published, or ""."""
    bar, rows = skill.deliver_bar, len(mine.acceptable)
    if judged.share < MIN_SHARE:
        return (
            f"only {judged.share:.1%} of the held-out rows reach the bar {bar:g}; at least {MIN_SHARE:.0%} must. "
            f"{mine.acceptable.mean():.1%} of its answers are acceptable. More traffic may help."
        )
    slack = 2 * math.sqrt(bar * (1 - bar) / max(rows * judged.share, 1.0))
    if judged.delivered < bar - slack:
        return f"of the answers that reach the bar {bar:g} only {judged.delivered:.1%} are acceptable."
    if present is not None:
        test = mcnemar(present.acceptable, mine.acceptable)
        if test["only_first"] > test["only_second"]:
            mean, before = mine.acceptable.mean(), present.acceptable.mean()
            return f"{mean:.2%} of its answers to held-out rows are acceptable, {before:.2%} of the present student's (p {test['p']:.2g})."
    return ""


def minimum(rows: int, least: int, skill: str) -> None:
    """Raises TooLittleData where fewer held-out rows are there than a calibration needs."""
    if rows < least:
        message = f"{skill!r} has {rows} held-out rows with an answer; {least} are needed to measure a student. Let more traffic pass."
        raise TooLittleData(message, rows=rows, minimum=least, skill=skill)
