"""The encoder engine: sequences of many calls in, batches through one graph, one row a sequence out.

A batch is whatever waits when the engine's thread is free; no timer. A sequence's row does not depend on what else is in its batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from native import batch as native
from server.core import Call, FloatArray, Task, Timings
from server.errors import InputTooLong, InvalidArgument, UnderstudyError
from server.runtime.manifest import Manifest
from server.runtime.observer import BatchReport as BatchReport
from server.runtime.observer import NullObserver as NullObserver
from server.runtime.observer import Observer as Observer
from server.runtime.packing import Encoded as Encoded
from server.runtime.packing import Packed, Packer
from server.runtime.queue import QueueLimits as QueueLimits
from server.runtime.sessions import Session, Stop
from server.runtime.worker import EngineSettings as EngineSettings
from server.runtime.worker import Flight, Outcome, Worker

_KINDS = {"mean": native.MEAN, "cls": native.CLS, "last": native.LAST}


@dataclass(frozen=True, slots=True)
class Pool:
    """One vector a sequence from its tokens' rows; `dimensions` leading columns are kept (None: all), then normalised if asked."""

    kind: Literal["mean", "cls", "last"]
    normalize: bool = False
    dimensions: int | None = None


@dataclass(slots=True)
class EngineOutput:
    """`rows[i]` of sequence i: float32[D] when pooled, [labels] of a sequence head, [n, C] of a token-wise output; or its error.

    Rows may share memory with each other: copy a row to keep it longer than the call.
    """

    rows: list[FloatArray | UnderstudyError]
    timings: Timings


@dataclass(frozen=True, slots=True)
class GraphForm:
    """What the engine needs to know of a graph. `per_token`: the output has one row a token, otherwise one a sequence."""

    name: str
    version: str
    form: Literal["packed", "padded"]
    max_tokens: int
    per_token: bool
    pad_id: int = 0

    @classmethod
    def of(cls, manifest: Manifest) -> GraphForm:
        """Raises ValueError for form "tensor", which has no sequences."""
        if manifest.form not in ("packed", "padded"):
            raise ValueError(f"a model of form {manifest.form!r} has no encoder engine")
        per_sequence = (Task.TEXT_CLASSIFICATION, Task.TEXT_RANKING, Task.ZERO_SHOT_CLASSIFICATION)
        return cls(
            name=manifest.name,
            version=manifest.version,
            form=manifest.form,
            max_tokens=manifest.max_tokens,
            per_token=manifest.task not in per_sequence,
            pad_id=int(manifest.extra.get("pad_token_id", 0)),
        )


_Item = tuple[Encoded, Pool | None]


class Engine(Worker[_Item, FloatArray]):
    """One loaded graph of form packed or padded. Made and used on the event loop; raises ModelRejected when the graph has other inputs."""

    def __init__(
        self, session: Session, graph: GraphForm, settings: EngineSettings | None = None, observer: Observer | None = None
    ) -> None:
        settings = settings or EngineSettings()
        self.graph = graph
        self._packers = [
            Packer(
                session,
                graph.form,
                capacity=max(settings.token_budget, graph.max_tokens),
                max_sequences=settings.max_sequences,
                pad_id=graph.pad_id,
            )
            for _ in range(settings.lanes)
        ]
        self._output = session.outputs[0].name
        width = session.outputs[0].shape[-1] if session.outputs[0].shape else None
        self.width = width if isinstance(width, int) else None
        super().__init__(graph.name, graph.version, session, settings, observer, padded=graph.form == "padded")

    @property
    def session(self) -> Session:
        """The loaded graph."""
        return self._session

    async def run(self, sequences: Sequence[Encoded], call: Call, pool: Pool | None = None) -> EngineOutput:
        """One row a sequence; a sequence that is empty or too long gets an error in its row, and the others still run.

        Raises what ends the whole call: DeadlineExceeded, Overloaded, Draining, RequestTooLarge, InvalidArgument for a `pool` that the
        graph's output does not allow. Cancelling the task withdraws what waits.
        """
        self._check_pool(pool)
        errors = {i: error for i, s in enumerate(sequences) if (error := self._refusal(s, i)) is not None}
        kept = [s for i, s in enumerate(sequences) if i not in errors] if errors else sequences
        flight = await self.submit([(s, pool) for s in kept], [len(s.ids) for s in kept], call)
        rows = iter(flight.rows)
        ordered = [errors[i] if i in errors else next(rows) for i in range(len(sequences))] if errors else flight.rows
        return EngineOutput(ordered, flight.timings)  # type: ignore[arg-type]  # every row has arrived

    def _check_pool(self, pool: Pool | None) -> None:
        if pool is None:
            return
        if not self.graph.per_token:
            raise InvalidArgument(f"model {self.name!r} gives one row a sequence: there is nothing to pool; call it without pooling")
        size = pool.dimensions
        if size is not None and (size < 1 or (self.width is not None and size > self.width)):
            raise InvalidArgument(
                f"{size} dimensions were asked of model {self.name!r}, which has {self.width}; ask for 1 to {self.width}",
                field="dimensions",
                limit=self.width,
            )

    def _refusal(self, sequence: Encoded, index: int) -> UnderstudyError | None:
        tokens = len(sequence.ids)
        if tokens > self.graph.max_tokens:
            return InputTooLong(
                f"sequence {index} has {tokens} tokens, model {self.name!r} takes {self.graph.max_tokens}; shorten it, or ask to truncate",
                tokens=tokens,
                limit=self.graph.max_tokens,
            )
        if tokens == 0:
            return InvalidArgument(f"sequence {index} has no token; at least one is needed")
        return None

    def _execute(self, batch: list[tuple[Flight[_Item, FloatArray], int]], stop: Stop, lane: int) -> Outcome[FloatArray]:
        items = [flight.pieces[index] for flight, index in batch]
        packed = self._packers[lane].pack([sequence for sequence, _ in items])
        start = time.monotonic()
        output = self._session.run(packed.feeds, [self._output], stop)[0]
        ran = time.monotonic()
        if output.dtype != np.float32:
            output = output.astype(np.float32)
        rows = self._rows(output, packed, [pool for _, pool in items])
        return Outcome(rows, packed.tokens, ran - start, time.monotonic() - ran)

    def _rows(self, output: FloatArray, packed: Packed, pools: list[Pool | None]) -> list[FloatArray]:
        if not self.graph.per_token:
            return list(output)
        width = output.shape[-1]
        flat = np.ascontiguousarray(output).reshape(-1, width)
        count = len(pools)
        sizes = [width if pool is None or pool.dimensions is None else pool.dimensions for pool in pools]
        if all(pool is None for pool in pools):
            vectors = None
        else:
            specs = [
                (native.NONE, 0, 0) if pool is None else (_KINDS[pool.kind], int(pool.normalize), size)
                for pool, size in zip(pools, sizes, strict=True)
            ]
            vectors = np.empty((count, width), np.float32)
            native.pool(flat, packed.begins, packed.ends, np.array(specs, np.int32), vectors)
        return [
            flat[packed.begins[i] : packed.ends[i]] if vectors is None or pools[i] is None else vectors[i, : sizes[i]] for i in range(count)
        ]
