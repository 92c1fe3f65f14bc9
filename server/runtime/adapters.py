"""Adapter versions on the disk, `<root>/<skill>/<version>/`, taken over while the server runs.

The trainer publishes by one rename; the store looks every second, verifies what is new in a thread, and swaps it in between two calls.
A broken version is refused and logged once, and the one before goes on serving.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from server.errors import AdapterNotFound, ModelRejected, UnderstudyError, near_names
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
    """`heads` by version, highest first; `refused`: versions with the time of the manifest that was refused."""

    heads: dict[int, LinearHead] = field(default_factory=dict)
    refused: dict[int, int] = field(default_factory=dict)


class AdapterStore:
    """The heads of every skill. `current` may be called from any thread; `refresh` from one at a time."""

    def __init__(
        self,
        root: Path,
        *,
        base_sha256: Callable[[str], str | None] | None = None,
        poll_s: float = 1.0,
        on_change: Callable[[str, str | None], None] | None = None,
    ) -> None:
        """`base_sha256` gives the SHA-256 of the model.onnx that answers to a base's name now, None if none does; without it all fit.

        `on_change(skill, version or None)` is called, on the thread that refreshes, after the newest version of a skill changed.
        """
        self.root = root
        self._base_sha256 = base_sha256
        self._on_change = on_change
        self._skills: dict[str, _Skill] = {}
        self._watch = Watch(self.refresh, poll_s, "adapters")

    def current(self, skill: str) -> LinearHead | None:
        """The newest good version that fits the base that is loaded, or None."""
        known = self._skills.get(skill)
        if known is None:
            return None
        for head in known.heads.values():
            base = head.manifest.base
            if self._base_sha256 is None or self._base_sha256(base.name) == base.sha256:
                return head
        return None

    def get(self, skill: str, version: str) -> LinearHead:
        """A version that is in memory; raises AdapterNotFound with those that are."""
        known = self._skills.get(skill)
        loaded = {str(number): head for number, head in known.heads.items()} if known else {}
        if version not in loaded:
            near = near_names(version, list(loaded)) if known else near_names(skill, list(self._skills))
            raise AdapterNotFound(f"adapter {skill[:128]!r} version {version[:32]!r} is not loaded; {near}", skill=skill[:128])
        return loaded[version]

    def versions(self) -> dict[str, list[str]]:
        """Versions in memory by skill, newest first."""
        return {skill: [str(number) for number in known.heads] for skill, known in sorted(self._skills.items())}

    def refresh(self) -> None:
        """One look at the disk: loads what is new, forgets what is gone. Blocks; raises nothing for broken versions."""
        found = {skill: self._numbers(skill) for skill in self._names(self.root)}
        for skill in [skill for skill in self._skills if skill not in found]:
            found[skill] = []
        for skill, numbers in found.items():
            before = self._skills.get(skill) or _Skill()
            after = self._look(skill, numbers, before)
            newest, was = next(iter(after.heads), None), next(iter(before.heads), None)
            if after.heads or after.refused:
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
        after = _Skill()
        for number in numbers:
            if len(after.heads) == _KEPT:
                break
            head = before.heads.get(number)
            if head is not None:  # versions are written once
                after.heads[number] = head
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
                after.heads[number] = _load(folder, skill, number)
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


def _load(folder: Path, skill: str, number: int) -> LinearHead:
    from server.runtime.heads import LinearHead

    head = LinearHead.load(folder, base_sha256=None)
    manifest = head.manifest
    if (manifest.name, manifest.version) != (skill, str(number)):
        raise ModelRejected(
            f"{skill}/{number}: the manifest says {manifest.name}/{manifest.version}. Publish it under the name that it was written for.",
            skill=skill,
        )
    return head
