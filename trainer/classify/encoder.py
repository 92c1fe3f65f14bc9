"""The student in torch: the base's encoder, its pooling as the server does it, and a linear layer on vectors of length 1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from server.core import FloatArray, IntArray
from server.errors import FailedPrecondition, InvalidArgument
from trainer.classify.batches import TokenTable
from trainer.classify.recipe import LORA, Recipe
from trainer.classify.source import Source

_EMBED_BATCH = 128
# Names that the layers of encoders have in transformers; the last number in a parameter's name is then its layer.
_LAYERS = (".layer.", ".layers.")


class Student(nn.Module):  # type: ignore[misc]
    """`forward` gives vectors float32[B, H] of length 1; `logits` what the head makes of them."""

    def __init__(self, encoder: nn.Module, head: nn.Linear, pooling: str, scale: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.pooling = pooling
        self.scale = scale

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        elif self.pooling == "last":
            pooled = hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
        else:
            weight = mask[..., None].float()
            pooled = (hidden * weight).sum(1) / weight.sum(1)
        return functional.normalize(pooled, dim=-1)

    def logits(self, vectors: Tensor) -> Tensor:
        """float32[B, labels]."""
        return self.scale * functional.linear(vectors, self.head.weight) + self.head.bias

    def linear(self) -> tuple[FloatArray, FloatArray]:
        """The head as the server has it: weight float32[labels, H] with the scale in it, bias float32[labels]."""
        weight = (self.scale * self.head.weight.detach()).cpu().numpy().astype(np.float32)
        return weight, self.head.bias.detach().cpu().numpy().astype(np.float32)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def embed(self, tokens: TokenTable, rows: IntArray) -> FloatArray:
        """Vectors float32[n, H] of rows of the table, in their order, without dropout and in float32."""
        training = self.training
        self.eval()
        device = next(self.parameters()).device
        out = np.zeros((len(rows), self.head.in_features), np.float32)
        order = np.argsort(tokens.lengths[rows], kind="stable")
        for start in range(0, len(order), _EMBED_BATCH):
            places = order[start : start + _EMBED_BATCH]
            ids, mask = tokens.batch(rows[places])
            out[places] = self(ids.to(device), mask.to(device)).cpu().numpy()
        self.train(training)
        return out


def open_student(source: Source, labels: int, recipe: Recipe) -> Student:
    """The base's encoder with a new head.

    Raises FailedPrecondition: weights that transformers does not read; InvalidArgument: a base that LoRA does not fit.
    """
    from transformers import AutoConfig, AutoModel, logging

    logging.set_verbosity_error()  # it warns of a pooler, which has no part in the vectors
    # What a layer is initialised with where the checkpoint has none (a pooler): the same in every run.
    torch.manual_seed(recipe.seed)
    try:
        config = AutoConfig.from_pretrained(source.folder)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
            if hasattr(config, name):
                setattr(config, name, recipe.dropout)
        more = {"add_pooling_layer": False} if config.model_type in ("bert", "roberta", "xlm-roberta", "mpnet") else {}
        encoder = AutoModel.from_pretrained(source.folder, config=config, use_safetensors=True, **more).float()
    except (OSError, ValueError, KeyError) as error:
        message = f"The weights of {source.base!r} in {source.folder} cannot be read: {str(error)[:300]}. Check training.sources."
        raise FailedPrecondition(message, base=source.base) from error
    for parameter in encoder.get_input_embeddings().parameters():  # most of the parameters, and few rows touch each of them
        parameter.requires_grad = False
    if recipe.method == LORA:
        encoder = _with_lora(encoder, recipe, source.base)
    return Student(encoder, nn.Linear(config.hidden_size, labels), source.pooling, recipe.scale)


def _with_lora(encoder: Any, recipe: Recipe, base: str) -> Any:
    from peft import LoraConfig, get_peft_model

    try:
        settings = LoraConfig(r=recipe.rank, lora_alpha=2 * recipe.rank, lora_dropout=recipe.dropout, target_modules="all-linear")
        return get_peft_model(encoder, settings)
    except ValueError as error:
        raise InvalidArgument(
            f"LoRA does not fit the base {base!r}: {str(error)[:200]}. Allowed: full, linear-head.", field="method"
        ) from error


def start_head(student: Student, vectors: FloatArray, classes: IntArray) -> None:
    """Starts the head at the mean vector of each class, which is already a fair classifier (Snell et al. 2017)."""
    with torch.no_grad():
        student.head.bias.zero_()
        for label in range(student.head.out_features):
            mean = vectors[classes == label].mean(axis=0)
            student.head.weight[label] = torch.from_numpy(mean / max(float(np.linalg.norm(mean)), 1e-6))


def parameter_groups(student: Student, recipe: Recipe) -> list[dict[str, Any]]:
    """AdamW's groups: rates fall from the top layer down; norms and biases are not decayed, the head neither."""
    named = [(name, p) for name, p in student.encoder.named_parameters() if p.requires_grad]
    depths = [_depth(name) for name, _ in named]
    top = max(depths, default=0)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for (_, parameter), depth in zip(named, depths, strict=True):
        groups.setdefault((depth, parameter.ndim > 1), []).append(parameter)
    found: list[dict[str, Any]] = []
    for (depth, decayed), parameters in sorted(groups.items(), key=lambda entry: entry[0]):
        rate = recipe.lr * recipe.decay ** (top - depth)
        found.append({"params": parameters, "lr": rate, "weight_decay": recipe.weight_decay if decayed else 0.0})
    found.append({"params": list(student.head.parameters()), "lr": recipe.head_lr, "weight_decay": 0.0})
    return found


def _depth(name: str) -> int:
    """A parameter's layer; -1 for embeddings."""
    for mark in _LAYERS:
        if mark in name:
            return int(name.split(mark, 1)[1].split(".", 1)[0])
    return -1


def save_encoder(student: Student, source: Source, folder: Path) -> None:
    """A folder as transformers writes it, LoRA merged into the weights, with the base's tokenizer."""
    encoder: Any = student.encoder
    if hasattr(encoder, "merge_and_unload"):
        encoder = student.encoder = encoder.merge_and_unload()
    folder.mkdir(parents=True, exist_ok=True)
    encoder.save_pretrained(folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    original = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
        if name in original:
            config[name] = original[name]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(source.tokenizer, folder / "tokenizer.json")
