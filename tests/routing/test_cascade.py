"""Deliver, second try, escalate: a real decoder as the student, whose answers a scripted judge scores."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from server.core import Call, Outcome, Preference, Work
from server.errors import ProviderUnavailable, UnderstudyError
from server.routing.briefing import Ask
from server.routing.candidates import Answer, Brief
from server.routing.difficulty import DifficultyEstimate
from server.routing.items import Item
from server.routing.pace import Paces
from server.routing.router import Router
from server.routing.routes import RouteParts
from server.routing.skills import Skill, SkillBook
from tests.generation_models import ANSWER, NAME
from tests.routing.conftest import Bench, ScriptedProvider

LOCAL = f"local:{NAME}@1"
SKILL = Skill("chat", "text-generation", teachers=("vendor/big",), student_model=NAME, rollout="full", max_tokens=24)
QUESTION = "where is my card"


class ScriptedJudge:
    """Gives each look the next quality of a list, the last one again and again; `agreed` of two answers is chosen."""

    def __init__(self, *qualities: float | None, agreed: int = 1) -> None:
        self.qualities = list(qualities)
        self.looks: list[str] = []
        self.agreed = agreed
        self.compared = 0

    def look(self, brief: Brief, item: Item, answer: Answer) -> Answer:
        self.looks.append(answer.reply.text)
        quality = self.qualities.pop(0) if len(self.qualities) > 1 else self.qualities[0]
        return replace(answer, quality=quality, findings=("it was not looked at",) if quality is None else ())

    async def agree(self, prompt: str, answers: Sequence[Answer], call: Call) -> tuple[int, float]:
        self.compared += 1
        return self.agreed, 0.5


@pytest.fixture
async def made(bench: Bench) -> Callable[..., tuple[Router, ScriptedProvider]]:
    await bench.runtime.load(NAME)

    def make(judge: ScriptedJudge, skill: Skill = SKILL, *, difficulty: Any = None, hold: int = 2) -> tuple[Router, ScriptedProvider]:
        provider = ScriptedProvider(lambda text: "from the teacher")
        providers = {"vendor": provider} if skill.teachers else {}
        parts = RouteParts(
            SkillBook({skill.name: skill}, bench.heads), bench.runtime, providers, bench.default_model, Paces(), difficulty=difficulty
        )
        return Router(parts, bench.lake, judge, hold_tokens=hold), provider

    return make


def asked(*texts: str, **more: Any) -> Ask:
    return Ask("chat", [Work(text) for text in texts or (QUESTION,)], **more)


def hops(outcome: Outcome) -> list[tuple[str, str, int]]:
    return [(hop.candidate, hop.outcome, hop.tries) for hop in outcome.decision.hops]


async def seen(router: Router, ask: Ask) -> tuple[list[str], Outcome]:
    words: list[str] = []
    async for piece in router.stream(ask, Call("test")):
        if isinstance(piece, Outcome):
            return words, piece
        words.append(piece)
    raise AssertionError("a stream ends with its outcome")


async def test_at_the_bar_the_student_is_delivered(made: Any, bench: Bench) -> None:
    router, provider = made(ScriptedJudge(0.8))
    (outcome,) = (await router.run(asked(), Call("test"))).items
    assert outcome.output_text == ANSWER.strip() or outcome.output_text.startswith("Sure")
    assert hops(outcome) == [(LOCAL, "delivered", 1)] and outcome.quality == 0.8 and provider.asked == []
    row = bench.row()
    assert row["student_text"] == outcome.output_text and row["finish_reason"] and row["preference"] == "local_first"


async def test_between_the_bars_a_second_try_decides(made: Any) -> None:
    judge = ScriptedJudge(0.7, 0.9)
    router, provider = made(judge)
    (outcome,) = (await router.run(asked(), Call("test"))).items
    assert hops(outcome) == [(LOCAL, "delivered", 2)] and outcome.quality == 0.9 and judge.compared == 1 and provider.asked == []
    judge = ScriptedJudge(0.7, 0.75)
    router, provider = made(judge)
    (outcome,) = (await router.run(asked(), Call("test"))).items
    assert hops(outcome) == [(LOCAL, "below_bar", 2), ("vendor/big", "delivered", 1)] and len(provider.asked) == 1


async def test_below_the_second_bar_the_teacher_is_asked_at_once(made: Any) -> None:
    judge = ScriptedJudge(0.3)
    router, provider = made(judge)
    (outcome,) = (await router.run(asked(), Call("test"))).items
    assert hops(outcome) == [(LOCAL, "below_bar", 1), ("vendor/big", "delivered", 1)] and judge.compared == 0
    assert outcome.output_text == "from the teacher" and len(provider.asked) == 1


async def test_an_unknown_quality_yields_to_a_teacher_and_is_told_without_one(made: Any) -> None:
    router, _ = made(ScriptedJudge(None))
    (outcome,) = (await router.run(asked(), Call("test"))).items
    assert hops(outcome)[0][1] == "below_bar" and outcome.output_text == "from the teacher"
    router, _ = made(ScriptedJudge(None), replace(SKILL, teachers=()))
    (outcome,) = (await router.run(asked(), Call("test"))).items
    assert outcome.decision.local and outcome.quality is None and outcome.findings == ("it was not looked at",)


async def test_a_held_skill_stays_with_its_teacher_unless_the_caller_wants_it_local(made: Any) -> None:
    router, _ = made(ScriptedJudge(0.9), replace(SKILL, rollout="held"))
    (outcome,) = (await router.run(asked(), Call("test"))).items
    assert hops(outcome) == [("vendor/big", "delivered", 1)] and outcome.decision.rollout_stage == "held"


async def test_a_shadow_is_asked_and_never_delivered(made: Any, bench: Bench) -> None:
    judge = ScriptedJudge(0.9)
    router, provider = made(judge, replace(SKILL, rollout="shadow"))
    provider.gate = gate = asyncio.Event()  # the student is quicker than the teacher
    look = judge.look

    def looked(brief: Brief, item: Item, answer: Answer) -> Answer:
        gate.set()
        return look(brief, item, answer)

    judge.look = looked  # type: ignore[method-assign]
    (outcome,) = (await router.run(asked(), Call("test"))).items
    assert outcome.output_text == "from the teacher" and not outcome.decision.local
    assert {(hop.candidate, hop.outcome) for hop in outcome.decision.hops} == {(LOCAL, "shadow"), ("vendor/big", "delivered")}
    assert bench.row()["student_text"] and bench.row()["teacher_text"] == "from the teacher"


async def test_a_canary_sticks_to_its_users(made: Any) -> None:
    router, _ = made(ScriptedJudge(0.9), replace(SKILL, rollout="canary", rollout_percent=50))
    for user in ("ada", "grace", "edsger", "barbara", "donald", "leslie"):
        outcomes = [(await router.run(asked(), Call("test", user=user))).items[0] for _ in range(2)]
        assert outcomes[0].decision.local == outcomes[1].decision.local
        assert all(one.decision.propensity == 0.5 for one in outcomes)
        if not outcomes[0].decision.local:
            assert hops(outcomes[0])[0][1] == "skipped" and "50 %" in outcomes[0].decision.hops[0].reason


class Hard:
    """Whatever asks why is hard; what asks twice is hard for the teacher too."""

    async def estimate(self, skill: str, texts: Sequence[str]) -> list[DifficultyEstimate] | None:
        return [DifficultyEstimate(0.9 if "why" in text else 0.1, 0.0 if text.count("why") > 1 else 0.5, "learned", 100) for text in texts]


async def test_what_seems_too_hard_goes_past_the_student(made: Any) -> None:
    router, _ = made(ScriptedJudge(0.9), difficulty=Hard())
    easy, hard, hopeless = (await router.run(asked(QUESTION, "but why ?", "why why ?"), Call("test"))).items
    assert hopeless.decision.local, "asking the teacher would be pure cost"
    assert easy.decision.local and easy.decision.difficulty == 0.1
    assert not hard.decision.local and hard.decision.difficulty == 0.9 and hops(hard)[0][1] == "skipped"
    (hard,) = (await router.run(asked("why ?", limits=replace(asked().limits, preference=Preference.LOCAL_ONLY)), Call("test"))).items
    assert hard.decision.local, "nobody else may answer"


async def test_a_stream_shows_nothing_before_its_first_look(made: Any) -> None:
    judge = ScriptedJudge(0.9)
    router, provider = made(judge, hold=3)
    words, outcome = await seen(router, asked())
    assert "".join(words) == outcome.output_text and outcome.decision.local and provider.asked == []
    assert len(judge.looks) == 2 and judge.looks[0] == words[0], "one look at the held words, one at the whole"


async def test_a_stream_that_begins_badly_is_another_ones(made: Any) -> None:
    router, _ = made(ScriptedJudge(0.2), hold=2)
    words, outcome = await seen(router, asked())
    assert "".join(words) == "from the teacher" and hops(outcome) == [(LOCAL, "below_bar", 1), ("vendor/big", "delivered", 1)]
    assert "tokens" in outcome.decision.hops[0].reason


async def test_a_stream_between_the_bars_is_held_to_its_end(made: Any) -> None:
    judge = ScriptedJudge(0.7)
    router, _ = made(judge, hold=1)
    words, outcome = await seen(router, asked())
    assert words == ["from the teacher"] and hops(outcome) == [(LOCAL, "below_bar", 2), ("vendor/big", "delivered", 1)]
    assert len(judge.looks) > 2 and judge.compared == 1, "looked at while it was held, and judged whole, with a second try"


async def test_a_stream_that_nobody_can_answer_is_one_error(made: Any, bench: Bench) -> None:
    router, provider = made(ScriptedJudge(0.2), hold=1)
    provider._answer = lambda text: ProviderUnavailable("down")
    with pytest.raises(UnderstudyError) as caught:
        await seen(router, asked())
    assert "vendor/big" in caught.value.message and bench.row()["error"] == "PROVIDER_UNAVAILABLE" and bench.row()["stream"]


async def test_leaving_a_stream_keeps_its_row_and_frees_the_engine(made: Any, bench: Bench) -> None:
    router, _ = made(ScriptedJudge(0.9), replace(SKILL, max_tokens=512), hold=1)
    stream = router.stream(asked(), Call("test"))
    assert await anext(stream)
    await stream.aclose()
    assert bench.row()["error"] == "CANCELLED"
