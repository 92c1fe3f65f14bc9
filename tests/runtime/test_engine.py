"""The encoder engine on real graphs: right rows whatever the batch, refusals, deadlines, cancellation, failure, draining."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.core import Call, Priority
from server.errors import (
    DeadlineExceeded,
    Draining,
    InputTooLong,
    InternalError,
    InvalidArgument,
    ModelRejected,
    Overloaded,
    RequestTooLarge,
    UnderstudyError,
)
from server.runtime.engine import BatchReport, Encoded, Engine, EngineSettings, GraphForm, NullObserver, Pool, QueueLimits
from server.runtime.sessions import Sessions
from tests.runtime import graphs_for_tests as graphs

SESSIONS = Sessions()


class Recorder(NullObserver):
    """Keeps what the engine reports."""

    def __init__(self) -> None:
        self.batches: list[BatchReport] = []
        self.rejections: list[str] = []
        self.skips: list[tuple[str, int]] = []
        self.failures: list[str] = []

    def batch_done(self, batch: BatchReport) -> None:
        self.batches.append(batch)

    def rejected(self, model: str, reason: str) -> None:
        self.rejections.append(reason)

    def skipped(self, model: str, reason: str, count: int) -> None:
        self.skips.append((reason, count))

    def run_failed(self, model: str, reason: str) -> None:
        self.failures.append(reason)


def encoded(length: int, seed: int = 0, kind: int | None = None) -> Encoded:
    ids = np.random.default_rng(seed).integers(0, graphs.WORDS, length)
    return Encoded(ids, None if kind is None else np.full(length, kind))


def hidden_of(sequence: Encoded) -> Any:
    """What the packed graph computes."""
    kinds = 0 if sequence.type_ids is None else sequence.type_ids[:, None] * 10
    return graphs.TABLE[sequence.ids] + np.arange(len(sequence.ids), dtype=np.float32)[:, None] + kinds


def call(**fields: Any) -> Call:
    return Call("test", **fields)


def engine(tmp_path: Path, kind: str = "hidden", *, layers: int = 0, observer: Any = None, max_tokens: int = 64, **settings: Any) -> Engine:
    """An engine over a fresh graph; must be made on an event loop's thread, and closed there."""
    path = tmp_path / f"{kind}{layers}.onnx"
    form: Any = "padded" if kind == "padded" else "packed"
    if kind == "hidden":
        graphs.packed_hidden(path, layers=layers)
    else:
        {"logits": graphs.packed_logits, "padded": graphs.padded_hidden}[kind](path)
    graph = GraphForm("tiny", "1", form, max_tokens, per_token=kind != "logits")
    return Engine(SESSIONS.open(path), graph, EngineSettings(**settings), observer)


def run(body: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(body, 30)

    return asyncio.run(bounded())


async def occupied(made: Engine, recorder: Recorder) -> asyncio.Task[Any]:
    """Starts a long run and returns once the queue is empty, that is, once the engine's thread is inside the run."""
    task = asyncio.create_task(made.run([encoded(64)] * 16, call()))
    await asyncio.sleep(0)
    while made.waiting:
        await asyncio.sleep(0)
    return task


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_rows_are_what_the_graph_says_whatever_the_batch(tmp_path: Path, lanes: int) -> None:
    async def body() -> None:
        made = engine(tmp_path, token_budget=100, lanes=lanes)
        sequences = [encoded(1 + i * 7 % 40, i, i % 3 or None) for i in range(50)]
        outputs = await asyncio.gather(*(made.run(sequences[i::5], call()) for i in range(5)))
        for i, output in enumerate(outputs):
            for sequence, row in zip(sequences[i::5], output.rows, strict=True):
                np.testing.assert_allclose(row, hidden_of(sequence), atol=1e-5)
        await made.close()

    run(body())


def test_a_long_run_holds_up_its_own_lane_alone(tmp_path: Path) -> None:
    """While one lane is inside a run of a second or so, the other answers what comes."""

    async def body() -> None:
        made = engine(tmp_path, layers=25, lanes=2, token_budget=64 * 16, max_tokens=64)
        long = await occupied(made, Recorder())
        short = await made.run([encoded(2)], call())
        assert isinstance(short.rows[0], np.ndarray)
        assert not long.done()
        await long
        await made.close()

    run(body())


def test_pooled_rows_have_the_same_bits_alone_and_together(tmp_path: Path) -> None:
    async def body() -> None:
        made = engine(tmp_path)
        sequences = [encoded(3 + i, i) for i in range(20)]
        pools: list[Any] = [Pool("mean", True), Pool("mean"), Pool("cls"), Pool("last", True, 3), None]
        for pool in pools:
            together = await asyncio.gather(
                made.run(sequences, call(), pool), *(made.run([encoded(9, 99)], call(), other) for other in pools)
            )
            for sequence, row in zip(sequences, together[0].rows, strict=True):
                alone = (await made.run([sequence], call(), pool)).rows[0]
                assert isinstance(row, np.ndarray) and isinstance(alone, np.ndarray)
                assert row.tobytes() == alone.tobytes()
        row = (await made.run([sequences[4]], call(), Pool("last", True, 3))).rows[0]
        want = hidden_of(sequences[4])[-1, :3]
        np.testing.assert_allclose(row, want / np.linalg.norm(want), rtol=1e-6)
        await made.close()

    run(body())


def test_padded_graphs_and_sequence_outputs(tmp_path: Path) -> None:
    async def body() -> None:
        sequences = [encoded(1 + i % 9, i) for i in range(30)]
        padded = engine(tmp_path, "padded", token_budget=40)
        for sequence, row in zip(sequences, (await padded.run(sequences, call())).rows, strict=True):
            np.testing.assert_array_equal(row, graphs.TABLE[sequence.ids])
        pooled = await padded.run(sequences, call(), Pool("mean"))
        np.testing.assert_allclose(pooled.rows[7], graphs.TABLE[sequences[7].ids].mean(0), rtol=1e-5)
        await padded.close()

        logits = engine(tmp_path, "logits")
        for sequence, row in zip(sequences, (await logits.run(sequences, call())).rows, strict=True):
            np.testing.assert_array_equal(row, graphs.TABLE[sequence.ids[0]])
        with pytest.raises(InvalidArgument, match="nothing to pool"):
            await logits.run(sequences, call(), Pool("mean"))
        await logits.close()

    run(body())


def test_bad_sequences_fail_alone_and_name_the_limit(tmp_path: Path) -> None:
    async def body() -> None:
        made = engine(tmp_path, max_tokens=10)
        good = encoded(10)
        rows = (await made.run([encoded(11), good, Encoded(np.zeros(0, np.int64)), good], call())).rows
        assert isinstance(rows[0], InputTooLong) and rows[0].metadata == {"tokens": "11", "limit": "10"}
        assert isinstance(rows[2], InvalidArgument)
        for row in (rows[1], rows[3]):
            np.testing.assert_allclose(row, hidden_of(good), atol=1e-5)
        assert (await made.run([], call())).rows == []
        assert len((await made.run([encoded(11)], call())).rows) == 1
        for size in (0, -1, graphs.WIDTH + 1):
            with pytest.raises(InvalidArgument):
                await made.run([good], call(), Pool("mean", dimensions=size))
        await made.close()

    run(body())


def test_a_failing_call_does_not_fail_its_neighbours(tmp_path: Path) -> None:
    async def body() -> None:
        recorder = Recorder()
        made = engine(tmp_path, layers=4, observer=recorder)
        busy = await occupied(made, recorder)
        outside = Encoded(np.array([1, graphs.WORDS + 5]))  # beyond the table: the run fails
        good = [encoded(5, i) for i in range(4)]
        results = await asyncio.gather(*(made.run([s], call()) for s in (*good[:2], outside, *good[2:])))
        await busy
        assert isinstance(results[2].rows[0], UnderstudyError)
        for sequence, output in zip(good, results[:2] + results[3:], strict=True):
            np.testing.assert_allclose(output.rows[0], hidden_of(sequence), atol=1e-4)
        assert len(recorder.failures) == 2  # together, then the one at fault alone
        assert isinstance((await made.run(good[:1], call())).rows[0], np.ndarray)
        await made.close()

    run(body())


def test_a_full_queue_answers_overloaded_and_takes_all_or_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        recorder = Recorder()
        made = engine(tmp_path, layers=4, observer=recorder, limits=QueueLimits(max_sequences=20, max_tokens=2000))
        busy = await occupied(made, recorder)
        waiting = asyncio.create_task(made.run([encoded(5)] * 15, call()))
        await asyncio.sleep(0)
        assert made.waiting == 15
        with pytest.raises(Overloaded) as caught:
            await made.run([encoded(5)] * 6, call())
        assert caught.value.retry_after_s is not None and caught.value.retry_after_s > 0
        assert made.waiting == 15
        with pytest.raises(RequestTooLarge):
            await made.run([encoded(5)] * 21, call())
        assert recorder.rejections == ["OVERLOADED", "REQUEST_TOO_LARGE"]
        assert len((await waiting).rows) == 15
        await busy
        await made.close()

    run(body())


def test_deadlines_end_calls_at_the_door_in_the_queue_and_after_the_run(tmp_path: Path) -> None:
    async def body() -> None:
        recorder = Recorder()
        made = engine(tmp_path, layers=25, observer=recorder)  # a run of a second or so
        with pytest.raises(DeadlineExceeded):
            await made.run([encoded(3)], call(deadline=time.monotonic() - 1))
        busy = await occupied(made, recorder)
        with pytest.raises(DeadlineExceeded) as caught:
            await made.run([encoded(3)] * 2, call(deadline=time.monotonic() + 0.1))
        assert caught.value.metadata == {"stage": "queue"}
        assert recorder.skips == [("expired", 2)]
        await busy
        with pytest.raises(DeadlineExceeded) as caught:
            await made.run([encoded(64)] * 16, call(deadline=time.monotonic() + 0.005))
        assert caught.value.metadata["stage"] in ("run", "queue")
        await made.close()

    run(body())


def test_a_caller_that_leaves_is_skipped_and_counted(tmp_path: Path) -> None:
    async def body() -> None:
        recorder = Recorder()
        made = engine(tmp_path, layers=4, observer=recorder)
        busy = await occupied(made, recorder)
        leaver = asyncio.create_task(made.run([encoded(5)] * 3, call()))
        marked = call()
        marked_task = asyncio.create_task(made.run([encoded(5)], marked))
        stayer = asyncio.create_task(made.run([encoded(5)], call()))
        await asyncio.sleep(0)
        leaver.cancel()
        marked.cancelled = True
        assert len((await stayer).rows) == 1
        with pytest.raises(asyncio.CancelledError):
            await leaver
        assert sorted(recorder.skips) == [("cancelled", 1), ("cancelled", 3)]
        assert all(batch.sequences != 3 for batch in recorder.batches)
        marked_task.cancel()
        await busy
        await made.close()

    run(body())


def test_a_run_that_works_for_nobody_is_ended(tmp_path: Path) -> None:
    async def body() -> None:
        made = engine(tmp_path, layers=25, max_tokens=512)
        start = time.monotonic()
        await made.run([encoded(256, 1)] * 4, call())
        whole = time.monotonic() - start
        task = asyncio.create_task(made.run([encoded(256, 1)] * 4, call()))
        await asyncio.sleep(0)
        while made.waiting:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        start = time.monotonic()
        await made.run([encoded(2)], call())
        assert time.monotonic() - start < whole * 0.8
        await made.close()

    run(body())


def test_under_overload_runs_are_spent_on_calls_that_can_still_have_them(tmp_path: Path) -> None:
    async def body() -> None:
        recorder = Recorder()
        # Layers enough that no machine answers 400 callers within 0.2 s each.
        made = engine(tmp_path, layers=8, observer=recorder, token_budget=128)
        answered = 0

        async def caller(until: float) -> None:
            nonlocal answered
            while time.monotonic() < until:
                try:
                    await made.run([encoded(16)], call(deadline=time.monotonic() + 0.2))
                    answered += 1
                except Overloaded as error:
                    assert error.retry_after_s is not None
                    await asyncio.sleep(error.retry_after_s)
                except DeadlineExceeded:
                    pass

        until = time.monotonic() + 2
        await asyncio.gather(*(caller(until) for _ in range(400)))
        await made.close()
        # Half, not nine tenths: the time of a batch swings on machines that others use too.
        assert answered > 0.5 * sum(batch.sequences for batch in recorder.batches)
        assert "OVERLOADED" in recorder.rejections

    run(body())


def test_draining_finishes_what_was_accepted(tmp_path: Path) -> None:
    async def body() -> None:
        recorder = Recorder()
        made = engine(tmp_path, layers=2, observer=recorder, token_budget=64)
        accepted = [asyncio.create_task(made.run([encoded(9, i)] * 4, call())) for i in range(20)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(made.close())
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await made.run([encoded(2)], call())
        assert [len(output.rows) for output in await asyncio.gather(*accepted)] == [4] * 20
        await closing
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine-tiny")]

    run(body())


def test_stopping_without_draining_fails_what_waits(tmp_path: Path) -> None:
    async def body() -> None:
        recorder = Recorder()
        made = engine(tmp_path, layers=4, observer=recorder)
        busy = await occupied(made, recorder)
        waiting = [asyncio.create_task(made.run([encoded(9)], call())) for _ in range(3)]
        await asyncio.sleep(0)
        await made.close(drain=False)
        assert [type(error) for error in await asyncio.gather(*waiting, return_exceptions=True)] == [Draining] * 3
        assert len((await busy).rows) == 16

    run(body())


def test_interactive_work_overtakes_bulk(tmp_path: Path) -> None:
    async def body() -> None:
        recorder = Recorder()
        made = engine(tmp_path, layers=4, observer=recorder, token_budget=64)
        busy = await occupied(made, recorder)
        order: list[str] = []

        async def tagged(name: str, priority: Priority) -> None:
            await made.run([encoded(60)], call(priority=priority))
            order.append(name)

        tasks = [asyncio.create_task(tagged(f"bulk{i}", Priority.BULK)) for i in range(3)]
        tasks += [asyncio.create_task(tagged("live", Priority.INTERACTIVE)), asyncio.create_task(tagged("urgent", Priority.CRITICAL))]
        await asyncio.gather(busy, *tasks)
        assert order == ["urgent", "live", "bulk0", "bulk1", "bulk2"]
        await made.close()

    run(body())


def test_what_is_reported_adds_up(tmp_path: Path) -> None:
    async def body() -> None:
        recorder = Recorder()
        made = engine(tmp_path, observer=recorder, token_budget=50)
        output = await made.run([encoded(10)] * 12, call())
        await made.close()
        assert sum(batch.sequences for batch in recorder.batches) == 12
        assert sum(batch.tokens for batch in recorder.batches) == 120
        assert all(0 < batch.fill <= 1 and len(batch.queue_waits_s) == batch.sequences for batch in recorder.batches)
        assert output.timings.run > 0 and output.timings.queue >= 0

    run(body())


def test_an_observer_that_raises_stops_nothing(tmp_path: Path) -> None:
    class Broken(NullObserver):
        def batch_done(self, batch: BatchReport) -> None:
            raise RuntimeError("no disk")

        def run_failed(self, model: str, reason: str) -> None:
            raise RuntimeError("no disk")

    async def body() -> None:
        made = engine(tmp_path, observer=Broken())
        for _ in range(3):
            assert isinstance((await made.run([encoded(4)], call())).rows[0], np.ndarray)
        with pytest.raises(InternalError):
            await made.run([Encoded(np.array([graphs.WORDS + 1]))], call())
        assert isinstance((await made.run([encoded(4)], call())).rows[0], np.ndarray)
        await made.close()

    run(body())


def test_one_wake_up_of_the_event_loop_a_batch(tmp_path: Path) -> None:
    async def body() -> None:
        recorder = Recorder()
        made = engine(tmp_path, layers=2, observer=recorder)
        loop = asyncio.get_running_loop()
        wakes: list[int] = []
        original = loop.call_soon_threadsafe

        def counted(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name.startswith("engine-"):
                wakes.append(1)
            return original(*args, **kwargs)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        await asyncio.gather(*(made.run([encoded(4, i)], call()) for i in range(100)))
        await made.close()
        assert len(wakes) == len(recorder.batches) < 100

    run(body())


def test_a_graph_of_another_form_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        session = SESSIONS.open(graphs.padded_hidden(tmp_path / "p.onnx"))
        with pytest.raises(ModelRejected, match="cu_seqlens"):
            Engine(session, GraphForm("tiny", "1", "packed", 64, per_token=True))

    run(body())


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"nonsense" * 100, graphs.packed_hidden(tmp_path / "g.onnx").read_bytes()[:-200]):
        path = tmp_path / "broken.onnx"
        path.write_bytes(content)
        with pytest.raises(ModelRejected, match=r"broken\.onnx"):
            SESSIONS.open(path)
