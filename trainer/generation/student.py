"""The torch model that learns: the base whole, or with an adapter of PEFT over it; its trained weights by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from trainer.generation.recipe import Recipe


def make_student(model: Any, recipe: Recipe) -> Any:
    """The model as the recipe's method trains it; its fresh weights follow the recipe's seed."""
    import torch
    from transformers import set_seed

    set_seed(recipe.seed)
    if recipe.method == "full":
        return model.requires_grad_(True)
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model

    configs: dict[str, Any] = {
        "lora": lambda: LoraConfig(
            task_type=TaskType.CAUSAL_LM, r=recipe.rank, lora_alpha=2 * recipe.rank, lora_dropout=0.0, target_modules="all-linear"
        ),
        "prefix": lambda: PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=recipe.positions),
        "prompt": lambda: PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=recipe.positions),
    }
    student = get_peft_model(model, configs[recipe.method]())
    if recipe.method == "prefix":
        with torch.no_grad():  # PEFT begins with keys and values of size 1, which drown a base's own
            for value in student.prompt_encoder.parameters():
                value.mul_(0.1)
    return student


def trained(student: Any) -> dict[str, Any]:
    """The tensors that training changes, by name."""
    return {name: value for name, value in student.named_parameters() if value.requires_grad}


def put_back(student: Any, weights: dict[str, Any]) -> None:
    """Writes such tensors into the model."""
    import torch

    own = trained(student)
    assert set(weights) == set(own), "weights of this very student"
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


def save_student(student: Any, folder: Path) -> None:
    """As PEFT saves an adapter, or transformers a model: safetensors alone."""
    shutil.rmtree(folder, ignore_errors=True)
    student.save_pretrained(folder, safe_serialization=True)
    for readme in folder.glob("README.md"):  # a template of PEFT's without content
        readme.unlink()
