"""The adapters of a base as they lie in the repository, whether or not anything has them loaded."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from server.errors import AdapterNotFound, ModelRejected, near_names
from server.runtime.adapter_folder import version_numbers
from server.runtime.lora.folder import AdapterManifest, read_adapter_manifest
from server.runtime.verify import check_name, check_version

ADAPTERS = "adapters"  # the folder of the model repository that holds them
_MARK = ".highest"  # the highest version that an adapter ever had: numbers are not used twice


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """A version as listed: its manifest, unverified, or why that could not be read."""

    name: str
    version: str
    manifest: AdapterManifest | None
    error: str = ""


def names(root: Path, base: str) -> list[str]:
    """Adapters of a base with at least one version, sorted."""
    folder = root / check_name(base, field="model")
    try:
        found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return []
    return [name for name in found if version_numbers(folder / name)]


def entries(root: Path, base: str) -> list[AdapterEntry]:
    """Every version of every adapter of a base, by name, then ascending version. Reads manifests and verifies nothing."""
    found = []
    for name in names(root, base):
        for number in reversed(version_numbers(root / base / name)):
            try:
                found.append(AdapterEntry(name, str(number), read_adapter_manifest(root / base / name / str(number))))
            except ModelRejected as error:
                found.append(AdapterEntry(name, str(number), None, error.message))
    return found


def locate(root: Path, base: str, name: str, version: str | None = None) -> list[str]:
    """The versions that are meant, ascending; all of them without `version`. Raises InvalidArgument, AdapterNotFound."""
    check_name(name, field="adapter")
    known = [str(number) for number in reversed(version_numbers(root / check_name(base, field="model") / name))]
    if not known:
        message = f"model {base!r} has no adapter {name!r}; {near_names(name, names(root, base))}"
        raise AdapterNotFound(message, adapter=name, model=base)
    if version is None:
        return known
    if check_version(version) not in known:
        message = f"adapter {name!r} of model {base!r} has no version {version}; {near_names(version, known)}"
        raise AdapterNotFound(message, adapter=f"{name}@{version}", model=base)
    return [check_version(version)]


def next_version(root: Path, base: str, name: str) -> str:
    """The number after the highest that an adapter ever had."""
    folder = root / base / name
    return str(max([*version_numbers(folder), _mark(folder)]) + 1)


def remove(root: Path, base: str, name: str, version: str | None = None) -> list[str]:
    """Deletes a version, or all of an adapter; returns the versions deleted.

    A server that has one loaded keeps it until another adapter takes its slot. Raises InvalidArgument, AdapterNotFound.
    """
    versions = locate(root, base, name, version)
    folder = root / base / name
    (folder / _MARK).write_text(str(max([*version_numbers(folder), _mark(folder)])), encoding="ascii")
    for number in versions:
        doomed = Path(tempfile.mkdtemp(prefix=".removed-", dir=root))
        try:
            with suppress(FileNotFoundError):
                (folder / number).rename(doomed / number)
        finally:
            shutil.rmtree(doomed, ignore_errors=True)
    return versions


def _mark(folder: Path) -> int:
    try:
        return int((folder / _MARK).read_text(encoding="ascii")[:9])
    except (OSError, ValueError):
        return 0
