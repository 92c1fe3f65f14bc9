"""The running book: routes, comparisons, late shadows, feedback, a second server, a registry that is away. A real head and SQLite."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from server.core import Call, Preference
from server.errors import FailedPrecondition, InvalidArgument, Unavailable
from server.lake.schema import SHADOWS
from server.registry.registry import Registry
from server.registry.rollouts import RolloutTable
from server.routing.judge import QualityBook, QualityJudge
from server.routing.pace import Paces
from server.routing.rollout_book import RolloutBook
from server.routing.router import Router
from server.routing.routes import RouteParts
from server.routing.skills import Skill, SkillBook
from server.runtime.heads import LinearHead
from server.settings import RegistryConfig, RolloutConfig
from tests.routing.conftest import LABELS, SURE, TEXTS, Bench, ScriptedProvider, ask

GOLD = {text: label for label in LABELS for text in TEXTS[label]}
CONFIG = RolloutConfig(margin=0.1, min_comparisons=12, poll_s=3600.0)


class OneStudent:
    """Students that are ready: the heads that the bench made, newest first."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.made: dict[str, LinearHead] = {}

    def publish(self) -> str:
        self._bench.student(SURE)
        head = self._bench.heads.heads["intent"]
        self.made = {head.manifest.version: head, **self.made}
        return head.manifest.version

    def ready(self, skill: str) -> Mapping[str, LinearHead]:
        return self.made if skill == "intent" else {}


class Server:
    """A router with its book of rollouts."""

    def __init__(self, bench: Bench, students: OneStudent, registry: Registry, provider: ScriptedProvider) -> None:
        self.book = RolloutBook(CONFIG, RolloutTable(registry), students, seed=0)
        skill = Skill("intent", instruction="Say what.", labels=LABELS, teachers=("vendor/big",), base="embedder")
        skills = SkillBook({"intent": skill}, bench.heads, students=students, rollouts=self.book)
        self.book.of(skills)
        parts = RouteParts(skills, bench.runtime, {"vendor": provider}, bench.default_model, Paces())
        judge = QualityJudge(bench.runtime, lambda: "embedder", QualityBook(bench.lake.path))
        self.router = Router(parts, bench.lake, judge, rollouts=self.book)

    async def run(self, rounds: int = 1, **more: Any) -> list[Any]:
        items: list[Any] = []
        for number in range(rounds):
            items += (await self.router.run(ask(*GOLD, **more), Call("test", user=f"user {number}"))).items
        await self.router.afterwards.close()
        return items

    def at(self) -> tuple[str, int, str]:
        standing = self.book.standing("intent")
        return standing.stage, standing.percent, standing.student


@pytest.fixture
def students(bench: Bench) -> OneStudent:
    return OneStudent(bench)


@pytest.fixture
async def serve(bench: Bench, students: OneStudent, tmp_path: Path) -> AsyncIterator[Callable[[ScriptedProvider], Server]]:
    registries: list[Registry] = []

    def make(provider: ScriptedProvider) -> Server:
        registries.append(Registry(RegistryConfig(url=f"sqlite:///{tmp_path}/registry.db")))
        return Server(bench, students, registries[-1], provider)

    yield make
    for registry in registries:
        registry.close()


def teacher() -> ScriptedProvider:
    return ScriptedProvider(lambda text: GOLD[text])


async def test_evidence_of_two_servers_takes_one_student_to_the_next_stage(serve: Any, students: OneStudent) -> None:
    one, other = serve(teacher()), serve(teacher())
    await one.book.poll()
    assert one.at() == ("held", 0, "")
    students.publish()
    await one.book.poll()
    await other.book.poll()
    assert one.at() == other.at() == ("shadow", 0, "1")
    await one.run()
    items = await other.run()
    assert all(not item.decision.local for item in items) and items[0].decision.hops[-1].candidate
    await one.book.poll()  # 12 of its own are enough
    await other.book.poll()
    assert one.at() == other.at() == ("canary", 10, "1")
    with pytest.raises(InvalidArgument, match="at hand"):
        await one.book.command("intent", "promote", "ada", version="9")
    report = await one.book.command("intent", "hold", "ada", "audit")
    assert report.rollout.paused and report.verdict.compared >= 12
    await one.run(3)
    await one.book.poll()
    assert one.at() == ("canary", 10, "1"), "held by hand"
    await other.book.command("intent", "resume", "grace")
    await one.book.poll()
    await one.book.poll()
    assert one.at()[1] == 50 and [event.actor for event in await one.book.events("intent", 9)].count("ada") == 1


async def test_a_shadow_slower_than_the_teacher_is_kept(serve: Any, students: OneStudent, bench: Bench, monkeypatch: Any) -> None:
    server = serve(teacher())
    students.publish()
    await server.book.poll()
    appended: list[tuple[str, dict[str, object]]] = []
    append = bench.lake.append

    def watch(table: str, records: list[dict[str, object]]) -> bool:
        appended.extend((table, record) for record in records)
        return append(table, records)

    monkeypatch.setattr(bench.lake, "append", watch)
    await server.run()
    late = [record for table, record in appended if table == SHADOWS]
    rows = [record for table, record in appended if table != SHADOWS]
    assert len(rows) == len(GOLD)
    told = sum(row["student_label"] is not None for row in rows)
    assert told + len(late) == len(GOLD) and all(record["role"] == "student" for record in late)
    live = server.book.live("intent")
    assert live is not None and live.mine.compared == live.mine.agreed == len(GOLD)


async def test_the_teacher_is_asked_beside_and_callers_that_stay_here_are_not_compared(serve: Any, students: OneStudent) -> None:
    provider = teacher()
    server = serve(provider)
    students.publish()
    await server.book.poll()
    for _ in range(4):
        await server.book.command("intent", "promote", "ada")
    assert server.at() == ("full", 100, "1")
    items = await server.run(20)
    assert all(item.decision.local for item in items)
    share = len(provider.asked) / len(items)
    assert 0 < share < 0.25, "about a tenth of the first at full"
    asked = len(provider.asked)
    await server.run(20, preference=Preference.LOCAL_ONLY)
    assert len(provider.asked) == asked


async def test_a_student_that_goes_bad_is_suspended_before_the_registry_knows(serve: Any, students: OneStudent) -> None:
    wrong = [False]
    provider = ScriptedProvider(lambda text: LABELS[(LABELS.index(GOLD[text]) + wrong[0]) % 3])
    server = serve(provider)
    students.publish()
    await server.book.poll()
    await server.book.command("intent", "promote", "ada")
    assert server.at()[0] == "canary"
    wrong[0] = True
    for _ in range(10):
        await server.run()
        if server.at()[0] == "rolled_back":
            break
    assert server.at()[0] == "rolled_back" and (await server.run())[0].decision.candidate == "vendor/big"
    await server.book.poll()
    event = (await server.book.events("intent", 1))[0]
    assert (event.to_stage, event.student, event.actor) == ("rolled_back", "1", "auto") and "agrees" in event.reason
    await server.book.poll()
    assert server.at()[0] == "rolled_back", "it is not taken again"
    with pytest.raises(FailedPrecondition, match="nobody to roll back"):
        await server.book.command("intent", "rollback", "ada")
    again = await server.book.command("intent", "promote", "ada", version="1")
    assert again.rollout.stage == "shadow" and again.rollout.refused == ()


async def test_corrections_overrule_the_teacher_and_thumbs_do_not(serve: Any, students: OneStudent) -> None:
    server = serve(teacher())
    students.publish()
    await server.book.poll()
    items = await server.run()
    live = server.book.live("intent")
    assert live is not None and live.mine.agreed == len(GOLD)
    for item in items:
        server.book.feedback_kept(item.interaction_id, rating=None, thumb="down", correction=None)
    assert live.mine.agreed == len(GOLD)
    for item in items:
        server.book.feedback_kept(item.interaction_id, rating=None, thumb=None, correction="something else")
    assert len(GOLD) - live.mine.agreed == live.mine.corrections <= 5, "one person does not overrule everything"


async def test_without_its_registry_a_rollout_stays_and_says_so(serve: Any, students: OneStudent, monkeypatch: Any) -> None:
    server = serve(teacher())
    students.publish()
    await server.book.poll()

    def away(*_: object) -> Any:
        raise Unavailable("The registry's database does not answer: gone.")

    with monkeypatch.context() as patch:
        patch.setattr(RolloutTable, "all", away)
        await server.run(2)
        await server.book.poll()
        assert server.at() == ("shadow", 0, "1") and "registry" in server.book.report("intent").frozen
        with pytest.raises(Unavailable):
            await server.book.command("intent", "promote", "ada")
    await server.book.poll()
    assert server.at() == ("canary", 10, "1") and server.book.report("intent").frozen == "", "what was seen meanwhile is not lost"


async def test_the_loop_is_woken_and_ends(serve: Any, students: OneStudent) -> None:
    server = serve(teacher())
    students.publish()
    await server.book.start()
    assert server.at() == ("shadow", 0, "1")
    await asyncio.wait_for(server.book.close(), 10)
