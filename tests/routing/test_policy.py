"""The order of a route, sticky assignment, and the time of a hop: integers and a clock of our own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.core import Preference
from server.routing.policy import Facts, assigned, order, share_of_deadline

LOCAL = Facts("local:small@1", True, 0, 0, 0.2)
TEACHER = Facts("openai/big", False, 1, 900, 0.8)
SPARE = Facts("groq/quick", False, 2, 100, 0.1)
FREE = Facts("hf/free", False, 3, 0, None)
UNPRICED = Facts("odd/model", False, 4, None, 0.5)
ALL = [LOCAL, TEACHER, SPARE, FREE, UNPRICED]


def names(preference: Preference) -> list[str]:
    return [one.name for one, _ in order(ALL, preference)]


def test_each_preference_has_its_order() -> None:
    assert names(Preference.LOCAL_FIRST) == [one.name for one in ALL]
    assert names(Preference.LOCAL_ONLY) == [LOCAL.name]
    assert names(Preference.PROVIDER_ONLY) == [one.name for one in ALL if not one.local]
    assert names(Preference.BEST) == [TEACHER.name, SPARE.name, FREE.name, UNPRICED.name, LOCAL.name]
    assert names(Preference.CHEAPEST) == [LOCAL.name, FREE.name, SPARE.name, TEACHER.name, UNPRICED.name]
    assert names(Preference.FASTEST) == [SPARE.name, LOCAL.name, UNPRICED.name, TEACHER.name, FREE.name]
    assert names(Preference.FREE_FIRST) == [LOCAL.name, FREE.name, TEACHER.name, SPARE.name, UNPRICED.name]


@given(st.permutations(ALL), st.sampled_from(Preference))
def test_the_order_follows_from_the_facts_alone(shuffled: list[Facts], preference: Preference) -> None:
    assert [one.name for one, _ in order(shuffled, preference)] == names(preference)
    assert all(reason for _, reason in order(shuffled, preference))


@given(st.text(max_size=20), st.sampled_from([10, 50, 80]))
def test_an_assignment_sticks_and_tells_its_probability(who: str, percent: int) -> None:
    inside, propensity = assigned("skill", who, percent)
    assert (inside, propensity) == assigned("skill", who, percent)
    assert propensity == (percent / 100 if inside else 1 - percent / 100)


def test_shares_are_what_was_asked_and_grow_by_addition() -> None:
    for percent in (10, 50, 80):
        share = sum(assigned("intent", f"user-{n}", percent)[0] for n in range(5000)) / 50
        assert abs(share - percent) < 3
    # Who is in at 10 % is in at 50 % and at 80 %: nobody is sent back and forth by a promotion.
    for n in range(500):
        inside = [assigned("intent", f"user-{n}", percent)[0] for percent in (10, 50, 80)]
        assert inside == sorted(inside)


def test_a_hop_leaves_time_for_the_next() -> None:
    assert share_of_deadline(100.0, None, 3) is None
    assert share_of_deadline(100.0, 110.0, 0) == 110.0
    assert share_of_deadline(100.0, 110.0, 2) == 105.0
    assert share_of_deadline(120.0, 110.0, 2) == 120.0, "a passed deadline is passed, not earlier"
