"""Bar `ensembles`: each strategy's property on real questions, by the server's own ensembles in this process.

Votes and specialists are SIMULATED members on GSM8K's questions: each errs by itself with a stated probability, and a wrong answer is one
that a real model gives, a step of the solution, a slip of one, a factor of ten, swapped digits. Best of n takes EVOUNA's real answers of
five systems, by a quality model that had not seen the question. Texts are SciTLDR's, compared by the real embedder.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import re
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import ROOT, SHARED, STARTER, Row, part, row_of
from server.config import RuntimeConfig
from server.core import Call, FinishReason, Usage, Work
from server.lake.lake import Lake
from server.providers.base import Completion, Health, Prompt
from server.quality.agreement import normal
from server.routing.briefing import Ask
from server.routing.candidates import Answer, Brief
from server.routing.ensemble import Ensemble, EnsembleAsk, Ensembles
from server.routing.ensemble_members import MemberAsk
from server.routing.ensemble_strategies import Strategy
from server.routing.items import Item
from server.routing.pace import Paces
from server.routing.routes import RouteParts
from server.routing.skills import Skill, SkillBook
from server.runtime.loader import make_loader
from server.runtime.observer import NullObserver
from server.runtime.repository import Repository
from server.runtime.runtime import Runtime

ENSEMBLES = (
    "simulated members on GSM8K: the vote beats each member, weights beat the plain vote, an early stop changes no answer, specialists "
    "find the best member; best of n beats a random pick of real answers; the medoid takes no flipped number"
)
DATA = SHARED / "data"
SKILL = Skill("sums", "text-generation", max_tokens=256)
QUESTIONS = 2000
EVEN = {"ada": 0.66, "bob": 0.63, "cyd": 0.6, "dee": 0.57, "eve": 0.54}
UNEVEN = {"ada": 0.85, "bob": 0.6, "cyd": 0.55, "dee": 0.5, "eve": 0.5}
TEXTS = 150
_NEGATED = re.compile(r"\b(not|no|nor|never|none|cannot|without|neither|nothing|nobody|hardly|fails?)\b|n['’]t\b", re.IGNORECASE)


@dataclass
class Speaker:
    """A provider in this process: says what `answers` has for the last message. `asked` counts."""

    name: str
    answers: Callable[[str], str]
    training_allowed: bool = False
    asked: int = 0

    async def complete(self, model: str, prompt: Prompt, deadline: float | None) -> Completion:
        self.asked += 1
        return Completion(self.answers(prompt.messages[-1].content), Usage(1, 1), model, 1, 1, finish=FinishReason.STOP)

    def gives_logprobs(self, model: str) -> bool:
        return False

    def worst_cost_micro_usd(self, model: str, prompt: Prompt) -> int | None:
        return 1

    def open_circuit(self) -> str:
        return ""

    def health(self) -> Health:
        return Health()

    async def close(self) -> None:
        pass


@dataclass
class ByTable:
    """Gives each answer the quality that a table has for (question, answer); `agreed` for answers whose support by others is known."""

    qualities: Mapping[tuple[str, str], float] = field(default_factory=dict)
    agreed: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def look(self, brief: Brief, item: Item, answer: Answer) -> Answer:
        known = self.qualities if answer.signals.agreement is None or not self.agreed else self.agreed
        return replace(answer, quality=known.get((item.work.plain, answer.reply.text)))

    async def agree(self, prompt: str, answers: Sequence[Answer], call: Call) -> tuple[int, float]:
        return 0, 0.0


class _NoHeads:
    def current(self, skill: str) -> None:
        return None


@asynccontextmanager
async def _table(speakers: Sequence[Speaker], judge: Any, *, embedder: bool = False, chance: Any = None) -> AsyncIterator[Ensembles]:
    """The server's ensembles with these providers, a lake of their own and, if asked for, the starter as the embedder."""
    runtime = Runtime(Repository(ROOT / "models"), make_loader(RuntimeConfig(), NullObserver()))
    if embedder:
        await runtime.load(STARTER)
    with tempfile.TemporaryDirectory(prefix="understudy-ensembles-") as folder:
        lake = Lake(Path(folder))
        lake.start()
        book = SkillBook({SKILL.name: SKILL}, _NoHeads())
        providers: dict[str, Any] = {one.name: one for one in speakers}
        parts = RouteParts(book, runtime, providers, lambda task: STARTER, Paces())
        more = {} if chance is None else {"chance": chance}
        try:
            yield Ensembles(parts, lake, judge, lambda: STARTER, **more)
        finally:
            await asyncio.to_thread(lake.close)
            await runtime.close()


def _asked(question: str, members: Sequence[MemberAsk], strategy: Strategy, **more: Any) -> EnsembleAsk:
    return EnsembleAsk(Ask(SKILL.name, [Work(question)]), members, strategy, members_only=True, **{"threshold": 0.0, **more})


def _chance(*words: str) -> float:
    """A number in [0, 1) that depends on the words alone."""
    return int.from_bytes(hashlib.blake2b("\0".join(words).encode(), digest_size=8).digest(), "big") / 2**64


# GSM8K, simulated members.


def sums(limit: int, skip: int = 0) -> dict[str, tuple[str, list[int]]]:
    """Questions with the solution's number and the wrong ones that a solver could come to."""
    found: dict[str, tuple[str, list[int]]] = {}
    with gzip.open(DATA / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number < skip:
                continue
            row = json.loads(line)
            gold = row["answer"].rpartition("#### ")[2].replace(",", "").strip()
            if not re.fullmatch(r"-?\d+", gold):
                continue
            value = int(gold)
            steps = [int(step) for step in re.findall(r"=(\d+)>>", row["answer"])]
            swapped = int(gold[::-1]) if len(gold) > 1 and gold.isdigit() else value + 2
            wrong = [one for one in (*steps, value + 1, value - 1, value * 10, value * 2, swapped) if one != value]
            found[row["question"]] = (gold, wrong)
            if len(found) == limit:
                break
    return found


def simulated(name: str, accuracy: float, table: Mapping[str, tuple[str, list[int]]]) -> Speaker:
    """A simulated member: right on a share of the questions that is its own, whatever the others do."""

    def answer(question: str) -> str:
        gold, wrong = table[question]
        said = gold if _chance(name, "right", question) < accuracy else str(wrong[int(_chance(name, "which", question) * len(wrong))])
        shown = f"{int(said):,}"
        return f"Step by step it comes to this.\n#### {shown}" if _chance(name, "form", question) < 0.5 else f"The answer is {shown}."

    return Speaker(name, answer)


def _right(found: Ensemble, gold: str) -> bool:
    return found.outcome.error is None and normal(found.outcome.output_text) == normal(gold)


async def _votes() -> list[dict[str, Any]]:
    table, seen = sums(QUESTIONS), sums(500, skip=QUESTIONS + 500)
    even = [simulated(name, accuracy, {**table, **seen}) for name, accuracy in EVEN.items()]
    each = {one.name: _accuracy(one, table) for one in even}
    plain, calls, differing, confident, delivered = 0, 0, 0, 0, 0
    members = [MemberAsk(f"{name}/m") for name in EVEN]
    async with _table(even, ByTable()) as ensembles:
        for question, (gold, _) in table.items():
            early = await ensembles.run(_asked(question, members, Strategy.CONSENSUS), Call("bench"))
            whole = await ensembles.run(_asked(question, members, Strategy.CONSENSUS, quorum=5), Call("bench"))
            sure = await ensembles.run(_asked(question, members, Strategy.CONSENSUS, threshold=None), Call("bench"))
            plain += _right(early, gold)
            calls += sum(shot.wave > 0 for shot in early.shots)
            differing += normal(early.outcome.output_text) != normal(whole.outcome.output_text)
            delivered += sure.outcome.error is None
            confident += _right(sure, gold)
    accuracy, best = plain / len(table), max(each.values())
    shown = {"simulated_members": each, "vote": round(accuracy, 4), "questions": len(table), "ties": "counted as wrong"}
    shown |= {"delivered_at_half_the_votes": round(delivered / len(table), 4), "right_of_those": round(confident / max(delivered, 1), 4)}
    return [
        part("vote's lead over its best simulated member", "> 0", round(accuracy - best, 4), accuracy > best, **shown),
        part("answers that an early stop changed", "0", differing, differing == 0, calls_of_5=round(calls / len(table), 3)),
        *await _weights(table, seen),
    ]


def _accuracy(one: Speaker, table: Mapping[str, tuple[str, list[int]]]) -> float:
    return round(sum(normal(one.answers(question)) == normal(gold) for question, (gold, _) in table.items()) / len(table), 4)


async def _weights(table: Mapping[str, tuple[str, list[int]]], seen: Mapping[str, tuple[str, list[int]]]) -> list[dict[str, Any]]:
    """Weights from accuracies seen on 500 other questions, and from what consensus counted on those, against the plain vote."""
    uneven = [simulated(name, accuracy, {**table, **seen}) for name, accuracy in UNEVEN.items()]
    known = [MemberAsk(f"{one.name}/m", accuracy=min(max(_accuracy(one, seen), 0.01), 0.99)) for one in uneven]
    unknown = [MemberAsk(f"{one.name}/m") for one in uneven]
    right = {"plain": 0, "stated": 0, "counted": 0}
    async with _table(uneven, ByTable()) as plain, _table(uneven, ByTable()) as stated, _table(uneven, ByTable()) as counted:
        for question in seen:
            await counted.run(_asked(question, unknown, Strategy.CONSENSUS, quorum=5), Call("bench"))
        for question, (gold, _) in table.items():
            right["plain"] += _right(await plain.run(_asked(question, unknown, Strategy.CONSENSUS), Call("bench")), gold)
            right["stated"] += _right(await stated.run(_asked(question, known, Strategy.WEIGHTED), Call("bench")), gold)
            right["counted"] += _right(await counted.run(_asked(question, unknown, Strategy.WEIGHTED), Call("bench")), gold)
    shares = {name: round(count / len(table), 4) for name, count in right.items()}
    each = {one.name: _accuracy(one, table) for one in uneven}
    over_plain, over_best = (round(min(shares["stated"], shares["counted"]) - other, 4) for other in (shares["plain"], max(each.values())))
    return [
        part("weighted vote's lead over the plain one", "> 0", over_plain, over_plain > 0, simulated_members=each, **shares),
        part("weighted vote's lead over its best simulated member", "> 0", over_best, over_best > 0),
    ]


async def _specialists() -> dict[str, Any]:
    """One member a call, by what was learned of each: a judge that knows the solutions says whether an answer is right."""
    table = sums(1000)
    uneven = [simulated(name, accuracy, table) for name, accuracy in UNEVEN.items()]
    qualities = {(q, one.answers(q)): float(normal(one.answers(q)) == normal(gold)) for q, (gold, _) in table.items() for one in uneven}
    rng = np.random.default_rng(3)
    right = []
    members = [MemberAsk(f"{one.name}/m") for one in uneven]
    async with _table(uneven, ByTable(qualities), chance=rng.random) as ensembles:
        for question, (gold, _) in table.items():
            found = await ensembles.run(_asked(question, members, Strategy.SPECIALIST, threshold=0.5), Call("bench"))
            right.append(_right(found, gold))
        calls = sum(one.asked for one in uneven)
    late = float(np.mean(right[500:]))
    best = _accuracy(uneven[0], table)
    shown = {"best_member": best, "mean_member": round(float(np.mean([_accuracy(one, table) for one in uneven])), 4)}
    shown |= {
        "first_100": round(float(np.mean(right[:100])), 4),
        "calls_each": calls / len(table),
        "asked": {m.name: m.asked for m in uneven},
    }
    return part(
        "specialist, last 500 of 1,000, below its best simulated member", "<= 0.03", round(best - late, 4), best - late <= 0.03, **shown
    )


# EVOUNA, real answers.


async def _best_of_five() -> list[dict[str, Any]]:
    """Five systems' real answers to a question, judged by people: the one of the highest quality, by one answer and by all of them."""
    from trainer.quality import fit, judged_of, read, with_support

    lines = list(read(DATA / "answer_quality_human" / "evouna_qa_human.jsonl.gz"))
    judged = with_support(judged_of(lines, {"prompt": "question", "acceptable": "correct"}))
    fitted = fit(judged)
    by_question: dict[str, list[tuple[str, bool, float, float]]] = {}
    for one, alone, agreed in zip(judged, fitted.alone.tolist(), fitted.agreed.tolist(), strict=True):
        by_question.setdefault(one.observed.prompt, []).append((one.observed.answer, one.acceptable, alone, agreed))
    fives = {question: rows for question, rows in by_question.items() if len({row[0] for row in rows}) == len(rows) == 5}
    speakers = [Speaker(name, lambda question, place=place: fives[question][place][0]) for place, name in enumerate(EVEN)]  # type: ignore[misc]
    alone = {(question, row[0]): row[2] for question, rows in fives.items() for row in rows}
    agreed = {(question, row[0]): row[3] for question, rows in fives.items() for row in rows}
    by_one, by_all = await _picked(fives, speakers, ByTable(alone)), await _picked(fives, speakers, ByTable(alone, agreed))
    each = np.array([[row[1] for row in rows] for rows in fives.values()]).mean(axis=0)
    random, top = float(each.mean()), float(each.max())
    shown = {"random_pick": round(random, 4), "best_system": round(top, 4), "questions": len(fives)}
    name = "best of five real answers over a random pick"
    return [
        part(
            name,
            "> 0",
            round(by_all - random, 4),
            by_all > random,
            right=round(by_all, 4),
            over_best_system=round(by_all - top, 4),
            **shown,
        ),
        part(f"{name}, each answer scored alone", "> 0", round(by_one - random, 4), by_one > random, right=round(by_one, 4), **shown),
    ]


async def _picked(fives: Mapping[str, Sequence[tuple[str, bool, float, float]]], speakers: Sequence[Speaker], judge: ByTable) -> float:
    """The share of questions whose picked answer people accept."""
    members = [MemberAsk(f"{one.name}/m") for one in speakers]
    good = []
    async with _table(speakers, judge) as ensembles:
        for question, rows in fives.items():
            found = await ensembles.run(_asked(question, members, Strategy.BEST_OF_N, threshold=1.0, wave_size=5), Call("bench"))
            said = found.outcome.output_text.strip()
            good.append(next(row[1] for row in rows if row[0].strip() == said))
    return float(np.mean(good))


# SciTLDR, the real embedder.


def _sentences() -> list[tuple[str, str, str]]:
    """Texts of SciTLDR with a number of two digits or more, the same with another number, and with its first verb negated, or ""."""
    found = []
    rng = np.random.default_rng(4)
    for line in (DATA / "summarization" / "scitldr_a_test.jsonl").read_text(encoding="utf-8").splitlines():
        source = json.loads(line)["source"]
        for start in range(len(source) - 1):
            text = " ".join(sentence.strip() for sentence in source[start : start + 2])
            numbers = list(re.finditer(r"(?<![\w.])\d{2,}(?![\w.])", text))
            if numbers:
                at = numbers[int(rng.integers(len(numbers)))]
                flipped = text[: at.start()] + str(int(at[0]) + int(rng.integers(1, 9))) + text[at.end() :]
                negated, changed = re.subn(r"\b(is|are|can|does|do|was|were)\b", r"\1 not", text, count=1)
                found.append((text, flipped, negated if changed and not _NEGATED.search(text) else ""))
                break
    return found


async def _texts() -> list[dict[str, Any]]:
    """Four members say a text in their own words, one of them with another number, or its contrary: whose text is taken."""
    sentences = _sentences()
    lines: dict[str, list[str]] = {}
    for kind, place in (("number", 1), ("negation", 2)):
        for number, text in enumerate([one for one in sentences if one[place]][:TEXTS]):
            right, wrong = text[0], text[place]
            said = [f"In short: {right}", wrong, f"{right} This is the gist.", f"Sure! {right} I hope that this helps."]
            lines[f"{kind} {number}"] = said
    names = list(EVEN)[:4]
    speakers = [Speaker(name, lambda question, place=place: lines[question][place]) for place, name in enumerate(names)]  # type: ignore[misc]
    members = [MemberAsk(f"{name}/m") for name in names]
    taken = {"number": 0, "negation": 0}
    told = {"number": 0, "negation": 0}
    asked = {"number": 0, "negation": 0}
    by_cosine = {"number": 0, "negation": 0}
    async with _table(speakers, ByTable(), embedder=True) as ensembles:
        for question, said in lines.items():
            kind = question.partition(" ")[0]
            found = await ensembles.run(_asked(question, members, Strategy.CONSENSUS, threshold=None, quorum=4), Call("bench"))
            asked[kind] += 1
            vectors = await ensembles.texts.of(said, {}, Call("bench"))
            by_cosine[kind] += vectors is not None and int((vectors @ vectors.T).sum(axis=1).argmax()) == 1
            taken[kind] += found.outcome.error is None and found.outcome.output_text == said[1]
            told[kind] += found.shots[1].outcome == "dissented"
    number, negation = (
        {"texts": asked[kind], "told_as_dissent": told[kind], "by_cosine_alone": by_cosine[kind]} for kind in ("number", "negation")
    )
    taken_name = "SciTLDR texts of which the consensus took the one with"
    return [
        part(f"{taken_name} a flipped number", "0", taken["number"], taken["number"] == 0, **number),
        # A second negation in a text that has one already changes nothing that is looked at.
        part(f"{taken_name} a negation, where none was before", "0", taken["negation"], taken["negation"] == 0, **negation),
    ]


def ensembles() -> Row:
    """All properties; see the module."""

    async def measure() -> list[dict[str, Any]]:
        return [*await _votes(), await _specialists(), *await _best_of_five(), *await _texts()]

    if not DATA.is_dir():
        return Row("ensembles", ENSEMBLES, f"not measured: {DATA} is not there", False)
    return row_of("ensembles", ENSEMBLES, asyncio.run(measure()))
