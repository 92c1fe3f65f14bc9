"""A skill's base as torch sees it: where its weights are, its tokens by the tokenizer that serves, LoRA, the folder that is exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.config import Config
from server.core import Task
from server.errors import FailedPrecondition, UnderstudyError
from server.runtime.describe import describe, write_tokenizer
from server.runtime.hub import FolderOrigin, cached
from server.runtime.pull import STARTER, starter_origin
from server.runtime.repository import Repository
from server.runtime.verify import TOKENIZER, check_safetensors

WEIGHTS = "model.safetensors"
LORA_RANK, LORA_ALPHA, LORA_DROPOUT = 16, 32, 0.05
# Training costs grow with the longest text of a batch; what lies behind this many tokens of a long one teaches little.
MOST_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Base:
    """`folder`: config.json, safetensors and tokenizer; `name` and `version` of the model in the repository; `license` of its weights."""

    name: str
    version: str
    folder: Path
    license: str = ""


def find_base(config: Config, name: str) -> Base:
    """The torch model of a base: `training.sources.<name>`, else what its manifest says it was made from.

    Raises:
        ModelNotFound: the repository has no such model.
        FailedPrecondition: its torch weights are not on this machine; says where to name them.
    """
    manifest = Repository(Path(config.models.path)).manifest(name)
    named = config.training.sources.get(name, "")
    source = manifest.source
    if named:
        origin = _origin(name, named)
    elif source is not None and source.kind == STARTER:
        origin = starter_origin()
    elif source is not None and source.kind in ("folder", "hub"):
        wanted = f"{source.id}@{source.revision}" if source.kind == "hub" and source.revision else source.id
        origin = _origin(name, wanted)
    else:
        raise _missing(name, "its manifest does not say what it was made from")
    if WEIGHTS not in origin.files and "model.safetensors.index.json" not in origin.files:
        raise _missing(name, f"{origin.folder} holds no {WEIGHTS}")
    for file in origin.files:
        if "/" not in file and file.endswith(".safetensors"):
            path = origin.path(file)
            assert path is not None
            check_safetensors(path)
    return Base(name, manifest.version, origin.folder, manifest.license or origin.license)


def _origin(name: str, source: str) -> FolderOrigin:
    if source == STARTER:
        return starter_origin()
    if Path(source).is_dir():
        return FolderOrigin(Path(source).absolute())
    try:
        return cached(source)
    except UnderstudyError as error:
        raise _missing(name, f"{source[:200]!r} is no folder and not in the Hub's cache ({error.message})") from None


def _missing(name: str, why: str) -> FailedPrecondition:
    message = (
        f"The base {name!r} cannot be trained further: {why}. Name the folder of its safetensors under [training.sources] as {name!r}."
    )
    return FailedPrecondition(message, model=name, field=f"training.sources.{name}")


class Tokens:
    """A base's tokenizer, the very file that the server gets; texts and pairs are cut at `limit` tokens."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        import tokenizers

        read = FolderOrigin(folder).path
        description = describe(read, Task.FEATURE_EXTRACTION)
        scratch.mkdir(parents=True, exist_ok=True)
        write_tokenizer(read, description.config, scratch / TOKENIZER)
        self.limit = min(int(description.fields["max_tokens"]), MOST_TOKENS)
        self.pooling = str(description.fields.get("pooling", "mean"))
        self.query_prefix = str(description.fields.get("query_prefix", ""))
        self.passage_prefix = str(description.fields.get("passage_prefix", ""))
        self._tokenizer = tokenizers.Tokenizer.from_file(str(scratch / TOKENIZER))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self.limit)

    def encode(self, items: Sequence[str | tuple[str, str]]) -> list[Any]:
        """Encodings with ids, type_ids, offsets and special_tokens_mask."""
        return list(self._tokenizer.encode_batch(list(items)))

    def tensors(self, encodings: Sequence[Any], device: str) -> dict[str, Any]:
        """input_ids, attention_mask and token_type_ids int64[B, L], padded with zeros that the mask hides."""
        import torch

        longest = max(len(one.ids) for one in encodings)
        rows = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        batch = {name: torch.zeros(len(encodings), longest, dtype=torch.int64) for name in rows}
        for place, one in enumerate(encodings):
            for name, attribute in rows.items():
                batch[name][place, : len(one.ids)] = torch.tensor(getattr(one, attribute), dtype=torch.int64)
        return {name: tensor.to(device) for name, tensor in batch.items()}


def load_model(base: Base, task: str, labels: Sequence[str], seed: int) -> Any:
    """A torch model of the base with the head of the task, fresh where the base has none; the same for the same seed.

    `labels`: of each token for token-classification. Raises FailedPrecondition where transformers cannot read the base.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    kind: Any = transformers.AutoModel
    more: dict[str, Any] = {}
    if task == "token-classification":
        kind = transformers.AutoModelForTokenClassification
        more = {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}
    elif task == "text-ranking":
        kind = transformers.AutoModelForSequenceClassification
        more = {"num_labels": 1}
    try:
        return kind.from_pretrained(str(base.folder), local_files_only=True, use_safetensors=True, dtype=torch.float32, **more)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        message = f"The base {base.name!r} cannot be loaded for {task}: {str(error)[:300]}. Take another base."
        raise FailedPrecondition(message, model=base.name) from error


def add_lora(model: Any) -> Any:
    """The model with LoRA on the encoder's linear layers; its head, where it has one, is trained whole (Hu et al. 2021)."""
    from peft import LoraConfig, get_peft_model

    inner = model.base_model_prefix
    heads = [name for name, child in model.named_children() if name != inner and any(True for _ in child.parameters())]
    if not hasattr(model, inner):  # a bare encoder: its pooler, if any, has no part in the vectors
        heads = []
    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=LORA_DROPOUT,
        target_modules="all-linear",
        exclude_modules=rf".*(pooler|{'|'.join(heads)}).*" if heads else r".*pooler.*",
        modules_to_save=heads or None,
    )
    return get_peft_model(model, config)


def merged(model: Any) -> Any:
    """The plain model with what LoRA learned added to its weights; a model without LoRA is given back as it is."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def save_folder(model: Any, base: Base, folder: Path) -> None:
    """Writes config.json and model.safetensors of a merged model, and beside them what else the base's folder says of itself."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in base.folder.iterdir():
        if path.is_file() and path.suffix in (".json", ".txt") and "safetensors" not in path.name:
            shutil.copyfile(path, folder / path.name)
        elif path.is_dir() and (path / "config.json").is_file():
            (folder / path.name).mkdir()
            shutil.copyfile(path / "config.json", folder / path.name / "config.json")
    model.save_pretrained(str(folder), safe_serialization=True)


def read_fields(folder: Path) -> dict[str, Any]:
    """config.json of a folder."""
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
