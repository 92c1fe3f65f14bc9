"""What every task does in the same way: tokenize, run, account; each item with its own error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from server.core import Call, FloatArray, Results, Timings, Usage
from server.errors import Cancelled, DeadlineExceeded, InvalidArgument, TaskNotSupported, UnderstudyError
from server.runtime.engine import Encoded, EngineOutput, Pool
from server.runtime.manifest import Manifest
from server.runtime.tokenizers import TextInput, TextTokenizer, Tokens

T = TypeVar("T")
# Tokenizing costs about 0.6 us a character: below this the event loop is held for less than a thread's hand-over costs twice.
INLINE_CHARACTERS = 1024
# What one request may have in the engine's queue at once: a long request takes its turns, and never fills the queue alone.
MAX_SEQUENCES = 1024
MAX_TOKENS = 65_536


class EncoderEngine(Protocol):
    """What tasks ask of an engine: one row a sequence, in order, whatever batches they ran in.

    A row is a vector [D] with a pool, logits [labels] of a sequence, or [n, C] of its tokens; or that sequence's error.
    """

    async def run(self, sequences: Sequence[Encoded], call: Call, pool: Pool | None) -> EngineOutput: ...


@dataclass(slots=True)
class Parts:
    """A loaded model as tasks see it. `executor` does what would hold up the event loop; None is the loop's own."""

    manifest: Manifest
    tokenizer: TextTokenizer
    engine: EncoderEngine
    executor: Executor | None = None

    def results(self, items: list[T | Exception], account: Account, truncated: Sequence[bool] = ()) -> Results[T]:
        return Results(items, account.timings, Usage(input=account.tokens), truncated, self.manifest.name, self.manifest.version)

    def refuse_task(self, what: str, need: str) -> TaskNotSupported:
        manifest = self.manifest
        return TaskNotSupported(
            f"Model {manifest.name!r} does {manifest.task.value}; {what} needs {need}. Name another model.",
            model=manifest.name,
            task=manifest.task.value,
        )


@dataclass(slots=True)
class Account:
    """What a request has used so far: seconds a stage, and tokens that really ran."""

    timings: Timings = field(default_factory=Timings)
    tokens: int = 0


def check_call(call: Call, stage: str) -> None:
    """Raises Cancelled or DeadlineExceeded when nobody waits for the answer any more."""
    if call.cancelled:
        raise Cancelled("The caller left.", stage=stage)
    left = call.remaining()
    if left is not None and left <= 0:
        raise DeadlineExceeded(f"The deadline passed in the stage {stage!r}; give the call more time or fewer items.", stage=stage)


def check_items(items: Sequence[object], field_name: str) -> None:
    if not len(items):
        raise InvalidArgument(f"{field_name} is empty; expected at least one item.", field=field_name)


def check_count(value: int, field_name: str, low: int = 0) -> None:
    if value < low:
        raise InvalidArgument(f"{field_name} is {value}; expected at least {low}.", field=field_name, limit=low)


async def off_loop(parts: Parts, light: bool, work: Callable[..., T], *args: Any) -> T:
    """`work(*args)`, here when it is light, else in a thread."""
    if light:
        return work(*args)
    return await asyncio.get_running_loop().run_in_executor(parts.executor, work, *args)


def characters(inputs: Sequence[TextInput]) -> int:
    return sum(len(part) for one in inputs for part in (one if isinstance(one, tuple) else (one,)) if isinstance(part, str))


async def tokenize(
    parts: Parts, inputs: Sequence[TextInput], fields: Sequence[str], account: Account, *, call: Call, cut: str = ""
) -> list[Tokens | UnderstudyError]:
    """Tokens within the model's limit, or each item's error; `cut` as in `TextTokenizer.encode_within`."""
    call.stage = "tokenize"
    started = time.perf_counter()
    light = characters(inputs) <= INLINE_CHARACTERS
    tokens = await off_loop(parts, light, parts.tokenizer.encode_within, inputs, fields, cut)
    account.timings.tokenize += time.perf_counter() - started
    check_call(call, "tokenize")
    return tokens


async def run(
    parts: Parts, sequences: Sequence[Encoded], account: Account, *, call: Call, pool: Pool | None = None
) -> list[FloatArray | UnderstudyError]:
    """Rows in the order of `sequences`."""
    rows: list[FloatArray | UnderstudyError] = []
    for chunk in _turns(sequences):
        output = await parts.engine.run(chunk, call, pool)
        rows.extend(output.rows)
        timings = account.timings
        timings.queue += output.timings.queue
        timings.run += output.timings.run
        timings.post += output.timings.post
        account.tokens += sum(len(one.ids) for one, row in zip(chunk, output.rows, strict=True) if not isinstance(row, Exception))
    return rows


def _turns(sequences: Sequence[Encoded]) -> Iterator[Sequence[Encoded]]:
    start = tokens = 0
    for i, one in enumerate(sequences):
        if i > start and (i - start == MAX_SEQUENCES or tokens + len(one.ids) > MAX_TOKENS):
            yield sequences[start:i]
            start, tokens = i, 0
        tokens += len(one.ids)
    if start < len(sequences):
        yield sequences[start:]


async def run_items(
    parts: Parts, tokens: Sequence[Tokens | UnderstudyError], account: Account, *, call: Call, pool: Pool | None = None
) -> tuple[list[FloatArray | UnderstudyError], list[bool]]:
    """Runs the items that were tokenized: each one's row or error, and whether it was cut."""
    rows: list[FloatArray | UnderstudyError] = []
    good = [one.encoded for one in tokens if isinstance(one, Tokens)]
    ran = iter(await run(parts, good, account, call=call, pool=pool) if good else ())
    for one in tokens:
        rows.append(next(ran) if isinstance(one, Tokens) else one)
    return rows, [isinstance(one, Tokens) and one.truncated for one in tokens]


async def settle(
    parts: Parts,
    account: Account,
    rows: Sequence[FloatArray | Exception],
    work: Callable[[list[FloatArray]], list[T]],
    light_rows: int,
    *,
    call: Call,
) -> list[T | Exception]:
    """Applies `work` to all good rows at once (in a thread above `light_rows` of them) and puts its values among the errors."""
    call.stage = "post"
    started = time.perf_counter()
    good = [row for row in rows if not isinstance(row, Exception)]
    values = iter(await off_loop(parts, len(good) <= light_rows, work, good) if good else ())
    items: list[T | Exception] = [row if isinstance(row, Exception) else next(values) for row in rows]
    account.timings.post += time.perf_counter() - started
    return items
