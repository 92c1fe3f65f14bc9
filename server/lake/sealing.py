"""Payloads under a user's key (AES-256-GCM): delete the key, and nobody reads them again, in whatever copy.

A sealed value is `enc:v1:` and base64 of nonce (12 bytes), ciphertext and tag (16 bytes). What it is bound to (the additional data) is
`v1|<table>|<column>|<interaction_id>`, so that no value passes for another's. The sealed form of a list is a list with one value, which
holds the list as JSON. A row's column `sealed` says "v1" where its payloads are sealed; a text that merely begins so is not taken for one.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from server.errors import FailedPrecondition
from server.lake.schema import LISTS
from server.registry.keys import LOG_PREFIX

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

VERSION = "v1"
PREFIX = "enc:v1:"
_NONCE = 12
_SEALED = b"\x01"
_HEAD = 15
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Sealer:
    """Seals and opens payloads of one user. The key never leaves this object."""

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._cipher: AESGCM = AESGCM(key)

    def seal(self, table: str, column: str, interaction_id: str, value: Any) -> Any:
        """The sealed form of a string or a list of strings; null and the empty list stay what they are."""
        if value is None or value == []:
            return value
        listed = column in LISTS[table]
        clear = (_encode(value) if listed else str(value)).encode()
        nonce = os.urandom(_NONCE)
        box = nonce + self._cipher.encrypt(nonce, clear, _bound_to(table, column, interaction_id))
        text = PREFIX + base64.b64encode(box).decode()
        return [text] if listed else text

    def open(self, table: str, column: str, interaction_id: str, value: Any) -> Any:
        """The value as it was. Raises FailedPrecondition where it was altered, moved from another row, or sealed with another key."""
        from cryptography.exceptions import InvalidTag

        if value is None or value == []:
            return value
        listed = column in LISTS[table]
        try:
            box = base64.b64decode(str(value[0] if listed else value).removeprefix(PREFIX), validate=True)
            clear = self._cipher.decrypt(box[:_NONCE], box[_NONCE:], _bound_to(table, column, interaction_id))
        except (ValueError, InvalidTag) as error:
            message = (
                f"Column {column!r} of {interaction_id!r} in table {table!r} does not open with its user's key: it was altered, or the "
                "registry is another lake's. Look at registry.url; `understudy lake verify` counts such rows."
            )
            raise FailedPrecondition(message, table=table, column=column) from error
        return json.loads(clear) if listed else clear.decode()


class Sealers:
    """Sealers by user, made once a user."""

    def __init__(self, keys: Mapping[str, bytes | None]) -> None:
        self._keys = keys
        self._made: dict[str, Sealer] = {}

    def get(self, user: str) -> Sealer | None:
        """A user's; None where there is no key, because the user was erased."""
        if (made := self._made.get(user)) is None and (key := self._keys.get(user)) is not None:
            made = self._made[user] = Sealer(key)
        return made


class LogSealer:
    """Seals the records of one process's log, whole: what waits to become Parquet waits for seconds, and needs no user's key for it.

    A sealed record is the byte 1, the key's name (14 bytes, in the registry "log-" and its hexadecimal form), a nonce and the ciphertext
    with its tag; a record in clear begins with "{". The key is deleted when the log's segments are rows.
    """

    def __init__(self, name: str, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self.name = name
        self._head = _SEALED + bytes.fromhex(name.removeprefix(LOG_PREFIX))
        self._cipher = AESGCM(key)

    def __repr__(self) -> str:
        return f"LogSealer({self.name})"

    def seal(self, payload: bytes) -> bytes:
        """A record's sealed form."""
        nonce = os.urandom(_NONCE)
        return self._head + nonce + self._cipher.encrypt(nonce, payload, self._head)

    def open(self, payload: bytes) -> bytes:
        """The record. Raises ValueError where it does not open."""
        from cryptography.exceptions import InvalidTag

        try:
            return self._cipher.decrypt(payload[_HEAD : _HEAD + _NONCE], payload[_HEAD + _NONCE :], self._head)
        except InvalidTag:
            raise ValueError("a record of the log does not open with its key") from None


def log_key_name(payload: bytes) -> str:
    """Name of the key that a record of the log is sealed with; empty for one in clear."""
    return LOG_PREFIX + payload[1:_HEAD].hex() if payload[:1] == _SEALED else ""


def _bound_to(table: str, column: str, interaction_id: str) -> bytes:
    return f"{VERSION}|{table}|{column}|{interaction_id}".encode()
