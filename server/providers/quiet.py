"""The libraries' own logs: kept still, and where an operator wakes them, without keys."""

from __future__ import annotations

import logging

# At DEBUG they write whole requests with the users' texts, and headers as the vendor sent them; httpx2 writes a line a request at INFO.
_LIBRARIES = ("openai", "anthropic", "httpx2", "httpcore2")
# A filter holds for the logger that it is attached to, not for those below it.
_WRITERS = ("openai._base_client", "anthropic._base_client", "httpx2", "httpcore2.connection", "httpcore2.http11", "httpcore2.proxy")


class WithoutSecret(logging.Filter):
    """Drops records that repeat a secret."""

    def __init__(self, secret: str) -> None:
        super().__init__()
        self._secret = secret

    def __eq__(self, other: object) -> bool:  # so that a logger takes one a secret
        return isinstance(other, WithoutSecret) and other._secret == self._secret

    def __hash__(self) -> int:
        return hash(self._secret)

    def filter(self, record: logging.LogRecord) -> bool:
        """See logging.Filter."""
        if self._secret in record.getMessage():
            return False
        if record.exc_info and self._secret in logging.Formatter().formatException(record.exc_info):
            record.exc_info = None
        return True


def keep_quiet(secret: str) -> None:
    """Before the first request of a client that has the secret; levels that somebody has set stay."""
    for name in _LIBRARIES:
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.WARNING)
    if secret:
        for name in _WRITERS:
            logging.getLogger(name).addFilter(WithoutSecret(secret))
