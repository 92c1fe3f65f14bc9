"""What one encoder architecture is, as data: how its files name things, and its quirks.

Every architecture here is a post-norm transformer encoder: embeddings + norm, then per layer attention, add + norm, feed-forward, add +
norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from server.core import Task


class HeadKind(StrEnum):
    """What stands on the encoder, and how transformers ends the class name of a model that has it."""

    HIDDEN = "Model"
    SEQUENCE = "ForSequenceClassification"
    TOKEN = "ForTokenClassification"
    QUESTION = "ForQuestionAnswering"


HEAD_OF_TASK: Mapping[Task, HeadKind] = {
    Task.FEATURE_EXTRACTION: HeadKind.HIDDEN,
    Task.TEXT_CLASSIFICATION: HeadKind.SEQUENCE,
    Task.ZERO_SHOT_CLASSIFICATION: HeadKind.SEQUENCE,
    Task.TEXT_RANKING: HeadKind.SEQUENCE,
    Task.TOKEN_CLASSIFICATION: HeadKind.TOKEN,
    Task.QUESTION_ANSWERING: HeadKind.QUESTION,
}


@dataclass(frozen=True)
class HeadNames:
    """Dense layers of a head in order: (tensor name without `.weight`, activation after it: "tanh", "relu" or "")."""

    dense: tuple[tuple[str, str], ...]


# What the configuration calls each size; an architecture overrides what it names otherwise.
CONFIG_KEYS: Mapping[str, str] = {
    "vocabulary": "vocab_size",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
    "intermediate": "intermediate_size",
    "positions": "max_position_embeddings",
    "activation": "hidden_act",
}


@dataclass(frozen=True)
class Architecture:
    """Names and quirks.

    `tensors` maps our names to the checkpoint's, without `.weight`/`.bias` and without `prefix`; `{i}` is the layer's number. Our names:
    word, position, token_type, embed_norm, query, key, value, out, norm1, up, down, norm2, and relative_bias.
    `position_offset`: row of the position table that belongs to a sequence's first token, as a number or "after-padding" (pad_token_id +
    1).
    `epsilon`: the norms' epsilon where the configuration does not carry one, else None (layer_norm_eps is read).
    """

    model_types: tuple[str, ...]
    prefix: str
    tensors: Mapping[str, str]
    heads: Mapping[HeadKind, HeadNames]
    config_keys: Mapping[str, str] = field(default_factory=dict)
    position_offset: int | str = 0
    epsilon: float | None = None
    token_types: bool = False
    relative_bias: bool = False

    def config_key(self, name: str) -> str:
        return self.config_keys.get(name, CONFIG_KEYS[name])


# BERT's names, which RoBERTa shares.
BERT_TENSORS: Mapping[str, str] = {
    "word": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "token_type": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "query": "encoder.layer.{i}.attention.self.query",
    "key": "encoder.layer.{i}.attention.self.key",
    "value": "encoder.layer.{i}.attention.self.value",
    "out": "encoder.layer.{i}.attention.output.dense",
    "norm1": "encoder.layer.{i}.attention.output.LayerNorm",
    "up": "encoder.layer.{i}.intermediate.dense",
    "down": "encoder.layer.{i}.output.dense",
    "norm2": "encoder.layer.{i}.output.LayerNorm",
}

TOKEN_HEADS: Mapping[HeadKind, HeadNames] = {
    HeadKind.TOKEN: HeadNames((("classifier", ""),)),
    HeadKind.QUESTION: HeadNames((("qa_outputs", ""),)),
}
