"""config.json of a Hugging Face encoder: read, checked, and reduced to what a graph needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import ModelRejected, near_names
from server.runtime.graphs.architecture import Architecture, HeadKind
from server.runtime.graphs.bert import BERT
from server.runtime.graphs.distilbert import DISTILBERT
from server.runtime.graphs.mpnet import MPNET
from server.runtime.graphs.roberta import ROBERTA

MAX_CONFIG_BYTES = 4 << 20
_BY_TYPE: dict[str, Architecture] = {name: a for a in (BERT, ROBERTA, DISTILBERT, MPNET) for name in a.model_types}
# The activation's name in transformers -> does it use the tanh approximation?
_GELUS = {"gelu": False, "gelu_python": False, "gelu_new": True, "gelu_pytorch_tanh": True, "gelu_fast": True, "gelu_python_tanh": True}
_LIMITS = {
    "vocabulary": 4_000_000,
    "hidden": 16_384,
    "heads": 1024,
    "layers": 256,
    "intermediate": 131_072,
    "positions": 1_000_000,
}


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and switches of one encoder.

    `position_offset`: row of the position table for a sequence's first token. `max_tokens`: rows behind it. `token_types`: number of token
    types, 0 without. `approximate`: GELU by tanh. `architecture`: class name in the checkpoint, "" if it names none.
    """

    model_type: str
    architecture: str
    vocabulary: int
    hidden: int
    heads: int
    layers: int
    intermediate: int
    positions: int
    position_offset: int
    token_types: int
    approximate: bool
    epsilon: float
    labels: tuple[str, ...]
    multi_label: bool

    @property
    def max_tokens(self) -> int:
        return self.positions - self.position_offset

    @property
    def names(self) -> Architecture:
        return _BY_TYPE[self.model_type]

    def head_in_checkpoint(self) -> HeadKind | None:
        """The head that the class name promises; None where it says nothing of it (a masked language model, say)."""
        return next((kind for kind in HeadKind if self.architecture.endswith(kind.value)), None)


def supported_architectures() -> list[str]:
    """Values of `model_type` in config.json that we write graphs for."""
    return sorted(_BY_TYPE)


def read_config(folder: Path) -> EncoderConfig:
    """Reads and checks `folder/config.json`.

    Raises:
        ModelRejected: the file is absent, is not JSON, or describes an encoder that we do not write; metadata `field`.
    """
    raw = read_json(folder / "config.json")
    model_type = raw.get("model_type")
    names = _BY_TYPE.get(model_type) if isinstance(model_type, str) else None
    if names is None or not isinstance(model_type, str):
        known = supported_architectures()
        hint = near_names(str(model_type)[:64], known)
        raise _wrong("model_type", model_type, f"one of {', '.join(known)}", f"{hint} Others go through `python -m trainer.export`.")
    _refuse_variants(raw)
    sizes = {name: _size(raw, names.config_key(name), limit) for name, limit in _LIMITS.items()}
    if sizes["hidden"] % sizes["heads"] or sizes["hidden"] // sizes["heads"] > 256:
        raise _wrong(names.config_key("heads"), sizes["heads"], f"a divisor of hidden size {sizes['hidden']} with heads of at most 256", "")
    key = names.config_key("activation")
    activation = raw.get(key, "gelu")
    if not isinstance(activation, str) or activation not in _GELUS:
        raise _wrong(key, activation, f"one of {', '.join(sorted(_GELUS))}", "Others go through `python -m trainer.export`.")
    offset = names.position_offset
    if isinstance(offset, str):
        offset = _size(raw, "pad_token_id", sizes["positions"] - 2, default=1, least=0) + 1
    if offset >= sizes["positions"]:
        raise _wrong(names.config_key("positions"), sizes["positions"], f"more than the {offset} rows before the first position", "")
    return EncoderConfig(
        model_type=model_type,
        architecture=_architecture(raw),
        **sizes,
        position_offset=offset,
        token_types=_size(raw, "type_vocab_size", 1024, default=2, least=0) if names.token_types else 0,
        approximate=_GELUS[activation],
        epsilon=names.epsilon if names.epsilon is not None else _epsilon(raw),
        labels=_labels(raw),
        multi_label=raw.get("problem_type") == "multi_label_classification",
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelRejected(f"{path.name} is {path.stat().st_size} bytes; at most {MAX_CONFIG_BYTES} are read.", field=path.name)
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelRejected(
            f"There is no {path.name} in the model's folder; copy it from where the weights came.", field=path.name
        ) from None
    except (ValueError, RecursionError) as error:
        raise ModelRejected(f"{path.name} is not JSON ({type(error).__name__}); download it again.", field=path.name) from None
    if not isinstance(value, dict):
        raise ModelRejected(f"{path.name} holds a {type(value).__name__}; a JSON object was expected.", field=path.name)
    return value


def _wrong(field: str, got: object, expected: str, mend: str) -> ModelRejected:
    return ModelRejected(f"config.json: {field} is {str(got)[:80]!r}; expected {expected}. {mend}".rstrip(), field=field)


def _size(raw: dict[str, Any], key: str, limit: int, *, default: int | None = None, least: int = 1) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= limit:
        raise _wrong(key, value, f"a whole number from {least} to {limit}", "")
    return value


def _epsilon(raw: dict[str, Any]) -> float:
    value = raw.get("layer_norm_eps", 1e-12)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise _wrong("layer_norm_eps", value, "a number between 0 and 1", "")
    return float(value)


def _refuse_variants(raw: dict[str, Any]) -> None:
    """Variants of the known architectures whose arithmetic differs; a graph written all the same would answer wrongly."""
    if raw.get("position_embedding_type", "absolute") != "absolute":
        raise _wrong("position_embedding_type", raw["position_embedding_type"], "'absolute'", "Use `python -m trainer.export`.")
    for key in ("is_decoder", "add_cross_attention"):
        if raw.get(key):
            raise _wrong(key, raw[key], "false: only encoders are served", "Use an encoder checkpoint.")


def _architecture(raw: dict[str, Any]) -> str:
    value = raw.get("architectures") or [""]
    if not isinstance(value, list) or not isinstance(value[0], str) or len(value[0]) > 128:
        raise _wrong("architectures", value, "a list with one class name", "")
    return value[0]


def _labels(raw: dict[str, Any]) -> tuple[str, ...]:
    names = raw.get("id2label")
    if names is None:
        count = _size(raw, "num_labels", 100_000, default=2)
        return tuple(f"LABEL_{i}" for i in range(count))
    try:
        by_id = {int(key): str(value) for key, value in names.items()}
    except (AttributeError, TypeError, ValueError):
        raise _wrong("id2label", names, "an object from class numbers to names", "") from None
    if sorted(by_id) != list(range(len(by_id))) or not by_id:
        raise _wrong("id2label", sorted(by_id)[:8], "the class numbers 0, 1, 2, ... without a gap", "")
    return tuple(by_id[i] for i in range(len(by_id)))
