"""Interaction ids that prove themselves: feedback on an id that was never given out is refused without a look-up.

An id is 20 bytes in base32: 48 bits of milliseconds, 48 random bits, and 64 bits of BLAKE2b keyed with a secret of the lake. Every
replica on one lake shares the key, so that any of them can take the feedback, however old the interaction is.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path

_BODY = 12
_MAC = 8


class IdKey:
    """Makes and checks ids. The key never leaves this object: its repr shows nothing of it."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def open(cls, path: Path) -> IdKey:
        """Reads the key of a lake, or makes it on first use (mode 0600, exclusively: of two makers one wins)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            return cls(path.read_bytes())
        except FileNotFoundError:
            pass
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(fd, secrets.token_bytes(32))
            os.fsync(fd)
            os.link(draft, path)  # fails where another maker was first; never shows half a key
        except FileExistsError:
            pass
        finally:
            os.close(fd)
            draft.unlink()
        return cls(path.read_bytes())

    def new(self) -> str:
        """A fresh id, with the millisecond of its making in it."""
        body = (time.time_ns() // 1_000_000).to_bytes(6, "big") + secrets.token_bytes(6)
        return base64.b32encode(body + self._mac(b"interaction", body)).decode().lower()

    def valid(self, interaction_id: str) -> bool:
        """Whether this lake gave the id out."""
        try:
            raw = base64.b32decode(interaction_id.upper().encode("ascii"))
        except (binascii.Error, UnicodeEncodeError, ValueError):
            return False
        return len(raw) == _BODY + _MAC and hmac.compare_digest(raw[_BODY:], self._mac(b"interaction", raw[:_BODY]))

    def pseudonym(self, user: str) -> str:
        """A keyed hash of a caller's user id, 32 hex digits; empty for no user. The same user gives the same hash in one lake only."""
        return hashlib.blake2b(user.encode(), key=self._key, digest_size=16, person=b"user").hexdigest() if user else ""

    def derived(self, *parts: str) -> str:
        """An id that is the same whenever the parts are the same, 32 hex digits: for requests that may be repeated."""
        message = b"\0".join(part.encode() for part in parts)
        return hashlib.blake2b(message, key=self._key, digest_size=16, person=b"derived").hexdigest()

    def _mac(self, person: bytes, body: bytes) -> bytes:
        return hashlib.blake2b(body, key=self._key, digest_size=_MAC, person=person).digest()
