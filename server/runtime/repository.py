"""The model repository: a folder `<model>/<version>/{model.onnx, tokenizer.json, manifest.json}` whose versions are written once.

Writers may be many processes (pull, the trainer, operators): a version appears by one rename, complete and on the disk, or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.errors import InvalidArgument, ManifestInvalid, ModelNotFound, ModelRejected, VersionNotFound, near_names
from server.runtime.manifest import FileEntry, Manifest
from server.runtime.verify import (
    MANIFEST,
    MODEL,
    SUFFIXES,
    TOKENIZER,
    check_files,
    check_insides,
    check_name,
    check_tokenizer,
    check_version,
    entry_of,
    parse_manifest,
    read_manifest,
)

_MARK = ".highest"  # the highest version that a model ever had: numbers are not used twice
_STALE_S = 24 * 3600.0  # a staging folder of this age belongs to a writer that died


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A version that was verified. `folder` is absolute; `paths` maps each name of the manifest to its file."""

    manifest: Manifest
    folder: Path
    paths: Mapping[str, Path]

    @property
    def model(self) -> Path:
        """The graph."""
        return self.paths[MODEL]

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer, or None for raw models."""
        return self.paths.get(TOKENIZER)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.manifest.files.values())


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A version as listed: its manifest, unverified, or why that could not be read."""

    name: str
    version: str
    manifest: Manifest | None
    error: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files, by the manifest."""
        return sum(entry.size for entry in self.manifest.files.values()) if self.manifest else 0


class Repository:
    """Versions of models under `root`. Every method touches the disk and may block: call it from a thread where that matters.

    Safe to use from several threads and processes at once.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    # Reading.

    def names(self) -> list[str]:
        """Models with at least one version, sorted."""
        return [name for name in self._folders(self.root) if _is_name(name) and self._numbers(name)]

    def entries(self) -> list[ModelEntry]:
        """Every version of every model, by name, then ascending version. Reads manifests and verifies nothing."""
        entries = []
        for name in self.names():
            for version in self.versions(name):
                try:
                    entries.append(ModelEntry(name, version, self.manifest(name, version)))
                except ModelRejected as error:
                    entries.append(ModelEntry(name, version, None, error.message))
                except VersionNotFound:  # removed meanwhile
                    continue
        return entries

    def exists(self, name: str) -> bool:
        """Whether the model has a version."""
        return bool(self._numbers(check_name(name)))

    def versions(self, name: str) -> list[str]:
        """Versions of a model, ascending; raises ModelNotFound with the near names."""
        numbers = self._numbers(check_name(name))
        if not numbers:
            raise ModelNotFound(
                f"model {name!r} is not in the repository; {near_names(name, self.names())} Add it with `understudy models pull` or `add`.",
                model=name,
            )
        return [str(number) for number in numbers]

    def latest(self, name: str) -> str:
        """The highest version of a model; raises ModelNotFound."""
        return self.versions(name)[-1]

    def manifest(self, name: str, version: str | None = None) -> Manifest:
        """The manifest alone, unverified. Raises ModelNotFound, VersionNotFound, ManifestInvalid."""
        return self._manifest(*self._locate(name, version))

    def open(self, name: str, version: str | None = None) -> ModelFiles:
        """A version whose files were all verified: names, sizes, SHA-256, insides. `None` is the latest.

        Raises:
            ModelNotFound, VersionNotFound: with the ones that exist.
            ModelRejected, ManifestInvalid: broken, altered or hostile files.
        """
        name, version, folder = self._locate(name, version)
        manifest = self._manifest(name, version, folder)
        check_files(folder, manifest)
        return ModelFiles(manifest, folder, {file: folder / file for file in manifest.files})

    def verify(self, name: str, version: str | None = None) -> ModelFiles:
        """As `open`, and the tokenizer is parsed too."""
        files = self.open(name, version)
        if files.tokenizer is not None:
            check_tokenizer(files.tokenizer)
        return files

    # Writing.

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty folder on the repository's file system, to write a version in; what is left of it is removed afterwards."""
        self._make_root()
        folder = Path(tempfile.mkdtemp(prefix=".staging-", dir=self.root))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, folder: Path, name: str, fields: Mapping[str, Any]) -> ModelFiles:
        """Turns a folder from `staging` into the next version of `name`; the folder is moved, and not written again.

        `fields` are the manifest's but `name`, `version`, `files` and `created`, which are set here.

        Raises:
            ManifestInvalid: the fields contradict, or have wrong types.
            ModelRejected: a file that no version may hold.
        """
        check_name(name)
        folder.chmod(0o755)
        (folder / MANIFEST).unlink(missing_ok=True)
        files = _entries(folder)
        check_insides(folder, files)
        if TOKENIZER in files:
            check_tokenizer(folder / TOKENIZER)
        for path in folder.iterdir():
            _settle(path)
        parent = self.root / name
        parent.mkdir(exist_ok=True)
        number = max([*self._numbers(name), self._mark(name)], default=0)
        while True:
            number += 1
            manifest = _manifest_of(name, str(number), files, fields)
            (folder / MANIFEST).unlink(missing_ok=True)
            (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
            _settle(folder / MANIFEST)
            _sync(folder)
            target = parent / str(number)
            if target.exists():  # another writer was faster, or something that is no version has the number
                continue
            try:
                folder.rename(target)
            except OSError:
                if not target.exists():
                    raise
                continue
            _sync(parent)
            return ModelFiles(manifest, target, {file: target / file for file in files})

    def add(self, folder: Path, name: str | None = None, *, fields: Mapping[str, Any] | None = None) -> ModelFiles:
        """Copies a folder in as a new version, the next number after the highest; `folder` stays as it is.

        A folder with a manifest is verified against it first, and keeps its fields (`fields` win over them) but its version.

        Raises:
            ManifestInvalid, ModelRejected: what is wrong with the folder.
            InvalidArgument: no folder, or no name.
        """
        if not folder.is_dir():
            raise InvalidArgument(f"{folder} is not a folder. Give the folder that holds {MODEL}.", field="folder")
        merged: dict[str, Any] = {}
        if (folder / MANIFEST).is_file():
            manifest = parse_manifest((folder / MANIFEST).read_bytes(), f"{folder.name}/{MANIFEST}")
            check_files(folder, manifest)
            merged = manifest.model_dump(exclude={"name", "version", "files", "created"})
            name = name or manifest.name
        elif fields is None:
            raise ManifestInvalid(f"{folder} has no {MANIFEST} and nothing says what the model does. Write one, or give at least a task.")
        merged |= fields or {}
        if name is None:
            raise InvalidArgument("the folder's manifest gives no name. Give one.", field="name")
        check_name(name)
        _entries(folder)
        with self.staging() as staged:
            for path in folder.iterdir():
                if path.name != MANIFEST:
                    shutil.copyfile(path, staged / path.name, follow_symlinks=False)
            return self.publish(staged, name, merged)

    def remove(self, name: str, version: str | None = None) -> list[str]:
        """Deletes a version, or all of a model; returns the versions deleted. Readers see it whole or gone.

        Whether it is loaded is the Runtime's to know. Raises ModelNotFound, VersionNotFound.
        """
        versions = self.versions(name) if version is None else [self._locate(name, version)[1]]
        highest = max(*self._numbers(name), self._mark(name), 0)
        (self.root / name / _MARK).write_text(str(highest), encoding="ascii")
        for number in versions:
            with self.staging() as bin_folder, suppress(FileNotFoundError):
                (self.root / name / number).rename(bin_folder / number)
        _sync(self.root / name)
        return versions

    # Inside.

    def _locate(self, name: str, version: str | None) -> tuple[str, str, Path]:
        known = self.versions(name)
        if version is None:
            version = known[-1]
        elif check_version(version) not in known:
            raise VersionNotFound(
                f"model {name!r} has no version {version}; {near_names(version, known)}",
                model=name,
                version=version,
                versions=",".join(known[-20:]),
            )
        version = str(int(version))
        return name, version, self.root / name / version

    def _manifest(self, name: str, version: str, folder: Path) -> Manifest:
        manifest = read_manifest(folder)
        for key, wanted, got in (("name", name, manifest.name), ("version", version, manifest.version)):
            if got != wanted:
                raise ManifestInvalid(
                    f"{name}/{version}/{MANIFEST}: its {key} is {got!r}, its folder says {wanted!r}. Add it with `understudy models add`.",
                    key=key,
                )
        return manifest

    def _make_root(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for path in self.root.glob(".staging-*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_S:
                    shutil.rmtree(path, ignore_errors=True)

    def _folders(self, parent: Path) -> Iterator[str]:
        """Names of real folders (no links) that are not hidden, sorted."""
        try:
            with os.scandir(parent) as entries:
                found = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError):
            found = []
        return iter(sorted(found))

    def _numbers(self, name: str) -> list[int]:
        """Versions that are there, ascending: folders named by a number without leading zeros that hold a manifest."""
        parent = self.root / name
        numbers = [int(v) for v in self._folders(parent) if v.isascii() and v.isdigit() and len(v) <= 9 and v[0] != "0"]
        return sorted(number for number in numbers if (parent / str(number) / MANIFEST).is_file())

    def _mark(self, name: str) -> int:
        try:
            return int((self.root / name / _MARK).read_text(encoding="ascii")[:9])
        except (OSError, ValueError):
            return 0


def _is_name(name: str) -> bool:
    try:
        check_name(name)
    except InvalidArgument:
        return False
    return True


def _entries(folder: Path) -> dict[str, FileEntry]:
    """Hashes of a folder's files; raises ModelRejected for anything but plain files of the known kinds."""
    entries: dict[str, FileEntry] = {}
    for path in sorted(folder.iterdir()):
        if path.name == MANIFEST:
            continue
        if not stat.S_ISREG(path.lstat().st_mode) or not path.name.endswith(SUFFIXES):
            raise ModelRejected(
                f"{path.name[:128]} cannot be part of a version: only plain {', '.join(SUFFIXES)} files are read. Remove or convert it.",
                file=path.name[:128],
            )
        entries[path.name] = entry_of(path)
    return entries


def _manifest_of(name: str, version: str, files: Mapping[str, FileEntry], fields: Mapping[str, Any]) -> Manifest:
    created = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    content = {**fields, "name": name, "version": version, "files": files, "created": created}
    try:
        text = json.dumps(content, default=lambda part: part.model_dump(mode="json"))
    except (ValueError, TypeError, AttributeError) as error:
        raise ManifestInvalid(f"the manifest of {name} cannot be written: {str(error)[:200]}") from None
    return parse_manifest(text.encode(), f"{name}/{version}/{MANIFEST}")  # what was written is what will be read


def _settle(path: Path) -> None:
    """Makes a file read-only and waits until the disk has it."""
    path.chmod(0o444)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
