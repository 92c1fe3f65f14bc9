"""The engine over a device's caches, on the processor: the graph for CUDA with its attention in plain operators, all else as served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from server.core import Call
from server.errors import ModelRejected
from server.runtime.decoder.contract import Sampling
from server.runtime.decoder.device import COPY, DeviceRunner, DeviceSession, device_decoder
from server.runtime.decoder.engine import EngineParts, GenerationEngine, run_offline
from server.runtime.decoder.load import DecoderSettings, LoadedDecoder
from server.runtime.decoder.settings import GenerationSettings
from server.runtime.decoder.step import StepLimits
from server.runtime.manifest import Manifest
from server.runtime.observer import NullObserver
from server.runtime.repository import ModelFiles
from server.runtime.sessions import Sessions, SessionSettings
from tests.runtime.decoder.decoders import VOCABULARY, build, greedy, ids, opened, random_llama
from tests.runtime.decoder.standin import write_standin


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder, manifest = build(random_llama(tmp_path_factory.mktemp("llama")), tmp_path_factory.mktemp("graphs"), ("float32", "cuda"))
    write_standin(folder / "model.cuda.onnx", folder / "standin.onnx")
    return folder, manifest


def plain(manifest: Manifest) -> Manifest:
    assert manifest.decoder is not None
    return manifest.model_copy(update={"decoder": manifest.decoder.model_copy(update={"graphs": {"float32": "model.onnx"}})})


@asynccontextmanager
async def on_device(model: tuple[Path, Manifest], page: int = 16, **settings: Any) -> AsyncIterator[GenerationEngine]:
    folder, manifest = model
    assert manifest.decoder is not None
    session = DeviceSession(folder / "standin.onnx", folder / COPY, "cpu")
    seen = manifest.model_copy(update={"decoder": device_decoder(manifest.decoder, page)})
    chosen = GenerationSettings(**{"kv_cache_bytes": 1 << 20, "max_sequences": 8, **settings})
    engine = GenerationEngine(EngineParts(seen, {"cuda": session}, runner=DeviceRunner), chosen)
    try:
        await engine.ready()
        yield engine
    finally:
        await engine.close(drain=False)
        session.close()


def prompts(*lengths: int) -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(3, VOCABULARY, length).tolist() for length in lengths]


async def test_says_what_the_float32_form_says(model: tuple[Path, Manifest]) -> None:
    jobs = prompts(1, 9, 40, 70, 120)
    sampling = Sampling(temperature=0.0, logprobs=True)
    async with on_device(model, token_budget=48) as device:
        got = [pieces[0] for pieces in await run_offline(device, [greedy(one, 12, sampling=sampling) for one in jobs])]
    async with opened((model[0], plain(model[1]))) as exact:
        want = [pieces[0] for pieces in await run_offline(exact, [greedy(one, 12, sampling=sampling) for one in jobs])]
    followed = 0
    for one, other in zip(got, want, strict=True):
        for a, b in zip(one.tokens, other.tokens, strict=True):
            assert abs(a.logprob - b.logprob) < 0.05 or a.id != b.id
            if a.id != b.id:  # level in float32 as well; from here on the texts are different ones
                assert b.margin < 0.1
                break
            followed += 1
    assert followed >= 40


async def test_chunks_neighbours_and_the_prefix_cache_change_nothing(model: tuple[Path, Manifest]) -> None:
    long, short, other = prompts(100, 7, 33)
    async with on_device(model, token_budget=32) as engine:
        alone = [ids((await run_offline(engine, [greedy(one, 10)]))[0][0]) for one in (long, short, other)]
        again = await run_offline(engine, [greedy(one, 10) for one in (long, short, other, long)])
        assert [ids(pieces[0]) for pieces in again] == [*alone, alone[0]]
        assert again[0][0].cached >= 80


async def test_candidates_of_one_prompt_get_copies_of_its_last_page(model: tuple[Path, Manifest]) -> None:
    (prompt,) = prompts(21)
    async with on_device(model) as engine:
        alone = ids((await run_offline(engine, [greedy(prompt, 20)]))[0][0])
        several = (await run_offline(engine, [greedy(prompt, 20, n=3)]))[0]
        assert [ids(piece) for piece in several] == [alone] * 3
        drawn = (await run_offline(engine, [greedy(prompt, 20, n=3, sampling=Sampling(seed=1), call=Call("drawn"))]))[0]
        assert len({tuple(ids(piece)) for piece in drawn}) == 3


async def test_pages_of_the_devices_own_size(model: tuple[Path, Manifest]) -> None:
    jobs = [greedy(one, 8) for one in prompts(30, 90)]
    async with on_device(model) as engine:
        want = [ids(pieces[0]) for pieces in await run_offline(engine, jobs)]
    assert device_decoder(engine.decoder).page == 256
    async with on_device(model, page=64) as engine:
        assert [ids(pieces[0]) for pieces in await run_offline(engine, [greedy(one, 8) for one in prompts(30, 90)])] == want


async def test_adapters_pages_are_refused(model: tuple[Path, Manifest]) -> None:
    async with on_device(model) as engine:
        with pytest.raises(ModelRejected, match="without adapters"):
            await engine.add_prefix("a@1", *(np.zeros((2, 2, 5, 16), np.float32),) * 2)
        assert engine.pages.used == 0


def test_more_sequences_than_the_operator_takes_are_refused(model: tuple[Path, Manifest]) -> None:
    folder, manifest = model
    assert manifest.decoder is not None
    session = DeviceSession(folder / "standin.onnx", folder / COPY, "cpu")
    with pytest.raises(ModelRejected, match="max_sequences"):
        DeviceRunner(device_decoder(manifest.decoder, 16), {"cuda": session}, 8, StepLimits(512, 300, 256))
    session.close()


def test_a_graph_of_another_kind_is_refused(model: tuple[Path, Manifest]) -> None:
    folder = model[0]
    with pytest.raises(ModelRejected, match="other caches"):
        DeviceSession(folder / "standin.onnx", folder / "standin.onnx", "cpu")


async def in_thread(work: Any) -> Any:
    return await asyncio.to_thread(work)


def files_of(model: tuple[Path, Manifest]) -> ModelFiles:
    folder, manifest = model
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    return ModelFiles(manifest, folder, {path.name: path for path in folder.iterdir()})


async def test_a_model_with_the_form_is_still_served_by_the_processor(model: tuple[Path, Manifest]) -> None:
    loaded = LoadedDecoder()
    await loaded.build(files_of(model), in_thread, Sessions(), DecoderSettings(), NullObserver())
    try:
        assert loaded.engine.forms.wide == "float32" and loaded.engine.decoder.lora is not None
    finally:
        await loaded.close(drain=False)


async def test_loading_takes_the_devices_way_where_it_is_configured(model: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = model

    def on_processor(cls: type[DeviceSession], _decoder: Any, paths: Any) -> DeviceSession:
        return cls(folder / "standin.onnx", paths[COPY], "cpu")

    monkeypatch.setattr(DeviceSession, "of", classmethod(on_processor))
    settings = SessionSettings(providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    loaded = LoadedDecoder()
    await loaded.build(files_of(model), in_thread, Sessions(settings), DecoderSettings(), NullObserver())
    try:
        assert loaded.engine.forms.wide == "cuda" and loaded.engine.decoder.page == 256
        assert loaded.adapters is not None and loaded.generator is not None
    finally:
        await loaded.close(drain=False)


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
async def test_loading_without_a_gpu_says_why(model: tuple[Path, Manifest]) -> None:
    settings = SessionSettings(providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    loaded = LoadedDecoder()
    with pytest.raises(ModelRejected, match="CUDA and cuDNN"):
        await loaded.build(files_of(model), in_thread, Sessions(settings), DecoderSettings(), NullObserver())
    await loaded.close(drain=False)


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_without_a_gpu_the_error_says_how_to_mend_it(model: tuple[Path, Manifest]) -> None:
    folder = model[0]
    with pytest.raises(ModelRejected, match=r"runtime\.execution_providers"):
        DeviceSession(folder / "model.cuda.onnx", folder / COPY)
