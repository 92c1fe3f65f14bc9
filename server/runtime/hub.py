"""Files of a model on a Hugging Face hub: listed, filtered, downloaded with resume, and checked against the hub's own hashes.

Listing goes through huggingface_hub; content is streamed here, because that is where progress in bytes, resuming, retries and hashes
must be the same whichever release of that library is installed. Blocks: call it from a thread or a process of its own.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from server.errors import InvalidArgument, ModelNotFound, ModelRejected, PermissionDenied, Unavailable, UnderstudyError

_ID = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]{0,95}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
# Never .bin, .pt, .pkl, .h5, .msgpack or code: only what cannot carry a program.
SAFE_SUFFIXES = (".json", ".safetensors", ".onnx", ".onnx_data", ".onnx.data", ".txt", ".jinja", ".spm", ".model")
_ATTEMPTS = 5
_LONGEST_WAIT_S = 30.0
_CHUNK = 1 << 20


class Progress(Protocol):
    """Who watches a pull. Called from the thread that pulls."""

    def stage(self, name: str, fraction: float, /) -> None:
        """`fraction` in [0, 1] of the stage `name` is done."""

    def bytes(self, file: str, done: int, total: int, /) -> None:
        """Of a download."""

    def note(self, text: str, /) -> None:
        """Something that the person should know."""


class Quiet:
    """Nobody watches."""

    def stage(self, name: str, fraction: float, /) -> None: ...

    def bytes(self, file: str, done: int, total: int, /) -> None: ...

    def note(self, text: str, /) -> None: ...


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """`sha256` of large files; `blob` (git's SHA-1 over a header and the content) of the others. Either may be ""."""

    size: int
    sha256: str = ""
    blob: str = ""


def is_hub_id(source: str) -> bool:
    """Whether `source` looks like `owner/name`, `name`, or either with `@revision`."""
    name, _, revision = source.partition("@")
    return bool(_ID.fullmatch(name)) and ".." not in source and (not revision or bool(_REVISION.fullmatch(revision)))


class HubOrigin:
    """One revision of one model of a hub. Downloads are kept under `folder` until `discard`, so that a second try goes on from there."""

    kind = "hub"

    def __init__(self, source: str, folder: Path, *, endpoint: str | None = None, progress: Progress | None = None) -> None:
        """Asks the hub for the list of files and pins the revision to its commit.

        Raises:
            InvalidArgument: no id. ModelNotFound: no such model or revision. PermissionDenied: gated or private.
            Unavailable: offline, rate-limited or broken down, after some tries.
        """
        if not is_hub_id(source):
            raise InvalidArgument(f"{source[:128]!r} is no id of a hub; ids read 'owner/name' or 'owner/name@revision'.", field="source")
        self.id, _, revision = source.partition("@")
        self._progress = progress or Quiet()
        self._endpoint = endpoint
        info = _patiently(lambda: self._info(revision or None), self._progress)
        self.revision = str(info.sha or "")
        if not re.fullmatch(r"[0-9a-f]{40,64}", self.revision):
            raise Unavailable(f"the hub gave no commit for {self.id}, so that nothing can be pinned. Try again, or another endpoint.")
        card = info.card_data
        license_name = getattr(card, "license", None) if card is not None else None
        self.license = str(license_name or "")[:128]
        self.files: Mapping[str, RemoteFile] = _safe_files(info.siblings or [])
        self.folder = folder / f"{self.id.replace('/', '--')}--{self.revision}"

    def _info(self, revision: str | None) -> Any:
        from huggingface_hub import HfApi

        return HfApi(endpoint=self._endpoint).model_info(self.id, revision=revision, files_metadata=True, timeout=30.0)

    def path(self, name: str) -> Path | None:
        """The file, downloaded if it is not here yet; None where the model has none of that name. Errors as the constructor's."""
        remote = self.files.get(name)
        if remote is None:
            return None
        target = self.folder / name
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            _patiently(lambda: self._download(name, remote, target), self._progress)
        return target

    def discard(self) -> None:
        """Removes the downloads."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _download(self, name: str, remote: RemoteFile, target: Path) -> None:
        import httpx
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        part = target.with_name(target.name + ".part")
        have = part.stat().st_size if part.is_file() else 0
        if have > remote.size:
            part.unlink()
            have = 0
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}  # ranges count the bytes that are stored
        if have:
            headers["Range"] = f"bytes={have}-"
        url = hf_hub_url(self.id, name, revision=self.revision, endpoint=self._endpoint)
        if have < remote.size or not part.is_file():
            with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=30.0) as response:
                response.raise_for_status()
                if have and response.status_code != 206:  # the server does not resume
                    have = 0
                self._receive(response, name, remote, part, have)
        _check(part, name, remote)
        os.replace(part, target)

    def _receive(self, response: Any, name: str, remote: RemoteFile, part: Path, have: int) -> None:
        with part.open("r+b" if have else "wb") as out:
            out.seek(have)
            out.truncate()
            for chunk in response.iter_bytes():  # as it arrives: what a broken connection brought is kept
                have += len(chunk)
                if have > remote.size:
                    break  # the check after this says so
                out.write(chunk)
                self._progress.bytes(name, have, remote.size)


class FolderOrigin:
    """A local folder in a hub's layout."""

    def __init__(self, folder: Path, *, kind: str = "folder", id: str = "", revision: str = "", license: str = "") -> None:
        self.folder, self.kind, self.id = folder, kind, id or folder.name
        self.revision, self.license = revision, license
        self.files: Mapping[str, RemoteFile] = {
            path.relative_to(folder).as_posix(): RemoteFile(path.stat().st_size)
            for path in sorted(folder.glob("*")) + sorted(folder.glob("*/*"))
            if path.is_file() and path.name.endswith(SAFE_SUFFIXES)
        }

    def path(self, name: str) -> Path | None:
        """The file, or None."""
        return self.folder / name if name in self.files else None

    def discard(self) -> None:
        """Nothing: the folder is not ours."""


def cached(source: str) -> FolderOrigin:
    """A model from huggingface_hub's own cache, for when the hub cannot be asked; raises Unavailable where it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, _, revision = source.partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except LocalEntryNotFoundError:
        raise Unavailable(
            f"{name} cannot be pulled: HF_HUB_OFFLINE is set and the model is not in the local cache. Unset it, "
            "or pull a local folder or 'starter'."
        ) from None
    return FolderOrigin(folder, kind="hub", id=name, revision=folder.name)


def _safe_files(siblings: list[Any]) -> dict[str, RemoteFile]:
    """The files that are ever read, by a name that stays in its folder; the hub is not trusted with paths."""
    files: dict[str, RemoteFile] = {}
    for sibling in siblings:
        name = str(sibling.rfilename)
        parts = name.split("/")
        if name.endswith(SAFE_SUFFIXES) and len(parts) <= 3 and all(_PART.fullmatch(part) for part in parts):
            lfs = sibling.lfs
            sha256 = str((lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", "")) or "") if lfs else ""
            size = sibling.size
            if isinstance(size, int) and size >= 0:
                files[name] = RemoteFile(size, sha256, "" if lfs else str(sibling.blob_id or ""))
    return files


def _check(part: Path, name: str, remote: RemoteFile) -> None:
    """Size and hash of a download; what is wrong is deleted, so that the next try starts afresh."""
    size = part.stat().st_size
    if size < remote.size:  # kept, to go on from
        raise ConnectionError(f"{name} ended after {size} of {remote.size} bytes")
    with part.open("rb") as handle:
        if remote.sha256:
            got, wanted = hashlib.file_digest(handle, "sha256").hexdigest(), remote.sha256
        else:
            digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
            for chunk in iter(lambda: handle.read(_CHUNK), b""):
                digest.update(chunk)
            got, wanted = digest.hexdigest(), remote.blob or digest.hexdigest()
    if size > remote.size or got != wanted:
        part.unlink()
        raise ModelRejected(
            f"{name} was downloaded with the hash {got} and {size} bytes; the hub says {wanted} and {remote.size}. "
            "Pull again; if it stays so, something between here and the hub alters files.",
            file=name,
        )


def _patiently(action: Callable[[], Any], progress: Progress) -> Any:
    """Runs `action`, again after a pause where that can help: broken connections, 429 and 5xx. Errors become ours."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return action()
        except UnderstudyError:
            raise
        except Exception as error:
            pause = _pause(error, attempt)
            if pause is None or attempt == _ATTEMPTS:
                _translate(error)
            progress.note(f"{_short(error)}; trying again in {pause:.0f} s ({attempt} of {_ATTEMPTS - 1}).")
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _status(error: Exception) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _short(error: Exception) -> str:
    """One line about an error of any library, without addresses: redirected ones carry signatures."""
    status = _status(error)
    return f"the hub answered {status}" if status else f"the connection failed ({type(error).__name__})"


def _pause(error: Exception, attempt: int) -> float | None:
    """Seconds to wait before another try; None where another try cannot help."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    if status == 429 or status >= 500:
        stated = getattr(error, "response").headers.get("Retry-After", "")  # noqa: B009 (no common type)
        return min(float(stated), _LONGEST_WAIT_S) if stated.isdigit() else min(2.0 ** (attempt - 1), _LONGEST_WAIT_S)
    if isinstance(error, OfflineModeIsEnabled):
        return None
    if status == 0 and _is_broken_connection(error):
        return min(0.25 * 2.0 ** (attempt - 1), _LONGEST_WAIT_S)
    return None


def _is_broken_connection(error: Exception) -> bool:
    """Whether the network is to blame. Releases of huggingface_hub speak through requests, httpx or httpx2, whose errors share no base."""
    packages = ("requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2")
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in packages


def _translate(error: Exception) -> NoReturn:
    from huggingface_hub import errors as hub

    status = _status(error)
    if isinstance(error, hub.OfflineModeIsEnabled):
        raise Unavailable("HF_HUB_OFFLINE is set, so the hub is not asked. Unset it, or pull a local folder or 'starter'.") from None
    if isinstance(error, hub.GatedRepoError) or status == 403:
        raise PermissionDenied(
            "the model is gated or private. Accept its licence on the hub's page, and set HF_TOKEN to a token that may read it."
        ) from None
    if isinstance(error, hub.RevisionNotFoundError):
        raise ModelNotFound("the model has no such revision. Leave '@revision' out, or name a branch, tag or commit.") from None
    if isinstance(error, hub.RepositoryNotFoundError) or status in (401, 404):
        raise ModelNotFound(
            "the hub has no such model, or does not show it to you. Check the id; for a private one set HF_TOKEN."
        ) from None
    if status == 429:
        raise Unavailable(
            "the hub limits how often it may be asked, and said so five times. Wait some minutes, or set HF_TOKEN for a higher limit.",
            retry_after_s=60.0,
        ) from None
    if status or isinstance(error, OSError) or _is_broken_connection(error):
        raise Unavailable(
            f"{_short(error)}, and trying again did not help. What was downloaded is kept: pull again when the network is back, "
            "or pull a local folder or 'starter'."
        ) from None
    raise error
