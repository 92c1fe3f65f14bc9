"""A job's answers on their way from the engine's thread to whoever iterates over them on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from server.errors import UnderstudyError
from server.runtime.decoder.contract import Piece
from server.runtime.decoder.sequence import Flight


class JobStream:
    """One reader. What arrives before it looks again is merged, so that a slow reader holds text and tokens once, not messages."""

    def __init__(self, flight: Flight, nudge: Callable[[], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self._flight = flight
        self._nudge = nudge
        self._left = flight.job.n
        self._pieces: dict[int, Piece] = {}
        self._error: UnderstudyError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def cancel(self) -> None:
        """Nobody reads on; the pages are free with the next step. May be called at any time, and twice."""
        if self._left and self._error is None and not self._flight.abandoned:
            self._flight.abandoned = True
            self._nudge()

    async def __aiter__(self) -> AsyncIterator[list[Piece]]:
        try:
            while True:
                if self._pieces:
                    found = list(self._pieces.values())
                    self._pieces = {}
                    self._left -= sum(piece.finish is not None for piece in found)
                    yield found
                elif self._error is not None:
                    raise self._error
                elif self._left == 0:
                    return
                else:
                    self._waiter = self.loop.create_future()
                    await self._waiter
        finally:
            if self._left:
                self.cancel()

    # Called on the event loop by the engine's delivery.

    def arrive(self, piece: Piece) -> None:
        """More of one candidate."""
        known = self._pieces.get(piece.index)
        if known is None:
            self._pieces[piece.index] = piece
        else:
            known.tokens += piece.tokens
            known.finish, known.text_end = piece.finish, piece.text_end
        self._wake()

    def fail(self, error: UnderstudyError) -> None:
        """The job ended with an error; what arrived before is still read."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
