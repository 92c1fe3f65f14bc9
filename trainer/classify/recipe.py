"""With what an encoder is trained: one dial, the number of rows, and everything else follows from it unless a search says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

LORA, FULL = "lora", "full"
# Below so many rows a label contrast between rows teaches more than their labels (Tunstall et al. 2022, SetFit).
FEW_A_LABEL = 25
# Validation is a share of the training rows; with fewer of them than this it would say nothing, and the length is fixed.
MIN_VALIDATED = 1000
VALIDATED = 0.1
# Of a second student: steps that are enough, and the fewest epochs all the same.
_SECOND_STEPS = 480
_SECOND_EPOCHS = 3


@dataclass(slots=True, frozen=True)
class Recipe:
    """Rates are of AdamW. `decay`: each layer's rate is that of the layer above times this. `smoothing`: of labels (Szegedy et al. 2016).

    `contrastive`: weight of the supervised contrastive loss (Khosla et al. 2020), at `tau`. `rdrop`: weight of the divergence between two
    passes under dropout (Liang et al. 2021); 0: one pass. `average`: of the weights over steps (0: none). `rank`: of LoRA. `views`: rows
    of one label that a batch draws together, 1: none. `named`: the labels' own words are rows too. `again`: a second student learns from
    requests without labels too, which the first one labelled. `patience`: epochs without a better validation that end the training.
    """

    method: str = FULL
    epochs: int = 10
    batch: int = 64
    accumulate: int = 1
    lr: float = 2e-4
    head_lr: float = 5e-3
    warmup: float = 0.1
    decay: float = 0.9
    weight_decay: float = 0.01
    dropout: float = 0.1
    smoothing: float = 0.1
    scale: float = 20.0
    contrastive: float = 0.3
    tau: float = 0.07
    rdrop: float = 0.0
    average: float = 0.995
    rank: int = 16
    views: int = 1
    named: bool = False
    again: bool = False
    patience: int = 3
    max_tokens: int = 128
    validated: float = 0.0
    seed: int = 0

    def with_(self, changes: Mapping[str, Any]) -> Recipe:
        """The recipe with some fields changed."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def second_recipe(first: Recipe, rows: int, labels: int) -> Recipe:
    """For the student that learns from `rows` rows, most of which the first student labelled: a few passes over many, more over few."""
    recipe = recipe_for(first.method, max(rows, FEW_A_LABEL * labels), labels, seed=first.seed)
    epochs = min(max(round(_SECOND_STEPS * recipe.batch / rows), _SECOND_EPOCHS), recipe.epochs)
    return replace(recipe, epochs=epochs, validated=first.validated, max_tokens=first.max_tokens)


def recipe_for(method: str, rows: int, labels: int, *, seed: int = 0) -> Recipe:
    """The recipe for so many training rows of so many labels, as measured on Banking77 (docs/training.md has the figures)."""
    few = rows < FEW_A_LABEL * labels
    recipe = Recipe(method=method, seed=seed, validated=VALIDATED if rows >= MIN_VALIDATED else 0.0)
    if few:
        recipe = replace(recipe, epochs=10, lr=1e-4, contrastive=1.0, tau=0.1, views=2, average=0.9, named=True, again=True)
    if method == LORA:
        recipe = replace(recipe, lr=10 * recipe.lr)
    return recipe
