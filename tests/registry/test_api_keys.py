"""API keys and the audit log in the registry, on SQLite and PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from server.core import Role
from server.errors import ApiKeyNotFound, FailedPrecondition, InvalidArgument
from server.registry.api_keys import ApiKeys, KeySettings, hash_of, is_secret_of, read_name, split_key
from server.registry.audit import AuditLog, event_of
from server.registry.registry import Registry
from server.settings import RegistryConfig
from tests.api.auth_calls import own_database

DAY_MS = 86_400_000


class Clock:
    """Milliseconds that stand still until they are moved."""

    def __init__(self) -> None:
        self.now = 1_800_000_000_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(registry_url: str) -> Iterator[Registry]:
    with own_database(registry_url) as url:
        made = Registry(RegistryConfig(url=url))
        yield made
        made.close()


@pytest.fixture
def keys(registry: Registry, clock: Clock) -> ApiKeys:
    return ApiKeys(registry, clock=clock)


def test_a_key_is_kept_as_a_hash_and_shown_once(keys: ApiKeys, registry: Registry) -> None:
    wish = KeySettings(Role.USER, "the shop", ("triage", "intent"), None, 60, 5, None)
    key, text = keys.create(wish, "command line")
    parts = split_key(text)
    assert parts is not None and parts[0] == key.id and len(parts[1]) >= 43  # 256 bits
    assert is_secret_of(parts[1], key.secret_hash) and not is_secret_of(parts[1] + "x", key.secret_hash)
    found = keys.get(key.id)
    assert (found, found.settings, found.name) == (key, wish, f"apiKeys/{key.id}")
    assert key.secret_hash not in repr(found)
    with registry.engine().connect() as connection:
        rows = [str(row) for row in connection.exec_driver_sql("SELECT * FROM api_keys")]
    assert len(rows) == 1 and parts[1] not in rows[0] and hash_of(parts[1]) in rows[0]


def test_keys_differ_and_come_newest_first_a_page_at_a_time(keys: ApiKeys, clock: Clock) -> None:
    made = []
    for number in range(7):
        clock.now += number % 2  # some of the same millisecond
        made.append(keys.create(KeySettings(Role.VIEWER), "x"))
    assert len({text for _, text in made}) == 7
    seen = []
    after = None
    while page := keys.page(3, after):
        seen += page
        after = (page[-1].create_ms, page[-1].id)
    assert [(key.create_ms, key.id) for key in seen] == sorted(((key.create_ms, key.id) for key, _ in made), reverse=True)


def test_a_revoked_key_stays_revoked_and_every_change_shows_in_the_counts(keys: ApiKeys, clock: Clock) -> None:
    counts = [keys.count()]
    key, _ = keys.create(KeySettings(Role.USER), "x")
    counts.append(keys.count())
    revoked = keys.revoke(key.id)
    counts.append(keys.count())
    assert counts == [(0, 0), (1, 0), (1, 1)]
    assert (revoked.revoke_ms, revoked.state(clock.now)) == (clock.now, "revoked")
    clock.now += 5
    assert keys.revoke(key.id) == revoked
    assert [one.id for one in keys.current()] == [key.id]  # known for a while, to say that it was revoked
    clock.now += 31 * DAY_MS
    assert keys.current() == []
    with pytest.raises(ApiKeyNotFound, match="apiKeys/aaaaaaaa"):
        keys.revoke("aaaaaaaa")
    with pytest.raises(ApiKeyNotFound):
        keys.get("aaaaaaaa")


def test_the_last_live_admin_stays(keys: ApiKeys, clock: Clock) -> None:
    first, _ = keys.create(KeySettings(Role.ADMIN), "x")
    short, _ = keys.create(KeySettings(Role.ADMIN, expire_ms=clock.now + 10), "x")
    keys.create(KeySettings(Role.OPERATOR), "x")
    clock.now += 10
    assert short.state(clock.now) == "expired"
    with pytest.raises(FailedPrecondition, match="last key of an admin"):
        keys.revoke(first.id)
    assert keys.get(first.id).revoke_ms is None
    second, _ = keys.create(KeySettings(Role.ADMIN), "x")
    keys.revoke(first.id)
    assert keys.revoke(second.id, last_admin=True).revoke_ms == clock.now


def test_of_two_admins_that_revoke_each_other_one_stays(keys: ApiKeys) -> None:
    for _ in range(5):
        pair = [keys.create(KeySettings(Role.ADMIN), "x")[0].id for _ in range(2)]
        start = threading.Barrier(2)
        refused: list[str] = []

        def revoke(key: str, start: threading.Barrier = start, refused: list[str] = refused) -> None:
            start.wait()
            try:
                keys.revoke(key)
            except FailedPrecondition:
                refused.append(key)

        threads = [threading.Thread(target=revoke, args=(key,)) for key in pair]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 1
        keys.revoke(refused[0], last_admin=True)


def test_the_last_use_only_grows(keys: ApiKeys) -> None:
    key, _ = keys.create(KeySettings(Role.USER), "x")
    assert key.last_use_ms is None
    keys.note_use({key.id: 500, "aaaaaaaa": 1})
    keys.note_use({key.id: 400})
    assert keys.get(key.id).last_use_ms == 500


@pytest.mark.parametrize(
    ("field", "wish"),
    [
        ("display_name", KeySettings(Role.USER, "x" * 129)),
        ("display_name", KeySettings(Role.USER, "two\nlines")),
        ("skills[1]", KeySettings(Role.USER, skills=("fine", "Not fine"))),
        ("skills", KeySettings(Role.USER, skills=tuple(f"s{number}" for number in range(101)))),
        ("skills", KeySettings(Role.OPERATOR, skills=("triage",))),
        ("expire_time", KeySettings(Role.USER, expire_ms=1)),
        ("requests_per_minute", KeySettings(Role.USER, requests_per_minute=-1)),
        ("requests_per_minute", KeySettings(Role.USER, requests_per_minute=1_000_001)),
        ("budget_day_micro_usd", KeySettings(Role.USER, budget_day=-1)),
        ("budget_month_micro_usd", KeySettings(Role.USER, budget_month=10**15 + 1)),
    ],
)
def test_what_cannot_be_is_refused_by_field(field: str, wish: KeySettings, keys: ApiKeys) -> None:
    with pytest.raises(InvalidArgument) as refused:
        keys.create(wish, "x")
    assert refused.value.metadata["field"] == f"api_key.{field}"
    assert keys.count() == (0, 0)


@pytest.mark.parametrize(
    "text", ["", "und_", "und_abc_x", "und_7f3k2m9q", "und_7f3k2m9q_", "und_7F3K2M9Q_secret", "xnd_abcdefgh_secret", "und_abcdefghsecret"]
)
def test_other_words_are_no_key(text: str) -> None:
    assert split_key(text) is None


def test_a_key_that_is_pasted_for_a_name_is_not_repeated() -> None:
    with pytest.raises(InvalidArgument) as refused:
        read_name("und_abcdefgh_verysecret")
    assert "verysecret" not in refused.value.message
    assert "verysecret" not in event_of("x", "m", "models/und_abcdefgh_verysecret", "OK").resource


def test_audit_events_come_newest_first_by_actor_and_time(registry: Registry) -> None:
    log = AuditLog(registry)
    events = [event_of(f"apiKeys/{number % 2}", "s/M", f"models/{number}", "OK", request_id=str(number), peer="p") for number in range(9)]
    log.add(events[:5])
    log.add(events[4:])  # what may have been written before is written once
    assert log.page(100) == events[::-1]
    assert log.page(4, before=events[6].id) == events[5:1:-1]
    assert log.page(100, actor="apiKeys/1") == events[7::-2]
    assert log.page(100, since_ms=events[0].time_ms) == events[::-1]
    assert log.page(100, since_ms=events[-1].time_ms + 1) == []


def test_old_audit_events_are_forgotten_where_days_are_given(registry: Registry) -> None:
    event = event_of("x", "m", "", "OK")
    for keep, after_days, left in ((0, 4000, 1), (10, 10, 1), (10, 11, 0)):
        log = AuditLog(registry, clock=lambda days=after_days: event.time_ms + days * DAY_MS)  # type: ignore[misc]
        log.add([event])
        log.forget(keep)
        assert len(log.page(10)) == left


def test_hostile_texts_fit_into_the_audit_log(registry: Registry) -> None:
    event = event_of("a" * 900, "m" * 900, "\x00r\udc80" + "é" * 900, "C" * 90, request_id="q" * 900, peer="p" * 900)
    AuditLog(registry).add([event])
    assert AuditLog(registry).page(1) == [event]
