"""Tiny random bases with adapters that PEFT itself made and saved."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from server.runtime.lora.layout import Linear, make_layout
from server.runtime.manifest import Manifest

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, WORDS = 32, 48, 2, 4, 2, 8, 97
LINEARS = [
    Linear(f"model.layers.{i}.{name}", inputs, outputs)
    for i in range(LAYERS)
    for name, inputs, outputs in (
        ("self_attn.q_proj", HIDDEN, HEADS * HEAD_DIM),
        ("self_attn.k_proj", HIDDEN, KV_HEADS * HEAD_DIM),
        ("self_attn.v_proj", HIDDEN, KV_HEADS * HEAD_DIM),
        ("self_attn.o_proj", HEADS * HEAD_DIM, HIDDEN),
        ("mlp.gate_proj", HIDDEN, INNER),
        ("mlp.up_proj", HIDDEN, INNER),
        ("mlp.down_proj", INNER, HIDDEN),
    )
]


def manifest(name: str = "tiny", *, dtype: str = "float32", weights: bytes = b"weights", **fields: Any) -> Manifest:
    """A decoder's manifest as its builder would write it; `weights` stands for what the files hold."""
    decoder = {
        "layers": LAYERS,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocabulary": WORDS,
        "page_bytes": 2 * KV_HEADS * HEAD_DIM * 16 * 4,
        "kv_dtype": "float32",
        "graphs": {"float32": "model.onnx"},
        "lora": make_layout(LINEARS, dtype).model_dump(),  # type: ignore[arg-type]
    }
    files = {name: {"sha256": hashlib.sha256(weights + name.encode()).hexdigest(), "size": 1} for name in ("model.onnx", "model.onnx.data")}
    content = {"name": name, "version": "1", "task": "text-generation", "form": "decoder", "hidden_size": HIDDEN, "max_tokens": 128}
    return Manifest.model_validate_json(json.dumps({**content, "decoder": decoder, "files": files, **fields}))


def decoder_config(kind: str = "llama") -> Any:
    """The configuration of transformers for that base."""
    import transformers

    classes = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "phi3": transformers.Phi3Config}
    return classes[kind](
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def causal_model(kind: str = "llama", seed: int = 0) -> Any:
    """A random model with weights large enough for its answers to differ."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(decoder_config(kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def peft_adapter(model: Any, config: Any, seed: int, folder: Path, *, change: Callable[[dict[str, Any]], None] | None = None) -> Any:
    """Wraps `model` with a PEFT adapter of random weights and saves it; `change` may spoil its configuration on the disk."""
    import peft
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * (0.3 if "lora" in name else 1.0))
        wrapped.save_pretrained(str(folder), safe_serialization=True)
    if change is not None:
        raw = json.loads((folder / "adapter_config.json").read_text())
        change(raw)
        (folder / "adapter_config.json").write_text(json.dumps(raw))
    return wrapped.eval()


def lora(**options: Any) -> Any:
    """A LoraConfig for a decoder."""
    import peft

    defaults = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "lora_dropout": 0.0}
    return peft.LoraConfig(**{**defaults, **options})


def random_lora(rng: np.random.Generator, rank: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B of every layer, float32."""
    return {
        one.name: (rng.standard_normal((rank, one.inputs)).astype(np.float32), rng.standard_normal((one.outputs, rank)).astype(np.float32))
        for one in LINEARS
    }
