"""A student that is a base's embedding, an adapter's head, and a calibrated quality."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import numpy as np

from server.core import Call, Label, Reply, Task, Timings, Usage, Work
from server.errors import ModelNotLoaded, UnderstudyError, Unimplemented
from server.routing.candidates import Allowance, Answer, Failure, Piece
from server.routing.pace import Paces
from server.routing.skills import Student
from server.runtime.runtime import Runtime
from server.runtime.verify import MODEL


class HeadCandidate:
    """See Candidate. An item that the base refuses (too long, empty) fails here and may succeed elsewhere."""

    local = True
    scored = True
    aborted_micro_usd = 0

    def __init__(self, student: Student, runtime: Runtime, paces: Paces) -> None:
        self.name = student.candidate
        self._student = student
        self._runtime = runtime
        self._paces = paces

    def closed(self) -> str:
        """See Candidate."""
        return ""

    def expected_s(self) -> float | None:
        """See Candidate."""
        return self._paces.expected_s(self.name)

    def worst_cost_micro_usd(self, work: Work) -> int | None:
        """Nothing."""
        return 0

    async def second_try(self, work: Work, first: Answer, call: Call, allowed: Allowance) -> Answer | Failure | None:
        """None: a head says the same again."""
        return None

    async def stream(self, work: Work, call: Call, allowed: Allowance) -> AsyncGenerator[Piece, None]:
        """A label is no stream."""
        raise Unimplemented(f"{self.name} gives labels, which are no stream. Call Run.")
        yield Piece()

    def _version(self) -> str | None:
        """The base's version that the head was trained on, where it is loaded; the default otherwise, which may be the same graph."""
        base = self._student.head.manifest.base
        return base.version if self._runtime.has(base.name, base.version) else None

    async def answers(
        self, works: Sequence[Work], call: Call, timings: Timings, allowed: Allowance
    ) -> AsyncIterator[tuple[int, Answer | Failure]]:
        """See Candidate."""
        head = self._student.head
        features = head.manifest.features
        started = time.perf_counter()
        try:
            # The head's own base, not the skill's setting: after a change of the setting the head still reads what it was trained on.
            base = head.manifest.base
            with self._runtime.use(base.name, Task.FEATURE_EXTRACTION, self._version()) as model:
                if model.manifest.files[MODEL].sha256 != base.sha256:
                    raise ModelNotLoaded(f"{self.name} was trained on another version of {base.name!r}.", model=base.name)
                dimensions = features.size if features.size != model.manifest.hidden_size else None
                embedded = await model.embed(
                    [work.plain for work in works],
                    call=call,
                    pooling=features.pooling,
                    normalize=features.normalize,
                    dimensions=dimensions,
                )
            timings.merge(embedded.timings)
            rows = [index for index, row in enumerate(embedded.items) if not isinstance(row, Exception)]
            posted = time.perf_counter()
            vectors = [row for row in embedded.items if not isinstance(row, Exception)]
            probabilities = head.predict(np.stack(vectors)) if vectors else np.zeros((0, len(head.manifest.labels)), np.float32)
            calibration = self._student.calibration
            qualities = calibration.quality(probabilities).tolist() if calibration is not None and vectors else [None] * len(rows)
            timings.merge(Timings(post=embedded.timings.post + time.perf_counter() - posted))
        except UnderstudyError as error:
            for index in range(len(works)):
                yield index, Failure(error)
            return
        elapsed = time.perf_counter() - started
        self._paces.took(self.name, elapsed)
        share = Usage(embedded.usage.input // max(len(rows), 1))
        for index, row in enumerate(embedded.items):
            if isinstance(row, Exception):
                assert isinstance(row, UnderstudyError), row
                yield index, Failure(row, elapsed_s=elapsed)
        names = head.manifest.labels
        for index, scores, quality in zip(rows, probabilities, qualities, strict=True):
            order = np.argsort(-scores, kind="stable")
            labels = [Label(names[i], float(scores[i])) for i in order]
            reply = Reply(labels[0].name, labels=labels)
            yield index, Answer(reply, quality, usage=share, source_model=head.manifest.base.name, elapsed_s=elapsed)
