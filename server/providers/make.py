"""The providers of a configuration."""

from __future__ import annotations

from collections.abc import Mapping

from server.providers.anthropic import AnthropicProvider
from server.providers.base import Provider
from server.providers.openai import OpenAIProvider
from server.providers.presets import presets
from server.settings import ProviderConfig

_BY_WIRE: dict[str, type[OpenAIProvider] | type[AnthropicProvider]] = {"openai": OpenAIProvider, "anthropic": AnthropicProvider}


def make_providers(configs: Mapping[str, ProviderConfig], *, environ: Mapping[str, str] | None = None) -> dict[str, Provider]:
    """One client each, by name. Imports no vendor's library and opens no connection; raises InvalidArgument where a key is missing."""
    return {name: _BY_WIRE[presets()[config.kind].wire](name, config, environ=environ) for name, config in configs.items()}
