"""What a model costs: the configuration's prices over those of prices.json, and cautious counts where nobody has counted yet."""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from server.core import Usage
from server.providers.base import Prompt
from server.providers.presets import Preset, at_home
from server.settings import ProviderConfig

# What a chat template adds around the messages, and a vendor around tools, generously.
_TEMPLATE_TOKENS = 32
_TOKENS_PER_MESSAGE = 8
_TOOL_TOKENS = 512
# The most that one picture counts at OpenAI (gpt-4o-mini: 2833 + 8 tiles of 5667); others count hundreds to a few thousands.
_IMAGE_BOUND = 48_169
_IMAGE_TOKENS = 1_500
# English has some four bytes a token; other languages have fewer.
_BYTES_PER_TOKEN = 3
# Vendors sell dated snapshots of a model at the model's price: gpt-4o-mini-2024-07-18, claude-haiku-4-5-20251001.
_SNAPSHOT = re.compile(r"-(\d{4}-\d{2}-\d{2}|\d{8})$")


@dataclass(slots=True, frozen=True)
class Price:
    """US dollars a million tokens, which are also millionths of a dollar a token. `cached_input` None: as `input`."""

    input: float
    output: float
    cached_input: float | None = None

    def cost_micro_usd(self, usage: Usage) -> int:
        """Rounded up, so that a sum of costs is never less than the bill."""
        cached = min(usage.cached, usage.input)
        discount = cached * (self.input - self.cached_input) if self.cached_input is not None else 0.0
        # The product of a price like 0.15 and a count is a hair above the true value: without rounding first, ceil would add a unit.
        return math.ceil(round(usage.input * self.input - discount + usage.output * self.output, 6))


class Prices:
    """The prices of one provider's models. The table's own hold only where requests go to the vendor's own address."""

    def __init__(self, config: ProviderConfig, preset: Preset) -> None:
        self._own = {
            model: Price(p.input_per_million_usd, p.output_per_million_usd, p.cached_input_per_million_usd)
            for model, p in config.prices.items()
        }
        self._table = table().get(config.kind, {}) if at_home(config, preset) else {}
        self._otherwise = Price(0.0, 0.0) if preset.free else None

    def find(self, model: str) -> Price | None:
        """The model's price, or that of the model it is a dated snapshot of; None where there is none."""
        family = _SNAPSHOT.sub("", model)
        for prices in (self._own, self._table):
            found = prices.get(model) or prices.get(family)
            if found is not None:
                return found
        return self._otherwise

    def cost_micro_usd(self, model: str, usage: Usage) -> int:
        """0 where the model has no price."""
        price = self.find(model)
        return price.cost_micro_usd(usage) if price else 0

    def worst_micro_usd(self, model: str, prompt: Prompt) -> int | None:
        """What the prompt costs at the very most: a token is at least one byte."""
        price = self.find(model)
        return None if price is None else price.cost_micro_usd(Usage(input_bound(prompt), prompt.max_tokens))


@functools.cache
def table() -> Mapping[str, Mapping[str, Price]]:
    """prices.json: kind -> model -> price."""
    text = importlib.resources.files("server.providers").joinpath("prices.json").read_text(encoding="utf-8")
    vendors = json.loads(text)["vendors"]
    return {kind: {model: Price(*numbers) for model, numbers in vendor["models"].items()} for kind, vendor in vendors.items()}


def input_bound(prompt: Prompt) -> int:
    """Tokens that the prompt has at most, with any tokenizer."""
    return _prompt_bytes(prompt) + _overhead(prompt) + _IMAGE_BOUND * _images(prompt)


def input_estimate(prompt: Prompt) -> int:
    """Tokens that the prompt has in all likelihood at most: for rate limits, and for vendors that do not say."""
    return _prompt_bytes(prompt) // _BYTES_PER_TOKEN + _overhead(prompt) + _IMAGE_TOKENS * _images(prompt)


def output_estimate(text: str) -> int:
    """The same of an answer."""
    return len(text.encode()) // _BYTES_PER_TOKEN + 1


def _prompt_bytes(prompt: Prompt) -> int:
    size = 0
    for message in prompt.messages:
        size += len(message.content.encode()) + len(message.name.encode())
        for call in message.tool_calls:
            size += len(call.name.encode()) + len(call.arguments.encode())
    for tool in prompt.tools:
        size += len(tool.name.encode()) + len(tool.description.encode()) + len(json.dumps(tool.parameters))
    return size + (2 * len(prompt.format.source.encode()) if prompt.format else 0)


def _overhead(prompt: Prompt) -> int:
    return _TEMPLATE_TOKENS + _TOKENS_PER_MESSAGE * len(prompt.messages) + (_TOOL_TOKENS if prompt.tools or prompt.format else 0)


def _images(prompt: Prompt) -> int:
    return sum(len(message.images) for message in prompt.messages)
