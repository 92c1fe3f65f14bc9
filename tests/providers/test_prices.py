"""Costs: whole, never below the bill, by the configuration's prices over the table's."""

from __future__ import annotations

import datetime
import importlib.resources
import json

import pytest

from server.core import Format, Image, Message, Tool, Usage
from server.errors import InvalidArgument
from server.providers.base import Prompt
from server.providers.make import make_providers
from server.providers.presets import key_of, presets
from server.providers.prices import Price, Prices, input_bound, input_estimate, table
from server.settings import PriceConfig, ProviderConfig


def test_costs_are_whole_and_never_below_the_bill() -> None:
    assert Price(0.15, 0.6).cost_micro_usd(Usage(1000, 100)) == 210
    assert Price(0.15, 0.6).cost_micro_usd(Usage(1, 0)) == 1
    assert Price(3.0, 15.0).cost_micro_usd(Usage(0, 0)) == 0
    assert Price(0.1, 0.0).cost_micro_usd(Usage(30, 0)) == 3, "0.1 * 30 is a hair above 3 in floating point"
    assert Price(1.0, 0.0, 0.25).cost_micro_usd(Usage(100, 0, cached=40)) == 70
    assert Price(1.0, 0.0).cost_micro_usd(Usage(100, 0, cached=40)) == 100


def test_the_worst_cost_bounds_any_tokenizer() -> None:
    config = ProviderConfig(base_url="http://127.0.0.1:1/v1", prices={"m": PriceConfig(input_per_million_usd=1, output_per_million_usd=10)})
    prices = Prices(config, presets()["openai"])
    worst = prices.worst_micro_usd("m", Prompt.of("é" * 10, "x" * 10, 16))
    assert worst is not None and worst >= 30 + 160
    assert prices.worst_micro_usd("unknown", Prompt.of("", "x", 1)) is None
    plain = Prompt.of("", "x", 16)
    image = Prompt((Message("user", "x", images=(Image("image/png", b"x"),)),), 16)
    tool = Prompt(plain.messages, 16, tools=(Tool("t", "d" * 100, {"type": "object"}),))
    schema = Prompt(plain.messages, 16, format=Format("json_schema", '{"type": "object"}'))
    for richer in (image, tool, schema):
        assert input_bound(richer) > input_bound(plain) + 100 and input_estimate(richer) > input_estimate(plain) + 100


def test_the_configuration_is_over_the_table_and_the_table_only_at_home() -> None:
    openai, here = presets()["openai"], "http://127.0.0.1:1/v1"
    assert Prices(ProviderConfig(), openai).find("gpt-4o-mini") == Price(0.15, 0.6, 0.075)
    assert Prices(ProviderConfig(base_url="https://api.openai.com/v1/"), openai).find("gpt-4o-mini-2024-07-18") == Price(0.15, 0.6, 0.075)
    assert Prices(ProviderConfig(base_url=here), openai).find("gpt-4o-mini") is None, "another vendor's prices are not known"
    own = ProviderConfig(prices={"gpt-4o-mini": PriceConfig(input_per_million_usd=7)})
    assert Prices(own, openai).find("gpt-4o-mini") == Price(7.0, 0.0)
    assert Prices(own, openai).find("gpt-9") is None
    assert Prices(ProviderConfig(kind="ollama"), presets()["ollama"]).worst_micro_usd("any", Prompt.of("", "x", 1)) == 0
    claude = Prices(ProviderConfig(kind="anthropic"), presets()["anthropic"])
    assert claude.find("claude-haiku-4-5-20251001") == Price(1, 5, 0.1)


def test_the_table_says_where_it_is_from() -> None:
    data = json.loads(importlib.resources.files("server.providers").joinpath("prices.json").read_text(encoding="utf-8"))
    assert "overrides" in data["about"]
    for kind, vendor in data["vendors"].items():
        assert vendor["source"].startswith("https://") and vendor["how"] and datetime.date.fromisoformat(vendor["date"])
        assert presets()[kind]
        for model, (cost_in, cost_out, cached) in vendor["models"].items():
            assert 0 <= cost_in < 100 and 0 <= cost_out < 200 and (cached is None or cached < cost_in), model
    assert sum(len(models) for models in table().values()) >= 24


def test_kinds_bring_their_address_and_key() -> None:
    for kind, preset in presets().items():
        assert preset.source and (preset.base_url or kind == "compatible")
        config = ProviderConfig(kind=kind, base_url=preset.base_url or "http://127.0.0.1:1/v1")  # type: ignore[arg-type]
        environ = {preset.api_key_env: "secret"} if preset.api_key_env else {}
        made = make_providers({"x": config}, environ=environ)["x"]
        assert made.name == "x" and repr(made) in ("OpenAIProvider('x')", "AnthropicProvider('x')")
        if preset.api_key_env:
            with pytest.raises(InvalidArgument, match=preset.api_key_env):
                make_providers({"x": config}, environ={})


def test_a_key_goes_only_where_it_was_named_for() -> None:
    groq = presets()["groq"]
    elsewhere = ProviderConfig(kind="groq", base_url="http://127.0.0.1:1/v1")
    assert key_of(elsewhere, groq, {"GROQ_API_KEY": "secret"}) == ""
    named = ProviderConfig(kind="groq", base_url="http://127.0.0.1:1/v1", api_key_env="GROQ_API_KEY")
    assert key_of(named, groq, {"GROQ_API_KEY": " secret\n"}) == "secret"
    for broken in ("se cret", "se\x00cret", "schlüssel"):
        with pytest.raises(InvalidArgument) as caught:
            key_of(named, groq, {"GROQ_API_KEY": broken})
        assert broken not in caught.value.message


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "compatible"},
        {"kind": "nobody"},
        {"base_url": "api.openai.com"},
        {"base_url": "ftp://x/v1"},
        {"base_url": "https://x/v1?key=secret"},
        {"base_url": "https://secret@x/v1"},
        {"api_key_env": "A", "api_key_file": "b"},
        {"requests_per_minute": 0},
        {"timeout_s": 0},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError) as caught:
        ProviderConfig(**settings)  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)
