"""Students on the disk, `<root>/<skill>/<version>/`, taken over while the server runs: linear heads, and references to models.

The trainer publishes by one rename; the store looks every second, verifies what is new in a thread, and swaps it in between two calls.
A broken version is refused and logged once, and the one before goes on serving. Models that students stand on are loaded from the
repository where they are not loaded (student_models.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from server.errors import AdapterNotFound, ModelRejected, UnderstudyError, near_names
from server.runtime.references import KINDS, Reference, kind_of, read_reference
from server.runtime.verify import MANIFEST
from server.runtime.watch import Watch

if TYPE_CHECKING:
    from server.runtime.heads import LinearHead

_log = logging.getLogger(__name__)
_MAX_SKILLS = 10_000
# The newest versions of a skill that are kept in memory: one may be trained on a base that is about to be loaded.
_KEPT = 2


@dataclass(slots=True)
class _Skill:
    """`made` by version, highest first; `refused`: versions with the time of the manifest that was refused."""

    made: dict[int, LinearHead | Reference] = field(default_factory=dict)
    refused: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stand:
    """A model version that a student stands on, with an adapter of it where that is the student. `sha256`: of the model's graph."""

    model: str
    version: str
    sha256: str
    adapter: str = ""
    adapter_version: str = ""


class AdapterStore:
    """The students of every skill. Looks may be taken from any thread; `refresh` from one at a time."""

    def __init__(
        self,
        root: Path,
        *,
        base_sha256: Callable[[str], str | None] | None = None,
        poll_s: float = 1.0,
        on_change: Callable[[str, str | None], None] | None = None,
        after_look: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`base_sha256` gives the SHA-256 of the model.onnx that answers to a base's name now, None if none does; without it all fit.

        `on_change(skill, version or None)` is called, on the thread that refreshes, after the newest version of a skill changed;
        `after_look` on the event loop after each look of the watch.
        """
        self.root = root
        self._base_sha256 = base_sha256
        self._on_change = on_change
        self._skills: dict[str, _Skill] = {}
        self._wanted: dict[str, frozenset[int]] = {}
        self._watch = Watch(self.refresh, poll_s, "adapters", after_look)

    def current(self, skill: str) -> LinearHead | None:
        """The newest good head that fits the base that is loaded, or None."""
        known = self._skills.get(skill)
        for made in known.made.values() if known else ():
            if isinstance(made, Reference):
                continue
            base = made.manifest.base
            if self._base_sha256 is None or self._base_sha256(base.name) == base.sha256:
                return made
        return None

    def made(self, skill: str) -> Mapping[int, LinearHead | Reference]:
        """The students that are in memory, newest first, whether or not what they stand on is loaded."""
        known = self._skills.get(skill)
        return known.made if known else {}

    def get(self, skill: str, version: str) -> LinearHead | Reference:
        """A version that is in memory; raises AdapterNotFound with those that are."""
        known = self._skills.get(skill)
        loaded = {str(number): made for number, made in known.made.items()} if known else {}
        if version not in loaded:
            near = near_names(version, list(loaded)) if known else near_names(skill, list(self._skills))
            raise AdapterNotFound(f"adapter {skill[:128]!r} version {version[:32]!r} is not loaded; {near}", skill=skill[:128])
        return loaded[version]

    def versions(self) -> dict[str, list[str]]:
        """Versions in memory by skill, newest first."""
        return {skill: [str(number) for number in known.made] for skill, known in sorted(self._skills.items())}

    def keep(self, wanted: Mapping[str, Iterable[str]]) -> None:
        """From the next look on these versions are in memory too, beside the newest of each skill."""
        self._wanted = {skill: frozenset(int(one) for one in versions if one.isdigit()) for skill, versions in wanted.items()}

    def stands(self) -> dict[str, list[Stand]]:
        """What the students in memory stand on, by skill, the newest student first."""
        return {skill: [stand_of(made) for made in known.made.values()] for skill, known in self._skills.items()}

    def refresh(self) -> None:
        """One look at the disk: loads what is new, forgets what is gone. Blocks; raises nothing for broken versions."""
        found = {skill: self._numbers(skill) for skill in self._names(self.root)}
        for skill in [skill for skill in self._skills if skill not in found]:
            found[skill] = []
        for skill, numbers in found.items():
            before = self._skills.get(skill) or _Skill()
            after = self._look(skill, numbers, before)
            newest, was = next(iter(after.made), None), next(iter(before.made), None)
            if after.made or after.refused:
                self._skills[skill] = after
            else:
                self._skills.pop(skill, None)
            if newest != was:
                _log.info("adapter changed", extra={"skill": skill, "version": newest, "before": was})
                if self._on_change is not None:
                    self._on_change(skill, None if newest is None else str(newest))

    async def start(self) -> None:
        """Looks once, then every `poll_s` seconds until `stop`."""
        await self._watch.start()

    async def stop(self) -> None:
        """Ends the watch; what is loaded stays."""
        await self._watch.stop()

    def _look(self, skill: str, numbers: list[int], before: _Skill) -> _Skill:
        """The skill's state after a look; `before` is left as it is, for those who read it meanwhile."""
        after, wanted = _Skill(), self._wanted.get(skill, frozenset())
        for number in numbers:
            if len(after.made) >= _KEPT and number not in wanted:
                continue
            made = before.made.get(number)
            if made is not None:  # versions are written once
                after.made[number] = made
                continue
            folder = self.root / skill / str(number)
            try:
                changed = (folder / MANIFEST).stat().st_mtime_ns
            except OSError:
                continue
            if before.refused.get(number) == changed:
                after.refused[number] = changed
                continue
            try:
                after.made[number] = _load(folder, skill, number)
            except UnderstudyError as error:
                after.refused[number] = changed
                _log.error("adapter refused", extra={"skill": skill, "version": number, "reason": error.reason, "error": error.message})
            except Exception:
                after.refused[number] = changed
                _log.exception("adapter refused", extra={"skill": skill, "version": number})
        return after

    def _numbers(self, skill: str) -> list[int]:
        """Version folders, highest first."""
        names = self._names(self.root / skill)
        return sorted((int(n) for n in names if n.isascii() and n.isdigit() and len(n) <= 9 and n[0] != "0"), reverse=True)

    def _names(self, folder: Path) -> list[str]:
        try:
            with os.scandir(folder) as entries:
                return [e.name for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)][:_MAX_SKILLS]
        except OSError:
            return []


def stand_of(made: LinearHead | Reference) -> Stand:
    """What a student stands on."""
    if isinstance(made, Reference):
        target = made.target
        return Stand(target.model, target.version, target.sha256, target.adapter, target.adapter_version)
    base = made.manifest.base
    return Stand(base.name, base.version, base.sha256)


def _load(folder: Path, skill: str, number: int) -> LinearHead | Reference:
    from server.runtime.heads import LinearHead

    made: LinearHead | Reference
    if kind_of(folder) in KINDS:
        made = read_reference(folder)
        named = (made.name, made.version)
    else:
        made = LinearHead.load(folder, base_sha256=None)
        named = (made.manifest.name, made.manifest.version)
    if named != (skill, str(number)):
        message = f"{skill}/{number}: the manifest says {named[0]}/{named[1]}. Publish it under the name that it was written for."
        raise ModelRejected(message, skill=skill)
    return made
