"""Who answers, in which order, at what price, and what is written down of it."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from server.core import Call, Preference
from server.errors import BudgetExceeded, Cancelled, DeadlineExceeded, FailedPrecondition, ProviderUnavailable, SkillNotFound
from server.lake.schema import columns
from server.routing.skills import Skill
from tests.routing.conftest import SURE, TEXTS, UNSURE, Bench, ScriptedProvider, ask

TEXT = TEXTS["card"][0]


def call(**more: object) -> Call:
    return Call("r1", **more)  # type: ignore[arg-type]


def hops(outcome: object) -> list[tuple[str, str]]:
    return [(hop.candidate, hop.outcome) for hop in outcome.decision.hops]  # type: ignore[attr-defined]


async def test_without_a_student_the_teacher_answers(bench: Bench) -> None:
    provider = ScriptedProvider(lambda text: "card")
    (outcome,) = (await bench.router(provider).run(ask(TEXT), call(user="user-of-mine"))).items
    assert outcome.output_text == "card" and outcome.error is None and not outcome.decision.local
    assert hops(outcome) == [("vendor/big", "delivered")]
    assert (outcome.cost_micro_usd, outcome.usage.input, outcome.decision.rollout_stage) == (7, 20, "held")
    row = bench.row()
    assert row["teacher_label"] == "card" and row["source_model"] == "big-2026" and row["training_allowed"] is True
    assert row["interaction_id"] == outcome.interaction_id and bench.lake.ids.valid(outcome.interaction_id)
    assert row["user_hash"] and "user-of-mine" not in json.dumps(row)
    assert set(row) - {"time_ns"} <= set(columns("interactions"))


async def test_a_teachers_odds_are_kept_where_the_skill_says_so_and_the_vendor_gives_them(bench: Bench) -> None:
    provider = ScriptedProvider(lambda text: "from you")
    for teacher, kept in (("vendor/open", 2), ("vendor/big", 2), ("vendor/open", 0)):
        skill = Skill("intent", "text-generation", teachers=(teacher,), teacher_logprobs=kept)
        (outcome,) = (await bench.router_of(skill, {"vendor": provider}).run(ask(TEXT), call())).items
        assert outcome.output_text == "from you"
        told = json.loads(str(bench.row()["teacher_tokens"] or "null"))
        if kept and teacher == "vendor/open":
            assert told == [[word, -0.5, [[word, -0.5], ["x", -1.5]]] for word in ("from", "you")]
        else:
            assert told is None


async def test_a_sure_student_answers_alone_and_for_nothing(bench: Bench) -> None:
    bench.student(SURE)
    provider = ScriptedProvider(lambda text: "card")
    texts = [text for label in TEXTS for text in TEXTS[label]]
    results = await bench.router(provider).run(ask(*texts), call())
    gold = [label for label in TEXTS for _ in TEXTS[label]]
    assert [outcome.output_text for outcome in results.items] == gold
    assert provider.asked == [] and all(outcome.decision.local and outcome.cost_micro_usd == 0 for outcome in results.items)
    first = results.items[0]
    assert hops(first) == [("local:intent@1", "delivered")]
    assert first.quality == pytest.approx(0.97, abs=1e-4) and first.decision.rollout_stage == "full"
    assert first.labels[0].name == "card" and len(first.labels) == 3
    assert (bench.row()["student"], bench.row()["student_version"], bench.row()["teacher_label"]) == ("intent", "1", None)
    assert results.timings.run > 0


async def test_below_the_bar_the_teacher_decides_and_both_are_kept(bench: Bench) -> None:
    bench.student(UNSURE)
    provider = ScriptedProvider(lambda text: "transfer")
    (outcome,) = (await bench.router(provider).run(ask(TEXT), call())).items
    assert outcome.output_text == "transfer" and hops(outcome) == [("local:intent@1", "below_bar"), ("vendor/big", "delivered")]
    assert outcome.quality is None, "a teacher sets the standard; nobody scored it"
    row = bench.row()
    assert (row["teacher_label"], row["student_label"]) == ("transfer", "card") and row["student_quality"] < 0.01  # type: ignore[operator]


async def test_preferences(bench: Bench) -> None:
    provider = ScriptedProvider(lambda text: "card")
    router = bench.router(provider)
    with pytest.raises(FailedPrecondition, match="understudy train"):
        await router.run(ask(TEXT, preference=Preference.LOCAL_ONLY), call())
    bench.student(UNSURE)
    (outcome,) = (await router.run(ask(TEXT, preference=Preference.LOCAL_ONLY), call())).items
    assert outcome.error is not None and hops(outcome) == [("local:intent@1", "below_bar")] and provider.asked == []
    bench.student(SURE)
    (outcome,) = (await router.run(ask(TEXT, preference=Preference.PROVIDER_ONLY), call())).items
    assert hops(outcome) == [("vendor/big", "delivered")]
    with pytest.raises(FailedPrecondition, match="teacher"):
        await bench.router(None).run(ask(TEXT, preference=Preference.PROVIDER_ONLY), call())


async def test_a_student_that_was_not_measured_may_not_answer(bench: Bench) -> None:
    bench.student(None)
    provider = ScriptedProvider(lambda text: "card")
    (outcome,) = (await bench.router(provider).run(ask(TEXT), call())).items
    assert not outcome.decision.local and outcome.decision.rollout_stage == "held"
    with pytest.raises(FailedPrecondition, match="not calibrated"):
        await bench.router(None).run(ask(TEXT), call())


async def test_a_student_of_other_labels_or_another_base_may_not_answer(bench: Bench) -> None:
    bench.student(SURE)
    provider = ScriptedProvider(lambda text: "card")
    router = bench.router(provider, labels=("card", "transfer", "password", "new"))
    (outcome,) = (await router.run(ask(TEXT), call())).items
    assert not outcome.decision.local and outcome.decision.rollout_stage == "held"
    with pytest.raises(FailedPrecondition, match="labels have changed"):
        await router.run(ask(TEXT, preference=Preference.LOCAL_ONLY), call())
    bench.student(SURE, base_sha256="0" * 64)
    (outcome,) = (await bench.router(provider).run(ask(TEXT), call())).items
    assert hops(outcome) == [("local:intent@2", "failed"), ("vendor/big", "delivered")]


async def test_a_cost_limit_holds_before_anything_is_asked(bench: Bench) -> None:
    provider = ScriptedProvider(lambda text: "card")
    (outcome,) = (await bench.router(provider).run(ask(TEXT, max_cost_micro_usd=49), call())).items
    assert isinstance(outcome.error, BudgetExceeded) and hops(outcome) == [("vendor/big", "skipped")] and provider.asked == []
    (outcome,) = (await bench.router(provider, max_cost=10).run(ask(TEXT, max_cost_micro_usd=50), call())).items
    assert outcome.error is None, "the request's own limit comes before the skill's"


async def test_equal_texts_are_paid_once(bench: Bench) -> None:
    provider = ScriptedProvider(lambda text: "card")
    results = await bench.router(provider).run(ask(TEXT, "another", TEXT, TEXT), call())
    assert sorted(provider.asked) == sorted([TEXT, "another"])
    assert sum(outcome.cost_micro_usd for outcome in results.items) == 14
    assert all(outcome.output_text == "card" for outcome in results.items)
    assert len({outcome.interaction_id for outcome in results.items}) == 4


async def test_items_fail_alone_and_what_was_paid_is_counted(bench: Bench) -> None:
    answers = {"good": "card", "chatty": "I think that it is about a card", "down": ProviderUnavailable("down")}
    provider = ScriptedProvider(lambda text: answers[text])
    results = await bench.router(provider).run(ask(*answers), call())
    good, chatty, down = results.items
    assert good.output_text == "card"
    assert isinstance(chatty.error, ProviderUnavailable) and chatty.cost_micro_usd == 7 and hops(chatty) == [("vendor/big", "failed")]
    assert "chatty" not in str(chatty.error) and "about a card" not in str(chatty.error)
    assert isinstance(down.error, ProviderUnavailable)
    assert [row["error"] for row in bench.rows] == [None, "PROVIDER_UNAVAILABLE", "PROVIDER_UNAVAILABLE"]
    assert provider.asked.count("chatty") == 1, "paid once"


async def test_a_text_too_long_for_the_base_goes_to_the_teacher(bench: Bench) -> None:
    bench.student(SURE)
    provider = ScriptedProvider(lambda text: "transfer")
    long = "card " * 100
    results = await bench.router(provider).run(ask(TEXT, long), call())
    assert [outcome.decision.local for outcome in results.items] == [True, False]
    assert hops(results.items[1]) == [("local:intent@1", "failed"), ("vendor/big", "delivered")]
    assert provider.asked == [long]


async def test_an_unloaded_base_leaves_the_teacher(bench: Bench) -> None:
    bench.student(SURE)
    await bench.runtime.unload("embedder")
    provider = ScriptedProvider(lambda text: "card")
    (outcome,) = (await bench.router(provider).run(ask(TEXT), call())).items
    assert hops(outcome) == [("local:intent@1", "failed"), ("vendor/big", "delivered")]


async def test_an_open_circuit_is_passed_over(bench: Bench) -> None:
    provider = ScriptedProvider(lambda text: "card")
    provider.circuit = "failed again and again"
    (outcome,) = (await bench.router(provider).run(ask(TEXT), call())).items
    assert hops(outcome) == [("vendor/big", "skipped")] and isinstance(outcome.error, ProviderUnavailable) and provider.asked == []


async def test_the_deadline_ends_the_slow_items_and_keeps_the_quick(bench: Bench) -> None:
    provider = ScriptedProvider(lambda text: "card" if text == "quick" else None)
    started = time.monotonic()
    results = await bench.router(provider).run(ask("quick", "slow"), call(deadline=started + 0.5))
    assert time.monotonic() < started + 0.5, "in time for the caller"
    assert results.items[0].output_text == "card" and isinstance(results.items[1].error, DeadlineExceeded)


async def test_a_caller_that_leaves_loses_no_paid_answer(bench: Bench) -> None:
    provider = ScriptedProvider(lambda text: "card" if text == "quick" else None)
    running = asyncio.ensure_future(bench.router(provider).run(ask("quick", "slow"), call()))
    while len(provider.asked) < 2:
        await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    quick, slow = bench.rows
    assert (quick["teacher_label"], quick["error"], quick["cost_micro_usd"]) == ("card", None, 7)
    assert (slow["teacher_label"], slow["error"]) == (None, Cancelled.reason)


async def test_unknown_skills_name_the_near_ones(bench: Bench) -> None:
    with pytest.raises(SkillNotFound, match="'intent'"):
        await bench.router(None).run(ask(TEXT, skill="intnt"), call())


async def test_answers_are_delivered_when_the_disk_is_full(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    def full(records: object) -> None:
        raise OSError(28, "No space left on device")

    bench.lake._logs["interactions"].append_frames = full  # type: ignore[method-assign, assignment]
    (outcome,) = (await bench.router(ScriptedProvider(lambda text: "card")).run(ask(TEXT), call())).items
    assert outcome.output_text == "card" and bench.lake.counters().held == 1 and "No space left" in caplog.text
