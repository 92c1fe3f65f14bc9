"""What pull does for text-generation models: which checkpoints are taken, and the forms that are made of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from server.errors import InvalidArgument, ModelRejected, near_names
from server.runtime.describe import Description
from server.runtime.verify import TOKENIZER

_HOW = "save it with transformers (save_pretrained with safe_serialization=True), then pull that folder"


class Origin(Protocol):
    """Of pull's origins, what is needed here."""

    folder: Path
    kind: str


@dataclass(frozen=True, slots=True)
class DecoderBuild:
    """`dtype` "float32", or "int8" for int8 and int4 over the same pages; see graphs/decoder/build.py for the others."""

    dtype: str
    effort: Literal["fast", "normal", "best"]
    calibration: list[str] | None
    progress: Callable[[str, float], None]


def check_decoder(files: Mapping[str, Any], description: Description, graph: str) -> None:
    """Raises ModelRejected or InvalidArgument, saying what would help, where no graph can be written for the checkpoint."""
    from server.runtime.graphs.decoder.architectures import supported_decoders

    if graph not in ("auto", "own"):
        raise InvalidArgument(f"--graph {graph}: decoders are served by graphs of our own alone. Use auto or own.", field="graph")
    known, kind = supported_decoders(), str(description.config.get("model_type"))[:64]
    if kind not in known:
        raise ModelRejected(
            f"no decoder graph is written for the architecture {kind!r}; {near_names(kind, known)} Pull a model of one of these.",
            field="model_type",
        )
    if not {"model.safetensors", "model.safetensors.index.json"} & set(files):
        raise ModelRejected(f"the model has no model.safetensors; pickled weights are never read: {_HOW}.", file="model.safetensors")
    if TOKENIZER not in files:
        raise ModelRejected(
            f"the model has no {TOKENIZER}. Make one where transformers is installed: AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER).",
            file=TOKENIZER,
        )


def build_text_generator(folder: Path, staged: Path, build: DecoderBuild) -> dict[str, Any]:
    """Writes the graphs of the checkpoint in `folder` to `staged`; the manifest's fields. Errors as build_decoder's."""
    from server.runtime.graphs.decoder.build import build_decoder

    built = build_decoder(
        folder,
        staged,
        forms=["float32"] if build.dtype == "float32" else ["int8", "int4"],
        calibration=build.calibration,
        effort=build.effort,
        progress=build.progress,
    )
    return dict(built.manifest)


def llama2c_files(origin: Origin) -> tuple[Path, Path] | None:
    """(weights, tokenizer) of a local folder that holds a checkpoint of llama2.c and its tokenizer, else None."""
    from server.runtime.graphs.decoder.llama2c import read_sizes

    if origin.kind != "folder":
        return None
    found = sorted(path for path in origin.folder.glob("*.bin") if path.is_file())
    tokenizers = [path for path in found if path.name.startswith("tok")]
    weights = [path for path in found if path not in tokenizers]
    if len(tokenizers) != 1 or len(weights) != 1:
        return None
    try:
        read_sizes(weights[0])
    except ModelRejected:
        return None  # another kind of .bin
    return weights[0], tokenizers[0]


def prepare_llama2c(files: tuple[Path, Path], staged: Path, build: DecoderBuild) -> dict[str, Any]:
    """Writes graphs and tokenizer of a llama2.c checkpoint to `staged`; the manifest's fields."""
    from server.runtime.graphs.decoder.llama2c import convert

    with tempfile.TemporaryDirectory(prefix="understudy-build-") as place:
        folder = Path(place)
        convert(*files, folder)
        (staged / TOKENIZER).write_bytes((folder / TOKENIZER).read_bytes())
        return build_text_generator(folder, staged, build)
