"""The base of a student that writes: what serves it, and the torch model that its graph was made of."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.config import Config
from server.errors import FailedPrecondition, InvalidArgument, ModelNotFound, near_names
from server.runtime.decoder_source import llama2c_files
from server.runtime.hub import FolderOrigin
from server.runtime.manifest import Manifest
from server.runtime.repository import ModelFiles, Repository
from trainer.classify.source import find_source

BASE = "base"  # in a job's folder: the base's checkpoint, where it had to be converted


@dataclass(slots=True, frozen=True)
class GeneratorBase:
    """`files`: the served version; `folder`: config.json and safetensors of the same weights."""

    files: ModelFiles
    folder: Path

    @property
    def manifest(self) -> Manifest:
        """Of the served version."""
        return self.files.manifest

    @property
    def shown(self) -> str:
        """name@version."""
        return f"{self.manifest.name}@{self.manifest.version}"

    @property
    def exact(self) -> bool:
        """Whether the served graph is float32, so that it computes what torch does."""
        return self.manifest.dtype == "float32"


def open_base(config: Config, skill: str, scratch: Path) -> GeneratorBase:
    """The skill's base. `scratch`: a folder that outlives the job's attempts; converted checkpoints are kept there.

    Raises:
        InvalidArgument: no base, or a model that writes no text by itself; with those that do.
        FailedPrecondition: its torch weights are not at hand; says how to give them. ModelNotFound, ModelRejected: see Repository.
    """
    settings = config.skills[skill]
    repository = Repository(Path(config.models.path))
    named = (settings.student_model or settings.base).partition("/")[0].partition("@")[0]
    where = f"skills.{skill}.{'student_model' if settings.student_model else 'base'}"
    if not named:
        raise InvalidArgument(f"The skill {skill!r} has no base to train. {_decoders(repository, where)}", field=where, skill=skill)
    try:
        files = repository.open(named)
    except ModelNotFound as error:
        raise InvalidArgument(f"{where} is {named!r}: {error.message} {_decoders(repository, where)}", field=where, skill=skill) from error
    if files.manifest.decoder is None:
        message = f"{where} is {named!r}, a model for {files.manifest.task.value}, which writes no text by itself."
        raise InvalidArgument(f"{message} {_decoders(repository, where)}", field=where, skill=skill)
    return GeneratorBase(files, _torch_folder(config, named, scratch))


def load_torch(base: GeneratorBase) -> Any:
    """The torch model in float32 (bfloat16 comes with mixed precision). Never reads a pickle, never runs a model's own code.

    Raises FailedPrecondition where it is not the model that is served.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            base.folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise FailedPrecondition(
            f"The weights in {base.folder} cannot be loaded: {reason}. {_mend(base)}", base=base.manifest.name
        ) from error
    decoder, found = base.manifest.decoder, model.config.get_text_config()
    assert decoder is not None, "looked at by open_base"
    wanted = {
        "layers": (decoder.layers, found.num_hidden_layers),
        "heads": (decoder.heads, found.num_attention_heads),
        "vocabulary": (decoder.vocabulary, found.vocab_size),
        "hidden size": (base.manifest.hidden_size, found.hidden_size),
    }
    for what, (served, torch_has) in wanted.items():
        if served != torch_has:
            message = f"The weights in {base.folder} have {what} {torch_has}; the served base {base.shown} has {served}."
            raise FailedPrecondition(f"{message} {_mend(base)}", base=base.manifest.name)
    return model


def _mend(base: GeneratorBase) -> str:
    return f"Set training.sources.{base.manifest.name} to the folder or Hub id of the very model that was pulled."


def _torch_folder(config: Config, name: str, scratch: Path) -> Path:
    """Raises FailedPrecondition."""
    said = config.training.sources.get(name, "")
    old = llama2c_files(FolderOrigin(Path(said))) if said and Path(said).is_dir() and not (Path(said) / "config.json").is_file() else None
    if old is None:
        return find_source(config, name).folder
    from server.runtime.graphs.decoder.llama2c import convert

    folder = scratch / BASE
    if not (folder / "config.json").is_file():
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch) as place:
            made = Path(place) / "made"
            made.mkdir()
            convert(*old, made)
            made.rename(folder)
    return folder


def _decoders(repository: Repository, where: str) -> str:
    known = [entry.name for entry in repository.entries() if entry.manifest is not None and entry.manifest.decoder is not None]
    if not known:
        return f"Set {where} to a text-generation model; the repository has none: `understudy models pull ID --task text-generation`."
    return f"Set {where} to a text-generation model; {near_names('', sorted(set(known)))}"
