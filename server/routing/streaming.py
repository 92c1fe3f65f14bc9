"""A routed answer as a stream. What the caller has seen of a candidate's answer stays: after the first visible word nobody takes over.

Words of a model that is scored are held back until its quality is known to reach the bar, or to fall short of the second-try bar; in
between they are held to the end, and the whole answer is judged as `Cascade` judges it. Words of a provider go out as they come.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from server.core import Call, Reply
from server.errors import ProviderUnavailable, UnderstudyError
from server.routing.candidates import Answer, Brief, Candidate, Piece
from server.routing.cascade import Cascade, Judge
from server.routing.items import Item, Place


class StreamedCascade:
    """One streamed request's way through its route. `hold_tokens`: tokens after which a first look at held words is taken."""

    def __init__(self, cascade: Cascade, brief: Brief, judge: Judge, call: Call, hold_tokens: int) -> None:
        self._cascade = cascade
        self._brief = brief
        self._judge = judge
        self._call = call
        self._hold = hold_tokens
        self._started = time.monotonic()

    async def run(self, route: Sequence[Place], item: Item) -> AsyncGenerator[str, None]:
        """Visible words. Ends with `item.done`, or with the item undone where nobody could answer.

        Raises the error of a candidate that failed after its first visible word.
        """
        item.stream = True
        asked = [place for place in route if not place.shadow]
        for number, place in enumerate(asked):
            candidate, later = place.candidate, asked[number + 1 :]
            reason = item.passed_over.get(candidate.name) or candidate.closed()
            if reason:
                item.skip(candidate, reason)
                continue
            words = self._one(candidate, item, later)
            try:
                async for text in words:
                    if not item.first_token_s:
                        item.first_token_s = time.monotonic() - self._started
                    yield text
            finally:
                await words.aclose()
            if item.done:
                return

    async def _one(self, candidate: Candidate, item: Item, later: Sequence[Place]) -> AsyncGenerator[str, None]:
        """One candidate's words, if they may be seen. Returns with the item undone where the next candidate is due."""
        held: list[str] = []
        visible = not candidate.scored
        seen = False
        pieces = candidate.stream(item.work, self._call, self._cascade.allowance(len(later)))
        try:
            async for piece in pieces:
                if piece.answer is not None:
                    if seen:
                        item.note(candidate, piece.answer)
                        item.deliver(candidate, self._judge.look(self._brief, item, piece.answer), _reason(candidate))
                        return
                    if not candidate.scored and not piece.answer.reply.tool_calls and not piece.answer.reply.text.strip():
                        raise ProviderUnavailable(f"{candidate.name} ended its stream without a word.")
                    await self._cascade.finish(candidate, item, piece.answer, later)
                    if item.done and item.outcome.reply.text:
                        yield item.outcome.reply.text  # of the second try, where there was one
                    return
                held.append(piece.text)
                if not visible:
                    verdict = self._first_look(candidate, item, "".join(held), piece, later)
                    if verdict is None:
                        continue
                    if not verdict:
                        return
                    visible = True
                yield "".join(held)
                seen = True
                held.clear()
        except UnderstudyError as error:
            item.fail(candidate, error)
            if seen:
                item.committed = True
                raise
        finally:
            await pieces.aclose()
            item.outcome.cost_micro_usd += candidate.aborted_micro_usd

    def _first_look(self, candidate: Candidate, item: Item, text: str, piece: Piece, later: Sequence[Place]) -> bool | None:
        """True: the words may be seen. False: the next candidate is due. None: they are held on."""
        signals = piece.signals
        if signals is None or len(signals.logprobs) < self._hold:
            return None
        skill = self._brief.skill
        begun = Answer(Reply(text), signals=replace(signals, valid=None))
        quality = self._judge.look(self._brief, item, begun).quality
        others = any(not place.candidate.scored for place in later)
        if quality is None:
            return None if others else True
        if quality >= skill.deliver_bar:
            return True
        if quality < skill.second_try_bar and others:
            bar = f"{skill.second_try_bar:g}"
            item.hop(
                candidate, "below_bar", f"after {len(signals.logprobs)} tokens its quality is below {bar}", replace(begun, quality=quality)
            )
            return False
        return None


def _reason(candidate: Candidate) -> str:
    return "its first words reached the bar" if candidate.scored else "it sets the skill's standard"
