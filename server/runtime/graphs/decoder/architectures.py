"""What one decoder architecture is, as data: how its files name things, and its quirks.

Every architecture here is a pre-norm decoder with RMS norms: per layer norm, attention with rotary positions and grouped heads, add, norm,
gated feed-forward, add; then a norm and the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Our names -> the tensors' names without ".weight" and without the prefix; `{i}` is the layer's number.
SPLIT: Mapping[str, str] = {
    "embed": "embed_tokens",
    "final_norm": "norm",
    "norm1": "layers.{i}.input_layernorm",
    "norm2": "layers.{i}.post_attention_layernorm",
    "q": "layers.{i}.self_attn.q_proj",
    "k": "layers.{i}.self_attn.k_proj",
    "v": "layers.{i}.self_attn.v_proj",
    "out": "layers.{i}.self_attn.o_proj",
    "q_norm": "layers.{i}.self_attn.q_norm",
    "k_norm": "layers.{i}.self_attn.k_norm",
    "gate": "layers.{i}.mlp.gate_proj",
    "up": "layers.{i}.mlp.up_proj",
    "down": "layers.{i}.mlp.down_proj",
}
# Norms before and after both halves of a layer.
SANDWICH: Mapping[str, str] = {
    **SPLIT,
    "inner1": "layers.{i}.post_attention_layernorm",
    "norm2": "layers.{i}.pre_feedforward_layernorm",
    "inner2": "layers.{i}.post_feedforward_layernorm",
}
FUSED: Mapping[str, str] = {
    **{name: tensor for name, tensor in SPLIT.items() if name not in ("q", "k", "v", "gate", "up")},
    "qkv": "layers.{i}.self_attn.qkv_proj",
    "gate_up": "layers.{i}.mlp.gate_up_proj",
}


@dataclass(frozen=True)
class Architecture:
    """Names and quirks.

    `tensors`: with "qkv" or "gate_up" in place of their parts where the file has them fused, with "inner1" and "inner2" where a norm stands
    after attention and after the feed-forward. `defaults`: what config.json may leave out, as transformers fills it in. `windows` says
    which layers see a window: "all" (where sliding_window is given), "flag" (use_sliding_window, from max_window_layers on), "alternate"
    (every `pattern`-th layer sees everything), "none"; a list layer_types in config.json wins.
    """

    model_types: tuple[str, ...]
    tensors: Mapping[str, str] = field(default_factory=lambda: SPLIT)
    defaults: Mapping[str, object] = field(default_factory=dict)
    windows: str = "none"
    pattern: int = 1
    qkv_bias: bool | None = None  # None: attention_bias of the configuration, which out shares
    mlp_bias: bool = False  # may the configuration ask for one?
    head_norm: bool = False  # RMS norms of each head of q and k
    norm_plus_one: bool = False  # gain is 1 + weight
    scaled_embeddings: bool = False  # times sqrt(hidden size)
    local_theta: bool = False  # windowed layers rotate by rope_local_base_freq, unscaled
    nope: bool = False  # no_rope_layers: some layers do not rotate
    activation_key: str = "hidden_act"


_GEMMA = {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "head_dim": 256}
_GEMMA2 = {**_GEMMA, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096}
_SMOLLM3 = {"rms_norm_eps": 1e-6, "rope_theta": 2_000_000.0, "tie_word_embeddings": True}
_PHI3 = {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(("llama",), mlp_bias=True, defaults={"rms_norm_eps": 1e-6}),
    Architecture(("mistral",), windows="all", qkv_bias=False, defaults={"rms_norm_eps": 1e-6, "sliding_window": 4096}),
    Architecture(("qwen2",), windows="flag", qkv_bias=True, defaults={"rms_norm_eps": 1e-6, "sliding_window": 4096}),
    Architecture(("qwen3",), windows="flag", head_norm=True, defaults={"rms_norm_eps": 1e-6, "sliding_window": 4096, "head_dim": 128}),
    Architecture(("gemma",), defaults=_GEMMA, norm_plus_one=True, scaled_embeddings=True),
    Architecture(
        ("gemma2",),
        tensors=SANDWICH,
        defaults={**_GEMMA2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        windows="alternate",
        pattern=2,
        norm_plus_one=True,
        scaled_embeddings=True,
        activation_key="hidden_activation",
    ),
    Architecture(
        ("gemma3_text",),
        tensors=SANDWICH,
        defaults={**_GEMMA2, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
        windows="alternate",
        pattern=6,
        head_norm=True,
        norm_plus_one=True,
        scaled_embeddings=True,
        local_theta=True,
        activation_key="hidden_activation",
    ),
    Architecture(("phi3",), tensors=FUSED, windows="all", qkv_bias=False, defaults=_PHI3),
    Architecture(
        ("smollm3",),
        windows="flag",
        nope=True,
        mlp_bias=True,
        defaults=_SMOLLM3,
    ),
)
BY_TYPE: Mapping[str, Architecture] = {name: a for a in ARCHITECTURES for name in a.model_types}


def supported_decoders() -> list[str]:
    """Values of `model_type` in config.json that we write decoder graphs for."""
    return sorted(BY_TYPE)
