"""A graph with adapters, seen as one without: the bank is fed here, and tokens that name no slot have no adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from server.runtime.lora.bank import AdapterBank
from server.runtime.sessions import Array, Binding, Session, Stop

ADAPTER_IDS = "adapter_ids"
HIDDEN = (ADAPTER_IDS, "lora_bank", "lora_ranks")


class AdaptedSession(Session):
    """`inner` without its inputs `HIDDEN`. Feeds may hold adapter_ids int32[T] (slots, -1 without); else no token has an adapter."""

    def __init__(self, inner: Session, bank: AdapterBank) -> None:
        assert {spec.name for spec in inner.inputs} >= set(HIDDEN), "a graph that takes adapters"
        self.path = inner.path
        self.inputs = tuple(spec for spec in inner.inputs if spec.name not in HIDDEN)
        self.outputs = inner.outputs
        self._inner = inner
        self._constant = bank.feeds()

    def stop(self) -> Stop:
        """A new flag for one run."""
        return self._inner.stop()

    def close(self) -> None:
        """Drops the graph."""
        self._inner.close()

    def bind(self, inputs: Sequence[Array], outputs: Mapping[str, Array]) -> Binding:
        """Encoders run by feeds alone: how many tokens there are changes with each batch."""
        raise AssertionError("a session with adapters is not bound")

    def _run(self, feeds: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None) -> list[Array]:
        ids = feeds.get(ADAPTER_IDS)
        if ids is None:
            ids = np.full(len(feeds["input_ids"]), -1, np.int32)
        return self._inner._run({**feeds, **self._constant, ADAPTER_IDS: ids}, outputs, stop)
