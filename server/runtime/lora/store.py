"""The adapters of one loaded base: found on the disk, brought into the bank or the page pool, lent to requests, given up again.

More adapters may be loaded than the bank has slots: the one that was used least recently, and by nobody now, gives its slot to the next and
comes back, within some tens of milliseconds, when a request names it. Everything public runs on the event loop; reading, hashing and
copying happen in threads. State changes only on the loop, between two awaits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from server.core import FloatArray
from server.errors import AdapterNotFound, Draining, ModelRejected, Overloaded, UnderstudyError, near_names
from server.runtime.adapter_folder import version_numbers
from server.runtime.decoder.contract import AdapterUse
from server.runtime.lora.bank import AdapterBank
from server.runtime.lora.folder import AdapterManifest, read_adapter
from server.runtime.lora.repository import names
from server.runtime.lora.weights import LoraWeights, PrefixWeights
from server.runtime.manifest import Manifest
from server.runtime.verify import check_name, check_version

_log = logging.getLogger(__name__)
# A slot is free again when some request ends: soon, but nobody knows when.
_RETRY_S = 1.0
_MAX_NAMES = 10_000


class PrefixPages(Protocol):
    """What the decoder engine does for adapters; see DecoderEngine in server/runtime/decoder/contract.py."""

    async def add_prefix(self, key: str, keys: FloatArray, values: FloatArray) -> int: ...

    async def add_prompt(self, key: str, rows: FloatArray) -> int: ...

    async def drop_prefix(self, key: str) -> None: ...


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """One adapter at one moment. `resident`: its weights are in the bank (or its pages in the pool); `users`: requests that hold it."""

    manifest: AdapterManifest
    resident: bool
    users: int
    default: bool  # it answers to its name without a version


@dataclass(slots=True, eq=False)
class _Entry:
    manifest: AdapterManifest
    folder: Path
    slot: int = -1
    prefix: int = 0
    users: int = 0
    used: int = 0  # when, in uses of any adapter
    coming: asyncio.Task[None] | None = None  # on its way into a slot
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def key(self) -> str:
        return self.manifest.key

    @property
    def resident(self) -> bool:
        return self.coming is None and (self.slot >= 0 or self.manifest.kind != "lora")


class AdapterSet:
    """Owns the bank's slots. Made on the event loop with the model; `close` ends it before the engine is closed."""

    def __init__(self, base: Manifest, root: Path, bank: AdapterBank | None, pages: PrefixPages | None = None, refused: str = "") -> None:
        """`root`: the folder of all adapters; this base's are in `<root>/<base>/<name>/<version>`. `bank` None: no LoRA; `pages` None: no
        prefixes, as with encoders. `refused`: why none can be loaded, where that is so.
        """
        self._refused = refused
        self.base = base
        self._root = root
        self.folder = root / base.name
        self._bank = bank
        self._pages = pages
        self._slots: list[_Entry | None] = [None] * (bank.slots if bank is not None else 0)
        self._loaded: dict[str, dict[int, _Entry]] = {}  # by name, highest version first
        self._loading: dict[tuple[str, int], asyncio.Task[_Entry]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._clock = 0
        self._closed = False
        self._loop = asyncio.get_running_loop()

    # Looking.

    def loaded(self) -> list[AdapterStatus]:
        """Every loaded version by name, newest first."""
        return [self._status(entry) for _, versions in sorted(self._loaded.items()) for entry in versions.values()]

    def names(self) -> list[str]:
        """What a request may name now: each name, and each name@version."""
        return list(self._loaded) + [entry.key for versions in self._loaded.values() for entry in versions.values()]

    # Using.

    async def acquire(self, spec: str) -> AdapterUse:
        """Holds an adapter, "name" (its newest loaded version) or "name@version", until its `release`, which any thread may call, once.

        Returns without waiting where the adapter is in the bank.

        Raises:
            InvalidArgument: `spec` is no name.
            AdapterNotFound: not loaded; with those that are.
            Overloaded: every slot is held by a running request.
            ModelRejected: its files were changed since they were loaded.
        """
        entry = self._find(spec)
        self._hold(entry)
        try:
            if not entry.resident:
                await self._come(entry)
        except BaseException:
            self._let_go(entry)
            raise
        held = [entry]  # emptied by the first release

        def release() -> None:
            try:
                one = held.pop()
            except IndexError:
                return
            if _running_loop() is self._loop:
                self._let_go(one)
            else:
                with suppress(RuntimeError):  # the loop was closed, and the set with it
                    self._loop.call_soon_threadsafe(self._let_go, one)

        return AdapterUse(entry.key, entry.slot, entry.prefix, release)

    # Changing.

    async def load(self, name: str, version: str | None = None) -> AdapterStatus:
        """Verifies a version (None: the newest on the disk) and brings it in; the newest loaded version answers to the bare name.

        Loading what is loaded changes nothing. Several loads of one version are one.

        Raises:
            InvalidArgument, AdapterNotFound: no such name or version; with those on the disk.
            ModelRejected: another base, broken or hostile files, a rank above the bank's.
            Overloaded: every slot is held by a running request.
            Draining: the model is being unloaded.
        """
        if self._closed:
            raise Draining(f"model {self.base.name!r} is being unloaded and takes no adapters. Load it again first.")
        name, number = await self._locate(name, version)
        entry = self._loaded.get(name, {}).get(number)
        if entry is None:
            task = self._loading.get((name, number))
            if task is None:
                task = self._loading[name, number] = asyncio.create_task(self._load(name, number), name=f"load adapter {name}@{number}")
                task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, even if every caller left
            entry = await asyncio.shield(task)
        return self._status(entry)

    async def unload(self, name: str, version: str | None = None, *, grace_s: float = 30.0) -> list[AdapterStatus]:
        """Forgets a version (None: all of the name's). New requests no longer find it; those that hold it finish.

        Returns when its memory is free, or after `grace_s`; then the memory follows when the last request that holds it ends.

        Raises:
            InvalidArgument: `name` is none.
            AdapterNotFound: not loaded; with those that are.
        """
        check_name(name, field="adapter")
        number = None if version is None else int(check_version(version))
        for key in [key for key in self._loading if key[0] == name and number in (None, key[1])]:
            with suppress(UnderstudyError):
                await asyncio.shield(self._loading[key])
        doomed = [entry for one, entry in self._loaded.get(name, {}).items() if number in (None, one)]
        if not doomed:
            raise self._unknown(name if version is None else f"{name}@{number}")
        for entry in doomed:
            del self._loaded[name][int(entry.manifest.version)]
        if not self._loaded[name]:
            del self._loaded[name]
        tasks = [asyncio.create_task(self._retire(entry), name=f"unload adapter {entry.key}") for entry in doomed]
        for task in tasks:
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
        await asyncio.wait(tasks, timeout=grace_s)
        return [AdapterStatus(entry.manifest, False, entry.users, False) for entry in doomed]

    async def start(self, wanted: Sequence[str] = ("*",)) -> None:
        """Loads adapters by "base/name", "base/name@version" (those of other bases are passed over) or "*": the newest of each.

        One that is refused keeps out no other; the log says why.
        """
        for spec in wanted:
            base, _, own = spec.partition("/")
            if spec != "*" and base != self.base.name:
                continue
            for one in await asyncio.to_thread(self._names) if spec == "*" else [own]:
                name, _, version = one.partition("@")
                try:
                    await self.load(name, version or None)
                except UnderstudyError as error:
                    _log.error("adapter not loaded", extra={"model": self.base.name, "adapter": one, "error": error.message})

    async def close(self) -> None:
        """Refuses new loads and forgets everything. Requests that hold an adapter must have ended, or end with the engine."""
        self._closed = True
        tasks = [*self._loading.values(), *self._leaving]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._loaded.clear()

    # Inside: the disk.

    def _names(self) -> list[str]:
        return names(self._root, self.base.name)[:_MAX_NAMES]

    async def _locate(self, name: str, version: str | None) -> tuple[str, int]:
        check_name(name, field="adapter")
        known = await asyncio.to_thread(version_numbers, self.folder / name)
        if version is not None and (number := int(check_version(version))) in known:
            return name, number
        if version is None and known:
            return name, known[0]
        near = near_names(name, await asyncio.to_thread(self._names))
        versions = f"it has the versions {', '.join(map(str, known[:20]))}." if known else near
        shown = f"{name}@{version}" if version is not None else name
        raise AdapterNotFound(
            f"model {self.base.name!r} has no adapter {shown!r} on the disk; {versions} Add it with `understudy adapters add`.",
            adapter=shown,
            model=self.base.name,
        )

    async def _load(self, name: str, number: int) -> _Entry:
        try:
            entry = await self._read(name, number)
        finally:
            del self._loading[name, number]
        versions = {**self._loaded.get(name, {}), number: entry}
        self._loaded[name] = dict(sorted(versions.items(), reverse=True))
        self._let_go(entry)
        _log.info("adapter loaded", extra={"model": self.base.name, "adapter": entry.key, "kind": entry.manifest.kind, "slot": entry.slot})
        return entry

    async def _read(self, name: str, number: int) -> _Entry:
        """A new entry, held once so that nobody takes its slot yet."""
        if self._refused:
            raise ModelRejected(self._refused, adapter=f"{name}@{number}")
        folder = self.folder / name / str(number)
        manifest, weights = await asyncio.to_thread(read_adapter, folder, self.base)
        if (manifest.name, manifest.version) != (name, str(number)):
            raise ModelRejected(
                f"{name}/{number}: the manifest says {manifest.name}/{manifest.version}. Put it where it was written for.", adapter=name
            )
        entry = _Entry(manifest, folder)
        self._hold(entry)
        if isinstance(weights, LoraWeights):
            self._require_bank(manifest).check(weights, entry.key)
            entry.slot = self._take_slot(entry)
            await self._write(entry, weights)
        elif self._pages is None:
            raise ModelRejected(f"adapter {entry.key!r} is a {manifest.kind}; only models that generate text take one.", adapter=entry.key)
        elif isinstance(weights, PrefixWeights):
            entry.prefix = await self._pages.add_prefix(entry.key, weights.keys, weights.values)
        else:
            entry.prefix = await self._pages.add_prompt(entry.key, weights.rows)
        return entry

    def _require_bank(self, manifest: AdapterManifest) -> AdapterBank:
        if self._bank is None:
            raise ModelRejected(
                f"model {self.base.name!r} was built without places for LoRA adapters. Pull it again with --adapters.", adapter=manifest.key
            )
        if not self._bank.slots:
            raise ModelRejected("this server has no slots for adapters. Set generation.adapter_slots to 1 or more.", adapter=manifest.key)
        return self._bank

    # Inside: slots.

    def _take_slot(self, entry: _Entry) -> int:
        """A free slot, else that of the least recently used adapter that nobody holds; raises Overloaded."""
        free = [i for i, owner in enumerate(self._slots) if owner is None]
        if not free:
            idle = [owner for owner in self._slots if owner is not None and owner.users == 0 and owner.resident]
            if not idle:
                raise Overloaded(
                    f"all {len(self._slots)} adapter slots of model {self.base.name!r} are held by running requests; {entry.key!r} "
                    "has to wait. Try again, or raise generation.adapter_slots.",
                    retry_after_s=_RETRY_S,
                    model=self.base.name,
                    limit=len(self._slots),
                )
            oldest = min(idle, key=lambda owner: owner.used)
            free = [oldest.slot]
            oldest.slot = -1
        self._slots[free[0]] = entry
        return free[0]

    async def _write(self, entry: _Entry, weights: LoraWeights) -> None:
        """Fills the entry's slot in a thread, and frees it if that fails. Not to be cancelled while the thread writes."""
        assert self._bank is not None, "an entry with a slot"
        writing = asyncio.ensure_future(asyncio.to_thread(self._bank.write, entry.slot, weights))
        try:
            await asyncio.shield(writing)
        except BaseException:
            await asyncio.wait([writing])
            self._free(entry)
            raise

    def _free(self, entry: _Entry) -> None:
        if entry.slot >= 0:
            self._slots[entry.slot] = None
            entry.slot = -1

    async def _come(self, entry: _Entry) -> None:
        """Brings a loaded adapter that lost its slot back into one; callers that ask for the same wait for the same."""
        if entry.coming is None:
            entry.slot = self._take_slot(entry)
            entry.coming = asyncio.create_task(self._bring(entry), name=f"adapter {entry.key}")
            entry.coming.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(entry.coming)

    async def _bring(self, entry: _Entry) -> None:
        try:
            manifest, weights = await asyncio.to_thread(read_adapter, entry.folder, self.base)
            if manifest != entry.manifest or not isinstance(weights, LoraWeights):
                raise ModelRejected(
                    f"{entry.folder} was changed since adapter {entry.key!r} was loaded. Add a new version.", adapter=entry.key
                )
            await self._write(entry, weights)
        except BaseException:
            self._free(entry)
            raise
        finally:
            entry.coming = None

    # Inside: uses.

    def _find(self, spec: str) -> _Entry:
        name, at, version = spec.partition("@") if isinstance(spec, str) else ("", "", "")
        check_name(name, field="adapter")
        versions = self._loaded.get(name, {})
        newest = next(iter(versions.values()), None)
        entry = versions.get(int(check_version(version, field="adapter"))) if at else newest
        if entry is None:
            raise self._unknown(spec)
        return entry

    def _unknown(self, spec: str) -> AdapterNotFound:
        shown = spec[:140]
        message = f"adapter {shown!r} is not loaded on model {self.base.name!r}; {near_names(shown, self.names())}"
        return AdapterNotFound(message, adapter=shown, model=self.base.name, loaded=",".join(sorted(self._loaded)[:20]))

    def _hold(self, entry: _Entry) -> None:
        self._clock += 1
        entry.used = self._clock
        entry.users += 1
        entry.idle.clear()

    def _let_go(self, entry: _Entry) -> None:
        self._clock += 1
        entry.used = self._clock
        entry.users -= 1
        assert entry.users >= 0, entry.key
        if entry.users == 0:
            entry.idle.set()

    async def _retire(self, entry: _Entry) -> None:
        if entry.users:
            await entry.idle.wait()
        self._free(entry)
        if self._pages is not None:
            await self._pages.drop_prefix(entry.key)
        _log.info("adapter unloaded", extra={"model": self.base.name, "adapter": entry.key})

    def _status(self, entry: _Entry) -> AdapterStatus:
        newest = next(iter(self._loaded.get(entry.manifest.name, {}).values()), None)
        return AdapterStatus(entry.manifest, entry.resident, entry.users, newest is entry)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
