"""The torch model behind a base of the repository: training needs the weights that its ONNX graph was made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from server.config import Config
from server.errors import FailedPrecondition, UnderstudyError
from server.runtime.manifest import Manifest
from server.runtime.repository import Repository

CONFIG, WEIGHTS = "config.json", ("model.safetensors", "model.safetensors.index.json")


@dataclass(slots=True, frozen=True)
class Source:
    """`folder` holds config.json and safetensors; `tokenizer` is the served base's own file; `manifest`, what the repository says of it."""

    base: str
    folder: Path
    tokenizer: Path
    manifest: Manifest

    @property
    def pooling(self) -> str:
        """How tokens become one vector: as the server does it."""
        return self.manifest.pooling if self.manifest.pooling != "none" else "mean"


def find_source(config: Config, base: str) -> Source:
    """Where the torch weights of `base` lie: `training.sources`, else what the manifest says it was made of.

    Raises:
        FailedPrecondition: they are not at hand; says what to set.
        ModelNotFound: the repository has no such base.
    """
    files = Repository(Path(config.models.path)).open(base)
    if files.tokenizer is None:
        raise FailedPrecondition(f"The base {base!r} has no tokenizer, so its encoder cannot be trained. Train a linear head.", base=base)
    named = config.training.sources.get(base, "")
    folder, why = _folder(named, files.manifest)
    if folder is None:
        raise FailedPrecondition(
            f"The torch weights of the base {base!r} are not at hand ({why}), and its ONNX graph cannot be trained. Set "
            f"training.sources.{base} to a folder with {CONFIG} and {WEIGHTS[0]}, or to the Hub id of the model.",
            base=base,
        )
    return Source(base, folder, files.tokenizer, files.manifest)


def _folder(named: str, manifest: Manifest) -> tuple[Path | None, str]:
    """The folder, or None and the reason."""
    from server.runtime.pull import starter_origin

    if named:
        return _at(named)
    source = manifest.source
    kind, id, revision = (source.kind, source.id, source.revision) if source is not None else ("", "", "")
    if kind == "starter":
        try:
            return starter_origin().folder, ""
        except UnderstudyError as error:
            return None, error.message.rstrip(".")
    if kind in ("folder", "hub", "cache") and id:
        return _at(id, revision)
    return None, "its manifest does not say what it was made of"


def _at(named: str, revision: str = "") -> tuple[Path | None, str]:
    folder = Path(named).expanduser()
    if folder.is_dir():
        return (folder, "") if _has_weights(folder) else (None, f"{named} has no {CONFIG} or no {WEIGHTS[0]}")
    from server.runtime.hub import is_hub_id

    if not is_hub_id(named):
        return None, f"{named[:200]} is no folder"
    from huggingface_hub import snapshot_download

    wanted = [CONFIG, "*.safetensors", "*.safetensors.index.json"]
    try:
        found = Path(
            snapshot_download(named.partition("@")[0], revision=named.partition("@")[2] or revision or None, allow_patterns=wanted)
        )
    except Exception as error:  # the client has dozens of classes for "not there"
        return None, f"the Hub does not give {named[:200]}: {type(error).__name__}"
    return (found, "") if _has_weights(found) else (None, f"{named[:200]} has no {WEIGHTS[0]}")


def _has_weights(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in WEIGHTS)
