"""Verified files of a decoder to something that answers: sessions of its forms, bank, engine, adapters, tokenizer, template."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.core import Call
from server.errors import ModelRejected, UnderstudyError
from server.runtime.decoder.chat import ChatTemplate
from server.runtime.decoder.checks import check_request
from server.runtime.decoder.contract import Sampling
from server.runtime.decoder.device import CUDA, FORM, NO_ADAPTERS, DeviceRunner, DeviceSession, device_decoder
from server.runtime.decoder.engine import EngineParts, GenerationEngine
from server.runtime.decoder.generator import GeneratorModel, Parts
from server.runtime.decoder.grammar import GrammarCompiler, GrammarMasks
from server.runtime.decoder.prompt import PromptReader, read_config, special_names
from server.runtime.decoder.request import GenerateRequest
from server.runtime.decoder.settings import GenerationSettings
from server.runtime.decoder.step import StepRunner
from server.runtime.decoder.text import TextStreams
from server.runtime.lora.bank import AdapterBank
from server.runtime.lora.convert import ADAPTERS
from server.runtime.lora.store import AdapterSet
from server.runtime.observer import Observer
from server.runtime.repository import ModelFiles
from server.runtime.sessions import Session, Sessions, release_memory
from server.runtime.tokenizers import TextTokenizer

if TYPE_CHECKING:
    from server.config import GenerationConfig
    from server.runtime.runtime import InThread

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True, slots=True)
class DecoderSettings:
    """The engine's bounds, how many adapters of which rank fit into the bank (0 slots turn adapters off), and which are loaded at once."""

    generation: GenerationSettings = field(default_factory=GenerationSettings)
    adapter_slots: int = 8
    adapter_rank: int = 16
    adapters: Sequence[str] = ("*",)

    @classmethod
    def of(cls, config: GenerationConfig | None) -> DecoderSettings:
        """What the section [generation] says."""
        if config is None:
            return cls()
        bounds = {one.name: getattr(config, one.name) for one in fields(GenerationSettings) if hasattr(config, one.name)}
        return cls(GenerationSettings(**bounds), config.adapter_slots, config.adapter_rank, config.adapters)


class LoadedDecoder:
    """One version of a decoder in memory."""

    encoder = seq2seq = tensors = None

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._engine: GenerationEngine | None = None
        self._grammars: list[GrammarCompiler | GrammarMasks] = []
        self.generator: GeneratorModel | None = None
        self.adapters: AdapterSet | None = None

    @property
    def engine(self) -> GenerationEngine:
        """The loop itself, for who has token ids and wants token ids."""
        assert self._engine is not None, "built with the model"
        return self._engine

    async def build(
        self, files: ModelFiles, in_thread: InThread, sessions: Sessions, settings: DecoderSettings, observer: Observer
    ) -> None:
        """Opens the graphs, makes the engine, and generates two tokens. Raises ModelRejected."""
        manifest, decoder = files.manifest, files.manifest.decoder
        assert decoder is not None, "a manifest of form decoder"
        reader, tokenizer = await in_thread(lambda: read_text_parts(files))
        bank, run_by, refused = None, manifest, ""
        if FORM in decoder.graphs and sessions.settings.providers[:1] == (CUDA,):
            run_by, refused = manifest.model_copy(update={"decoder": device_decoder(decoder)}), NO_ADAPTERS
            self._sessions[FORM] = await in_thread(lambda: DeviceSession.of(decoder, files.paths))
        else:
            for form in [form for form in decoder.graphs if form != FORM]:
                self._sessions[form] = await in_thread(partial(sessions.open, files.paths[decoder.graphs[form]]))
            if (layout := decoder.lora) is not None:
                bank = await in_thread(lambda: AdapterBank(layout, settings.adapter_slots, settings.adapter_rank))
        streams = TextStreams(tokenizer.inner)
        compiler, masks = self._make_grammars(files, settings)
        runner = DeviceRunner if FORM in self._sessions else StepRunner
        parts = EngineParts(run_by, self._sessions, bank.feeds() if bank is not None else None, masks, runner)
        self._engine = engine = GenerationEngine(parts, settings.generation, observer)
        await engine.ready()
        self.adapters = AdapterSet(manifest, files.folder.parents[1] / ADAPTERS, bank, engine, refused)
        self.generator = GeneratorModel(
            Parts(
                manifest=manifest,
                tokenizer=tokenizer,
                reader=reader,
                engine=engine,
                texts=lambda stops, follows: streams(stops, follows=follows),
                check=lambda request: check_request(request, decoder.vocabulary),
                grammars=compiler,
                adapters=self.adapters,
            )
        )
        await self._warm(manifest.name)
        await self.adapters.start(settings.adapters)

    async def close(self, drain: bool) -> None:
        """Finishes accepted answers if `drain`, stops the thread, drops the graphs and gives their memory back."""
        if self.adapters is not None:
            await self.adapters.close()
        if self._engine is not None:
            await self._engine.close(drain=drain)
        for part in self._grammars:
            await asyncio.to_thread(part.close)
        for session in self._sessions.values():
            session.close()
        self.generator = self.adapters = self._engine = None
        self._sessions, self._grammars = {}, []
        await asyncio.to_thread(release_memory)

    def _make_grammars(self, files: ModelFiles, settings: DecoderSettings) -> tuple[GrammarCompiler | None, GrammarMasks | None]:
        """None for a model that never ends an answer: a grammar could not say that it is complete."""
        decoder = files.manifest.decoder
        assert decoder is not None and files.tokenizer is not None, "looked at before"
        if not decoder.stop_token_ids:
            return None, None
        compiler = GrammarCompiler(files.tokenizer, decoder.vocabulary, decoder.stop_token_ids)
        masks = GrammarMasks(decoder.vocabulary, settings.generation.max_sequences)
        self._grammars = [compiler, masks]
        return compiler, masks

    async def _warm(self, name: str) -> None:
        assert self.generator is not None
        request = GenerateRequest(token_ids=[0], sampling=Sampling(temperature=0), max_tokens=2, ignore_eos=True)
        try:
            await (await self.generator.generate(request, Call("warm-up"))).collect()
        except UnderstudyError as error:
            raise ModelRejected(f"model {name!r} fails on a first prompt: {error.message}", model=name) from error


def read_text_parts(files: ModelFiles) -> tuple[PromptReader, TextTokenizer]:
    """Tokenizer and chat template. Blocks. Raises ModelRejected."""
    manifest = files.manifest
    assert manifest.decoder is not None, "a manifest of form decoder"
    if files.tokenizer is None:
        raise ModelRejected(
            f"model {manifest.name!r} version {manifest.version} has no tokenizer.json; expected one for {manifest.task.value}.",
            model=manifest.name,
        )
    tokenizer = TextTokenizer.load(files.tokenizer, max_tokens=manifest.max_tokens)
    bos, stops = manifest.decoder.bos_token_id, manifest.decoder.stop_token_ids
    template = None
    if CHAT_TEMPLATE in files.paths:
        names = special_names(_config(files.paths), tokenizer, bos, stops)
        try:
            template = ChatTemplate(files.paths[CHAT_TEMPLATE].read_text(encoding="utf-8"), names)
        except UnicodeDecodeError as error:
            raise ModelRejected(f"{CHAT_TEMPLATE} is not UTF-8 text. Pull the model again.", file=CHAT_TEMPLATE) from error
    return PromptReader(tokenizer, template, model=manifest.name, bos_token_id=bos), tokenizer


def _config(paths: Mapping[str, Path]) -> dict[str, Any]:
    path = paths.get(TOKENIZER_CONFIG)
    return read_config(path.read_bytes()) if path is not None else {}
