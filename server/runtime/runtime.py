"""The models that are loaded: loading beside the old version, swapping, draining, giving memory back.

Everything public runs on the event loop's thread; hashing and session building run in one thread of their own, so that loads queue
behind each other and never behind requests. State changes only on the loop, between two awaits: no lock is needed to read it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeVar

from server.core import Task
from server.errors import (
    Draining,
    FailedPrecondition,
    ModelInUse,
    ModelNotLoaded,
    ModelRejected,
    OutOfMemory,
    TaskNotSupported,
    UnderstudyError,
    VersionNotFound,
    near_names,
)
from server.runtime.manifest import Manifest
from server.runtime.memory import check_fits
from server.runtime.repository import ModelFiles, Repository
from server.runtime.served import Served as Served
from server.runtime.served import tasks_of as tasks_of
from server.runtime.verify import check_name, check_version

if TYPE_CHECKING:
    from server.runtime.decoder.generator import GeneratorModel
    from server.runtime.encoder import EncoderModel
    from server.runtime.lora.store import AdapterSet
    from server.runtime.seq2seq.contract import Seq2SeqModel
    from server.runtime.tensor_engine import TensorEngine

_log = logging.getLogger(__name__)
T = TypeVar("T")


class ModelState(StrEnum):
    """Where a version stands. UNLOADED is only ever told to listeners: the version is forgotten with it."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    FAILED = "FAILED"
    UNLOADED = "UNLOADED"


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One version, at one moment. `default`: it answers calls that name no version.

    `loaded_ns` is wall-clock nanoseconds since 1970, 0 before READY; `memory_bytes` the weights' and tokenizer's size;
    `requests` counts the uses since it was loaded; `error` says why a load failed.
    """

    name: str
    version: str
    state: ModelState
    default: bool = False
    manifest: Manifest | None = None
    error: str = ""
    loaded_ns: int = 0
    memory_bytes: int = 0
    requests: int = 0
    in_use: int = 0


class InThread(Protocol):
    """Runs a function outside of the event loop, one at a time."""

    async def __call__(self, function: Callable[[], T], /) -> T: ...


class Loader(Protocol):
    """Builds a model and warms it up. Raises ModelRejected, and leaves nothing behind then."""

    async def __call__(self, files: ModelFiles, in_thread: InThread, /) -> Served: ...


@dataclass(slots=True, eq=False)
class _Record:
    name: str
    version: str
    state: ModelState = ModelState.LOADING
    manifest: Manifest | None = None
    tasks: frozenset[Task] = frozenset()
    served: Served | None = None
    error: str = ""
    loaded_ns: int = 0
    memory: int = 0
    requests: int = 0
    in_use: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class Runtime:
    """Owns the loaded models of one process.

    A call holds its model by `use` or `use_tensors`: what it holds is closed only after it is let go, so that a swap fails no call.
    """

    def __init__(
        self, repository: Repository, loader: Loader, *, on_change: Callable[[ModelStatus], None] | None = None, drain_s: float = 30.0
    ) -> None:
        """`on_change` is called on the event loop after each change of a version's state. `drain_s` bounds the wait for calls at unload."""
        self.repository = repository
        self._loader = loader
        self._drain_s = drain_s
        self._listeners: list[Callable[[ModelStatus], None]] = [on_change] if on_change else []
        self._records: dict[tuple[str, str], _Record] = {}
        self._defaults: dict[str, str] = {}
        self._loading: dict[tuple[str, str], asyncio.Task[_Record]] = {}
        self._retiring: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="load")
        self._closing = False

    def subscribe(self, listener: Callable[[ModelStatus], None]) -> None:
        """Adds a listener of state changes."""
        self._listeners.append(listener)

    # Finding models.

    def get(self, name: str, task: Task | None = None, version: str | None = None) -> EncoderModel:
        """The loaded model, for a look at it; to call it, hold it by `use`.

        Raises:
            InvalidArgument: `name` or `version` is none.
            ModelNotFound, VersionNotFound: not in the repository; names the near ones.
            ModelNotLoaded: in the repository, not loaded (or still loading).
            TaskNotSupported: loaded, and does other tasks.
        """
        return self._encoder(self._find(name, version), task)

    def tensors(self, name: str, version: str | None = None) -> TensorEngine:
        """The loaded model for raw tensors; errors as `get`."""
        return self._tensors(self._find(name, version))

    @contextmanager
    def use(self, name: str, task: Task | None = None, version: str | None = None) -> Iterator[EncoderModel]:
        """As `get`, and counts the call: the model stays open until the block is left, even if it is unloaded meanwhile."""
        record = self._find(name, version)
        encoder = self._encoder(record, task)
        with self._held(record):
            yield encoder

    @contextmanager
    def use_tensors(self, name: str, version: str | None = None) -> Iterator[TensorEngine]:
        """As `tensors`, held as by `use`."""
        record = self._find(name, version)
        tensors = self._tensors(record)
        with self._held(record):
            yield tensors

    @contextmanager
    def use_generator(self, name: str, task: Task = Task.TEXT_GENERATION, version: str | None = None) -> Iterator[GeneratorModel]:
        """The loaded decoder, held as by `use` for as long as its answers take; errors as `get`."""
        record = self._find(name, version)
        generator = self._served(record).generator
        if generator is None or task not in record.tasks:
            self._raise_other_task(record, task)
        with self._held(record):
            yield generator

    @contextmanager
    def use_seq2seq(self, name: str, task: Task, version: str | None = None) -> Iterator[Seq2SeqModel]:
        """The loaded encoder-decoder, held as by `use`; errors as `get`."""
        record = self._find(name, version)
        model = self._served(record).seq2seq
        if model is None or task not in record.tasks:
            self._raise_other_task(record, task)
        with self._held(record):
            yield model

    @contextmanager
    def use_adapters(self, name: str, version: str | None = None) -> Iterator[AdapterSet]:
        """The adapters of a loaded model, held as by `use`; raises FailedPrecondition for a model that takes none, and as `get`."""
        record = self._find(name, version)
        adapters = self._served(record).adapters
        if adapters is None:
            message = f"model {name!r} takes no adapters; expected one that was built for them. Pull it again with --adapters."
            raise FailedPrecondition(message, model=name)
        with self._held(record):
            yield adapters

    def manifest(self, name: str, version: str | None = None) -> Manifest:
        """Manifest of a loaded model; errors as `get`."""
        manifest = self._find(name, version).manifest
        assert manifest is not None
        return manifest

    def has(self, name: str, version: str) -> bool:
        """Whether a version is loaded and ready."""
        record = self._records.get((name, version))
        return record is not None and record.state is ModelState.READY

    def default_version(self, name: str) -> str | None:
        """The version that answers to a name alone, or None; without a look at the disk."""
        return self._defaults.get(name)

    def models_for(self, task: Task) -> list[str]:
        """Names of the loaded models whose default version does `task`, sorted; models made for the task come first."""
        names = []
        for name, version in self._defaults.items():
            record = self._records[name, version]
            if task in record.tasks:
                names.append((record.manifest is not None and record.manifest.task is not task, name))
        return [name for _, name in sorted(names)]

    def loaded(self) -> list[ModelStatus]:
        """Every version that is loading, ready, unloading or failed to load, by name, then version."""
        return [self._status(record) for _, record in sorted(self._records.items(), key=lambda item: (item[0][0], int(item[0][1])))]

    # Changing them.

    async def load(self, name: str, version: str | None = None, *, replace: bool = False, default: bool = True) -> ModelStatus:
        """Loads a version (`None`: the latest) and makes it the one that answers calls without a version; returns once it is READY.

        Without `default` it does so only where no other version is loaded.

        Verified, built and warmed up beside what runs; calls go to the new one from one moment to the next. With `replace`, its
        other versions are drained and dropped, in the background. Loading what is loaded only makes it the default. Several loads of
        the same version are one. When it fails, what ran before still runs, and nothing of the new one stays but its status.

        Raises:
            InvalidArgument, ModelNotFound, VersionNotFound: as `get`.
            ModelRejected: broken, altered or hostile files.
            OutOfMemory: not enough for this model.
            Draining: the runtime is closing.
        """
        self._refuse_when_closing()
        check_name(name, field="model")
        wanted = await self._in_thread(lambda: self.repository.manifest(name, version).version)
        key = (name, wanted)
        while key in self._retiring:  # unloaded a moment ago: its memory goes first
            await asyncio.shield(self._retiring[key])
        self._refuse_when_closing()
        record = self._records.get(key)
        if record is None or record.state is not ModelState.READY:
            task = self._loading.get(key)
            if task is None:
                task = self._loading[key] = asyncio.create_task(self._load(key), name=f"load {name}/{wanted}")
                task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, even if every caller left
            record = await asyncio.shield(task)  # a caller that leaves does not stop it for the others
        if record.state is ModelState.READY and default:
            self._make_default(record, replace)
        return self._status(record)

    async def unload(self, name: str, version: str | None = None, *, grace_s: float | None = None) -> list[ModelStatus]:
        """Drains and drops a version (`None`: all of the model's); returns once their memory is given back.

        New calls no longer find it from the first moment; calls that hold it finish, for up to `grace_s` (`None`: `drain_s`).

        Raises:
            InvalidArgument, ModelNotFound, VersionNotFound, ModelNotLoaded: as `get`.
        """
        check_name(name, field="model")
        version = None if version is None else check_version(version)
        for key in [key for key in self._loading if key[0] == name and version in (None, key[1])]:
            with suppress(UnderstudyError):
                await asyncio.shield(self._loading[key])
        records = [record for record in self._records.values() if record.name == name and version in (None, record.version)]
        if not records:
            self._raise_absent(name, version)
        tasks = [self._retire(record, grace_s=grace_s) for record in records]
        await asyncio.gather(*(asyncio.shield(task) for task in tasks))
        return [ModelStatus(r.name, r.version, ModelState.UNLOADED, manifest=r.manifest, requests=r.requests) for r in records]

    async def delete(self, name: str, version: str) -> None:
        """Removes a version from the repository; raises ModelInUse while it is loaded, and as `get`."""
        check_name(name, field="model")
        version = check_version(version)
        record = self._records.get((name, version))
        if record is not None and record.state is not ModelState.FAILED:
            raise ModelInUse(
                f"model {name!r} version {version} is {record.state.value.lower()}; only what is not loaded is deleted. Unload it first.",
                model=name,
                version=version,
            )
        await self._in_thread(lambda: self.repository.remove(name, version))
        self._records.pop((name, version), None)

    async def close(self, drain: bool = True) -> None:
        """Refuses new loads, then closes every model; with `drain`, calls that hold one finish first. May be called twice."""
        self._closing = True
        for task in list(self._loading.values()):
            task.cancel()
        await asyncio.gather(*self._loading.values(), return_exceptions=True)
        self._loading.clear()  # a task that was stopped before its first step
        tasks = [self._retire(record, drain) for record in list(self._records.values())]
        await asyncio.gather(*tasks, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    # Inside: finding.

    def _find(self, name: str, version: str | None) -> _Record:
        check_name(name, field="model")
        wanted = self._defaults.get(name) if version is None else check_version(version)
        record = self._records.get((name, wanted)) if wanted is not None else None
        if record is None or record.state is not ModelState.READY:
            self._raise_absent(name, wanted if version is not None else None)
        return record

    def _raise_absent(self, name: str, version: str | None) -> NoReturn:
        """Raises the error that says what is the matter with a version that is not ready. Looks at the disk: the slow path."""
        states = [r for r in self._records.values() if r.name == name and version in (None, r.version)]
        known = self.repository.versions(name) if not states else []  # raises ModelNotFound
        if not states and version is not None and version not in known:
            raise VersionNotFound(
                f"model {name!r} has no version {version}; {near_names(version, known)}",
                model=name,
                version=version,
                versions=",".join(known[-20:]),
            )
        shown = f"model {name!r}" + (f" version {version}" if version else "")
        if any(record.state is ModelState.LOADING for record in states):
            raise ModelNotLoaded(f"{shown} is still loading. Call again when it is ready.", retry_after_s=1.0, model=name, state="LOADING")
        failed = next((record for record in states if record.state is ModelState.FAILED), None)
        if failed is not None:
            raise ModelNotLoaded(f"{shown} failed to load: {failed.error} Load it again when that is mended.", model=name, state="FAILED")
        raise ModelNotLoaded(
            f"{shown} is not loaded. Load it with ModelService.LoadModel, or name it in the configuration.", model=name, state="UNLOADED"
        )

    def _encoder(self, record: _Record, task: Task | None) -> EncoderModel:
        encoder = self._served(record).encoder
        if encoder is None or (task is not None and task not in record.tasks):
            self._raise_other_task(record, task)
        return encoder

    def _tensors(self, record: _Record) -> TensorEngine:
        tensors = self._served(record).tensors
        if tensors is None:
            self._raise_other_task(record, Task.TENSOR)
        return tensors

    def _raise_other_task(self, record: _Record, task: Task | None) -> NoReturn:
        wanted = task.value if task else "text"
        does = ", ".join(sorted(t.value for t in record.tasks if t is not Task.TENSOR)) or "raw tensors only"
        others = ", ".join(repr(name) for name in self.models_for(task)) if task else ""
        hint = f"Loaded models that do: {others}." if others else "Load one that does."
        message = f"model {record.name!r} does not do {wanted}; it does {does}. {hint}"
        raise TaskNotSupported(message, model=record.name, task=wanted, does=does)

    def _served(self, record: _Record) -> Served:
        assert record.served is not None, "a READY record is always served"
        return record.served

    @contextmanager
    def _held(self, record: _Record) -> Iterator[None]:
        record.in_use += 1
        record.requests += 1
        try:
            yield
        finally:
            record.in_use -= 1
            if record.in_use == 0:
                record.idle.set()

    # Inside: changing.

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _load(self, key: tuple[str, str]) -> _Record:
        name, version = key
        record = self._records[key] = _Record(name, version)
        self._changed(record)
        try:
            files = await self._in_thread(lambda: self.repository.open(name, version))
            record.manifest, record.tasks, record.memory = files.manifest, tasks_of(files.manifest), files.size
            check_fits(files.size, f"model {name!r} version {version}")
            record.served = await self._loader(files, self._in_thread)
        except asyncio.CancelledError:
            self._fail(record, "the load was stopped.")
            raise
        except UnderstudyError as error:
            self._fail(record, error.message)
            raise
        except MemoryError as error:
            self._fail(record, "out of memory.")
            raise OutOfMemory(f"model {name!r} version {version} does not fit into memory. Unload another first.", model=name) from error
        except Exception as error:
            self._fail(record, f"{type(error).__name__}: {str(error)[:500]}")
            message = f"model {name!r} version {version} cannot be loaded: {record.error}"
            raise ModelRejected(message, model=name, version=version) from error
        finally:
            self._loading.pop(key, None)
        record.loaded_ns = time.time_ns()
        record.state = ModelState.READY
        if record.name not in self._defaults:
            self._defaults[record.name] = record.version
        self._changed(record)
        return record

    def _fail(self, record: _Record, error: str) -> None:
        record.state, record.error, record.served, record.memory = ModelState.FAILED, error, None, 0
        _log.error("model load failed", extra={"model": record.name, "version": record.version, "error": error})
        self._changed(record)

    def _make_default(self, record: _Record, replace: bool) -> None:
        if self._defaults.get(record.name) != record.version:
            self._defaults[record.name] = record.version
            self._changed(record)
        if replace:
            for other in list(self._records.values()):
                if other.name == record.name and other is not record and other.state is ModelState.READY:
                    self._retire(other)

    def _retire(self, record: _Record, drain: bool = True, grace_s: float | None = None) -> asyncio.Task[None]:
        key = (record.name, record.version)
        task = self._retiring.get(key)
        if task is None:
            was_failed = record.state is ModelState.FAILED
            record.state = ModelState.UNLOADING
            self._pick_default(record.name)
            if not was_failed:
                self._changed(record)
            task = self._retiring[key] = asyncio.create_task(self._drop(record, drain, grace_s), name=f"unload {key[0]}/{key[1]}")
        return task

    def _pick_default(self, name: str) -> None:
        """After a version stopped being ready: the highest that is ready answers, if any."""
        current = self._defaults.get(name)
        if current is not None and self._records[name, current].state is ModelState.READY:
            return
        ready = [int(r.version) for r in self._records.values() if r.name == name and r.state is ModelState.READY]
        if ready:
            self._defaults[name] = str(max(ready))
            self._changed(self._records[name, self._defaults[name]])
        else:
            self._defaults.pop(name, None)

    async def _drop(self, record: _Record, drain: bool, grace_s: float | None) -> None:
        key = (record.name, record.version)
        try:
            if drain and record.in_use:
                record.idle.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(record.idle.wait(), self._drain_s if grace_s is None else grace_s)
            served, record.served = record.served, None
            if served is not None:
                await served.close(drain and record.in_use == 0)  # who still holds it has had its time
        except Exception:
            _log.exception("closing a model failed", extra={"model": record.name, "version": record.version})
        finally:
            record.state = ModelState.UNLOADED
            self._records.pop(key, None)
            self._retiring.pop(key, None)
            self._changed(record)

    def _refuse_when_closing(self) -> None:
        if self._closing:
            raise Draining("the server is stopping and loads no models. Call another server, or again after it has started.")

    def _status(self, record: _Record) -> ModelStatus:
        default = self._defaults.get(record.name) == record.version
        return ModelStatus(
            record.name,
            record.version,
            record.state,
            default,
            manifest=record.manifest,
            error=record.error,
            loaded_ns=record.loaded_ns,
            memory_bytes=record.memory,
            requests=record.requests,
            in_use=record.in_use,
        )

    def _changed(self, record: _Record) -> None:
        status = self._status(record)
        for listener in self._listeners:
            try:
                listener(status)
            except Exception:
                _log.exception("a listener of model changes failed")
