"""ONNX Runtime's operators of the CUDA form in NumPy, written from their documentation, and their schemas as ONNX Runtime states them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx.reference.op_run import OpRun
from onnxruntime.capi import _pybind_state

MICROSOFT = "com.microsoft"
NAMES = (("", "SimplifiedLayerNormalization"), (MICROSOFT, "SkipSimplifiedLayerNormalization"), (MICROSOFT, "PagedAttention"))
NAMES += ((MICROSOFT, "FastGelu"), (MICROSOFT, "Gelu"))


def register_schemas() -> None:
    """Tells onnx's checker of the operators: inputs, outputs, attributes and types are ONNX Runtime's own."""
    listed = {(s.domain, s.name): s for s in _pybind_state.get_all_operator_schema() if (s.domain, s.name) in NAMES}
    for (domain, name), schema in listed.items():
        if not onnx.defs.has(name, domain):
            onnx.defs.register_schema(_schema(domain, name, schema))


def _schema(domain: str, name: str, schema: Any) -> onnx.defs.OpSchema:
    kind, optional = onnx.defs.OpSchema, onnx.defs.OpSchema.FormalParameterOption.Optional

    def parameters(listed: Any) -> list[Any]:
        single = kind.FormalParameterOption.Single
        return [
            kind.FormalParameter(p.name, p.typeStr, param_option=optional if str(p.option).endswith("Optional") else single) for p in listed
        ]

    attributes = [
        kind.Attribute(key, getattr(kind.AttrType, str(a.type).split(".")[-1]), "", required=a.required)
        for key, a in schema.attributes.items()
    ]
    types = [(t.type_param_str, list(t.allowed_type_strs), "") for t in schema.type_constraints]
    inputs, outputs = parameters(schema.inputs), parameters(schema.outputs)
    return kind(name, domain, 1, inputs=inputs, outputs=outputs, attributes=attributes, type_constraints=types)


def _rms(x: np.ndarray, gain: np.ndarray, epsilon: float) -> np.ndarray:
    wide = x.astype(np.float32)
    return (wide / np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + epsilon) * gain).astype(x.dtype)


class SimplifiedLayerNormalization(OpRun):
    def _run(self, x, scale, axis=None, epsilon=None, stash_type=None):  # type: ignore[no-untyped-def]
        assert axis == -1 and stash_type == 1
        return (_rms(x, scale, epsilon),)


class SkipSimplifiedLayerNormalization(OpRun):
    op_domain = MICROSOFT

    def _run(self, x, skip, gamma, bias=None, epsilon=None):  # type: ignore[no-untyped-def]
        total = x + skip if bias is None else x + skip + bias
        assert total.ndim == 2 and x.shape == skip.shape
        nothing = np.zeros(0, np.float32)
        return _rms(total, gamma, epsilon), nothing, nothing, total


class FastGelu(OpRun):
    op_domain = MICROSOFT

    def _run(self, x):  # type: ignore[no-untyped-def]
        wide = x.astype(np.float32)
        return ((0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))).astype(x.dtype),)


class Gelu(OpRun):
    op_domain = MICROSOFT

    def _run(self, x, **_of_onnx_own):  # type: ignore[no-untyped-def]
        from math import erf

        wide = x.astype(np.float32)
        return ((0.5 * wide * (1 + np.vectorize(erf)(wide / np.sqrt(2)))).astype(x.dtype),)


class PagedAttention(OpRun):
    """Packed Q, K and V; rotation of halves; causal, in a window that counts the token itself; K and V written to their pages first."""

    op_domain = MICROSOFT

    def _run(self, qkv, key, value, key_cache, value_cache, cu, past, table, cos, sin, *rest, **attributes):  # type: ignore[no-untyped-def]
        *unused, metadata = rest
        assert len(unused) == 6 and all(one is None or one.size == 0 for one in (key, value, *unused))
        heads, kv_heads = attributes["num_heads"], attributes["kv_num_heads"]
        window, scale = attributes["local_window_size"], attributes["scale"]
        assert attributes["do_rotary"] == 1 and attributes["rotary_interleaved"] == 0
        pages, page, _, dim = key_cache.shape
        assert key_cache.dtype == value_cache.dtype == qkv.dtype == cos.dtype == np.float16
        assert cu.dtype == past.dtype == table.dtype == metadata.dtype == np.int32
        assert dim % 16 == 0 and cos.shape[1] == dim // 2 and page >= 16 and page & (page - 1) == 0 and len(past) <= 256
        assert table.min() >= 0 and table.max() < pages
        assert metadata[0] >= np.diff(cu).max() and metadata[1] >= (past + np.diff(cu)).max()
        keys, values, out = key_cache.copy(), value_cache.copy(), []
        for s in range(len(past)):
            rows = qkv[cu[s] : cu[s + 1]].reshape(-1, heads + 2 * kv_heads, dim)
            at = past[s] + np.arange(len(rows))
            turned = _rotate(rows[:, : heads + kv_heads], cos[at], sin[at])
            blocks, inside = table[s, at // page], at % page
            keys[blocks, inside] = turned[:, heads:]
            values[blocks, inside] = rows[:, heads + kv_heads :]
            seen = np.arange(at[-1] + 1)
            k, v = (one[table[s, seen // page], seen % page].astype(np.float32) for one in (keys, values))
            k, v = (np.repeat(one, heads // kv_heads, axis=1) for one in (k, v))
            score = np.einsum("qhd,khd->hqk", turned[:, :heads].astype(np.float32), k) * scale
            hidden = seen > at[:, None]
            if window > 0:
                hidden |= seen <= at[:, None] - window
            score = np.where(hidden, -np.inf, score)
            score = np.exp(score - score.max(axis=-1, keepdims=True))
            out.append(np.einsum("hqk,khd->qhd", score / score.sum(axis=-1, keepdims=True), v).reshape(len(rows), -1))
        return np.concatenate(out).astype(qkv.dtype), keys, values


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    a, b = x[..., :half].astype(np.float32), x[..., half:].astype(np.float32)
    cos, sin = cos[:, None].astype(np.float32), sin[:, None].astype(np.float32)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


OPERATORS = [SimplifiedLayerNormalization, SkipSimplifiedLayerNormalization, FastGelu, Gelu, PagedAttention]
