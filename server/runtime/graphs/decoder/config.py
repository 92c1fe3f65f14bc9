"""config.json of a Hugging Face decoder: read, checked, and reduced to what a graph needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import ModelRejected, near_names
from server.runtime.graphs.config import read_json
from server.runtime.graphs.decoder.architectures import BY_TYPE, Architecture, supported_decoders
from server.runtime.graphs.decoder.rope import Rope, read_rope

# The activation's name in transformers -> the attribute `kind` of GatedAct.
_ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu_new": 1, "gelu_fast": 1, "gelu": 2, "gelu_python": 2}
_MOST = {
    "vocab_size": 4_000_000,
    "hidden_size": 32_768,
    "num_attention_heads": 1024,
    "num_hidden_layers": 512,
    "intermediate_size": 262_144,
    "max_position_embeddings": 16_777_216,
}
MAX_HEAD_DIM = 256
# Rotary tables are kept for every position; more than this is cut off.
MAX_POSITIONS = 131_072


@dataclass(frozen=True)
class LayerKind:
    """How one layer attends. `window`: positions a token sees, itself included, 0 for all; `rope`: index into the config's `ropes`."""

    window: int = 0
    rope: int = 0
    rotary: bool = True


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of one decoder. `scale` of attention scores; softcaps are 0 where there are none; `activation`: see GatedAct."""

    model_type: str
    vocabulary: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    positions: int
    epsilon: float
    activation: int
    scale: float
    softcap: float
    final_softcap: float
    multiplier: float
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    ropes: tuple[Rope, ...]
    kinds: tuple[LayerKind, ...]
    stop_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def layers(self) -> int:
        return len(self.kinds)

    @property
    def names(self) -> Architecture:
        return BY_TYPE[self.model_type]

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def window(self) -> int:
        """Positions that any layer still sees, 0 where one sees all."""
        return 0 if any(kind.window == 0 for kind in self.kinds) else max(kind.window for kind in self.kinds)


class Fields:
    """The keys of config.json with an architecture's defaults behind them; each is checked as it is read."""

    def __init__(self, raw: dict[str, Any], defaults: Any) -> None:
        self.raw = raw
        self.defaults = defaults

    def get(self, key: str) -> Any:
        """The value, or the architecture's default, or None."""
        value = self.raw.get(key)
        return self.defaults.get(key) if value is None else value

    def whole(self, key: str, most: int, *, least: int = 1, default: int | None = None) -> int:
        """A whole number from `least` to `most`."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise wrong(key, value, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, *, default: float | None = None, most: float = 1e12, least: float = 0.0) -> float:
        """A finite number above `least`."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not least < value <= most:
            raise wrong(key, value, f"a number above {least:g} and up to {most:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; absent is false."""
        value = self.get(key)
        if value not in (None, True, False):
            raise wrong(key, value, "true or false")
        return bool(value)


def wrong(field: str, got: object, expected: str, mend: str = "") -> ModelRejected:
    """The error of a key that cannot be used."""
    return ModelRejected(f"config.json: {field} is {str(got)[:80]!r}; expected {expected}. {mend}".rstrip(), field=field)


def read_decoder_config(folder: Path) -> DecoderConfig:
    """Reads and checks `folder/config.json`.

    Raises:
        ModelRejected: the file is absent, is not JSON, or describes a decoder that we do not write; metadata `field`.
    """
    raw = read_json(folder / "config.json")
    model_type = raw.get("model_type")
    names = BY_TYPE.get(model_type) if isinstance(model_type, str) else None
    if names is None or not isinstance(model_type, str):
        known = supported_decoders()
        raise wrong("model_type", model_type, f"one of {', '.join(known)}", near_names(str(model_type)[:64], known))
    fields = Fields(raw, names.defaults)
    if "quantization_config" in raw:
        raise wrong("quantization_config", raw["quantization_config"], "float weights", "Use the checkpoint it was made from.")
    sizes = {key: fields.whole(key, most, default=None) for key, most in _MOST.items()}
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    kv_heads = fields.whole("num_key_value_heads", heads, default=heads)
    head_dim = fields.whole("head_dim", MAX_HEAD_DIM, default=hidden // heads or 1)
    if heads % kv_heads or head_dim % 2:
        raise wrong("num_key_value_heads", kv_heads, f"a divisor of the {heads} heads, with heads of even size (here {head_dim})")
    ropes, positions = _ropes(fields, names, head_dim, sizes["max_position_embeddings"])
    bias = fields.flag("attention_bias") if names.qkv_bias is None else False
    return DecoderConfig(
        model_type=model_type,
        vocabulary=sizes["vocab_size"],
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=sizes["intermediate_size"],
        positions=min(positions, MAX_POSITIONS),
        epsilon=fields.number("rms_norm_eps", most=0.1),
        activation=_activation(fields, names.activation_key),
        scale=1 / math.sqrt(fields.number("query_pre_attn_scalar", default=head_dim, most=1e6)),
        softcap=fields.number("attn_logit_softcapping", default=0.0, least=-1e-30),
        final_softcap=fields.number("final_logit_softcapping", default=0.0, least=-1e-30),
        multiplier=math.sqrt(hidden) if names.scaled_embeddings else 1.0,
        tied=fields.flag("tie_word_embeddings"),
        qkv_bias=bias if names.qkv_bias is None else names.qkv_bias,
        out_bias=bias,
        mlp_bias=names.mlp_bias and fields.flag("mlp_bias"),
        ropes=ropes,
        kinds=_kinds(fields, names, sizes["num_hidden_layers"]),
        stop_token_ids=_token_ids(raw.get("eos_token_id"), sizes["vocab_size"]),
        bos_token_id=next(iter(_token_ids(raw.get("bos_token_id"), sizes["vocab_size"])), None),
    )


def _activation(fields: Fields, key: str) -> int:
    value = fields.get(key)
    value = "silu" if value is None else value
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise wrong(key, value, f"one of {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[value]


def _ropes(fields: Fields, names: Architecture, head_dim: int, positions: int) -> tuple[tuple[Rope, ...], int]:
    """The rotations that layers use, and how many positions they are good for."""
    theta = fields.number("rope_theta", default=10_000.0)
    partial = fields.number("partial_rotary_factor", default=1.0, most=1.0) if names.model_types[0] == "phi3" else 1.0
    dims = int(head_dim * partial)
    if dims < 2 or dims % 2:
        raise wrong("partial_rotary_factor", partial, f"a share of the head's {head_dim} dimensions that is even")
    main, limit = read_rope(fields, theta, dims, positions)
    if not names.local_theta:
        return (main,), limit
    return (main, Rope.plain(fields.number("rope_local_base_freq"), dims)), limit


def _kinds(fields: Fields, names: Architecture, layers: int) -> tuple[LayerKind, ...]:
    window = fields.whole("sliding_window", 1 << 31, least=0, default=0)
    if fields.raw.get("sliding_window", 0) is None:  # said outright: there is none
        window = 0
    listed = fields.raw.get("layer_types")
    if names.windows == "none" or (names.windows == "flag" and not fields.flag("use_sliding_window")):
        seen = [0] * layers
    elif isinstance(listed, list) and names.windows != "all":
        if len(listed) != layers or not set(map(str, listed)) <= {"full_attention", "sliding_attention"}:
            raise wrong("layer_types", listed, f"{layers} times full_attention or sliding_attention")
        seen = [window if one == "sliding_attention" else 0 for one in listed]
    elif names.windows == "alternate":
        pattern = fields.whole("sliding_window_pattern", 1024, default=names.pattern)
        seen = [window if (i + 1) % pattern else 0 for i in range(layers)]
    elif names.windows == "flag":
        first = 0 if names.nope else fields.whole("max_window_layers", 1024, least=0, default=28)
        seen = [window if i >= first else 0 for i in range(layers)]
    else:
        seen = [window] * layers
    rotary = _rotary(fields, layers) if names.nope else [True] * layers
    if names.nope and not isinstance(listed, list):
        seen = [0 if turns else size for size, turns in zip(seen, rotary, strict=True)]
    return tuple(LayerKind(size, 1 if names.local_theta and size else 0, turns) for size, turns in zip(seen, rotary, strict=True))


def _rotary(fields: Fields, layers: int) -> list[bool]:
    listed = fields.raw.get("no_rope_layers")
    if listed is None:
        interval = fields.whole("no_rope_layer_interval", 1024, default=4)
        return [(i + 1) % interval != 0 for i in range(layers)]
    if not isinstance(listed, list) or len(listed) != layers or any(one not in (0, 1) for one in listed):
        raise wrong("no_rope_layers", listed, f"a list of {layers} times 0 or 1")
    return [bool(one) for one in listed]


def _token_ids(value: object, vocabulary: int) -> tuple[int, ...]:
    """Ids of one or several tokens; what is no token of the model is left out."""
    listed = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(i for i in listed if type(i) is int and 0 <= i < vocabulary))
