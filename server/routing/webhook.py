"""Posts events as JSON to an address that is a secret: it is in no log and no error."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping

_LOG = logging.getLogger(__name__)
_TRIES = 6
_FIRST_PAUSE_S = 0.5
_TIMEOUT_S = 10.0


class Webhook:
    """Sends in the background, with retries; `post` never waits. On one event loop."""

    def __init__(self, url: str, *, first_pause_s: float = _FIRST_PAUSE_S) -> None:
        self._url = url
        self._first_pause_s = first_pause_s
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return "Webhook()"

    def post(self, event: Mapping[str, object]) -> None:
        """Sends soon. Where every try fails, the log says so."""
        task = asyncio.get_running_loop().create_task(self._send(dict(event)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self, wait_s: float = 5.0) -> None:
        """Gives what is under way a moment, then leaves it."""
        tasks = list(self._tasks)
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=wait_s)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)
            _LOG.error("a webhook was not delivered before the end", extra={"events": len(late)})

    async def _send(self, event: dict[str, object]) -> None:
        import httpx

        failure = ""
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, follow_redirects=False) as client:
            for attempt in range(_TRIES):
                if attempt:
                    await asyncio.sleep(self._first_pause_s * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))
                try:
                    status = (await client.post(self._url, json=event)).status_code
                except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
                    failure = type(error).__name__  # the message may hold the address
                    continue
                if status < 300:
                    return
                failure = f"status {status}"
                if status < 500 and status not in (408, 425, 429):
                    break
        _LOG.error("a webhook was not delivered", extra={"event_type": event.get("event"), "failure": failure, "tries": attempt + 1})
