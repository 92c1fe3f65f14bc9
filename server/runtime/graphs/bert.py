"""BERT: token types, positions from 0, and a pooler between the encoder and the sequence classifier."""

from __future__ import annotations

from server.runtime.graphs.architecture import BERT_TENSORS, TOKEN_HEADS, Architecture, HeadKind, HeadNames

BERT = Architecture(
    model_types=("bert",),
    prefix="bert",
    tensors=BERT_TENSORS,
    heads={**TOKEN_HEADS, HeadKind.SEQUENCE: HeadNames((("bert.pooler.dense", "tanh"), ("classifier", "")))},
    token_types=True,
)
