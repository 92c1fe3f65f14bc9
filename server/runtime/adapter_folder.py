"""What the folders of all adapters have in common: read and verified with nothing taken on trust, written at once and only once."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from server.errors import AlreadyExists, ManifestInvalid, ModelRejected
from server.runtime.manifest import FileEntry, Name, Sha256, Version
from server.runtime.verify import sha256_of

MANIFEST = "manifest.json"
WEIGHTS = "adapter.safetensors"
_MAX_MANIFEST = 1 << 20
M = TypeVar("M", bound=BaseModel)


class Base(BaseModel):
    """The model version that an adapter was trained on. `sha256`: of its graph; where that keeps weights beside it, of all of them
    (server/runtime/lora/layout.py).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Name
    version: Version
    sha256: Sha256


def read_manifest(folder: Path, kind: type[M], what: str) -> M:
    """The manifest in `folder`, without a look at the other files; `what` names such an adapter in errors. Raises ManifestInvalid."""
    path = folder / MANIFEST
    again = f"Write the {what} again."
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ManifestInvalid(f"{path} is no regular file. Replace it by the file itself.", file=MANIFEST)
        with path.open("rb") as handle:
            raw = handle.read(_MAX_MANIFEST + 1)
    except OSError as error:
        raise ManifestInvalid(f"{path} cannot be read: {error.strerror}. A {what} has one. {again}", file=MANIFEST) from None
    if len(raw) > _MAX_MANIFEST:
        raise ManifestInvalid(f"{path} has over {_MAX_MANIFEST} bytes; expected a {what}'s manifest.", file=MANIFEST, limit=_MAX_MANIFEST)
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part)[:80] for part in first["loc"])[:200]
        raise ManifestInvalid(f"{path}: {key or 'the file'}: {str(first['msg'])[:300]}. {again}", key=key) from None
    except (RecursionError, ValueError) as error:
        raise ManifestInvalid(f"{path} is no manifest: {str(error)[:200]}. {again}", file=MANIFEST) from None


def verify_files(folder: Path, files: Mapping[str, FileEntry], what: str, *, unread: Collection[str] = ()) -> None:
    """Raises ModelRejected for foreign files, links, and wrong sizes or hashes; those in `unread`, which nobody opens, are not hashed."""
    found = {path.name for path in folder.iterdir()}
    foreign = sorted(found - {*files, MANIFEST})
    if foreign:
        expected = f"{', '.join(sorted(files))} and {MANIFEST}"
        raise ModelRejected(f"{folder} holds {foreign[0][:128]!r}; expected {expected} alone. Remove it.", file=foreign[0][:128])
    again = f"Copy or write the {what} again."
    for name, entry in files.items():
        path = folder / name
        if name not in found or not stat.S_ISREG(path.lstat().st_mode):
            raise ModelRejected(f"{path} is no regular file. {again}", file=name)
        size = path.stat().st_size
        if size != entry.size:
            raise ModelRejected(f"{path} has {size} bytes; the manifest says {entry.size}. {again}", file=name)
        if name in unread:
            continue
        digest = sha256_of(path)
        if digest != entry.sha256:
            raise ModelRejected(f"{path} has SHA-256 {digest}; the manifest says {entry.sha256}. {again}", file=name)


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """`fill` writes the files into a folder beside `folder`, which then appears by one rename: a reader sees all of it or nothing.

    Raises AlreadyExists: versions are written once.
    """
    if folder.exists():
        raise AlreadyExists(f"{folder} is there already; versions are written once. Choose the next version.", version=folder.name)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        fill(part)
        for path in (*part.iterdir(), part):
            sync(path)
        try:
            part.rename(folder)
        except OSError as error:
            raise AlreadyExists(f"{folder} appeared while it was written: {error.strerror}. Choose the next version.") from None
        sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def version_numbers(folder: Path) -> list[int]:
    """Versions under an adapter's folder, highest first: real folders named by a number without leading zeros."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return sorted((int(n) for n in names if n.isascii() and n.isdigit() and len(n) <= 9 and n[0] != "0"), reverse=True)


def sync(path: Path) -> None:
    """Waits until the disk has a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
