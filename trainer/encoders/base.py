"""A skill's base as torch sees it: its tokens by the tokenizer that serves, heads, LoRA, and the folder that is exported."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.errors import FailedPrecondition
from trainer.classify.source import Source
from trainer.encoders.examples import ENTITIES, RANKING

LORA_RANK, LORA_ALPHA, LORA_DROPOUT = 16, 32, 0.05
# Training costs grow with the longest text of a batch; what lies behind this many tokens of a long one teaches little.
MOST_TOKENS = 256


class Tokens:
    """A base's tokenizer, the very file that the server has; texts and pairs are cut at `limit` tokens."""

    def __init__(self, source: Source) -> None:
        import tokenizers

        manifest = source.manifest
        self.limit = min(manifest.max_tokens, MOST_TOKENS)
        self.pooling = source.pooling
        self._inputs = {"input_ids": "ids", "attention_mask": "attention_mask"}
        if manifest.token_types:  # others know no such input, or a single type
            self._inputs["token_type_ids"] = "type_ids"
        self.query_prefix, self.passage_prefix = manifest.query_prefix, manifest.passage_prefix
        self._tokenizer = tokenizers.Tokenizer.from_file(str(source.tokenizer))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self.limit)

    def encode(self, items: Sequence[str | tuple[str, str]]) -> list[Any]:
        """Encodings with ids, type_ids, offsets and special_tokens_mask."""
        return list(self._tokenizer.encode_batch(list(items)))

    def tensors(self, encodings: Sequence[Any], device: str) -> dict[str, Any]:
        """input_ids, attention_mask and, where the model has them, token_type_ids int64[B, L], padded with zeros that the mask hides."""
        import torch

        longest = max(len(one.ids) for one in encodings)
        batch = {name: torch.zeros(len(encodings), longest, dtype=torch.int64) for name in self._inputs}
        for place, one in enumerate(encodings):
            for name, attribute in self._inputs.items():
                batch[name][place, : len(one.ids)] = torch.tensor(getattr(one, attribute), dtype=torch.int64)
        return {name: tensor.to(device) for name, tensor in batch.items()}


def load_model(source: Source, task: str, labels: Sequence[str], seed: int) -> Any:
    """A torch model of the base with the head of the task, fresh where the base has none; the same for the same seed.

    `labels`: of each token for token-classification. Raises FailedPrecondition where transformers cannot read the base.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    kind: Any = transformers.AutoModel
    more: dict[str, Any] = {}
    if task == ENTITIES:
        kind = transformers.AutoModelForTokenClassification
        more = {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}
    elif task == RANKING:
        kind = transformers.AutoModelForSequenceClassification
        more = {"num_labels": 1}
    try:
        return kind.from_pretrained(str(source.folder), local_files_only=True, use_safetensors=True, dtype=torch.float32, **more)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        message = f"The base {source.base!r} cannot be loaded for {task}: {str(error)[:300]}. Take another base."
        raise FailedPrecondition(message, model=source.base) from error


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


def save_folder(model: Any, source: Source, folder: Path) -> None:
    """Writes config.json, model.safetensors and tokenizer.json of a merged model, from which the server's own writers make a graph."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_pretrained(str(folder), safe_serialization=True)
    shutil.copyfile(source.tokenizer, folder / "tokenizer.json")
