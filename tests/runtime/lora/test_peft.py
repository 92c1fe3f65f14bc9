"""Adapters that PEFT saved are read as PEFT means them, and what we do not do is refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from server.errors import ModelRejected
from server.runtime.lora.peft import TENSORS, read_peft
from server.runtime.lora.weights import LoraWeights, PrefixWeights, PromptWeights
from tests.runtime.lora.models import HEAD_DIM, HIDDEN, KV_HEADS, LAYERS, LINEARS, WORDS, causal_model, lora, manifest, peft_adapter

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all layers": {"target_modules": ALL, "r": 8},
    "all-linear": {"target_modules": "all-linear", "r": 2},
    "rank-stabilized": {"use_rslora": True, "r": 9, "lora_alpha": 5},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 7, r".*\.0\.mlp\.down_proj": 1},
        "alpha_pattern": {"v_proj": 1, "self_attn.o_proj": 3.5, "^model.layers.1.mlp.gate_proj": 40},
    },
    "rank-stabilized patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 30}},
    "a regular expression": {"target_modules": r".*\.(q|k)_proj|.*mlp\.down_proj"},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"target_modules": ALL, "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "fan in fan out": {"fan_in_fan_out": False, "lora_alpha": 1},
}


@pytest.fixture(scope="module")
def base() -> Any:
    return causal_model()


@pytest.mark.parametrize("name", CONFIGS)
def test_deltas_are_those_of_peft(name: str, base: Any, tmp_path: Path) -> None:
    model = peft_adapter(copy.deepcopy(base), lora(**CONFIGS[name]), 5, tmp_path)
    weights = read_peft(tmp_path, manifest()).weights
    assert isinstance(weights, LoraWeights)
    expected = {
        path.removeprefix("base_model.model."): module.get_delta_weight("default").detach().numpy()
        for path, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert set(weights.deltas) == set(expected)
    for layer, delta in weights.deltas.items():
        got = (delta.b @ delta.a) * np.float32(delta.scale)
        np.testing.assert_allclose(got, expected[layer], rtol=1e-5, atol=1e-5)


def test_a_fused_layer_is_read_into_its_parts(tmp_path: Path) -> None:
    model = peft_adapter(causal_model("phi3"), lora(target_modules=["qkv_proj", "gate_up_proj", "o_proj"]), 6, tmp_path)
    weights = read_peft(tmp_path, manifest()).weights
    assert isinstance(weights, LoraWeights)
    for i in range(LAYERS):
        for module, parts in (("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")), ("mlp.gate_up_proj", ("gate_proj", "up_proj"))):
            whole = model.get_submodule(f"base_model.model.model.layers.{i}.{module}").get_delta_weight("default").detach().numpy()
            stem = f"model.layers.{i}.{module.split('.')[0]}"
            got = np.concatenate([(d.b @ d.a) * d.scale for part in parts for d in (weights.deltas[f"{stem}.{part}"],)])
            np.testing.assert_allclose(got, whole, rtol=1e-5, atol=1e-5)


def test_other_wrappers_around_the_base_do_not_matter(base: Any, tmp_path: Path) -> None:
    peft_adapter(copy.deepcopy(base).model, lora(task_type=None), 7, tmp_path)  # "layers.0..." without "model."
    weights = read_peft(tmp_path, manifest()).weights
    assert isinstance(weights, LoraWeights)
    assert set(weights.deltas) == {one.name for one in LINEARS if one.name.endswith(("q_proj", "v_proj"))}


def test_half_precision_weights_are_read(base: Any, tmp_path: Path) -> None:
    peft_adapter(copy.deepcopy(base), lora(), 8, tmp_path)
    exact = read_peft(tmp_path, manifest()).weights
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    save_torch({name: value.to(torch.bfloat16) for name, value in load_torch(tmp_path / TENSORS).items()}, tmp_path / TENSORS)
    rounded = read_peft(tmp_path, manifest()).weights
    assert isinstance(exact, LoraWeights)
    assert isinstance(rounded, LoraWeights)
    for layer, delta in exact.deltas.items():
        np.testing.assert_allclose(rounded.deltas[layer].a, delta.a, rtol=1 / 128)


@pytest.mark.parametrize("projection", [False, True])
def test_prefixes_are_those_that_peft_hands_to_the_model(projection: bool, base: Any, tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projection, encoder_hidden_size=6)
    model = peft_adapter(copy.deepcopy(base), config, 9, tmp_path)
    weights = read_peft(tmp_path, manifest()).weights
    assert isinstance(weights, PrefixWeights)
    assert weights.keys.shape == (LAYERS, KV_HEADS, 5, HEAD_DIM)
    past = model.get_prompt(1)
    for i in range(LAYERS):
        layer = past.layers[i]
        np.testing.assert_allclose(weights.keys[i], layer.keys[0].detach().numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(weights.values[i], layer.values[0].detach().numpy(), rtol=1e-5, atol=1e-5)


def test_prompts_are_those_that_peft_puts_before_the_text(base: Any, tmp_path: Path) -> None:
    for name, config in (
        ("prompt", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        ("p", peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8)),
    ):
        model = peft_adapter(copy.deepcopy(base), config, 10, tmp_path / name)
        weights = read_peft(tmp_path / name, manifest()).weights
        assert isinstance(weights, PromptWeights)
        np.testing.assert_allclose(weights.rows, model.get_prompt(1)[0].detach().numpy(), rtol=1e-5, atol=1e-6)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "biases": ({"bias": "all"}, "bias"),
    "a trained head": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "biases of LoRA": ({"lora_bias": True}, "lora_bias"),
    "a repeated layer": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "trained tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "bare parameters": ({"target_parameters": ["x"]}, "target_parameters"),
    "activated LoRA": ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
    "a key from the future": ({"use_magic": {"x": 1}}, "use_magic"),
    "a start that moves the base": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    "another method": ({"peft_type": "IA3"}, "peft_type"),
    "no method": ({"peft_type": ["LORA"]}, "peft_type"),
    "rank of text": ({"r": "4"}, "r"),
    "rank of zero": ({"r": 0}, "r"),
    "a huge rank": ({"r": 100_000}, "r"),
    "an endless alpha": ({"lora_alpha": 1e300}, "lora_alpha"),
    "patterns of another kind": ({"rank_pattern": [1]}, "rank_pattern"),
    "a hostile pattern": ({"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern"),
    "a broken pattern": ({"target_modules": "(q_proj"}, "target_modules"),
    "targets of numbers": ({"target_modules": [1]}, "target_modules"),
    "layers of text": ({"layers_to_transform": ["1"]}, "layers_to_transform"),
}


@pytest.fixture(scope="module")
def saved(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    peft_adapter(copy.deepcopy(base), lora(), 11, folder)
    return folder


def spoiled(saved: Path, to: Path, config: dict[str, Any] | None = None, tensors: dict[str, np.ndarray | None] | None = None) -> Path:
    to.mkdir(exist_ok=True)
    (to / "adapter_config.json").write_text(json.dumps({**json.loads((saved / "adapter_config.json").read_text()), **(config or {})}))
    merged = {**load_file(saved / TENSORS), **(tensors or {})}
    save_file({name: value for name, value in merged.items() if value is not None}, to / TENSORS)
    return to


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_done_is_refused_by_its_key(name: str, saved: Path, tmp_path: Path) -> None:
    change, key = CHANGES[name]
    with pytest.raises(ModelRejected) as refused:
        read_peft(spoiled(saved, tmp_path, change), manifest())
    assert refused.value.metadata["field"] == key
    assert key in refused.value.message


STEM = "base_model.model.model.layers.0.self_attn.q_proj"
TENSOR_CHANGES: dict[str, dict[str, np.ndarray | None]] = {
    "another rank": {f"{STEM}.lora_A.weight": np.ones((5, HIDDEN), np.float32)},
    "another width": {f"{STEM}.lora_B.weight": np.ones((HIDDEN + 1, 4), np.float32)},
    "not finite": {f"{STEM}.lora_A.weight": np.full((4, HIDDEN), np.nan, np.float32)},
    "whole numbers": {f"{STEM}.lora_A.weight": np.ones((4, HIDDEN), np.int32)},
    "half of a pair": {f"{STEM}.lora_B.weight": None},
    "a missing layer": {f"{STEM}.lora_A.weight": None, f"{STEM}.lora_B.weight": None},
    "embeddings": {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, WORDS), np.float32)},
    "a head": {"base_model.model.lm_head.weight": np.ones((WORDS, HIDDEN), np.float32)},
    "an unnamed layer": {f"{STEM.replace('q_', 'k_')}.lora_{p}.weight": np.ones((4, HIDDEN), np.float32) for p in "AB"},
    "a layer of another base": {f"{STEM.replace('layers.0', 'layers.9')}.lora_{p}.weight": np.ones((4, HIDDEN), np.float32) for p in "AB"},
    "nothing": dict.fromkeys([f"base_model.model.{one.name}.lora_{p}.weight" for one in LINEARS for p in "AB"]),
}


@pytest.mark.parametrize("name", TENSOR_CHANGES)
def test_tensors_that_are_not_the_configurations_are_refused(name: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelRejected) as refused:
        read_peft(spoiled(saved, tmp_path, None, TENSOR_CHANGES[name]), manifest())
    assert refused.value.metadata.get("tensor") or refused.value.metadata.get("field") == TENSORS


def test_pickles_and_damaged_files_are_not_opened(saved: Path, tmp_path: Path) -> None:
    (spoiled(saved, tmp_path) / TENSORS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelRejected, match="pickle"):
        read_peft(tmp_path, manifest())
    whole = (saved / TENSORS).read_bytes()
    for cut in (b"", whole[:7], whole[:100], whole[:-1], (1 << 60).to_bytes(8, "little") + whole[8:]):
        (tmp_path / TENSORS).write_bytes(cut)
        with pytest.raises(ModelRejected):
            read_peft(tmp_path, manifest())
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(ModelRejected):
        read_peft(tmp_path, manifest())


def test_prompts_of_another_base_are_refused(base: Any, tmp_path: Path) -> None:
    peft_adapter(copy.deepcopy(base), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), 12, tmp_path)
    with pytest.raises(ModelRejected, match="prompt_embeddings"):
        read_peft(tmp_path, manifest(hidden_size=HIDDEN * 2))
    with pytest.raises(ModelRejected, match="num_virtual_tokens"):
        read_peft(tmp_path, manifest(max_tokens=4))
