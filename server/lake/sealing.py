"""Payloads under a user's key (AES-256-GCM): delete the key, and nobody reads them again, in whatever copy.

A sealed value is `enc:v1:` and base64 of nonce (12 bytes), ciphertext and tag (16 bytes). What it is bound to (the additional data) is
`v1|<table>|<column>|<interaction_id>`, so that no value passes for another's. The sealed form of a list is a list with one value, which
holds the list as JSON. A row's column `sealed` says "v1" where its payloads are sealed; a text that merely begins so is not taken for one.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from server.errors import FailedPrecondition
from server.lake.schema import LISTS, PAYLOADS

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

VERSION = "v1"
PREFIX = "enc:v1:"
KEY_BYTES = 32
_NONCE = 12
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Sealer:
    """Seals and opens payloads of one user. The key never leaves this object."""

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._cipher: AESGCM = AESGCM(key)

    def seal(self, table: str, row: MutableMapping[str, Any]) -> None:
        """Seals a row's payload columns where they stand, and says so in `sealed`."""
        key = str(row.get("interaction_id") or "")
        for column in PAYLOADS[table]:
            value = row.get(column)
            if value is None or value == []:
                continue
            listed = column in LISTS[table]
            clear = (_encode(value) if listed else str(value)).encode()
            nonce = os.urandom(_NONCE)
            box = nonce + self._cipher.encrypt(nonce, clear, _bound_to(table, column, key))
            text = PREFIX + base64.b64encode(box).decode()
            row[column] = [text] if listed else text
        row["sealed"] = VERSION

    def open(self, table: str, column: str, interaction_id: str, value: Any) -> Any:
        """The value as it was. Raises FailedPrecondition where it was altered, moved from another row, or sealed with another key."""
        from cryptography.exceptions import InvalidTag

        listed = column in LISTS[table]
        text = (value[0] if value else "") if listed else value
        if not text:
            return value
        try:
            box = base64.b64decode(str(text).removeprefix(PREFIX), validate=True)
            clear = self._cipher.decrypt(box[:_NONCE], box[_NONCE:], _bound_to(table, column, interaction_id))
        except (ValueError, InvalidTag) as error:
            message = (
                f"Column {column!r} of {interaction_id!r} in table {table!r} does not open with its user's key: it was altered, or the "
                "registry is another lake's. Look at registry.url; `understudy lake verify` names every such row."
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


def blank(table: str, row: MutableMapping[str, Any]) -> None:
    """Takes everything out of a row that its user said or was told."""
    for column in PAYLOADS[table]:
        row[column] = None


def users_of(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """The users that rows name."""
    return {str(row["user_hash"]) for row in rows if row.get("user_hash")}


def _bound_to(table: str, column: str, interaction_id: str) -> bytes:
    return f"{VERSION}|{table}|{column}|{interaction_id}".encode()
