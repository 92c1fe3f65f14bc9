"""Reads an adapter as PEFT saves it: a folder with adapter_config.json and adapter_model.safetensors.

Taken are LoRA (rank and alpha patterns, rank-stabilized scales, targets by list, pattern or "all-linear"), prefix tuning, prompt tuning and
P-tuning, which PEFT saves as the prompt that its encoder made. Whatever would change the result and is not done here is refused by name.
Source: peft/tuners/lora/config.py, peft/utils/save_and_load.py, peft/utils/other.py (get_pattern_key) of PEFT 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from server.errors import ModelRejected
from server.runtime.graphs.config import read_json
from server.runtime.graphs.tensors import Tensors, open_file
from server.runtime.lora.layout import Targets, layout_of
from server.runtime.lora.patterns import Pattern, pattern
from server.runtime.lora.weights import Delta, LoraWeights, PrefixWeights, PromptWeights, Weights
from server.runtime.manifest import LoraTarget, Manifest
from server.runtime.verify import check_safetensors

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MAX_RANK = 1024
MAX_TENSORS = 100_000
_ROOT = "base_model.model."
# Layers that checkpoints keep as one and a base's layout may list one by one: same input, outputs side by side.
FUSED: Mapping[str, tuple[str, ...]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Keys that say how an adapter came to be, or where it belongs, and do not change what it computes.
_HARMLESS = frozenset(
    {
        *(
            "task_type",
            "peft_type",
            "auto_mapping",
            "peft_version",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
            "runtime_config",
        ),
        *("r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "modules_to_save", "ensure_weight_tying"),
        *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    }
)
# Starting points that move a part of the base's own weights into the adapter: without the base that was changed with it, it is wrong.
_MOVING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """What a folder holds. `base_model`: the name that it gives its base, "" where it gives none; `kind`: PEFT's name of the method."""

    weights: Weights
    kind: str
    base_model: str
    config: Mapping[str, Any]


def read_peft(folder: Path, base: Manifest) -> PeftAdapter:
    """The adapter in `folder` for a base with this manifest; every shape is checked against it.

    Raises:
        ModelRejected: it is no adapter of this base, is damaged, a pickle, or of a kind that is not done; metadata `field` or `tensor`.
    """
    config = read_json(folder / CONFIG)
    kind = config.get("peft_type")
    readers: dict[str, Callable[[dict[str, Any], Tensors, Manifest], Weights]] = {
        "LORA": _lora,
        "PREFIX_TUNING": _prefix,
        "PROMPT_TUNING": _prompt,
        "P_TUNING": _prompt,
    }
    if not isinstance(kind, str) or kind not in readers:
        _refuse("peft_type", f"is {_shown(kind)}; expected one of {', '.join(readers)}")
    tensors = _open(folder)
    name = config.get("base_model_name_or_path")
    return PeftAdapter(readers[kind](config, tensors, base), kind, name[:256] if isinstance(name, str) else "", config)


def _open(folder: Path) -> Tensors:
    path = folder / TENSORS
    if not path.is_file():
        if (folder / PICKLE).is_file():
            raise ModelRejected(
                f"{PICKLE} is a pickle, and opening a pickle runs whatever it contains; only {TENSORS} is read. "
                "Save the adapter again with save_pretrained(..., safe_serialization=True) on a machine that trusts it.",
                field=PICKLE,
            )
        raise ModelRejected(f"{folder} has no {TENSORS}; give the folder that PEFT's save_pretrained wrote.", field=TENSORS)
    check_safetensors(path)
    tensors = open_file(path)
    if len(tensors) > MAX_TENSORS:
        raise ModelRejected(f"{TENSORS} has {len(tensors)} tensors; expected at most {MAX_TENSORS}.", field=TENSORS, limit=MAX_TENSORS)
    return tensors


# LoRA.


def _lora(config: dict[str, Any], tensors: Tensors, base: Manifest) -> LoraWeights:
    layout = layout_of(base)
    if layout is None:
        raise ModelRejected(
            f"model {base.name!r} version {base.version} was built without places for LoRA adapters; expected a graph that has them. "
            "Pull the model again with --adapters.",
            model=base.name,
        )
    _check_lora(config)
    targets = Targets(layout)
    ranks = _Ranks(config)
    selection = _Selection(config)
    deltas: dict[str, Delta] = {}
    for module in _modules(tensors):
        if not selection.matches(module):
            raise ModelRejected(
                f"{TENSORS} has weights for {_shown(module)}, which target_modules of {CONFIG} does not name. Save the adapter again.",
                tensor=module[:200],
            )
        for target, delta in _deltas(module, tensors, targets, ranks):
            if target.name in deltas:
                raise ModelRejected(f"{TENSORS} changes the layer {target.name!r} twice. Save the adapter again.", tensor=target.name)
            deltas[target.name] = delta
    missing = [name for name in targets.by_name if name not in deltas and selection.matches(name)]
    if missing:
        raise ModelRejected(
            f"{TENSORS} has no weights for {missing[0]!r} ({len(missing)} such layers), which target_modules of {CONFIG} names. "
            "Save the adapter again.",
            tensor=missing[0],
        )
    return LoraWeights(deltas)


def _check_lora(config: Mapping[str, Any]) -> None:
    if config.get("bias", "none") != "none":
        _refuse("bias", f"is {_shown(config['bias'])}; only adapters that leave biases alone are done (bias='none')")
    if config.get("modules_to_save"):
        _refuse(
            "modules_to_save", f"is {_shown(config['modules_to_save'])}; layers that were trained whole are not taken over. Train without"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVING_STARTS):
        _refuse(
            "init_lora_weights",
            f"is {_shown(start)}, which changes the base too; save it with path_initial_model_for_weight_conversion, as PEFT explains",
        )
    for key, value in config.items():
        if key not in _HARMLESS and value not in (None, False, "", [], {}):
            _refuse(key, f"is {_shown(value)}, which is not done here; expected an adapter without it")


def _modules(tensors: Tensors) -> list[str]:
    """Module paths that have lora_A, in the file's order; refuses every tensor that is neither an A nor a B."""
    found: dict[str, set[str]] = {}
    for name in tensors.shapes():
        module, _, part = name.removeprefix(_ROOT).rpartition(".lora_")
        if not module or part not in ("A.weight", "B.weight"):
            what = "a LoRA of embeddings" if part.startswith("embedding") else "no lora_A or lora_B weight"
            raise ModelRejected(
                f"{TENSORS} holds {_shown(name)}, {what}; expected lora_A.weight and lora_B.weight of linear layers alone. "
                "Train without it.",
                tensor=name[:200],
            )
        found.setdefault(module, set()).add(part)
    for module, parts in found.items():
        if len(parts) != 2:
            raise ModelRejected(f"{TENSORS} has only one of lora_A and lora_B of {_shown(module)}. Save it again.", tensor=module[:200])
    if not found:
        raise ModelRejected(f"{TENSORS} has no lora_A and lora_B weights. Save the adapter again.", field=TENSORS)
    return list(found)


def _deltas(module: str, tensors: Tensors, targets: Targets, ranks: _Ranks) -> list[tuple[LoraTarget, Delta]]:
    """The targets that a module stands for: itself, or the parts of a layer that the base's layout lists one by one."""
    found = targets.find(module)
    parent, _, leaf = module.rpartition(".")
    parts = [found] if found else [t for part in FUSED.get(leaf, ()) if (t := targets.find(f"{parent}.{part}")) is not None]
    if not parts or (not found and len(parts) != len(FUSED[leaf])):
        raise ModelRejected(
            f"{TENSORS} changes {_shown(module)}, which is no layer that adapters may change in this base; "
            f"those are, for example, {', '.join(list(targets.by_name)[:3])}. Is it this base's adapter?",
            tensor=module[:200],
        )
    name = f"{_ROOT}{module}.lora_"
    if f"{name}A.weight" not in tensors:
        name = f"{module}.lora_"
    rank, scale = ranks.of(module)
    a = tensors.take(f"{name}A.weight", (rank, parts[0].inputs))
    b = tensors.take(f"{name}B.weight", (sum(t.outputs for t in parts), rank))
    bounds = np.cumsum([0, *(t.outputs for t in parts)])
    return [(t, Delta(a, np.ascontiguousarray(b[bounds[i] : bounds[i + 1]]), scale)) for i, t in enumerate(parts)]


class _Ranks:
    """Rank and scale of each module: the first pattern that fits its path from the right wins over `r` and `lora_alpha`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._rank = _whole(config.get("r"), "r")
        self._alpha = _number(config.get("lora_alpha", 8), "lora_alpha")
        self._rank_patterns = [(p, _whole(v, "rank_pattern")) for p, v in self._patterns(config, "rank_pattern")]
        self._alpha_patterns = [(p, _number(v, "alpha_pattern")) for p, v in self._patterns(config, "alpha_pattern")]
        self._root = bool(config.get("use_rslora", False))

    @staticmethod
    def _patterns(config: Mapping[str, Any], key: str) -> list[tuple[Pattern, Any]]:
        value = config.get(key) or {}
        if not isinstance(value, dict) or len(value) > MAX_TENSORS:
            _refuse(key, "is no table of layers")
        return [(pattern(name, key, suffix=True), one) for name, one in value.items()]

    def of(self, module: str) -> tuple[int, float]:
        rank = next((value for fits, value in self._rank_patterns if fits(module)), self._rank)
        alpha = next((value for fits, value in self._alpha_patterns if fits(module)), self._alpha)
        return rank, alpha / (math.sqrt(rank) if self._root else rank)


class _Selection:
    """Which modules `target_modules`, `exclude_modules` and `layers_to_transform` name."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._targets = self._names(config.get("target_modules"), "target_modules")
        self._excluded = self._names(config.get("exclude_modules"), "exclude_modules")
        layers = config.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        if layers is not None and not (isinstance(layers, list) and all(type(one) is int for one in layers)):
            _refuse("layers_to_transform", f"is {_shown(layers)}; expected whole numbers")
        # PEFT refuses layers_to_transform beside a pattern, and takes an empty list for none.
        self._layers = frozenset(layers) if layers else None

    @staticmethod
    def _names(value: Any, key: str) -> Callable[[str], bool] | None:
        if value is None:
            return None
        if value == "all-linear":
            return lambda _: True
        if isinstance(value, str):
            return pattern(value, key)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            _refuse(key, f"is {_shown(value)}; expected names or a pattern")
        names = frozenset(value)
        return lambda module: any(tail in names for tail in _tails(module))

    def matches(self, module: str) -> bool:
        if self._targets is None or not self._targets(module) or (self._excluded is not None and self._excluded(module)):
            return False
        if self._layers is None:
            return True
        number = re.search(r"\.(\d{1,6})\.", f".{module}")
        return number is not None and int(number[1]) in self._layers


def _tails(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


# Prompts.


def _prompt_shape(config: Mapping[str, Any], tensors: Tensors, base: Manifest, width: int) -> tuple[int, int]:
    """(positions, width) of the one tensor; the rest of the configuration only says how it was trained."""
    if base.decoder is None:
        raise ModelRejected(f"model {base.name!r} generates no text, and prompts can be learned only for models that do.", model=base.name)
    if config.get("num_transformer_submodules") not in (None, 1):
        _refuse("num_transformer_submodules", f"is {_shown(config['num_transformer_submodules'])}; expected 1, a decoder")
    if config.get("modules_to_save"):
        _refuse("modules_to_save", "names layers that were trained whole; they are not taken over. Train without")
    shapes = tensors.shapes()
    if set(shapes) != {"prompt_embeddings"}:
        raise ModelRejected(f"{TENSORS} holds {_shown(sorted(shapes)[:3])}; expected prompt_embeddings alone.", tensor="prompt_embeddings")
    positions = _whole(config.get("num_virtual_tokens"), "num_virtual_tokens", base.max_tokens - 1)
    if shapes["prompt_embeddings"] != (positions, width):
        raise ModelRejected(
            f"prompt_embeddings has shape {list(shapes['prompt_embeddings'])}; expected {[positions, width]} for model {base.name!r}. "
            "Is it this base's adapter?",
            tensor="prompt_embeddings",
        )
    return positions, width


def _prefix(config: dict[str, Any], tensors: Tensors, base: Manifest) -> PrefixWeights:
    decoder = base.decoder
    width = 2 * decoder.layers * decoder.kv_heads * decoder.head_dim if decoder is not None else 0
    positions, _ = _prompt_shape(config, tensors, base, width)
    assert decoder is not None, "refused above"
    rows = tensors.take("prompt_embeddings", (positions, width))
    split = rows.reshape(positions, decoder.layers, 2, decoder.kv_heads, decoder.head_dim).transpose(2, 1, 3, 0, 4)
    return PrefixWeights(np.ascontiguousarray(split[0]), np.ascontiguousarray(split[1]))


def _prompt(config: dict[str, Any], tensors: Tensors, base: Manifest) -> PromptWeights:
    return PromptWeights(tensors.take("prompt_embeddings", _prompt_shape(config, tensors, base, base.hidden_size)))


# Values of adapter_config.json.


def _whole(value: Any, key: str, most: int = MAX_RANK) -> int:
    if type(value) is not int or not 1 <= value <= most:
        _refuse(key, f"is {_shown(value)}; expected a whole number from 1 to {most}")
    return value


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or abs(value) > 1e6:
        _refuse(key, f"is {_shown(value)}; expected a number")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _refuse(key: str, what: str) -> NoReturn:
    raise ModelRejected(f"{CONFIG}: {key} {what}.", field=key)
