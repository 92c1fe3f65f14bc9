"""What ensembles decide, in integers; and the whole of one with real candidates, an in-memory vendor and a clock of its own making."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.core import Call, Limits, Preference, Work
from server.errors import BudgetExceeded, DeadlineExceeded, ProviderUnavailable, UnderstudyError
from server.registry.registry import Registry
from server.routing.briefing import Ask
from server.routing.budget import Budget
from server.routing.candidates import Answer, Brief
from server.routing.ensemble import Ensemble, EnsembleAsk, Ensembles
from server.routing.ensemble_members import MemberAsk
from server.routing.ensemble_strategies import (
    Beta,
    Slot,
    Standing,
    Strategy,
    WinTable,
    best,
    best_probabilities,
    draw,
    fewest,
    next_wave,
    ordered,
    rule_of,
    settled,
    verdict,
    weights_of,
)
from server.routing.items import Item
from server.routing.pace import Paces
from server.routing.routes import RouteParts
from server.routing.skills import Skill, SkillBook
from server.settings import BudgetConfig, BudgetLimits, RegistryConfig
from tests.generation_models import NAME
from tests.routing.conftest import LABELS, SURE, Bench, ScriptedProvider

SUMS = Skill("sums", "text-generation", teachers=("eve/m",), max_tokens=24)
NAMES = ("ada", "bob", "cyd", "dee", "eve")


# Pure functions.


def counted(votes: Sequence[int], left: int, running: int = 0) -> Standing:
    """A standing of votes of weight 1: how many say each answer, and how many have not voted."""
    ranked = [*sorted(votes, reverse=True), 0, 0]
    total = sum(votes)
    return Standing(total, (1.0,) * left, running, total, ranked[0], ranked[0] - ranked[1], ranked[0] / total if total else None)


@pytest.mark.parametrize("calls", range(1, 10))
def test_a_vote_is_settled_exactly_where_no_outcome_of_the_rest_differs(calls: int) -> None:
    """By enumeration: two answers and a third that nobody gave yet."""
    for first in range(calls + 1):
        for second in range(calls + 1 - first):
            left = calls - first - second
            if not first + second or first < second:
                continue
            outcomes = set()
            for more in range(left + 1):
                for other in range(left + 1 - more):
                    votes = [first + more, second + other, left - more - other]
                    top = max(votes)
                    outcomes.add((votes.index(top), votes.count(top) == 1 and top / calls >= 0.5))
            certain = outcomes == {(0, True)}
            assert settled(counted([first, second], left), 0.5) == certain, (first, second, left)


def test_the_first_wave_is_a_majority_and_later_ones_are_what_could_decide() -> None:
    rule = rule_of(Strategy.CONSENSUS, 5)
    slots = [Slot(i, 0) for i in range(5)]
    assert rule.needed == 3 and next_wave(rule, counted([], 5), slots) == 3
    assert next_wave(rule, counted([2, 1], 2), slots[3:]) == 1
    assert next_wave(rule, counted([1, 1, 1], 2), slots[3:]) == 2
    assert next_wave(replace(rule, wave_size=2), counted([], 5), slots) == 2
    assert next_wave(rule_of(Strategy.CONSENSUS, 5, quorum=2), counted([], 5), slots) == 2
    assert next_wave(rule_of(Strategy.CONSENSUS, 5, bars=(0.9, 0.8)), counted([], 5), slots) == 5, "four of five are less than 0.9"
    assert next_wave(rule, replace(counted([2, 1], 2), closed=False), slots[3:]) == 2, "texts are only alike: all that is left"


def test_heavier_members_settle_a_vote_with_fewer() -> None:
    assert fewest(Standing(0, tuple(weights_of((0.95, 0.7, 0.6, 0.6), choices=2))), 0.5) == 1
    assert fewest(Standing(0, tuple(weights_of((0.95, 0.7, 0.6, 0.6), choices=10))), 0.5) == 2
    assert fewest(Standing(0, (1.0, 1.0, 1.0, 1.0)), 0.5) == 3
    assert fewest(Standing(0, (1.0, 1.0)), 0.5) == 2 and fewest(Standing(0, ()), 0.5) == 0


def test_weights_are_the_likelihoods_of_independent_members() -> None:
    """By enumeration: of members whose wrong answers are spread evenly over two others, the heaviest answer is the likeliest one."""
    accuracies, choices = (0.9, 0.6, 0.45, 0.4), 3
    weights = weights_of(accuracies, choices)
    for said in itertools.product(range(choices), repeat=len(accuracies)):
        likelihoods = [
            math.prod(p if one == truth else (1 - p) / (choices - 1) for p, one in zip(accuracies, said, strict=True))
            for truth in range(choices)
        ]
        totals = [sum(w for w, one in zip(weights, said, strict=True) if one == answer) for answer in range(choices)]
        assert likelihoods[totals.index(max(totals))] == pytest.approx(max(likelihoods)), said
    assert weights_of((0.8,), 2) == pytest.approx([math.log(4)]), "of two choices: log(p / (1 - p))"
    many = weights_of((0.9, 0.6), 77)
    assert many[0] == pytest.approx(math.log(99)) and many[1] / many[0] == pytest.approx(math.log(76 * 1.5) / math.log(76 * 9))
    assert all(weight > 0 for weight in weights_of((0.0, 0.5, 1.0), 2)), "nobody is worth nothing"


def test_free_calls_come_first_then_first_samples_then_the_heavy() -> None:
    slots = [Slot(0, 0, free=False, weight=3.0), Slot(1, 0), Slot(1, 1), Slot(2, 0, weight=2.0)]
    assert [(slot.member, slot.sample) for slot in ordered(slots)] == [(2, 0), (1, 0), (1, 1), (0, 0)]


@pytest.mark.parametrize(
    ("strategy", "quorum", "standing", "word"),
    [
        (Strategy.CONSENSUS, 0, counted([3], 2), "could not change"),
        (Strategy.CONSENSUS, 0, counted([2, 1], 2), ""),
        (Strategy.CONSENSUS, 0, counted([1], 1), "are needed"),
        (Strategy.CONSENSUS, 0, counted([2, 2], 0), ""),
        (Strategy.CONSENSUS, 0, counted([1, 1, 1, 1], 1), "no answer can reach"),
        (Strategy.CONSENSUS, 3, counted([2, 1], 2), "enough"),
        (Strategy.CONSENSUS, 2, counted([1, 1], 3), ""),
        (Strategy.CONSENSUS, 0, Standing(3, (1.0, 1.0), 0, 3.0, 2.4, 0.5, 0.8, closed=False), "texts agree"),
        (Strategy.CONSENSUS, 0, Standing(3, (1.0, 1.0), 0, 3.0, 1.5, 0.0, 0.5, closed=False), ""),
        (Strategy.BEST_OF_N, 0, Standing(2, (1.0,), 1, confidence=0.9), ""),
        (Strategy.BEST_OF_N, 0, Standing(2, (1.0,), 0, confidence=0.9), "reaches the threshold"),
        (Strategy.BEST_OF_N, 0, Standing(2, (1.0,), 0, confidence=0.7), ""),
        (Strategy.BEST_OF_N, 2, Standing(2, (1.0,), 1, confidence=0.9), "2 answers"),
        (Strategy.SPECIALIST, 0, Standing(0, (1.0,)), ""),
        (Strategy.SPECIALIST, 0, Standing(0, ()), "are needed"),
    ],
)
def test_nobody_else_is_asked_where_it_is_of_no_use(strategy: Strategy, quorum: int, standing: Standing, word: str) -> None:
    found = verdict(rule_of(strategy, 5, quorum), standing)
    assert (word in found) if word else not found, found


def test_the_best_is_the_highest_quality_then_whoever_sets_the_standard() -> None:
    assert best([0.5, 0.9, 0.85], [False] * 3, 0.8) == 1
    assert best([0.5, 0.6, None], [False, False, True], 0.8) == 2
    assert best([0.9, None], [False, True], 0.8) == 0
    assert best([0.5, 0.3, 0.4], [False, True, True], 0.8) == 2
    assert best([0.5, 0.6], [False, False], 0.8) == 1 and best([None, None], [False, False], 0.8) is None


def test_chances_of_being_best_are_those_of_thompson_sampling() -> None:
    posteriors = [Beta(2, 1), Beta(30, 20), Beta(6, 3), Beta(0.5, 0.5)]
    found = best_probabilities(posteriors)
    rng = random.Random(1)
    draws = 40_000
    counts = [0] * 4
    for _ in range(draws):
        sampled = [rng.betavariate(one.wins, one.losses) for one in posteriors]
        counts[sampled.index(max(sampled))] += 1
    assert found == pytest.approx([count / draws for count in counts], abs=0.01) and sum(found) == pytest.approx(1.0)
    assert best_probabilities([Beta(3, 1), Beta(3, 1)]) == pytest.approx([0.5, 0.5])
    assert [draw([0.2, 0.3, 0.5], chance) for chance in (0.0, 0.19, 0.2, 0.49, 0.5, 0.999999)] == [0, 0, 1, 1, 2, 2]


def test_wins_are_counted_over_what_was_stated_and_fade() -> None:
    table = WinTable()
    assert table.posterior("sums", "ada/m") == Beta(2, 1)
    assert table.posterior("sums", "ada/m", 0.9, 100) == Beta(90, pytest.approx(10))
    for _ in range(5000):
        table.count("sums", "ada/m", won=True)
    assert table.posterior("sums", "ada/m").wins <= 503 and table.posterior("other", "ada/m") == Beta(2, 1)
    for _ in range(1000):
        table.count("sums", "ada/m", won=False)
    assert table.posterior("sums", "ada/m").mean < 0.3, "what was long ago counts less"


# Whole ensembles.


class Named(ScriptedProvider):
    """A vendor of its own name whose calls can be held."""

    def __init__(self, name: str, answer: Callable[[str], str | UnderstudyError | None]) -> None:
        super().__init__(answer, cost=7)
        self.name = name


class ByLength:
    """Longer answers are better; with `known` False nothing is known."""

    def __init__(self, known: bool = True) -> None:
        self.known = known

    def look(self, brief: Brief, item: Item, answer: Answer) -> Answer:
        return replace(answer, quality=min(len(answer.reply.text), 100) / 100) if self.known else answer

    async def agree(self, prompt: str, answers: Sequence[Answer], call: Call) -> tuple[int, float]:
        return 0, 0.0


class Table:
    """Ensembles with vendors whose answers a test sets."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.says: dict[str, str | UnderstudyError | None] = {}
        self.vendors = {name: Named(name, self._answer(name)) for name in NAMES}
        self.observed: list[tuple[str, float]] = []

    def _answer(self, name: str) -> Callable[[str], str | UnderstudyError | None]:
        return lambda _text: self.says.get(name, "42")

    def item_done(self, brief: Brief, outcome: Any, elapsed_s: float) -> None:
        self.observed.append((outcome.decision.candidate, elapsed_s))

    def make(self, *skills: Skill, judge: Any = None, budget: Budget | None = None, chance: float = 0.0) -> Ensembles:
        book = SkillBook({skill.name: skill for skill in skills or (SUMS,)}, self.bench.heads)
        parts = RouteParts(book, self.bench.runtime, self.vendors, self.bench.default_model, Paces(), budget=budget)
        judge = judge or ByLength(known=False)
        return Ensembles(parts, self.bench.lake, judge, lambda: "embedder", observer=self, chance=lambda: chance)

    def asked(self) -> dict[str, int]:
        return {name: len(vendor.asked) for name, vendor in self.vendors.items() if vendor.asked}


@pytest.fixture
def table(bench: Bench) -> Table:
    return Table(bench)


def asking(*models: str, skill: str = "sums", text: str = "6 times 7 ?", **more: Any) -> EnsembleAsk:
    limits = more.pop("limits", Limits())
    members = [MemberAsk(model) if isinstance(model, str) else model for model in models or [f"{name}/m" for name in NAMES]]
    return EnsembleAsk(Ask(skill, [Work(text)], limits=limits), members, **more)


def story(found: Ensemble) -> list[tuple[str, str]]:
    return [(hop.candidate, hop.outcome) for hop in found.outcome.decision.hops]


async def test_an_ensemble_is_one_interaction_with_its_calls_as_hops(table: Table) -> None:
    table.says["bob"] = "41"
    found = await table.make().run(asking(), Call("test", user="ada"))
    assert found.outcome.output_text == "42" and found.confidence == 0.75 and table.asked() == dict.fromkeys(NAMES[:4], 1)
    assert story(found) == [("bob/m", "member"), ("cyd/m", "member"), ("dee/m", "member"), ("ada/m", "delivered")]
    (row,) = table.bench.rows
    assert row["interaction_id"] == found.outcome.interaction_id and row["candidate"] == "ada/m" and row["output_text"] == "42"
    assert row["cost_micro_usd"] == 28 and row["input_tokens"] == 80 and len(json.loads(str(row["hops"]))) == 4
    assert row["user_hash"] and row["source_model"] == "m-2026" and table.observed[0][0] == "ada/m"


async def test_members_that_are_held_do_not_hold_up_a_settled_vote(table: Table) -> None:
    gate = table.vendors["dee"].gate = table.vendors["eve"].gate = asyncio.Event()
    found = await table.make().run(asking(wave_size=5), Call("test"))
    assert [shot.outcome for shot in found.shots] == ["chosen", "agreed", "agreed", "cut_off", "cut_off"] and not gate.is_set()
    assert found.outcome.cost_micro_usd == 3 * 7 + 2 * 50, "what was cut off is debited at its worst"
    assert table.asked() == dict.fromkeys(NAMES, 1) and found.waves == 1


async def test_texts_are_compared_by_likeness_numbers_and_negations(table: Table) -> None:
    right = "the transfer of money is late and the card is lost, where is 40 of it"
    table.says |= {"ada": right.replace("40", "400"), "bob": right, "cyd": right.replace("where", "how")}
    found = await table.make().run(asking("ada/m", "bob/m", "cyd/m"), Call("test"))
    assert found.outcome.output_text in (right, table.says["cyd"]) and not found.fell_back
    flipped = next(shot for shot in found.shots if shot.name == "ada/m")
    assert flipped.outcome == "dissented" and "400" in flipped.reason and flipped.share < 0.6 < (found.confidence or 0)


async def test_labels_are_voted_on_by_heads_and_vendors_alike(table: Table) -> None:
    table.bench.student(SURE)
    skill = Skill("intent", instruction="Say what.", labels=LABELS, teachers=("eve/m",), base="embedder")
    table.says |= {"ada": "card", "bob": "card"}
    asked = asking("local:intent", "ada/m", "bob/m", skill="intent", text="where is my card ?")
    found = await table.make(skill).run(asked, Call("test"))
    assert found.outcome.labels[0].name == "card" and found.outcome.decision.local and found.confidence == 1.0
    assert table.asked() == {"ada": 1}, "the student, which is free, and one more are a majority of three"
    row = table.bench.row()
    assert row["student_label"] == "card" and row["student_quality"] is not None


async def test_labels_that_read_alike_are_different_votes(table: Table) -> None:
    skill = Skill("intent", instruction="Say what.", labels=("card", "the card", "card 1", "card one"), teachers=("eve/m",))
    table.says |= {"ada": "the card", "bob": "card", "cyd": "card"}
    found = await table.make(skill).run(asking("ada/m", "bob/m", "cyd/m", skill="intent", quorum=3), Call("test"))
    assert found.outcome.output_text == "card" and found.confidence == pytest.approx(2 / 3)


async def test_samples_of_one_member_teach_nothing_of_it(table: Table) -> None:
    ensembles = table.make()
    found = await ensembles.run(asking(MemberAsk("ada/m", samples=5)), Call("test"))  # type: ignore[arg-type]
    assert found.outcome.output_text == "42" and table.asked() == {"ada": 3}
    assert ensembles.wins.posterior("sums", "ada/m") == Beta(2, 1)


async def test_counted_votes_become_weights(table: Table) -> None:
    ensembles = table.make()
    table.says["cyd"] = "41"
    for _ in range(20):
        await ensembles.run(asking("ada/m", "bob/m", "cyd/m", wave_size=3), Call("test"))
    assert ensembles.wins.posterior("sums", "ada/m").mean > 0.9 > 0.3 > ensembles.wins.posterior("sums", "cyd/m").mean
    table.says = {"ada": "7", "cyd": "8", "bob": "9", "dee": "8"}
    found = await ensembles.run(asking("ada/m", "cyd/m", "dee/m", strategy=Strategy.WEIGHTED), Call("test"))
    assert found.outcome.output_text == "7", "one that was right against two of which one was wrong"


async def test_best_of_n_takes_the_longest_and_pays_for_nothing_else(table: Table) -> None:
    await table.bench.runtime.load(NAME)
    ensembles = table.make(judge=ByLength())
    local = MemberAsk(f"local:{NAME}", samples=4)
    asked = asking(local, "ada/m", strategy=Strategy.BEST_OF_N, threshold=0.01)  # type: ignore[arg-type]
    found = await ensembles.run(asked, Call("test"))
    qualities = [shot.answer.quality or 0.0 for shot in found.shots if shot.answer is not None]
    assert len(qualities) == 4 and found.outcome.quality == max(qualities) and table.asked() == {} and found.waves == 1
    assert found.outcome.cost_micro_usd == 0 and found.outcome.decision.local
    found = await table.make(judge=ByLength(known=False)).run(asked, Call("test"))
    assert table.asked() == {"ada": 1} and found.outcome.decision.candidate == "ada/m", "where no quality is known the paid one is asked"


async def test_a_specialist_is_drawn_and_its_chance_is_kept(table: Table) -> None:
    strong, weak = MemberAsk("ada/m", 1, 0.8, 10), MemberAsk("bob/m", 1, 0.6, 10)
    asked = asking(strong, weak, strategy=Strategy.SPECIALIST)  # type: ignore[arg-type]
    found = await table.make(chance=0.0).run(asked, Call("test"))
    first = found.outcome.decision.propensity
    assert table.asked() == {"ada": 1} and 0.7 < first < 0.95 and found.confidence == pytest.approx(0.8)
    found = await table.make(chance=0.999).run(asked, Call("test"))
    assert table.asked() == {"ada": 1, "bob": 1} and found.outcome.decision.propensity == pytest.approx(1 - first)
    assert table.bench.row()["propensity"] == pytest.approx(1 - first)


async def test_the_route_is_taken_without_asking_anybody_again(table: Table) -> None:
    table.says |= {"ada": "1", "bob": "2", "eve": "3"}
    found = await table.make().run(asking("ada/m", "bob/m", "eve/m"), Call("test"))
    assert found.fell_back and found.outcome.output_text == "3" and table.asked() == {"ada": 1, "bob": 1, "eve": 1}
    assert found.outcome.cost_micro_usd == 21 and len(table.bench.rows) == 1
    table.says["eve"] = ProviderUnavailable("down")
    found = await table.make().run(asking("ada/m", "bob/m", "eve/m"), Call("test"))
    assert isinstance(found.outcome.error, ProviderUnavailable) and table.asked()["eve"] == 2
    assert all(word in str(found.outcome.error) for word in ("ada/m", "bob/m", "down")) and table.bench.row()["error"]


async def test_too_few_members_end_it_before_the_rest_are_paid(table: Table) -> None:
    table.says |= dict.fromkeys(("ada", "bob", "cyd"), ProviderUnavailable("down"))
    found = await table.make().run(asking(members_only=True, wave_size=3), Call("test"))
    assert isinstance(found.outcome.error, ProviderUnavailable) and table.asked() == {"ada": 1, "bob": 1, "cyd": 1}
    assert "are needed" in found.stopped


async def test_a_deadline_with_nobody_is_named(table: Table) -> None:
    table.says |= dict.fromkeys(NAMES)
    found = await table.make().run(asking(members_only=True, max_latency_s=0.2), Call("test"))
    assert isinstance(found.outcome.error, DeadlineExceeded) and found.outcome.error.metadata["stage"] == "provider"


async def test_a_caller_that_leaves_leaves_its_row(table: Table) -> None:
    table.vendors["ada"].gate = asyncio.Event()
    run = asyncio.ensure_future(table.make().run(asking("ada/m"), Call("test")))
    while not table.asked():
        await asyncio.sleep(0)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    row = table.bench.row()
    assert row["error"] == "CANCELLED" and row["cost_micro_usd"] == 50


async def test_a_wave_is_reserved_for_whole_and_never_over(table: Table, tmp_path: Path) -> None:
    registry = Registry(RegistryConfig(url=f"sqlite:///{tmp_path}/registry.db"))
    config = BudgetConfig(total=BudgetLimits(day_usd=0.000170), stop_at=1.0, alert_at=1.0)  # three calls at their worst
    budget = Budget(config, registry)
    await budget.start()
    ensembles = table.make(budget=budget)
    gates = {name: asyncio.Event() for name in NAMES}
    for name, gate in gates.items():
        table.vendors[name].gate = gate
    first = asyncio.ensure_future(ensembles.run(asking(members_only=True), Call("test")))
    while len(table.asked()) < 3:
        await asyncio.sleep(0)
    (status,) = await budget.report()
    assert status.reserved_micro_usd == 150, "all three of the wave, while none has answered"
    second = await ensembles.run(asking(members_only=True), Call("test"))
    assert isinstance(second.outcome.error, BudgetExceeded) and table.asked() == {"ada": 1, "bob": 1, "cyd": 1} and second.waves == 0
    for gate in gates.values():
        gate.set()
    assert (await first).outcome.output_text == "42"
    third = await ensembles.run(asking(members_only=True), Call("test"))
    assert third.outcome.error is None or isinstance(third.outcome.error, BudgetExceeded)
    (status,) = await budget.report()
    assert status.reserved_micro_usd == 0 and status.spent_micro_usd == 7 * sum(table.asked().values())
    await budget.close()
    registry.close()


async def test_the_calls_own_limit_counts_the_wave(table: Table) -> None:
    limits = Limits(max_cost_micro_usd=80)  # one at its worst, and what is left of others
    found = await table.make().run(asking("ada/m", "bob/m", limits=limits, members_only=True), Call("test"))
    assert isinstance(found.outcome.error, BudgetExceeded) and table.asked() == {}, "both are needed, and both together have no room"
    found = await table.make().run(asking(limits=limits, wave_size=1), Call("test"))
    assert found.outcome.output_text == "42" and found.outcome.cost_micro_usd == 21, "what was not used of the worst case is there again"


async def test_preferences_and_members_must_not_contradict(table: Table) -> None:
    from server.errors import InvalidArgument

    for preference, model in ((Preference.LOCAL_ONLY, "ada/m"), (Preference.PROVIDER_ONLY, "local:embedder")):
        with pytest.raises(InvalidArgument, match="contradict"):
            await table.make().run(asking(model, limits=Limits(preference)), Call("test"))
