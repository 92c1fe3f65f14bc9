"""Any loaded graph, raw: named tensors in, named tensors out, joined with other callers' along the first axis where that is sound.

Joined when every input and output of the graph has the same symbolic first axis; then calls whose other sizes agree share a run.
Everything else runs alone.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from server.core import Call
from server.errors import InvalidTensor, ModelRejected, UnderstudyError
from server.runtime.observer import Observer
from server.runtime.queue import QueueLimits
from server.runtime.sessions import Array, Session, Stop, TensorSpec
from server.runtime.worker import EngineSettings, Outcome, Piece, Worker

# The queue counts KiB here: raw inputs differ too much in size to be counted by rows.
_BATCH_KIB = 16 * 1024
_WAITING_KIB = 512 * 1024
_BATCH_CALLS = 64

Tensors = dict[str, Array]


@dataclass(frozen=True, slots=True)
class _Asked:
    feeds: Tensors
    outputs: tuple[str, ...]
    rows: int

    @property
    def signature(self) -> tuple[Any, ...]:
        """Calls with equal signatures can share a run."""
        return (self.outputs, *((name, array.shape[1:]) for name, array in self.feeds.items()))


class TensorEngine(Worker[_Asked, Tensors]):
    """Raw access to a session, which several engines may share. Of `settings` only the number of waiting calls is used.

    Raises ModelRejected for a graph with an input that is no tensor of a NumPy type.
    """

    def __init__(
        self, session: Session, name: str, version: str, settings: EngineSettings | None = None, observer: Observer | None = None
    ) -> None:
        strange = [spec.name for spec in session.inputs if spec.dtype is None]
        if strange:
            raise ModelRejected(
                f"model {name!r} takes {strange}, which are not tensors of a type that can be sent; expected tensors", model=name
            )
        self._inputs = {spec.name: spec for spec in session.inputs}
        self._outputs = {spec.name: spec for spec in session.outputs if spec.dtype is not None}
        self._batched = _shares_first_axis(session)
        waiting = (settings or EngineSettings()).limits.max_sequences
        own = EngineSettings(
            token_budget=_BATCH_KIB,
            max_sequences=_BATCH_CALLS if self._batched else 1,
            limits=QueueLimits(max_sequences=waiting, max_tokens=_WAITING_KIB),
        )
        super().__init__(name, version, session, own, observer)

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """What the graph takes, in its order."""
        return list(self._inputs.values())

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """What the graph gives, in its order, without what is no tensor."""
        return list(self._outputs.values())

    @property
    def batched(self) -> bool:
        """Whether callers are joined along the first axis."""
        return self._batched

    async def infer(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None, call: Call) -> Tensors:
        """Runs the graph; `outputs` None or empty: all of them. Text is an object array of str, or of bytes in UTF-8.

        Raises InvalidTensor (metadata tensor, got, expected) for names, dtypes and shapes that the graph does not take, and what
        `Engine.run` raises for a whole call. Arrays returned may share memory with those of other callers: copy what is kept.
        """
        wanted = self._wanted(outputs)
        feeds = self._checked(inputs)
        rows = len(next(iter(feeds.values()))) if self._batched and feeds else 1
        size = 1 + sum(array.nbytes for array in feeds.values()) // 1024
        flight = await self.submit([_Asked(feeds, wanted, rows)], [size], call)
        row = flight.rows[0]
        if isinstance(row, UnderstudyError):
            raise row
        assert row is not None, "every piece of a finished flight has arrived"
        return row

    def _wanted(self, outputs: Sequence[str] | None) -> tuple[str, ...]:
        for name in outputs or ():
            if name not in self._outputs:
                raise InvalidTensor(
                    f"model {self.name!r} has no output {name!r}; its outputs are {list(self._outputs)}",
                    tensor=name,
                    expected=",".join(self._outputs),
                )
        return tuple(outputs or self._outputs)

    def _checked(self, inputs: Mapping[str, Array]) -> Tensors:
        """The inputs in the graph's order, contiguous and of its types."""
        unknown = [name for name in inputs if name not in self._inputs]
        missing = [name for name in self._inputs if name not in inputs]
        if unknown or missing:
            what = f"has no input {unknown[0]!r}" if unknown else f"needs the input {missing[0]!r}"
            raise InvalidTensor(
                f"model {self.name!r} {what}; its inputs are {list(self._inputs)}: send each of them once",
                tensor=(unknown or missing)[0],
                expected=",".join(self._inputs),
            )
        feeds = {name: _fitted(inputs[name], spec, self.name) for name, spec in self._inputs.items()}
        if self._batched and len({len(array) for array in feeds.values()}) > 1:
            got = {name: len(array) for name, array in feeds.items()}
            raise InvalidTensor(
                f"the inputs of model {self.name!r} share their first axis, but its sizes are {got}; make them equal",
                tensor=next(iter(feeds)),
                got=got,
            )
        return feeds

    def _execute(self, batch: list[Piece[_Asked, Tensors]], stop: Stop, lane: int) -> Outcome[Tensors]:
        start = time.monotonic()
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        asked = [flight.pieces[index] for flight, index in batch]
        for i, one in enumerate(asked):
            groups[one.signature].append(i)
        rows: list[Tensors] = [{}] * len(batch)
        for places in groups.values():
            for place, row in zip(places, self._together([asked[i] for i in places], stop), strict=True):
                rows[place] = row
        return Outcome(rows, 0, time.monotonic() - start, 0.0)

    def _together(self, group: list[_Asked], stop: Stop) -> list[Tensors]:
        names = group[0].outputs
        if len(group) == 1:
            return [dict(zip(names, self._session.run(group[0].feeds, names, stop), strict=True))]
        feeds = {name: np.concatenate([one.feeds[name] for one in group]) for name in group[0].feeds}
        results = self._session.run(feeds, names, stop)
        total = sum(one.rows for one in group)
        if any(array.ndim == 0 or len(array) != total for array in results):
            # The graph's declared axes do not hold: its rows cannot be told apart, so from now on it runs each call alone.
            self._batched = False
            return [row for one in group for row in self._together([one], stop)]
        ends = np.cumsum([one.rows for one in group])[:-1]
        parts = zip(*(np.split(array, ends) for array in results), strict=True)
        return [dict(zip(names, part, strict=True)) for part in parts]


def _shares_first_axis(session: Session) -> bool:
    specs = (*session.inputs, *session.outputs)
    axes = {spec.shape[0] if spec.shape and spec.dtype is not None else None for spec in specs}
    return bool(session.inputs) and len(axes) == 1 and isinstance(next(iter(axes)), str)


def _fitted(array: Array, spec: TensorSpec, model: str) -> Array:
    assert spec.dtype is not None, "checked when the engine was made"
    if array.dtype != spec.dtype:
        raise _mismatch(spec.name, model, "dtype", array.dtype.name, spec.dtype.name)
    # ONNX Runtime reports both a scalar and an unknown rank as no axes, and checks such an input itself.
    if spec.shape and array.ndim != len(spec.shape):
        raise _mismatch(spec.name, model, "rank", array.ndim, len(spec.shape))
    expected = [size if isinstance(size, int) else -1 for size in spec.shape]
    if any(want not in (-1, have) for want, have in zip(expected, array.shape, strict=False)):
        raise _mismatch(spec.name, model, "shape", list(array.shape), expected)
    return _text(array, spec, model) if spec.dtype == np.object_ else np.ascontiguousarray(array).reshape(array.shape)


def _text(array: Array, spec: TensorSpec, model: str) -> Array:
    try:
        parts = [part.decode() if isinstance(part, bytes) else part for part in array.reshape(-1).tolist()]
    except UnicodeDecodeError as error:
        raise InvalidTensor(f"input {spec.name!r} of model {model!r} is not UTF-8: {error}; send UTF-8 text", tensor=spec.name) from error
    if not all(isinstance(part, str) for part in parts):
        raise _mismatch(spec.name, model, "content", "objects", "text")
    text = np.empty(len(parts), np.object_)
    text[:] = parts
    return text.reshape(array.shape)


def _mismatch(name: str, model: str, what: str, got: object, expected: object) -> InvalidTensor:
    return InvalidTensor(
        f"input {name!r} of model {model!r} has {what} {got}, expected {expected}", tensor=name, what=what, got=got, expected=expected
    )
