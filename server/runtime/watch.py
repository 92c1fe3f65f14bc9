"""Looks at a folder again and again, beside the event loop: how what a trainer publishes is taken over."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

_log = logging.getLogger(__name__)


class Watch:
    """Calls `refresh`, which may block, in a thread: once at the start, then every `poll_s` seconds. `what` names it in the log.

    `then` is awaited on the event loop after each, but for the first, which a start waits for.
    """

    def __init__(self, refresh: Callable[[], None], poll_s: float, what: str, then: Callable[[], Awaitable[None]] | None = None) -> None:
        self._refresh = refresh
        self._then = then
        self._poll_s = poll_s
        self._what = what
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Looks once, then goes on until `stop`."""
        await asyncio.to_thread(self._refresh)
        self._task = asyncio.create_task(self._run(), name=f"watch {self._what}")

    async def stop(self) -> None:
        """Ends the watch; what is loaded stays."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await asyncio.to_thread(self._refresh)
                if self._then is not None:
                    await self._then()
            except Exception:  # a disk that went away; it may come back
                _log.exception("looking for %s failed", self._what)
