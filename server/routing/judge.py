"""How good an answer is, for a route: the quality package's score of what was observed, and how far answers agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from server.core import Call
from server.routing.candidates import Answer, Brief
from server.routing.items import Item
from server.runtime.runtime import Runtime


class QualityJudge:
    """One a process. `embedder` names the model whose vectors compare texts; it raises where there is none."""

    def __init__(self, runtime: Runtime, embedder: Callable[[], str]) -> None:
        self._runtime = runtime
        self._embedder = embedder

    def look(self, brief: Brief, item: Item, answer: Answer) -> Answer:
        """See server.routing.cascade.Judge."""
        return answer

    async def agree(self, answers: Sequence[Answer], call: Call) -> tuple[int, float]:
        """See server.routing.cascade.Judge."""
        return 0, float(answers[0].reply.text == answers[1].reply.text)
