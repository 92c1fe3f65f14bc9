"""Checks a model version's folder before anything is built from it: manifest, names, sizes, hashes, and the insides of each file."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from server.core import Task
from server.errors import InvalidArgument, ManifestInvalid, ModelRejected
from server.runtime.decoder.contract import page_bytes
from server.runtime.manifest import Decoder, FileEntry, Manifest
from server.runtime.onnx_scan import scan_onnx

MANIFEST = "manifest.json"
MODEL = "model.onnx"
TOKENIZER = "tokenizer.json"
# Everything that a version may hold; ONNX keeps the data of large models in files of the last two kinds.
SUFFIXES = (".onnx", ".safetensors", ".json", ".txt", ".jinja", ".onnx_data", ".onnx.data")
MAX_FILES = 64
_MAX_MANIFEST = 1 << 20
_MAX_JSON = 128 << 20
MAX_TEMPLATE = 256 << 10
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_VERSION = re.compile(r"[0-9]{1,9}")
RESERVED = frozenset({"adapters"})  # a folder of the repository's root that is no model


def check_name(name: str, *, field: str = "name") -> str:
    """`name` itself if it can be a model's; nothing else may become part of a path.

    Raises:
        InvalidArgument: any other text, with `field`.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = repr(name[:64]) + ("..." if len(name) > 64 else "") if isinstance(name, str) else repr(type(name).__name__)
        raise InvalidArgument(
            f"{field}: {shown} is no model name. Names have 1 to 128 of a-z, 0-9, '.', '_' and '-', and begin with a letter or digit.",
            field=field,
            limit=128,
        )
    if name in RESERVED:
        raise InvalidArgument(f"{field}: {name!r} is the folder of the adapters and no model. Choose another name.", field=field)
    return name


def check_version(version: str, *, field: str = "version") -> str:
    """`version` without leading zeros, if it is a number of 1 to 9 digits above 0; raises InvalidArgument with `field` otherwise."""
    if not isinstance(version, str) or not _VERSION.fullmatch(version) or int(version) == 0:
        shown = repr(version[:32]) if isinstance(version, str) else repr(type(version).__name__)
        raise InvalidArgument(f'{field}: {shown} is no version. Versions are whole numbers from 1, e.g. "3".', field=field)
    return str(int(version))


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content, read in pieces."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def entry_of(path: Path) -> FileEntry:
    """The manifest's entry of a file."""
    return FileEntry(sha256=sha256_of(path), size=path.stat().st_size)


def parse_manifest(text: bytes, where: str) -> Manifest:
    """The manifest in `text`; `where` names it in errors.

    Raises:
        ManifestInvalid: too large, no JSON, a missing or unknown key (with the nearest known one), a wrong type, or parts that contradict.
    """
    mend = "Mend the file, or pull or add the model again."
    if len(text) > _MAX_MANIFEST:
        raise ManifestInvalid(f"{where} has {len(text)} bytes; a manifest has at most {_MAX_MANIFEST}. {mend}", limit=_MAX_MANIFEST)
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ManifestInvalid(f"{where}: {_explain(first)} {mend}", key=_path(first["loc"])) from None
    except (RecursionError, ValueError) as error:
        raise ManifestInvalid(f"{where} is no manifest: {str(error)[:200]}. {mend}") from None
    _check_meaning(manifest, where)
    return manifest


def _path(parts: Iterable[object]) -> str:
    return ".".join(str(part)[:80] for part in parts)[:200]


def _explain(error: Any) -> str:
    where = _path(error["loc"])
    if error["type"] == "extra_forbidden":
        known = sorted(Manifest.model_fields) if len(error["loc"]) == 1 else []
        near = get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "remove it, or upgrade if a newer release wrote it."
        return f"the key {where!r} is unknown; {hint}"
    if error["type"] == "missing":
        return f"the key {where!r} is missing."
    return f"{where + ': ' if where else ''}{str(error['msg'])[:300]}."


def _check_meaning(manifest: Manifest, where: str) -> None:
    def wrong(key: str, what: str) -> ManifestInvalid:
        return ManifestInvalid(f"{where}: {what}", key=key)

    files = manifest.files
    if len(files) > MAX_FILES:
        raise wrong("files", f"it lists {len(files)} files; at most {MAX_FILES} are taken.")
    if MANIFEST in files:
        raise wrong("files", f"it lists {MANIFEST} itself, whose hash it cannot know. Remove the entry.")
    for name in files:
        if not name.endswith(SUFFIXES):
            kinds = ", ".join(SUFFIXES)
            raise wrong("files", f"it lists {name!r}; only {kinds} files are read. Convert it, e.g. pickled weights to safetensors.")
    if (manifest.form == "seq2seq") != (manifest.seq2seq is not None):
        raise wrong("seq2seq", "form 'seq2seq' and the part 'seq2seq' belong together; one is there without the other.")
    for graph in (manifest.seq2seq.encoder, manifest.seq2seq.decoder) if manifest.seq2seq is not None else (MODEL,):
        if graph not in files:
            raise wrong("files", f"it lists no {graph}, the graph that is served. Add it with its SHA-256 and size.")
    if (manifest.form == "decoder") != (manifest.decoder is not None):
        raise wrong("decoder", "form 'decoder' and the part 'decoder' belong together; one is there without the other.")
    if manifest.decoder is not None:
        _check_decoder(manifest.decoder, set(files), wrong)
    if (manifest.form == "tensor") != (manifest.task is Task.TENSOR):
        raise wrong("form", f"form {manifest.form!r} and task {manifest.task.value!r} contradict; raw models have 'tensor' in both.")
    if manifest.form != "tensor":
        if TOKENIZER not in files:
            raise wrong("files", f"it lists no {TOKENIZER}, which a model of text needs.")
        if manifest.task in (Task.TEXT_CLASSIFICATION, Task.TOKEN_CLASSIFICATION, Task.ZERO_SHOT_CLASSIFICATION) and not manifest.labels:
            raise wrong("labels", f"it names no labels, which {manifest.task.value} needs.")
        if manifest.task is Task.FEATURE_EXTRACTION and (manifest.hidden_size == 0 or manifest.pooling == "none"):
            raise wrong("pooling", "it gives no hidden_size or no pooling, which feature-extraction needs.")
    if len(set(manifest.labels)) != len(manifest.labels):
        raise wrong("labels", "a label occurs twice.")
    if any(not 0 < size <= manifest.hidden_size for size in manifest.dimensions):
        raise wrong("dimensions", f"each of its dimensions must be from 1 to hidden_size, {manifest.hidden_size}.")


def _check_decoder(decoder: Decoder, files: set[str], wrong: Callable[[str, str], ManifestInvalid]) -> None:
    """The engine lays out pages and adapters by these numbers, and the kernels trust it to."""
    if missing := sorted(set(decoder.graphs.values()) - files):
        raise wrong("decoder.graphs", f"it names {missing[0]!r}, which is not among its files.")
    if MODEL not in decoder.graphs.values():
        raise wrong("decoder.graphs", f"none of its forms is {MODEL}.")
    if set(decoder.graphs) <= {"cuda"} or decoder.kv_dtype == "float16":
        raise wrong("decoder.graphs", "a form for CUDA cannot be the only one; one for processors, with its type of pages, must be there.")
    expected = page_bytes(decoder.kv_heads, decoder.head_dim, decoder.kv_dtype, decoder.page)
    if decoder.page_bytes != expected or decoder.heads % decoder.kv_heads:
        raise wrong("decoder.page_bytes", f"pages of {decoder.page_bytes} bytes do not fit its heads and type; {expected} do.")
    for token in [*decoder.stop_token_ids, *([] if decoder.bos_token_id is None else [decoder.bos_token_id])]:
        if not 0 <= token < decoder.vocabulary:
            raise wrong("decoder.stop_token_ids", f"token {token} is outside of its vocabulary of {decoder.vocabulary}.")
    targets = decoder.lora.targets if decoder.lora is not None else []
    width = decoder.lora.width if decoder.lora is not None else 0
    if sorted(target.index for target in targets) != list(range(len(targets))) or any(
        max(target.a + target.inputs, target.b + target.outputs) > width for target in targets
    ):
        raise wrong("decoder.lora", "its targets do not lie within the width, or are not numbered 0, 1, 2, ...")


def read_manifest(folder: Path) -> Manifest:
    """Manifest of a version's folder, without a look at the other files. Raises ManifestInvalid."""
    path = folder / MANIFEST
    where = f"{folder.parent.name}/{folder.name}/{MANIFEST}"
    try:
        mode = path.lstat()
        if not stat.S_ISREG(mode.st_mode):
            raise ManifestInvalid(f"{where} is no regular file. Replace it by the file itself.")
        with path.open("rb") as handle:
            return parse_manifest(handle.read(_MAX_MANIFEST + 1), where)
    except FileNotFoundError:
        raise ManifestInvalid(f"{where} does not exist. Add the folder with `understudy models add`, which writes it.") from None
    except OSError as error:
        raise ManifestInvalid(f"{where} cannot be read: {error.strerror}.") from error


def check_files(folder: Path, manifest: Manifest) -> None:
    """Every listed file is there, regular, of its size and hash, and nothing else is; then each file's insides are checked.

    Raises:
        ModelRejected: with `file`.
    """
    mend = "Pull or add the model again; the files were altered or copied incompletely."
    present = _present(folder)
    for extra in sorted(present - manifest.files.keys() - {MANIFEST}):
        message = f"{folder.name}/{extra[:128]} is not in the manifest. Remove it, or add the folder as a new version."
        raise ModelRejected(message, file=extra[:128])
    for name, entry in manifest.files.items():
        if name not in present:
            raise ModelRejected(f"{name} is in the manifest and not in the folder. {mend}", file=name)
        size = (folder / name).stat().st_size
        if size != entry.size:
            raise ModelRejected(f"{name} has {size} bytes and the manifest says {entry.size}. {mend}", file=name)
    for name, entry in manifest.files.items():
        digest = sha256_of(folder / name)
        if digest != entry.sha256:
            raise ModelRejected(f"{name} has the SHA-256 {digest} and the manifest says {entry.sha256}. {mend}", file=name)
    check_insides(folder, manifest.files)


def _present(folder: Path) -> set[str]:
    """Names in the folder; raises ModelRejected for links, subfolders, pipes and devices."""
    names: set[str] = set()
    for path in folder.iterdir():
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "no regular file"
            raise ModelRejected(
                f"{folder.name}/{path.name[:128]} is {kind}; a version holds plain files only. Replace it by the file itself.",
                file=path.name[:128],
            )
        names.add(path.name)
        if len(names) > MAX_FILES + 1:
            raise ModelRejected(f"{folder.name} holds more than {MAX_FILES} files. Keep the ones that the model needs.", limit=MAX_FILES)
    return names


def check_insides(folder: Path, names: Iterable[str]) -> None:
    """Looks into ONNX, safetensors and JSON files; raises ModelRejected with `file` for what is broken or hostile."""
    names = set(names)
    external: set[str] = set()
    for name in sorted(names):
        if name.endswith(".onnx"):
            external |= scan_onnx(folder / name).external
        elif name.endswith(".safetensors"):
            check_safetensors(folder / name)
        elif name.endswith(".json"):
            read_json(folder / name)
        elif name.endswith(".jinja"):
            _check_template(folder / name)
    for name in sorted(external - names):
        raise ModelRejected(f"the graph takes data from {name!r}, which the manifest does not list. Add the folder again.", file=name)


def _check_template(path: Path) -> None:
    size = path.stat().st_size
    if size > MAX_TEMPLATE:
        raise ModelRejected(f"{path.name} has {size} bytes; chat templates have at most {MAX_TEMPLATE}.", file=path.name)
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ModelRejected(f"{path.name} is not UTF-8 text. Pull the model again.", file=path.name) from None


def read_json(path: Path, limit: int = _MAX_JSON) -> Any:
    """Content of a JSON file of at most `limit` bytes; raises ModelRejected."""
    size = path.stat().st_size
    if size > limit:
        raise ModelRejected(f"{path.name} has {size} bytes; at most {limit} are read.", file=path.name, limit=limit)
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ModelRejected(f"{path.name} is nested too deeply to be a model's file. Pull the model again.", file=path.name) from None
    except ValueError as error:  # bad JSON and bad UTF-8
        raise ModelRejected(f"{path.name} is no JSON: {str(error)[:200]}. Pull the model again.", file=path.name) from None


def check_safetensors(path: Path) -> None:
    """Raises ModelRejected unless the header is sound: sizes, offsets without gaps or overlaps, known types."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as tensors:  # reads the header and maps the rest
            tensors.keys()
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelRejected(
            f"{path.name} is no sound safetensors file: {str(error)[:200]}. Save or pull it again; pickled weights are never read.",
            file=path.name,
        ) from None


def check_tokenizer(path: Path) -> None:
    """Raises ModelRejected unless the `tokenizers` library takes the file."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except BaseException as error:  # a panic of the Rust code is a BaseException of its own
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise ModelRejected(
            f"{path.name} is no tokenizer: {str(error)[:200]}. Save it with `tokenizers` 0.22 or newer, or pull the model again.",
            file=path.name,
        ) from None
