"""What a vendor's fine-tuning costs and until when it is to be had: offers.json as objects, with the clock given by the caller."""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

from server.errors import FailedPrecondition, InvalidArgument
from server.settings import ProviderConfig

# Vendors sell dated snapshots of a model at the model's price, and end them together.
_SNAPSHOT = re.compile(r"-(\d{4}-\d{2}-\d{2}|\d{8})$")
LOCAL = "Train locally instead: understudy finetune SKILL --provider local."


@dataclass(slots=True, frozen=True)
class Offer:
    """One vendor's. Days are UTC; None: no end is known."""

    models: Mapping[str, float] = field(default_factory=dict)
    least_examples: int = 10
    default_model: str = ""
    closed_to_new: date | None = None
    closed_to_inactive: date | None = None
    ends: date | None = None
    models_end: Mapping[str, date] = field(default_factory=dict)
    source: str = ""

    def warnings(self, model: str, now: datetime) -> list[str]:
        """What to know before money is spent. Raises FailedPrecondition where the offer or the model has ended."""
        today = now.astimezone(UTC).date()
        dies = self.models_end.get(_family(model))
        if self.ends is not None and today >= self.ends:
            message = f"The vendor takes no new fine-tuning jobs since {self.ends} ({self.source}). {LOCAL}"
            raise FailedPrecondition(message, ends=self.ends)
        if dies is not None and today >= dies:
            message = f"{model} and every fine-tune of it ended on {dies} ({self.source}). {LOCAL}"
            raise FailedPrecondition(message, ends=dies, model=model)
        found = []
        if self.ends is not None:
            left = (self.ends - today).days
            found.append(
                f"The vendor's fine-tuning ends: no new jobs from {self.ends} on, in {left} days. Nothing can be trained again then."
            )
        if dies is not None:
            found.append(f"Fine-tunes of {_family(model)} stop answering on {dies}, in {(dies - today).days} days.")
        if self.closed_to_new is not None and today >= self.closed_to_new:
            inactive = f", to those inactive since {self.closed_to_inactive}" if self.closed_to_inactive else ""
            found.append(
                f"It is closed to organisations that are new to it since {self.closed_to_new}{inactive}: such get HTTP status 403."
            )
        return found

    def price(self, model: str, config: ProviderConfig) -> float:
        """US dollars a million trained tokens. Raises InvalidArgument where no price is known, so that nothing is spent unseen."""
        for name in (model, _family(model)):
            found = config.training_prices.get(name, self.models.get(name))
            if found is not None:
                return found
        known = ", ".join(sorted(self.models)) or "none"
        message = (
            f"There is no price of fine-tuning {model!r}; prices are known of {known}. "
            f'Give providers.<name>.training_prices."{model}", as your contract has it.'
        )
        raise InvalidArgument(message, field="model", model=model)


@dataclass(slots=True, frozen=True)
class Estimate:
    """Before anything is sent. `tokens` are of one epoch; `worst_*` hold with any tokenizer. Money in 1e-6 US dollars."""

    examples: int
    tokens: int
    epochs: int
    per_million_usd: float
    cost_micro_usd: int
    worst_micro_usd: int

    def in_words(self) -> str:
        """One line for people."""
        return (
            f"{self.examples} examples, about {self.tokens} tokens, {self.epochs} epochs at {self.per_million_usd:g} US dollars a million: "
            f"about {self.cost_micro_usd / 1e6:.2f}, at most {self.worst_micro_usd / 1e6:.2f} US dollars"
        )


# English has some four bytes a token; a token is at least one byte, and other languages come nearer to that. A message has some tokens of
# its own.
_BYTES_PER_TOKEN = 4
_TOKENS_PER_MESSAGE = 6


def estimate(examples: int, content_bytes: int, messages: int, epochs: int, per_million_usd: float) -> Estimate:
    """What a training file costs. The vendor charges tokens times epochs."""
    framing = _TOKENS_PER_MESSAGE * messages
    tokens = content_bytes // _BYTES_PER_TOKEN + framing
    worst = content_bytes + framing
    return Estimate(
        examples, tokens, epochs, per_million_usd, cost(tokens * epochs, per_million_usd), cost(worst * epochs, per_million_usd)
    )


def cost(tokens: int, per_million_usd: float) -> int:
    """1e-6 US dollars, rounded up."""
    return math.ceil(round(tokens * per_million_usd, 6))


def offer_of(kind: str) -> Offer:
    """What is known of a kind of provider; an offer without models and ends where nothing is."""
    return _offers().get(kind, Offer())


@functools.cache
def _offers() -> Mapping[str, Offer]:
    text = importlib.resources.files("trainer.hosted").joinpath("offers.json").read_text(encoding="utf-8")
    return {kind: _offer(fields) for kind, fields in json.loads(text)["vendors"].items()}


def _offer(fields: Mapping[str, Any]) -> Offer:
    days = {name: date.fromisoformat(fields[name]) for name in ("closed_to_new", "closed_to_inactive", "ends")}
    return Offer(
        models=fields["models"],
        least_examples=fields["least_examples"],
        default_model=fields["default_model"],
        models_end={model: date.fromisoformat(day) for model, day in fields["models_end"].items()},
        source=fields["source"],
        **days,
    )


def _family(model: str) -> str:
    return _SNAPSHOT.sub("", model)
