"""DistilBERT: no token types, other names for everything, an epsilon that is not in the configuration, and a ReLU in its head."""

from __future__ import annotations

from server.runtime.graphs.architecture import TOKEN_HEADS, Architecture, HeadKind, HeadNames

DISTILBERT = Architecture(
    model_types=("distilbert",),
    prefix="distilbert",
    tensors={
        "word": "embeddings.word_embeddings",
        "position": "embeddings.position_embeddings",
        "embed_norm": "embeddings.LayerNorm",
        "query": "transformer.layer.{i}.attention.q_lin",
        "key": "transformer.layer.{i}.attention.k_lin",
        "value": "transformer.layer.{i}.attention.v_lin",
        "out": "transformer.layer.{i}.attention.out_lin",
        "norm1": "transformer.layer.{i}.sa_layer_norm",
        "up": "transformer.layer.{i}.ffn.lin1",
        "down": "transformer.layer.{i}.ffn.lin2",
        "norm2": "transformer.layer.{i}.output_layer_norm",
    },
    heads={**TOKEN_HEADS, HeadKind.SEQUENCE: HeadNames((("pre_classifier", "relu"), ("classifier", "")))},
    config_keys={
        "hidden": "dim",
        "heads": "n_heads",
        "layers": "n_layers",
        "intermediate": "hidden_dim",
        "activation": "activation",
    },
    epsilon=1e-12,
)
