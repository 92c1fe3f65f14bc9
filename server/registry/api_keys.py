"""API keys: who may call, and what. A key is `und_<id>_<secret>`; the registry holds its id, a hash of its secret, and what it may do.

The hash is one SHA-256. Slow hashes (bcrypt, argon2) protect what people choose and others could guess; a secret here is 256 bits from the
system's generator, which nobody tries out at any speed, and every call has to check one.

Rows are never deleted, and of them only the last use and the end ever change: so two counts say whether a copy in memory is up to date.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from server.core import Role
from server.errors import AlreadyExists, ApiKeyNotFound, FailedPrecondition, InvalidArgument
from server.registry.registry import reaching

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from server.registry.registry import Registry

PREFIX = "und_"
ID_LENGTH = 8
NAMES = "apiKeys/"
COMMAND_LINE = "command line"
MAX_NAME_BYTES = 128
MAX_SKILLS = 100
MAX_PER_MINUTE = 1_000_000
MAX_BUDGET = 10**15  # 1e-6 US dollars, the same as in the configuration
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base32: no letter that looks like a digit
_ID = re.compile(rf"[{_ALPHABET}]{{{ID_LENGTH}}}")
_SKILL = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_SECRET_BYTES = 32
_TOLD_MS = 30 * 86_400_000  # how long a server can still say that a key was revoked, and not only that it knows none
_LOCK = 0x756E6465_6B657973  # PostgreSQL's advisory lock of revocations


@dataclass(slots=True, frozen=True)
class KeySettings:
    """What a key may do. `skills` by name, empty: all; budgets in 1e-6 US dollars, None: the configured default of keys."""

    role: Role
    display_name: str = ""
    skills: tuple[str, ...] = ()
    expire_ms: int | None = None
    requests_per_minute: int = 0
    budget_day: int | None = None
    budget_month: int | None = None


@dataclass(slots=True, frozen=True)
class ApiKey:
    """A key as the registry knows it. Times in milliseconds since 1970."""

    id: str
    settings: KeySettings
    creator: str
    create_ms: int
    last_use_ms: int | None = None
    revoke_ms: int | None = None
    secret_hash: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        """Its resource name."""
        return NAMES + self.id

    def state(self, now_ms: int) -> str:
        """One of live, expired, revoked."""
        if self.revoke_ms is not None:
            return "revoked"
        end = self.settings.expire_ms
        return "live" if end is None or now_ms < end else "expired"


def split_key(text: str) -> tuple[str, str] | None:
    """Id and secret of a key's text, or None where it is none."""
    found, secret = text[len(PREFIX) : len(PREFIX) + ID_LENGTH], text[len(PREFIX) + ID_LENGTH + 1 :]
    if not text.startswith(PREFIX) or text[len(PREFIX) + ID_LENGTH : len(PREFIX) + ID_LENGTH + 1] != "_" or not secret:
        return None
    return (found, secret) if _ID.fullmatch(found) else None


def hash_of(secret: str) -> str:
    """What the registry keeps of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def is_secret_of(secret: str, kept: str) -> bool:
    """Whether a secret is the one that a hash was made of; takes as long for any."""
    return hmac.compare_digest(hash_of(secret), kept)


def read_name(name: str) -> str:
    """The id in a resource name. Raises InvalidArgument."""
    key = name.removeprefix(NAMES)
    if not name.startswith(NAMES) or not _ID.fullmatch(key):
        # A key that was pasted here by mistake must not come back in an error.
        shown = "a key itself" if PREFIX in name else repr(name[:80])
        raise InvalidArgument(f"name is {shown}; expected apiKeys/<id>, where the id is the first part of the key.", field="name")
    return key


def check(settings: KeySettings, now_ms: int) -> None:
    """Raises InvalidArgument, which names the field as CreateApiKeyRequest has it."""
    size = len(settings.display_name.encode("utf-8", "replace"))
    if size > MAX_NAME_BYTES or not settings.display_name.isprintable():
        message = f"display_name has {size} bytes; expected at most {MAX_NAME_BYTES}, without control characters."
        raise InvalidArgument(message, field="api_key.display_name", limit=MAX_NAME_BYTES)
    if len(settings.skills) > MAX_SKILLS:
        raise InvalidArgument(f"{len(settings.skills)} skills; expected at most {MAX_SKILLS}.", field="api_key.skills", limit=MAX_SKILLS)
    for index, skill in enumerate(settings.skills):
        if not _SKILL.fullmatch(skill):
            raise InvalidArgument(f"skills[{index}] is {skill[:80]!r}; expected skills/<skill>.", field=f"api_key.skills[{index}]")
    if settings.skills and settings.role > Role.USER:
        message = f"skills are given for a key of the role {settings.role.name}, which reads and changes all of them; leave skills out."
        raise InvalidArgument(f"{message} Or make it a key of the role USER.", field="api_key.skills")
    if settings.expire_ms is not None and settings.expire_ms <= now_ms:
        raise InvalidArgument("expire_time is past; expected a time to come, or none.", field="api_key.expire_time")
    if not 0 <= settings.requests_per_minute <= MAX_PER_MINUTE:
        message = f"requests_per_minute is {settings.requests_per_minute}; expected 0 (no limit) to {MAX_PER_MINUTE}."
        raise InvalidArgument(message, field="api_key.requests_per_minute", limit=MAX_PER_MINUTE)
    for field_name, value in (("budget_day_micro_usd", settings.budget_day), ("budget_month_micro_usd", settings.budget_month)):
        if value is not None and not 0 <= value <= MAX_BUDGET:
            raise InvalidArgument(f"{field_name} is {value}; expected 0 to {MAX_BUDGET}.", field=f"api_key.{field_name}")


class ApiKeys:
    """Blocking; for threads and commands, never the event loop. Methods raise Unavailable where the database does not answer."""

    def __init__(self, registry: Registry, *, clock: Callable[[], int] | None = None) -> None:
        self._registry = registry
        self.clock = clock or _now

    def create(self, settings: KeySettings, creator: str) -> tuple[ApiKey, str]:
        """Makes a key; returns what is kept of it, and the key itself, which nobody can find out again. Raises InvalidArgument."""
        from sqlalchemy.exc import IntegrityError

        from server.registry.schema import API_KEYS

        check(settings, self.clock())
        for _ in range(8):  # 40 bits of id: two of them meet once in a million keys of a million
            key, secret = "".join(secrets.choice(_ALPHABET) for _ in range(ID_LENGTH)), secrets.token_urlsafe(_SECRET_BYTES)
            made = ApiKey(key, settings, creator, self.clock(), secret_hash=hash_of(secret))
            try:
                with self._begin() as connection:
                    connection.execute(API_KEYS.insert().values(**_row(made)))
            except IntegrityError:
                continue
            return made, f"{PREFIX}{key}_{secret}"
        raise AlreadyExists("eight new ids were all taken; try again.")

    def get(self, key: str) -> ApiKey:
        """Raises ApiKeyNotFound."""
        with self._begin() as connection:
            return _get(connection, key)

    def page(self, limit: int, before: tuple[int, str] | None = None) -> list[ApiKey]:
        """The newest first, revoked and expired ones too; `before`: (create_ms, id) of the last one that was seen."""
        from sqlalchemy import and_, or_, select

        from server.registry.schema import API_KEYS

        when, key = API_KEYS.c.create_ms, API_KEYS.c.id
        query = select(API_KEYS).order_by(when.desc(), key.desc()).limit(limit)
        if before is not None:
            query = query.where(or_(when < before[0], and_(when == before[0], key < before[1])))
        with self._begin() as connection:
            return [_key(row) for row in connection.execute(query)]

    def revoke(self, key: str, *, last_admin: bool = False) -> ApiKey:
        """Ends a key for good; again changes nothing. Raises ApiKeyNotFound, and FailedPrecondition for the last live key of an admin,
        without `last_admin`.
        """
        from sqlalchemy import func, or_, select

        from server.registry.schema import API_KEYS

        now = self.clock()
        with self._begin() as connection:
            # Two admins that revoke each other at once: one of them is to stay. SQLite has one writer, which this makes us.
            if connection.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
            else:
                connection.execute(API_KEYS.update().where(API_KEYS.c.id == key).values(id=key))
            found = _get(connection, key)
            if found.revoke_ms is not None:
                return found
            ends = or_(API_KEYS.c.expire_ms.is_(None), API_KEYS.c.expire_ms > now)
            others = select(func.count()).where(
                API_KEYS.c.role == int(Role.ADMIN), API_KEYS.c.revoke_ms.is_(None), ends, API_KEYS.c.id != key
            )
            last = found.settings.role is Role.ADMIN and not connection.execute(others).scalar_one()
            if last and not last_admin:
                message = f"{found.name} is the last key of an admin; without one nobody could make keys by a call."
                raise FailedPrecondition(f"{message} Make another one first.", api_key=found.name)
            connection.execute(API_KEYS.update().where(API_KEYS.c.id == key).values(revoke_ms=now))
            return _get(connection, key)

    def count(self) -> tuple[int, int]:
        """How many there are, and how many of them are revoked: neither ever shrinks, so that any change shows."""
        from sqlalchemy import func, select

        from server.registry.schema import API_KEYS

        with self._begin() as connection:
            row = connection.execute(select(func.count(), func.count(API_KEYS.c.revoke_ms)).select_from(API_KEYS)).one()
            return int(row[0]), int(row[1])

    def current(self) -> list[ApiKey]:
        """All that a server needs to know: those that are not revoked, and those that were a while ago, to say so."""
        from sqlalchemy import or_, select

        from server.registry.schema import API_KEYS

        query = select(API_KEYS).where(or_(API_KEYS.c.revoke_ms.is_(None), API_KEYS.c.revoke_ms > self.clock() - _TOLD_MS))
        with self._begin() as connection:
            return [_key(row) for row in connection.execute(query)]

    def note_use(self, used: Mapping[str, int]) -> None:
        """Writes when keys were last used, where nobody wrote later."""
        from sqlalchemy import or_

        from server.registry.schema import API_KEYS

        last = API_KEYS.c.last_use_ms
        with self._begin() as connection:
            for key, when in sorted(used.items()):  # in one order, so that two servers do not wait for each other
                connection.execute(API_KEYS.update().where(API_KEYS.c.id == key, or_(last.is_(None), last < when)).values(last_use_ms=when))

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        with reaching(), self._registry.engine().begin() as connection:
            yield connection


def _get(connection: Connection, key: str) -> ApiKey:
    from sqlalchemy import select

    from server.registry.schema import API_KEYS

    row = connection.execute(select(API_KEYS).where(API_KEYS.c.id == key)).one_or_none()
    if row is None:
        raise ApiKeyNotFound(f"There is no key {NAMES}{key}; `understudy keys list` shows those that there are.", api_key=NAMES + key)
    return _key(row)


def _row(key: ApiKey) -> dict[str, Any]:
    given = key.settings
    return {
        "id": key.id,
        "secret_hash": key.secret_hash,
        "display_name": given.display_name,
        "role": int(given.role),
        "skills": json.dumps(list(given.skills)),
        "expire_ms": given.expire_ms,
        "requests_per_minute": given.requests_per_minute,
        "budget_day": given.budget_day,
        "budget_month": given.budget_month,
        "creator": key.creator,
        "create_ms": key.create_ms,
    }


def _key(row: Any) -> ApiKey:
    given = KeySettings(
        Role(row.role),
        row.display_name,
        tuple(json.loads(row.skills)),
        row.expire_ms,
        row.requests_per_minute,
        row.budget_day,
        row.budget_month,
    )
    return ApiKey(row.id, given, row.creator, row.create_ms, row.last_use_ms, row.revoke_ms, row.secret_hash)


def _now() -> int:
    return time.time_ns() // 1_000_000
