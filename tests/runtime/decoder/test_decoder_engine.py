"""The decoder engine on real graphs: the same text whatever shares the steps, places and pages given back, and errors that stay alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from server.core import Call, FinishReason, Priority
from server.errors import (
    AdapterNotFound,
    Cancelled,
    DeadlineExceeded,
    Draining,
    InputTooLong,
    InternalError,
    InvalidArgument,
    OutOfMemory,
    Overloaded,
    UnderstudyError,
)  # fmt: skip
from server.runtime.decoder.contract import AdapterUse, Job, Sampling
from server.runtime.decoder.engine import GenerationEngine, run_offline
from server.runtime.manifest import Manifest
from server.runtime.observer import NullObserver, StepReport
from tests.runtime.decoder.decoders import CONTEXT, VOCABULARY, build, greedy, ids, opened, random_llama
from tests.runtime.graphs_decoder.stories import OPENING, stories_folder

Model = tuple[Path, Manifest]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("decoder")
    return build(random_llama(folder / "checkpoint"), folder / "graphs")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(3, VOCABULARY, int(size)).tolist() for size in random.integers(1, 120, 24)]


@pytest.fixture(scope="module")
def alone(model: Model, prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    """What each prompt is answered by itself, without cache, and in one piece."""

    async def run() -> list[list[int]]:
        async with opened(model, {"max_sequences": 1, "prefix_cache": False}) as engine:
            return [ids((await run_offline(engine, [greedy(prompt, 40)]))[0][0]) for prompt in prompts]

    yield asyncio.run(run())


class Steps(NullObserver):
    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.skips: list[tuple[str, int]] = []
        self.failures: list[str] = []
        self.running: tuple[int, int] | None = None

    def answers_running(self, model: str, version: str, running: int, pages_used: int) -> None:
        self.running = (running, pages_used)

    def step_done(self, step: StepReport) -> None:
        self.steps.append(step)

    def skipped(self, model: str, reason: str, count: int) -> None:
        self.skips.append((reason, count))

    def run_failed(self, model: str, reason: str) -> None:
        self.failures.append(reason)


async def until(true: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.001)


async def idle(engine: GenerationEngine) -> None:
    """All pages are free but for those in the prefix cache."""
    await until(lambda: engine.pages.used == 0)


async def text(stream: Any) -> list[int]:
    return [token.id async for pieces in stream for piece in pieces for token in piece.tokens]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prefix_cache": False},
        {"token_budget": 17, "max_sequences": 5},
        {"token_budget": 7, "max_sequences": 3, "least_chunk": 1},
        {"kv_cache_bytes": 2 * 4096 * 24, "max_sequences": 8},
    ],
    ids=["together", "no cache", "small steps", "tiny steps", "few pages"],
)
async def test_text_is_the_same_in_any_company(
    model: Model, prompts: list[list[int]], alone: list[list[int]], settings: dict[str, Any]
) -> None:
    steps = Steps()
    async with opened(model, settings, observer=steps) as engine:
        for _ in range(2):  # the second time finds beginnings in the cache
            answers = await run_offline(engine, [greedy(prompt, 40) for prompt in prompts])
            assert [ids(answer[0]) for answer in answers] == alone
        await idle(engine)
    assert max(step.running for step in steps.steps) > 2
    if "kv_cache_bytes" in settings:
        assert sum(step.preempted for step in steps.steps), "so few pages are not enough for all"
    elif settings.get("prefix_cache", True):
        assert sum(step.hits for step in steps.steps) > 0.4 * sum(len(p) for p in prompts)


async def test_the_known_story_is_told(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = stories_folder(tmp_path / "stories")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    async with opened(build(folder, tmp_path / "graphs")) as engine:
        answers = await run_offline(engine, [greedy([1], 60) for _ in range(4)])
    assert all(tokenizer.decode(ids(answer[0])).startswith(OPENING) for answer in answers)


async def test_four_answers_of_one_prompt(model: Model, prompts: list[list[int]], alone: list[list[int]]) -> None:
    async with opened(model) as engine:
        longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
        [same] = await run_offline(engine, [greedy(prompts[longest], 40, n=4)])
        assert [ids(piece) for piece in same] == [alone[longest]] * 4
        drawn = Sampling(temperature=1.0, seed=3)
        [first] = await run_offline(engine, [greedy(prompts[longest], 40, n=4, sampling=drawn)])
        assert len({tuple(ids(piece)) for piece in first}) == 4
        single = await run_offline(engine, [greedy(prompts[longest], 40, sampling=drawn)])
        assert ids(single[0][0]) == ids(first[0])
        await idle(engine)


async def test_a_seed_gives_one_text_in_any_company_and_form(tmp_path: Path, prompts: list[list[int]]) -> None:
    model = build(stories_folder(tmp_path / "stories"), tmp_path / "graphs", ("float32", "int4"))
    steps = Steps()
    job = greedy(prompts[3], 30, sampling=Sampling(seed=11))
    async with opened(model, observer=steps) as engine:
        # The machine decides where the forms cross; here both must be used.
        engine._forms = type(engine.forms)(engine.forms.narrow, engine.forms.wide, 4)
        [[want]] = await run_offline(engine, [job])
        await run_offline(engine, [greedy(prompts[3], 5)])
        others = [greedy(prompt, 20) for prompt in prompts[:6]]
        mixed = await run_offline(engine, [*others, greedy(prompts[3], 30, sampling=Sampling(seed=11))])
        assert ids(mixed[-1][0]) == ids(want)
    assert {step.form for step in steps.steps} == {"int4", "float32"}
    assert (engine.forms.narrow, engine.forms.wide) == ("int4", "float32")


async def test_a_reader_that_leaves_gives_its_pages_back_with_the_next_step(model: Model, prompts: list[list[int]]) -> None:
    steps = Steps()
    async with opened(model, observer=steps) as engine:
        stays = engine.submit(greedy(prompts[0], 200 - len(prompts[0])))
        leaves = engine.submit(greedy(prompts[1], 150))
        async for _ in leaves:
            break
        await until(lambda: engine.pages.used and any(step.running == 2 for step in steps.steps))
        await until(lambda: steps.steps[-1].running == 1)
        at = next(i for i, step in enumerate(steps.steps) if step.running == 2)
        assert steps.skips == [("cancelled", 1)] and len(steps.steps) > at
        stays.cancel()
        await idle(engine)
        await until(lambda: steps.running == (0, 0))  # no step tells it any more
        call = Call("gone")
        waits = engine.submit(greedy(prompts[2], 100, call=call))
        call.cancelled = True
        with pytest.raises(Cancelled):
            await text(waits)


async def test_a_full_queue_refuses_and_memory_stays(model: Model) -> None:
    async with opened(model, {"max_waiting": 8, "max_sequences": 2}) as engine:
        streams = [engine.submit(greedy([5, i], 200)) for i in range(8)]
        refused = 0
        before = psutil.Process().memory_info().rss
        for i in range(20_000):
            try:
                streams.append(engine.submit(greedy([6] * 50, 200)))
            except Overloaded as error:
                refused += 1
                assert error.retry_after_s and 0.0 < error.retry_after_s <= 30.0
            if i % 100 == 0:
                await asyncio.sleep(0)
        assert refused > 19_000
        assert psutil.Process().memory_info().rss - before < 8 << 20
        for stream in streams:
            stream.cancel()
        await idle(engine)
        await until(lambda: engine.waiting == 0)
        assert len(await text(engine.submit(greedy([7], 5)))) == 5


async def test_a_run_that_fails_ends_only_what_was_at_fault(model: Model, prompts: list[list[int]], alone: list[list[int]]) -> None:
    steps = Steps()
    async with opened(model, observer=steps) as engine:
        good = [engine.submit(greedy(prompt, 40)) for prompt in prompts[:4]]
        bad = engine.submit(greedy(prompts[5], 40, adapter=AdapterUse("broken@1", 99)))
        with pytest.raises(UnderstudyError, match=r"slot|adapter"):
            await text(bad)
        assert [await text(stream) for stream in good] == alone[:4]
        assert steps.failures
        await idle(engine)


async def test_what_cannot_run_is_refused_with_the_reason(model: Model) -> None:
    async with opened(model, {"max_sequences": 4}) as engine:
        with pytest.raises(InputTooLong) as long:
            engine.submit(greedy([3] * CONTEXT, 1))
        assert long.value.metadata == {"tokens": str(CONTEXT), "limit": str(CONTEXT)}
        for job, field in [
            (greedy([], 1), "prompt"),
            (greedy([3], 0), "max_tokens"),
            (greedy([VOCABULARY], 1), "prompt"),
            (greedy([-1], 1), "prompt"),
            (greedy([3], 1, n=5), "sampling.n"),
            (greedy([3], 1, sampling=Sampling(temperature=-1.0)), "sampling"),
        ]:
            with pytest.raises(InvalidArgument) as wrong:
                engine.submit(job)
            assert wrong.value.metadata["field"] == field
        with pytest.raises(DeadlineExceeded):
            engine.submit(greedy([3], 1, call=Call("late", deadline=time.monotonic() - 1)))
        with pytest.raises(AdapterNotFound):
            await text(engine.submit(greedy([3], 4, adapter=AdapterUse("none@1", -1, 5))))
        # As many tokens as the context has room for, whatever was asked.
        [[piece]] = await run_offline(engine, [greedy([3] * (CONTEXT - 3), 100)])
        assert len(piece.tokens) == 3 and piece.finish is FinishReason.LENGTH


async def test_deadlines_end_answers_in_the_queue_and_while_they_run(model: Model) -> None:
    async with opened(model, {"max_sequences": 1}) as engine:
        holds = engine.submit(greedy([3], 250))
        pieces = aiter(holds)
        await anext(pieces)  # it has the only place: of two that wait, the more urgent would be first
        waits = engine.submit(greedy([4], 250, call=Call("b", deadline=time.monotonic() + 0.001)))
        with pytest.raises(DeadlineExceeded, match="waited"):
            await text(waits)
        async for _ in pieces:
            pass
        runs = engine.submit(greedy([3], 250, call=Call("a", deadline=time.monotonic() + 0.02)))
        try:
            assert len(await text(runs)) == 250  # a machine that is quick enough
        except DeadlineExceeded as error:
            assert error.metadata["stage"] in ("run", "queue")
        await idle(engine)


async def test_draining_finishes_and_stopping_tells(model: Model) -> None:
    async with opened(model) as engine:
        stream = engine.submit(greedy([3], 100))
        closing = asyncio.create_task(engine.close(drain=True))
        await asyncio.sleep(0)
        await until(lambda: engine._door._closed)
        with pytest.raises(Draining):
            engine.submit(greedy([3], 1))
        assert len(await text(stream)) == 100
        await closing
    async with opened(model) as engine:
        stream = engine.submit(greedy([3], 250))
        await engine.close(drain=False)
        with pytest.raises(Draining):
            await text(stream)


async def test_stop_ids_stop_strings_and_errors_of_a_caller_end_one_answer(
    model: Model, prompts: list[list[int]], alone: list[list[int]]
) -> None:
    class Upto:
        """Text that holds a token back, and ends at one."""

        def __init__(self, last: int) -> None:
            self.last = last
            self.held = ""

        def push(self, token: int) -> tuple[str, bool]:
            if token == -7:
                raise ValueError("no such text")
            shown, self.held = self.held, f"<{token}>"
            return shown, token == self.last

        def finish(self) -> str:
            return self.held

    want = alone[0]
    stop = want[4]
    before = want.index(stop)
    async with opened(model) as engine:
        jobs = [
            greedy(prompts[0], 40, stop_ids=frozenset([stop]), text=lambda: Upto(-1)),
            greedy(prompts[0], 40, text=lambda: Upto(stop)),
            greedy(prompts[0], 10, text=lambda: Upto(-1)),
        ]
        [[stopped], [cut], [ended]] = await run_offline(engine, jobs)
        assert ids(stopped) == want[:before] and stopped.finish is FinishReason.STOP
        assert "".join(t.text for t in stopped.tokens) + stopped.text_end == "".join(f"<{t}>" for t in want[:before])
        assert ids(cut) == want[: before + 1] and cut.finish is FinishReason.STOP and cut.text_end == ""
        assert ended.finish is FinishReason.LENGTH and ended.text_end == f"<{want[9]}>"

        class Broken(Upto):
            def push(self, token: int) -> tuple[str, bool]:
                raise ValueError("no such text")

        good = engine.submit(greedy(prompts[1], 40))
        with pytest.raises(InternalError, match="no such text"):
            await text(engine.submit(greedy(prompts[0], 10, text=lambda: Broken(0))))
        assert await text(good) == alone[1]
        await idle(engine)


async def test_log_probabilities_and_times_come_with_the_tokens(model: Model, prompts: list[list[int]]) -> None:
    async with opened(model) as engine:
        sampling = Sampling(temperature=0.0, logprobs=True, top_logprobs=3)
        before = time.monotonic()
        [[piece]] = await run_offline(engine, [greedy(prompts[2], 10, sampling=sampling)])
        for token in piece.tokens:
            assert token.top[0] == (token.id, pytest.approx(token.logprob, abs=1e-5)) and len(token.top) == 3
            assert token.entropy > 0 and token.margin == pytest.approx(token.top[0][1] - token.top[1][1], abs=1e-4)
        times = piece.times
        assert before <= times.arrival <= times.admitted <= times.first_token <= times.last_token <= time.monotonic()
        assert times.steps == 10


async def test_urgent_answers_come_first(model: Model) -> None:
    async with opened(model, {"max_sequences": 1}) as engine:
        order: list[str] = []

        async def read(name: str, priority: Priority, tokens: int) -> None:
            await text(engine.submit(Job([3, len(name)], Sampling(temperature=0.0), tokens, Call(name, priority=priority))))
            order.append(name)

        bulk, second = read("bulk", Priority.BULK, 100), read("second", Priority.INTERACTIVE, 20)
        await asyncio.gather(bulk, second, read("first", Priority.CRITICAL, 20))
        assert order == ["first", "second", "bulk"]


async def test_a_stored_prompt_comes_before_as_if_it_were_tokens(model: Model, prompts: list[list[int]], tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    table = load_file(str(model[0].parent / "checkpoint" / "model.safetensors"))["model.embed_tokens.weight"]
    first = prompts[7][:37]
    async with opened(model) as engine:
        rest = [prompt[:60] for prompt in prompts[8:16]]
        want = await run_offline(engine, [greedy([*first, *one], 30) for one in rest])
        assert await engine.add_prompt("soft@1", table[first]) == len(first)
        used = engine.pages.used
        use = AdapterUse("soft@1", -1, len(first))
        for _ in range(2):
            got = await run_offline(engine, [greedy(one, 30, adapter=use) for one in rest])
            assert [ids(a[0]) for a in got] == [ids(b[0]) for b in want]
        # The same once more from K and V, as prefix tuning has them.
        decoder = engine.decoder
        pages = engine._scheduler.stored["soft@1"].pages
        k, v = np.zeros((2, decoder.layers, decoder.kv_heads, len(first), decoder.head_dim), np.float32)
        for position in range(len(first)):
            for layer in range(decoder.layers):
                for head in range(decoder.kv_heads):
                    keys, values, _, _ = engine._runner.kv._views(engine._runner.pool[layer, pages[position // 16]], head)
                    k[layer, head, position], v[layer, head, position] = keys[:, position % 16], values[position % 16]
        assert await engine.add_prefix("stored@1", k, v) == len(first)
        use = AdapterUse("stored@1", -1, len(first))
        got = await run_offline(engine, [greedy(one, 30, adapter=use) for one in rest])
        assert [ids(a[0]) for a in got] == [ids(b[0]) for b in want]
        await engine.drop_prefix("stored@1")
        await until(lambda: engine.pages.used == used)
        await engine.drop_prefix("soft@1")
        await idle(engine)
        with pytest.raises(AdapterNotFound):
            await text(engine.submit(greedy([3], 4, adapter=use)))
        with pytest.raises(InvalidArgument):
            await engine.add_prompt("wrong@1", table[first][:, :-1])
        with pytest.raises((OutOfMemory, InvalidArgument)):
            await engine.add_prompt("long@1", np.tile(table, (10, 1)))


async def test_messages_carry_several_tokens_when_there_would_be_too_many(model: Model, prompts: list[list[int]]) -> None:
    async def messages(rate: float) -> tuple[int, list[int]]:
        async with opened(model, {"message_rate": rate}) as engine:
            sizes: list[int] = []

            async def read(prompt: list[int]) -> None:
                async for pieces in engine.submit(greedy(prompt, 60)):
                    sizes.append(sum(len(piece.tokens) for piece in pieces))

            await asyncio.gather(*(read(prompt) for prompt in prompts[:8]))
            return len(sizes), sizes

    many, _ = await messages(1e9)
    few, sizes = await messages(500.0)
    assert few < many / 2 and sum(sizes) == 8 * 60


async def test_who_left_hears_when_the_job_is_out(model: Model) -> None:
    async with opened(model) as engine:
        for tokens in (1, 2, 3, 40):
            stream = engine.submit(greedy([3, tokens], tokens))
            for _ in range(tokens):
                await asyncio.sleep(0)
            stream.cancel()
            stream.cancel()
            try:
                async with asyncio.timeout(10):
                    await text(stream)
            except Cancelled:
                pass
        await idle(engine)


async def test_metrics_tell_what_was_done(model: Model, prompts: list[list[int]]) -> None:
    from server.metrics import Metrics

    metrics = Metrics()
    async with opened(model, observer=metrics) as engine:
        for _ in range(2):
            await run_offline(engine, [greedy(prompt, 20) for prompt in prompts[:8]])
        await idle(engine)

    def value(name: str, **labels: str) -> float:
        found = metrics.registry.get_sample_value(f"understudy_generation_{name}", {"model": "tiny", "version": "1", **labels})
        assert found is not None, name
        return found

    tokens = sum(len(prompt) for prompt in prompts[:8])
    assert value("tokens_total") == 2 * 8 * 20 and value("prompt_tokens_total") == 2 * tokens
    assert 0.4 * tokens < value("prefix_hit_tokens_total") < tokens
    assert value("first_token_seconds_count") == 16 and value("inter_token_seconds_count") == 2 * 8 * 19
    assert value("step_seconds_count", form="float32") >= 40 and value("pages_capacity") == engine.pages.count
    assert value("running") == 0 and metrics.counts("tiny", "1").sequences == 16


async def test_memory_stays_however_many_answers_come(model: Model, prompts: list[list[int]]) -> None:
    async with opened(model, {"kv_cache_bytes": 2 << 20}) as engine:

        async def some(count: int) -> None:
            random = np.random.default_rng(count)
            for _ in range(count):
                jobs = [greedy(random.integers(3, VOCABULARY, 40).tolist(), 8, n=2, sampling=Sampling(seed=1)) for _ in range(8)]
                await run_offline(engine, jobs)

        await some(30)  # the pool is full and the cache evicts from here on
        before = psutil.Process().memory_info().rss
        await some(60)
        assert psutil.Process().memory_info().rss - before < 2 << 20
