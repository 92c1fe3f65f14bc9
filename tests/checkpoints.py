"""Tiny random checkpoints in Hugging Face's layout, made without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HIDDEN, LAYERS, WORDS = 32, 1, 40
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "card", "is", "lost", "my", "where", "##s", "?", "pay"]


def checkpoint(folder: Path, architecture: str = "BertModel", *, seed: int = 0, words: int = WORDS, **config: Any) -> Path:
    """A BERT with vocab.txt and no tokenizer.json; a sentence-transformers model where it has no head."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    head = architecture != "BertModel"
    prefix = "bert." if head else ""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (words, HIDDEN),
        "embeddings.position_embeddings.weight": (config.get("max_position_embeddings", 64), HIDDEN),
        "embeddings.token_type_embeddings.weight": (2, HIDDEN),
        "embeddings.LayerNorm.weight": (HIDDEN,),
        "embeddings.LayerNorm.bias": (HIDDEN,),
    }
    for layer in range(LAYERS):
        base = f"encoder.layer.{layer}."
        sizes = {"intermediate.dense": (64, HIDDEN), "output.dense": (HIDDEN, 64), "attention.output.dense": (HIDDEN, HIDDEN)}
        sizes |= {f"attention.self.{name}": (HIDDEN, HIDDEN) for name in ("query", "key", "value")}
        for name, size in sizes.items():
            shapes |= {f"{base}{name}.weight": size, f"{base}{name}.bias": (size[0],)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{base}{name}.weight": (HIDDEN,), f"{base}{name}.bias": (HIDDEN,)}
    shapes |= {"pooler.dense.weight": (HIDDEN, HIDDEN), "pooler.dense.bias": (HIDDEN,)}
    tensors = {
        prefix + name: (rng.standard_normal(size) * 0.2 + ("LayerNorm.weight" in name)).astype(np.float32) for name, size in shapes.items()
    }
    if head:
        tensors["classifier.weight"] = rng.standard_normal((len(config["id2label"]), HIDDEN)).astype(np.float32)
        tensors["classifier.bias"] = rng.standard_normal(len(config["id2label"])).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    sizes_of = {"vocab_size": words, "hidden_size": HIDDEN, "num_attention_heads": 2, "num_hidden_layers": LAYERS, "intermediate_size": 64}
    rest = {
        "model_type": "bert",
        "architectures": [architecture],
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
    }
    write(folder / "config.json", {**sizes_of, **rest, "layer_norm_eps": 1e-12, "pad_token_id": 0, **config})
    write(folder / "tokenizer_config.json", {"do_lower_case": True, "model_max_length": 48})
    entries = VOCABULARY + [f"w{i}" for i in range(words - len(VOCABULARY))]
    (folder / "vocab.txt").write_text("\n".join(entries) + "\n")
    if not head:
        kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(kinds)
        ]
        write(folder / "modules.json", modules)
        write(
            folder / "1_Pooling" / "config.json",
            {"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        )
        write(folder / "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": False})
        write(folder / "config_sentence_transformers.json", {"prompts": {"query": "query: ", "document": "passage: "}})
    return folder


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
