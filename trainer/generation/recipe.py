"""How a student is trained: derived from the base's size and the number of rows, so that there is little to set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from server.errors import InvalidArgument

METHODS = ("lora", "full", "prefix", "prompt")
# Enough opinions for a preference stage; fewer say more of who gave them than of the task.
MIN_PREFERENCES = 50
_LADDER = ("lora", "full")
POSITIONS = 16  # of prefix and prompt tuning


@dataclass(slots=True, frozen=True)
class Recipe:
    """`rank` of a LoRA (its alpha is twice that), `positions` of prefix and prompt tuning; `batch` rows a step, of which `micro` at once.

    `distil`: where a teacher told its odds, the share of a token's loss that is the distance to them; the rest is that of the token itself
    (arXiv 1503.02531, section 2). `patience`: looks at the watched rows without a better loss before training ends. `preference`: "dpo",
    "kto" or "".
    """

    method: str
    rank: int = 16
    positions: int = POSITIONS
    rate: float = 1e-3
    epochs: float = 6.0
    batch: int = 16
    micro: int = 16
    warmup: float = 0.03
    patience: int = 3
    distil: float = 0.5
    preference: str = ""
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def methods(asked: str, spec: Mapping[str, Any]) -> tuple[str, ...]:
    """What is tried, cheapest first. Raises InvalidArgument for a method that does not train a student that writes."""
    named = str(spec.get("method") or asked or "auto")
    if named == "auto":
        return _LADDER
    if named not in METHODS:
        message = f"method {named[:64]!r} trains no student that writes; expected auto, {', '.join(METHODS)}."
        raise InvalidArgument(message, field="method")
    return (named,)


def recipe_for(method: str, hidden: int, rows: int, rank_limit: int, spec: Mapping[str, Any]) -> Recipe:
    """The recipe of a base with this hidden size for so many training rows; `spec` may name any of its fields.

    Wide models want small steps: the rate goes with 1 / width (arXiv 2203.03466), and a full fine-tuning's is a tenth of a LoRA's
    (arXiv 2106.09685, table 12 and after). Raises InvalidArgument for values that cannot be.
    """
    rates = {"lora": 0.3 / hidden, "full": 0.04 / hidden, "prefix": 2e-2, "prompt": 5e-2}
    # About a thousand steps for little data, never more than 30 passes over it.
    epochs = min(30.0, max(3.0, 16_000 / max(rows, 1)))
    named = {"rate": min(rates[method], 1e-2 if method in ("lora", "full") else 1.0), "epochs": epochs, "rank": min(16, max(1, rank_limit))}
    own = {key: spec[key] for key in Recipe.__dataclass_fields__ if spec.get(key) is not None and key not in ("method", "preference")}
    if "batch" in own and "micro" not in own:
        own["micro"] = min(int(own["batch"]), 16)
    recipe = Recipe(method, **{**named, **own})
    if recipe.rank > rank_limit and method == "lora":
        message = (
            f"rank {recipe.rank} is above generation.adapter_rank {rank_limit}: no server could load the adapter. Lower it, or raise that."
        )
        raise InvalidArgument(message, field="rank", limit=rank_limit)
    if min(recipe.rank, recipe.positions, recipe.batch, recipe.micro) < 1 or recipe.rate <= 0 or recipe.epochs <= 0:
        raise InvalidArgument("rank, positions, batch, micro, rate and epochs of a recipe are above 0.", field="spec")
    if not 0 <= recipe.distil <= 1:
        raise InvalidArgument(f"distil is {recipe.distil:g}; expected a share of the loss, 0 to 1.", field="distil")
    return recipe


def preference_of(recipe: Recipe, pairs: int, opinions: tuple[int, int]) -> str:
    """The stage after fine-tuning: DPO where there are enough pairs, else KTO where opinions (good, bad) of both kinds are enough.

    Pairs count as a bad and a good opinion. Prompts and prefixes have too few weights for it, and their reference would be a second copy
    of them: they go without.
    """
    if recipe.method not in ("lora", "full"):
        return ""
    if pairs >= MIN_PREFERENCES:
        return "dpo"
    good, bad = opinions[0] + pairs, opinions[1] + pairs
    return "kto" if good + bad >= MIN_PREFERENCES and min(good, bad) >= MIN_PREFERENCES // 5 else ""
