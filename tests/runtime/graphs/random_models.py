"""Small random encoders of each architecture, made by transformers, in which every tensor matters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from bench.vocabularies import word_pieces
from server.core import Task
from server.runtime.graphs.calibrate import default_texts

VOCABULARY, HIDDEN, POSITIONS = 400, 48, 80
SIZES = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
LABELS = {i: f"class-{i}" for i in range(5)}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**SIZES, "type_vocab_size": 2, "layer_norm_eps": 1e-5},
    "roberta": {**SIZES, "type_vocab_size": 1, "hidden_act": "gelu_new"},
    "xlm-roberta": {**SIZES, "type_vocab_size": 1, "pad_token_id": 1},
    "camembert": {**SIZES, "type_vocab_size": 1, "pad_token_id": 1},
    "distilbert": {"vocab_size": VOCABULARY, "dim": HIDDEN, "n_heads": 4, "n_layers": 2, "hidden_dim": 96},
    "mpnet": {**SIZES, "layer_norm_eps": 1e-5},
}
CLASSES: dict[Task, Any] = {
    Task.FEATURE_EXTRACTION: transformers.AutoModel,
    Task.TEXT_CLASSIFICATION: transformers.AutoModelForSequenceClassification,
    Task.TEXT_RANKING: transformers.AutoModelForSequenceClassification,
    Task.TOKEN_CLASSIFICATION: transformers.AutoModelForTokenClassification,
    Task.QUESTION_ANSWERING: transformers.AutoModelForQuestionAnswering,
}
Sequences = list[tuple[list[int], list[int]]]


def random_model(folder: Path, architecture: str, task: Task, *, positions: int = POSITIONS, **changes: Any) -> Any:
    """Saves a model of `architecture` with a head for `task` to `folder`, and returns it."""
    labels = {Task.TEXT_RANKING: {0: "relevance"}, Task.QUESTION_ANSWERING: {0: "a", 1: "b"}}.get(task, LABELS)
    settings = {**CONFIGS[architecture], "max_position_embeddings": positions, "id2label": labels, **changes}
    config = transformers.AutoConfig.for_model(architecture, **settings)
    torch.manual_seed(7)
    model = CLASSES[task].from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm.weight" in name.lower() else 0.25 * noise)
    model.save_pretrained(folder)
    return model


def random_sequences(lengths: list[int], kinds: int, seed: int = 0) -> Sequences:
    """Token and type ids; ids from 5 on, since padding moves RoBERTa's positions."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(5, VOCABULARY, n).tolist(), rng.integers(0, kinds, n).tolist()) for n in lengths]


def answers(model: Any, sequences: Sequences, *, types: bool) -> list[np.ndarray]:
    """What transformers answers to each sequence alone: hidden states [n, H], or logits [labels], [n, labels] or [n, 2]."""
    found = []
    for ids, kinds in sequences:
        feeds = {"input_ids": torch.tensor([ids])} | ({"token_type_ids": torch.tensor([kinds])} if types else {})
        with torch.no_grad():
            answer = model(**feeds)
        if "start_logits" in answer:
            found.append(torch.stack([answer.start_logits[0], answer.end_logits[0]], dim=-1).numpy())
        else:
            found.append((answer.logits if "logits" in answer else answer.last_hidden_state)[0].numpy())
    return found


def write_tokenizer(folder: Path) -> None:
    """A word piece tokenizer of the models' vocabulary, trained on the calibration text."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    vocabulary = word_pieces(tokenizer, [t for t in default_texts() if t.isascii()], special, VOCABULARY)
    tokenizer.model = models.WordPiece(vocabulary, unk_token="[UNK]")
    tokenizer.add_special_tokens(special)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def edit_config(folder: Path, **changes: Any) -> None:
    """Overwrites keys of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
