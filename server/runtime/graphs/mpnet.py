"""MPNet: positions start at 2, no token types, and one table of relative position biases that all layers share."""

from __future__ import annotations

import math

import numpy as np

from server.core import FloatArray
from server.runtime.graphs.architecture import TOKEN_HEADS, Architecture, HeadKind, HeadNames

MPNET = Architecture(
    model_types=("mpnet",),
    prefix="mpnet",
    tensors={
        "word": "embeddings.word_embeddings",
        "position": "embeddings.position_embeddings",
        "embed_norm": "embeddings.LayerNorm",
        "query": "encoder.layer.{i}.attention.attn.q",
        "key": "encoder.layer.{i}.attention.attn.k",
        "value": "encoder.layer.{i}.attention.attn.v",
        "out": "encoder.layer.{i}.attention.attn.o",
        "norm1": "encoder.layer.{i}.attention.LayerNorm",
        "up": "encoder.layer.{i}.intermediate.dense",
        "down": "encoder.layer.{i}.output.dense",
        "norm2": "encoder.layer.{i}.output.LayerNorm",
        "relative_bias": "encoder.relative_attention_bias",
    },
    heads={**TOKEN_HEADS, HeadKind.SEQUENCE: HeadNames((("classifier.dense", "tanh"), ("classifier.out_proj", "")))},
    position_offset=2,  # transformers fixes the padding id at 1 here, whatever the configuration says
    relative_bias=True,
)

# transformers computes the buckets with these two, whatever the configuration says.
BUCKETS = 32
MAX_DISTANCE = 128


def relative_bias(table: FloatArray) -> FloatArray:
    """Bias per head and relative position, float32[heads, 2 * MAX_DISTANCE - 1], from the bucket table float32[buckets, heads].

    Column j belongs to key - query = j - (MAX_DISTANCE - 1); further away the bucket no longer changes.
    """
    relative = np.arange(-(MAX_DISTANCE - 1), MAX_DISTANCE)
    half, exact = BUCKETS // 2, BUCKETS // 4
    distance = np.abs(relative)
    far = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / math.log(MAX_DISTANCE / exact) * (half - exact)
    bucket = np.where(distance < exact, distance, np.minimum(exact + far.astype(np.int64), half - 1))
    bucket += np.where(relative > 0, half, 0)
    return np.ascontiguousarray(table[bucket].T)
