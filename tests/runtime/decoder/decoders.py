"""Small decoders for tests of the engine: random weights, and stories260K where it is there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from server.core import Call
from server.runtime.decoder.contract import Job, Sampling
from server.runtime.decoder.engine import EngineParts, GenerationEngine
from server.runtime.decoder.settings import GenerationSettings
from server.runtime.graphs.decoder.build import build_decoder
from server.runtime.manifest import Manifest
from server.runtime.sessions import Sessions

HIDDEN, HEADS, KV_HEADS, LAYERS, WIDE, VOCABULARY, CONTEXT = 64, 4, 2, 2, 96, 320, 256


def random_llama(folder: Path, seed: int = 0, context: int = CONTEXT) -> Path:
    """A LLaMA of random weights, large enough that its greedy text does not repeat at once."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    dim = HIDDEN // HEADS

    def weight(rows: int, columns: int) -> Any:
        return (random.standard_normal((rows, columns)) * 0.15).astype(np.float32)

    tensors = {"model.embed_tokens.weight": weight(VOCABULARY, HIDDEN) * 4, "model.norm.weight": np.ones(HIDDEN, np.float32)}
    tensors["lm_head.weight"] = weight(VOCABULARY, HIDDEN) * 4
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        for part, rows, columns in [
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", KV_HEADS * dim, HIDDEN),
            ("self_attn.v_proj", KV_HEADS * dim, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", WIDE, HIDDEN),
            ("mlp.up_proj", WIDE, HIDDEN),
            ("mlp.down_proj", HIDDEN, WIDE),
        ]:
            tensors[f"{name}{part}.weight"] = weight(rows, columns)
        for part in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}{part}.weight"] = np.ones(HIDDEN, np.float32)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY,
        "max_position_embeddings": context, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def build(folder: Path, out: Path, forms: tuple[str, ...] = ("float32",)) -> tuple[Path, Manifest]:
    """The graphs of a checkpoint, and a manifest around what the build says."""
    out.mkdir(parents=True, exist_ok=True)
    built = build_decoder(folder, out, forms=forms)  # type: ignore[arg-type]
    fields = {**built.manifest, "name": "tiny", "version": "1", "files": {}, "schema_version": 1, "parity": {}}
    return out, Manifest.model_validate(fields)


@asynccontextmanager
async def opened(model: tuple[Path, Manifest], settings: Mapping[str, Any] | None = None, **parts: Any) -> Any:
    """An engine over the graphs, ready; `drain=True` at the end where nothing failed."""
    folder, manifest = model
    assert manifest.decoder is not None
    sessions = {form: Sessions().open(folder / name) for form, name in manifest.decoder.graphs.items()}
    observer = parts.pop("observer", None)
    chosen = GenerationSettings(**{"kv_cache_bytes": 64 << 20, "max_sequences": 16, **(settings or {})})
    engine = GenerationEngine(EngineParts(manifest, sessions, **parts), chosen, observer)
    try:
        await engine.ready()
        yield engine
    finally:
        await engine.close(drain=False)
        for session in sessions.values():
            session.close()


def greedy(prompt: list[int], tokens: int, **fields: Any) -> Job:
    """A job that takes the likeliest token each time, and never stops by itself."""
    call = fields.pop("call", None) or Call("test")
    return Job(prompt, fields.pop("sampling", Sampling(temperature=0.0)), tokens, call, **fields)


def ids(pieces: Any) -> list[int]:
    """The tokens of one candidate's pieces."""
    return [token.id for token in pieces.tokens]
