"""The skill's route after an ensemble without a result: nobody is asked again, and what members said already is taken as said."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace

from server.core import Call, Limits, Timings, Usage, Work
from server.errors import Unimplemented
from server.routing.candidates import Allowance, Answer, Brief, Candidate, Failure, Piece
from server.routing.cascade import Cascade, Judge
from server.routing.ensemble_calls import Shot
from server.routing.items import Item, Place
from server.routing.routes import Routes


class Recalled:
    """A candidate that has answered as a member: its answer is at hand, and paid."""

    aborted_micro_usd = 0

    def __init__(self, candidate: Candidate, answer: Answer) -> None:
        self.name = candidate.name
        self.local = candidate.local
        self.scored = candidate.scored
        self._answer = replace(answer, usage=Usage(), cost_micro_usd=0, elapsed_s=0.0)

    async def answers(
        self, works: Sequence[Work], call: Call, timings: Timings, allowed: Allowance
    ) -> AsyncIterator[tuple[int, Answer | Failure]]:
        """See Candidate."""
        for index in range(len(works)):
            yield index, self._answer

    async def second_try(self, work: Work, first: Answer, call: Call, allowed: Allowance) -> Answer | Failure | None:
        """None: the ensemble was its chance."""
        return None

    async def stream(self, work: Work, call: Call, allowed: Allowance) -> AsyncGenerator[Piece, None]:
        """Not streamed."""
        raise Unimplemented(f"{self.name} has answered as a member of an ensemble, which is no stream.")
        yield Piece()

    def closed(self) -> str:
        """See Candidate."""
        return ""

    def worst_cost_micro_usd(self, work: Work) -> int | None:
        """Nothing more."""
        return 0

    def expected_s(self) -> float | None:
        """At once."""
        return 0.0


async def fall_back(
    routes: Routes, judge: Judge, asked: tuple[Brief, Limits], item: Item, shots: Sequence[Shot], run: tuple[Call, Timings]
) -> None:
    """Takes the route of `asked`, a brief with its limits. Raises FailedPrecondition where nobody may answer."""
    brief, limits = asked
    call, timings = run
    places = []
    for place in routes.places(brief, limits, item.work):
        mine = [shot for shot in shots if shot.name == place.candidate.name and (shot.wave or shot.answer is not None)]
        answer = next((shot.answer for shot in mine if shot.answer is not None), None)
        if answer is not None:
            places.append(Place(Recalled(place.candidate, answer), place.reason))
        elif mine:
            item.passed_over[place.candidate.name] = "it was asked as a member of the ensemble"
            places.append(place)
        elif not place.shadow:
            places.append(place)
    await routes.pass_over(brief, replace(limits, max_latency_s=_left(call)), places, [item], call)
    await Cascade(brief, judge, call, timings, limits.max_cost_micro_usd).run(places, [item])


def _left(call: Call) -> float | None:
    """Seconds until the call's deadline: who is expected to take longer is passed over."""
    return None if call.deadline is None else max(0.0, call.deadline - time.monotonic())
