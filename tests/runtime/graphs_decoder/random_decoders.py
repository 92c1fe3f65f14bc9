"""Small random decoders of each architecture, made by transformers, in which every tensor and every quirk matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

VOCABULARY, HIDDEN, LAYERS = 300, 48, 3
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [4.0, 5.0, 6.0]}
GEMMA2 = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-bias": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama-3": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500_000.0}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "hidden_act": "gelu"}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "mistral-whole": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"rope_scaling": YARN}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma": ("gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("gemma2", {**GEMMA2, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**GEMMA2, "num_hidden_layers": 4, "sliding_window_pattern": 2, "rope_theta": 100_000.0}),
    "phi3": ("phi3", {"sliding_window": 8}),
    "phi3-longrope": (
        "phi3",
        {"partial_rotary_factor": 0.75, "rope_scaling": LONGROPE, "original_max_position_embeddings": 64},
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
}


def random_decoder(folder: Path, name: str, **changes: Any) -> Any:
    """Saves a model of the configuration `name` to `folder`, and returns it."""
    kind, settings = CONFIGS[name]
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **settings, **changes}, attn_implementation="eager")
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    plus_one = kind.startswith("gemma")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in key:
                parameter.copy_(0.2 * noise + (0 if plus_one else 1))
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * (0.5 if "embed" in key else 1.2 / parameter.shape[1] ** 0.5))
    model.save_pretrained(folder)
    return model


def answers(model: Any, sequences: list[list[int]]) -> np.ndarray:
    """Logits of every token of each sequence alone, one after the other."""
    with torch.no_grad():
        return np.concatenate([model(input_ids=torch.tensor([ids])).logits[0].float().numpy() for ids in sequences])


def greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """What transformers' own generation says."""
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **settings)
    return out[0, len(prompt) :].tolist()
