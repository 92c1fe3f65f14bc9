"""Rollouts by the thousand: the server's own state machine, evidence and watch, on SIMULATED requests.

Requests, teachers and students are drawn by seeded dice; everything that decides (server/routing/rollout*.py) is the real thing. A student
may go bad at a request, silently: as sure of itself as before, and wrong. It delivers, and is compared, as in the server; what the network
and the database do is left out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from server.core import Decision, Label, Outcome, Reply, Work
from server.routing import rollout as machine
from server.routing.candidates import Answer
from server.routing.items import Item
from server.routing.rollout import Rollout
from server.routing.rollout_live import Live, Seen
from server.routing.skills import Skill
from server.settings import RolloutConfig

VERSION = "1"
_POLL = 25  # requests between two looks of the loop
_ROWS = 400.0  # delivered rows that the target was measured on
_NAMES = tuple(f"label {number}" for number in range(20))


@dataclass(slots=True, frozen=True)
class World:
    """Chances, of requests: `teacher` and `student` are right; `deliver`: the student is sure enough; from request `bad_from` after it has
    reached full the student is right with the chance `bad`. `promised`: what it was measured to be right in, as its teacher sees it.
    `feedback`: somebody gives a thumb, `flipped`: the wrong one.
    """

    teacher: float = 0.95
    student: float = 0.95
    promised: float | None = None
    deliver: float = 0.8
    bad: float | None = None
    bad_from: int = 1000
    feedback: float = 0.0
    flipped: float = 0.0


@dataclass(slots=True)
class Life:
    """What became of one student. Requests are counted from its first; `right`: of what callers got; `asked`: of the teacher, at full."""

    stage: str = machine.SHADOW
    percent: int = 0
    full_at: int | None = None
    back_at: int | None = None
    requests: int = 0
    right: int = 0
    full_requests: int = 0
    full_asked: int = 0
    steps: list[str] = field(default_factory=list)


def agreement(teacher: float, student: float) -> float:
    """How often two agree that are right independently of each other, and err evenly over the other labels."""
    return teacher * student + (1 - teacher) * (1 - student) / (len(_NAMES) - 1)


def live_one(
    world: World, seed: int, requests: int, config: RolloutConfig | None = None, *, full: bool = False, to_full: bool = False
) -> Life:
    """One student's life of so many requests, or until it was rolled back. `full`: it begins there; `to_full`: it ends there."""
    config = config or RolloutConfig()
    dice, skill = random.Random(seed), Skill("simulated", labels=_NAMES, teachers=("simulation/teacher",))
    target = world.promised if world.promised is not None else agreement(world.teacher, world.student)
    tolerance = config.margin + (target * (1 - target) / _ROWS) ** 0.5
    begun = machine.begin(Rollout(), VERSION, target, tolerance, "begun")
    if full:
        begun = replace(begun, stage=machine.FULL, percent=100, past=machine.Past(700, round(700 * target), 175, 60))
    live = Live(config)
    live.become(begun, 1)
    life = Life(stage=begun.stage, full_at=0 if full else None)
    for number in range(requests):
        _request(world, live, skill, dice, life, number)
        if number % _POLL == 0 or live.suspended:
            _poll(live, life, number)
        if life.back_at is not None or (to_full and life.full_at is not None):
            break
    life.stage, life.percent = live.rollout.stage, live.rollout.percent
    return life


def challenge(seed: int, behind: float, differing: float = 0.15, requests: int = 2000, config: RolloutConfig | None = None) -> Life:
    """A challenger beside a champion at full, until it is at full or was rolled back: in so many of the requests the two say different
    things, and the challenger is `behind` by that share of all requests. What the teacher is asked for is counted in `full_asked`.
    """
    config = config or RolloutConfig()
    dice, skill = random.Random(seed), Skill("simulated", labels=_NAMES, teachers=("simulation/teacher",))
    target, tolerance = 0.9, config.margin + (0.09 / _ROWS) ** 0.5
    champion = replace(machine.begin(Rollout(), VERSION, target, tolerance, "begun"), stage=machine.FULL, percent=100)
    live = Live(config)
    live.become(machine.begin(champion, "2", target, tolerance, "begun"), 1)
    life = Life()
    for number in range(requests):
        now = live.rollout
        inside = dice.random() * 100 < now.percent
        draw = dice.random()
        worse, better = draw < (differing + behind) / 2, (differing + behind) / 2 <= draw < differing
        drawn = dice.random() < live.share()
        if drawn:
            live.drawn()
        life.requests += 1
        life.full_asked += drawn or (not inside and (worse or better))
        key = str(number)
        decision = Decision(skill.name, now.stage, candidate=f"local:{skill.name}@{'2' if inside else VERSION}", local=True)
        champion_right = worse or (not better and dice.random() < (target - (differing + behind) / 2) / (1 - differing))
        mine_right = (champion_right and not worse) or better
        answer = Answer(Reply("said", labels=(Label("said", 0.9),)), 0.9, elapsed_s=0.01)
        seen = Seen(Item(Work(key), Outcome(key, decision)), "2", answer, None, None)
        seen.agreed = mine_right if drawn else None
        seen.champion_agreed = champion_right if drawn and not inside else None
        seen.pair = None if inside else int(better) - int(worse)
        live.saw(skill, seen)
        if number % _POLL == 0 or live.suspended:
            _poll(live, life, number)
        if life.back_at is not None or life.full_at is not None or not live.rollout.champion:
            break
    life.stage, life.percent = live.rollout.stage, live.rollout.percent
    return life


def _request(world: World, live: Live, skill: Skill, dice: random.Random, life: Life, number: int) -> None:
    now = live.rollout
    gone_bad = world.bad is not None and life.full_at is not None and number - life.full_at >= world.bad_from
    gold = dice.choice(_NAMES)
    mine = _answer(dice, gold, world.bad if gone_bad and world.bad is not None else world.student)
    sure = dice.random() < world.deliver
    quality = dice.uniform(0.85, 0.97) if sure else dice.uniform(0.3, 0.8)
    assigned = now.stage == machine.FULL or (now.stage == machine.CANARY and dice.random() * 100 < now.percent)
    delivered = assigned and sure
    drawn = True
    if assigned:
        drawn = dice.random() < live.share()
        if drawn:
            live.drawn()
    teacher = _answer(dice, gold, world.teacher) if drawn or not delivered else ""
    key = str(number)
    decision = Decision(skill.name, now.stage, candidate=f"local:{skill.name}@{VERSION}" if delivered else skill.teacher, local=delivered)
    seen = Seen(
        Item(Work(key), Outcome(key, decision)),
        VERSION,
        Answer(Reply(mine, labels=(Label(mine, quality),)), quality, elapsed_s=0.01),
        None,
        Answer(Reply(teacher, labels=(Label(teacher, 1.0),)), elapsed_s=0.5) if teacher else None,
        mine == teacher if drawn and sure else None,
    )
    live.saw(skill, seen)
    said = mine if delivered else teacher
    life.requests += 1
    life.right += said == gold
    if now.stage == machine.FULL and not gone_bad:
        life.full_requests += 1
        life.full_asked += drawn and delivered
    if world.feedback and dice.random() < world.feedback:
        live.feedback(key, (said == gold) != (dice.random() < world.flipped), None)


def _answer(dice: random.Random, gold: str, right: float) -> str:
    if dice.random() < right:
        return gold
    return dice.choice([name for name in _NAMES if name != gold])


def _poll(live: Live, life: Life, number: int) -> None:
    seen = live.mine
    if live.suspended:
        life.back_at = number
        life.steps.append(live.suspended)
        live.become(machine.roll_back(live.rollout, live.suspended), live.revision + 1)
        return
    verdict = machine.judge(live.rollout, seen, live.config)
    if verdict.step == "rollback":
        life.back_at = number
        life.steps.append(verdict.reason)
        live.become(machine.roll_back(live.rollout, verdict.reason), live.revision + 1)
    elif verdict.step == "promote":
        after = machine.promote(live.rollout, seen, verdict.reason)
        life.steps.append(verdict.reason)
        live.become(after, live.revision + 1)
        if after.stage == machine.FULL:
            life.full_at = number
