"""Verified files to something that answers: session, tokenizer, engine, and one run to warm them up."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from server.core import Call, Task
from server.errors import ModelRejected
from server.runtime.encoder import EncoderModel
from server.runtime.engine import Engine, GraphForm
from server.runtime.lora.bank import AdapterBank
from server.runtime.lora.repository import ADAPTERS
from server.runtime.lora.session import AdaptedSession
from server.runtime.lora.store import AdapterSet
from server.runtime.observer import Observer
from server.runtime.queue import QueueLimits
from server.runtime.repository import ModelFiles
from server.runtime.runtime import InThread, Loader, Served
from server.runtime.sessions import Session, Sessions, SessionSettings, release_memory, usable_cores
from server.runtime.tokenizers import TextTokenizer
from server.runtime.worker import EngineSettings

if TYPE_CHECKING:
    from server.config import GenerationConfig, RuntimeConfig
    from server.runtime.seq2seq.contract import Seq2SeqModel
    from server.runtime.tensor_engine import TensorEngine


# Every lane holds buffers of its own, and all of them take turns at the interpreter between runs.
MOST_LANES = 8


def make_loader(config: RuntimeConfig, observer: Observer, generation: GenerationConfig | None = None) -> Loader:
    """A loader whose sessions share one thread pool; `observer` hears from every engine that it makes."""
    sessions = Sessions(SessionSettings(config.threads, tuple(config.execution_providers), config.spinning))
    limits = QueueLimits(max_sequences=config.queue_sequences, max_tokens=config.queue_tokens)
    # Batches side by side use the cores better than one batch split over them: 8 to 17 % more texts a second on two cores.
    lanes = min(config.threads or usable_cores(), MOST_LANES)
    settings = EngineSettings(lanes=lanes, limits=limits)
    if config.token_budget:
        settings = replace(settings, token_budget=config.token_budget)

    async def load(files: ModelFiles, in_thread: InThread) -> Served:
        if files.manifest.form == "decoder":
            return await _load_decoder(files, in_thread, sessions, generation, observer)
        if files.manifest.form == "seq2seq":
            return await _load_seq2seq(files, sessions, settings, observer)
        session = await in_thread(lambda: sessions.open(files.model))
        bank = await in_thread(lambda: _bank(files, generation))
        model = LoadedModel(session if bank is None else AdaptedSession(session, bank))
        try:
            await model.build(files, in_thread, settings, observer)
            if bank is not None:
                model.adapters = AdapterSet(files.manifest, files.folder.parents[1] / ADAPTERS, bank)
                await model.adapters.start(generation.adapters if generation is not None else ("*",))
        except BaseException:
            await model.close(drain=False)
            raise
        return model

    return load


def _bank(files: ModelFiles, config: GenerationConfig | None) -> AdapterBank | None:
    """The adapters' bank of an encoder whose graph takes them; [generation] says how many fit into one, whatever the model does."""
    layout = files.manifest.lora
    if layout is None:
        return None
    return AdapterBank(layout, *((config.adapter_slots, config.adapter_rank) if config is not None else (8, 16)))


async def _load_decoder(
    files: ModelFiles, in_thread: InThread, sessions: Sessions, config: GenerationConfig | None, observer: Observer
) -> Served:
    from server.runtime.decoder.load import DecoderSettings, LoadedDecoder

    model = LoadedDecoder()
    try:
        await model.build(files, in_thread, sessions, DecoderSettings.of(config), observer)
    except BaseException:
        await model.close(drain=False)
        raise
    return model


async def _load_seq2seq(files: ModelFiles, sessions: Sessions, settings: EngineSettings, observer: Observer) -> Served:
    from server.runtime.seq2seq.model import open_seq2seq

    return LoadedSeq2Seq(await open_seq2seq(files, sessions, settings, observer))


class LoadedSeq2Seq:
    """One version of an encoder-decoder in memory."""

    encoder = generator = tensors = adapters = None

    def __init__(self, model: Seq2SeqModel) -> None:
        self.seq2seq: Seq2SeqModel = model

    async def close(self, drain: bool) -> None:
        """Finishes accepted calls if `drain`, and gives the memory back."""
        await self.seq2seq.close(drain=drain)


class LoadedModel:
    """One version in memory: its session, and the engines that share it."""

    generator = seq2seq = None

    def __init__(self, session: Session) -> None:
        self._session = session
        self.adapters: AdapterSet | None = None
        self._engine: Engine | None = None
        self._tensors: TensorEngine | None = None
        self.encoder: EncoderModel | None = None

    @property
    def tensors(self) -> TensorEngine:
        """The same graph for raw tensors."""
        assert self._tensors is not None, "built with the model"
        return self._tensors

    async def build(self, files: ModelFiles, in_thread: InThread, settings: EngineSettings, observer: Observer) -> None:
        """Makes the engines and runs the smallest input once. Raises ModelRejected."""
        from server.runtime.tensor_engine import TensorEngine

        manifest = files.manifest
        raw = manifest.form == "tensor" or manifest.task is Task.TENSOR
        # An encoder's raw calls are left out of the metrics: its texts and its tensors are counted in different units.
        self._tensors = TensorEngine(self._session, manifest.name, manifest.version, settings, observer if raw else None)
        if raw:
            return
        path = files.tokenizer
        if path is None:
            raise ModelRejected(
                f"model {manifest.name!r} version {manifest.version} has no tokenizer.json; expected one for {manifest.task.value}.",
                model=manifest.name,
            )
        tokenizer = await in_thread(lambda: TextTokenizer.load(path, max_tokens=manifest.max_tokens, token_types=manifest.token_types))
        self._engine = Engine(self._session, GraphForm.of(manifest), settings, observer)
        self.encoder = EncoderModel(manifest, tokenizer, self._engine)
        probe = tokenizer.tokens(tokenizer.encode(["warm"])[0])
        output = await self._engine.run([probe.encoded], Call("warm-up"))
        if isinstance(output.rows[0], Exception):
            raise ModelRejected(f"model {manifest.name!r} fails on a first text: {output.rows[0]}", model=manifest.name)

    async def close(self, drain: bool) -> None:
        """Finishes accepted work if `drain`, stops the threads, drops the session and gives its memory back."""
        if self.adapters is not None:
            await self.adapters.close()
        if self._engine is not None:
            await self._engine.close(drain=drain)
        if self._tensors is not None:
            await self._tensors.close(drain=drain)
        self._session.close()
        self.encoder = self.adapters = self._engine = self._tensors = None
        await asyncio.to_thread(release_memory)
