"""The state machine, step by step, and over seeded lives: what may happen with a chance of alpha happens no oftener."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.rollout_simulation import World, agreement, challenge, live_one
from server.routing import rollout as machine
from server.routing.rollout import Past, Rollout
from server.routing.rollout_evidence import Evidence, latency_class, latency_quantile, total
from server.routing.rollout_live import Live
from server.routing.rollout_watch import LABELS, QUALITY, THUMBS, Reference, Watch, cause
from server.settings import RolloutConfig

RULES = RolloutConfig(margin=0.03)
TARGET, TOLERANCE = 0.9, 0.05


def begun(version: str = "1", now: Rollout | None = None) -> Rollout:
    return machine.begin(now or Rollout(), version, TARGET, TOLERANCE, "published")


def seen(compared: int, agreed: int, **more: int) -> Evidence:
    """Comparisons in which those that disagree are spread evenly."""
    evidence = Evidence(requests=compared)
    wrong = 0
    for number in range(compared):
        due = (compared - agreed) * (number + 1) // compared
        evidence.compare(due == wrong)
        wrong = due
    for name, value in more.items():
        setattr(evidence, name, value)
    return evidence


def at_full(version: str = "1") -> Rollout:
    now = begun(version)
    while now.moving:
        now = machine.promote(now, seen(100, 92), "good")
    return now


def test_the_ladder() -> None:
    now, stages = begun(), []
    while now.moving:
        stages.append((now.stage, now.percent))
        now = machine.promote(now, seen(100, 92), "good")
    assert [*stages, (now.stage, now.percent)] == list(machine.LADDER)
    assert now.past.compared == 400 and now.serving == "1" and now.epoch == 5
    assert Rollout.from_json(now.to_json()) == now


def test_a_new_version_goes_beside_the_champion_and_takes_its_place() -> None:
    now = begun("2", at_full("1"))
    assert (now.stage, now.student, now.champion, now.serving) == ("shadow", "2", "1", "1")
    while now.moving:
        now = machine.promote(now, seen(100, 92, paired=100), "good")
    assert now.past.paired == 400
    assert (now.stage, now.student, now.champion, now.former) == ("full", "2", "", ("1",))
    assert now.versions == ("2", "1")


def test_back_to_the_champion_then_to_the_one_before_then_to_the_teacher() -> None:
    full = at_full("1")
    challenger = machine.promote(begun("2", full), seen(100, 92), "good")
    back = machine.roll_back(challenger, "bad")
    assert (back.stage, back.percent, back.student, back.refused) == ("full", 100, "1", ("2",))
    assert back.target == TARGET and back.tolerance == TOLERANCE, "what it promised still holds"
    second = replace(full, student="2", former=("1",), promises={"1": (0.8, 0.1)})
    back = machine.roll_back(second, "bad")
    assert (back.stage, back.student, back.target) == ("full", "1", 0.8)
    alone = machine.roll_back(back, "bad too")
    assert (alone.stage, alone.serving, alone.refused) == ("rolled_back", "", ("2", "1"))


def test_other_inputs_are_the_champions_or_the_teachers_and_no_former_students() -> None:
    second = replace(at_full("1"), student="2", former=("1",))
    after = machine.roll_back(second, "inputs changed", changed_inputs=True)
    assert (after.stage, after.serving, after.refused, after.former) == ("rolled_back", "", ("2",), ("1",))
    challenger = machine.promote(begun("2", at_full("1")), seen(100, 92), "good")
    assert machine.roll_back(challenger, "inputs changed", changed_inputs=True).serving == "1"


@pytest.mark.parametrize(
    ("compared", "agreed", "step", "words"),
    [
        (10, 10, "stay", "10 of 50"),
        (60, 56, "promote", "above"),  # into 10 % one may go at target - tolerance / 0.1
        (60, 20, "rollback", "agrees with its teacher less than"),
        (0, 0, "stay", "0 of 50"),
    ],
)
def test_what_the_evidence_says_in_the_shadow(compared: int, agreed: int, step: str, words: str) -> None:
    verdict = machine.judge(begun(), seen(compared, agreed), RULES)
    assert verdict.step == step and words in verdict.reason


def test_inconclusive_is_a_state() -> None:
    late = replace(begun(), stage="canary", percent=80)
    verdict = machine.judge(late, seen(60, 54), RULES)
    assert verdict.step == "stay" and "inconclusive" in verdict.reason and verdict.lower < 0.85 < verdict.upper
    assert machine.judge(late, seen(2000, 1800), RULES).step == "promote"


def test_guards_take_a_student_back_whatever_it_agrees() -> None:
    failing, slow = seen(100, 99), seen(100, 99)
    for number in range(200):
        failing.answer(failed=number % 5 == 0)
        slow.answer(slow=number % 3 == 0)
    assert "fail" in machine.alarming(at_full(), failing, RULES) and "too long" in machine.alarming(at_full(), slow, RULES)
    fine = seen(100, 99)
    for number in range(640):
        fine.answer(failed=number % 100 == 0, slow=number % 50 == 0)
    assert machine.alarming(at_full(), fine, RULES) == ""


def test_a_student_worse_than_its_champion_does_not_follow_it() -> None:
    now = begun("2", at_full("1"))
    late = replace(now, stage="canary", percent=80)
    assert "worse than the champion" in machine.alarming(now, seen(300, 270, paired=300, better=2, worse=30), RULES)
    verdict = machine.judge(late, seen(10, 9, paired=300, better=5, worse=20), RULES)
    assert verdict.step == "stay" and "inconclusive" in verdict.reason, "not shown, and not passed over"
    assert machine.judge(late, seen(10, 9, paired=500, better=16, worse=16), RULES).step == "promote", "few need the teacher"
    assert machine.judge(now, seen(300, 272, paired=49), RULES).step == "stay"


def test_a_challenger_asks_the_teacher_no_oftener_than_a_champion() -> None:
    live = Live(RolloutConfig())
    live.become(begun("2", at_full("1")), 1)
    assert live.share() == live.config.teacher_share
    live.become(begun("1"), 2)
    assert live.share() == live.config.canary_share


def test_a_held_rollout_pays_for_no_more_than_its_usual_comparisons() -> None:
    live = Live(RolloutConfig())
    live.become(at_full("1"), 1)
    live._burst = 5
    assert live.share() == 1.0
    live.become(machine.hold(live.rollout, "the teacher changed"), 2)
    assert live.share() == live.config.teacher_share


def test_a_champion_that_goes_bad_beside_its_challenger_goes() -> None:
    now = begun("2", at_full("1"))
    evidence = seen(40, 38)
    for number in range(60):
        evidence.compare_champion(number < 30)
    assert "the champion agrees" in machine.champion_alarming(now, evidence, RULES)
    after = machine.drop_champion(now, "bad")
    assert (after.stage, after.student, after.champion, after.refused) == ("shadow", "2", "", ("1",))


def test_sums_of_several_servers_add_up() -> None:
    one, other = seen(30, 28), seen(21, 20)
    one.answer(failed=True, now_ms=5)
    other.answer(seconds=0.2, now_ms=3)
    other.say("card", 0.95)
    both = total([Evidence.from_json(one.to_json()), Evidence.from_json(other.to_json())])
    assert (both.compared, both.agreed, both.answers, both.failed, both.labels) == (51, 48, 2, 1, {"card": 1})
    assert sum(block[1] for block in both.blocks) == 51 and [one[0] for one in both.stretches] == [3, 5]
    assert machine.judge(begun(), both, RULES).step == "promote" and machine.judge(begun(), one, RULES).step == "stay"


def test_latencies_keep_their_quantiles() -> None:
    counts: dict[str, int] = {}
    for number in range(1, 101):
        key = str(latency_class(number / 1000))
        counts[key] = counts.get(key, 0) + 1
    assert latency_quantile(counts, 0.95) == pytest.approx(0.095, rel=0.26) and latency_quantile({}, 0.5) is None
    assert machine.slow_after_s(counts, 2.0) == machine.NEVER_SLOW_S and machine.slow_after_s({"1": 3}, 2.0) is None


def test_a_watch_tells_other_labels_other_confidence_and_thumbs_once_each() -> None:
    usual = Reference({"a": 500, "b": 500}, {"9": 800, "5": 200}, (95, 5))
    calm = Watch(usual, 200, 0.05)
    assert not any(calm.saw("ab"[n % 2], 0.95 if n % 5 else 0.55) for n in range(2000))
    other = Watch(usual, 200, 0.05)
    found = [kind for n in range(300) for kind in other.saw("a" if n % 10 else "c", 0.55)]
    assert sorted(found) == [LABELS, QUALITY]
    thumbs = Watch(usual, 200, 0.05)
    assert not any(thumbs.thumb(n % 20 != 0) for n in range(200))
    assert [kind for n in range(60) for kind in thumbs.thumb(n % 2 == 0)] == [THUMBS]


def test_old_inputs_tell_what_changed() -> None:
    assert cause(16, 15, 16, {}).startswith("inputs changed")
    assert cause(16, 3, 16, {}).startswith("the teacher changed") and cause(3, 16, 16, {}).startswith("the student changed")
    assert "no old inputs" in cause(0, 0, 0, {LABELS: 1})


def test_seeded_bad_students_do_not_pass_their_canary() -> None:
    promised = agreement(0.95, 0.95)
    lives = [live_one(World(student=0.8, promised=promised), seed, 1200, to_full=True) for seed in range(40)]
    assert sum(life.full_at is not None for life in lives) <= 2 and sum(life.back_at is not None for life in lives) >= 36


def test_seeded_challengers_behind_their_champion_do_not_take_its_place() -> None:
    lives = [challenge(seed, behind=0.10) for seed in range(60)]
    assert sum(life.full_at is not None for life in lives) <= 60 * 0.05 + 3


def test_seeded_challengers_as_good_as_their_champion_take_its_place_for_a_few_questions() -> None:
    lives = [challenge(seed, behind=0.0, config=RolloutConfig(margin=0.06)) for seed in range(60)]
    assert sum(life.back_at is not None for life in lives) <= 60 * 0.05 + 3
    arrived = [life for life in lives if life.full_at is not None]
    assert len(arrived) >= 50
    assert sorted(life.full_asked / life.requests for life in arrived)[len(arrived) // 2] < 0.2


def test_seeded_good_students_reach_full_and_stay() -> None:
    lives = [live_one(World(), seed, 2500, to_full=True) for seed in range(20)]
    assert sum(life.full_at is not None for life in lives) >= 16 and sum(life.back_at is not None for life in lives) <= 1


def test_seeded_students_that_go_bad_at_full_are_back_within_300_requests() -> None:
    lives = [live_one(World(bad=0.3, bad_from=200), seed, 500, full=True) for seed in range(40)]
    back = [life.back_at - 200 for life in lives if life.back_at is not None]
    assert len(back) >= 38 and min(back) > 0, "and none before it went bad"
    assert sum(one <= 300 for one in back) >= 38


def test_flipped_thumbs_take_nobody_back() -> None:
    lives = [live_one(World(feedback=0.5, flipped=0.1), seed, 400, full=True) for seed in range(10)]
    assert not any(life.back_at for life in lives)
    assert Past().after(seen(3, 2)).compared == 3
