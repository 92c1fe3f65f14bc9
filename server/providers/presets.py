"""What is known of each kind of provider: presets.json as objects."""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from server.errors import InvalidArgument
from server.settings import ProviderConfig


@dataclass(slots=True, frozen=True)
class Preset:
    """A kind of provider. The fields are explained in presets.json, under `fields`."""

    wire: Literal["openai", "anthropic"]
    base_url: str
    api_key_env: str
    schema: Literal["json_schema", "json_object"]
    source: str
    fixed_sampling: str = ""
    max_completion_tokens: bool = False
    stream_usage: bool = False
    seed: bool = False
    logprobs: bool = False
    penalties: bool = False
    names: bool = False
    embeddings: bool = False
    embeddings_base64: bool = False
    free: bool = False

    def samples_freely(self, model: str) -> bool:
        """Whether the model takes temperature and top_p."""
        return not (self.fixed_sampling and re.search(self.fixed_sampling, model))


@functools.cache
def presets() -> Mapping[str, Preset]:
    """Each kind by its name."""
    text = importlib.resources.files("server.providers").joinpath("presets.json").read_text(encoding="utf-8")
    return {kind: Preset(**fields) for kind, fields in json.loads(text)["kinds"].items()}


def at_home(config: ProviderConfig, preset: Preset) -> bool:
    """Whether requests go to the kind's own address, so that its own key and its own prices hold."""
    return not config.base_url or config.base_url.rstrip("/") == preset.base_url


def key_of(config: ProviderConfig, preset: Preset, environ: Mapping[str, str]) -> str:
    """The key, or "" where none is needed. Raises InvalidArgument where a kind needs one and no place holds it."""
    if config.api_key_env or config.api_key_file:
        key = config.read_api_key(environ)
    elif not preset.api_key_env or not at_home(config, preset):
        return ""
    else:
        key = environ.get(preset.api_key_env, "").strip()
        if not key:
            message = (
                f"A provider of kind {config.kind!r} reads its key from {preset.api_key_env}, which is not set. "
                "Export it before the start, or name its place by api_key_env or api_key_file."
            )
            raise InvalidArgument(message, field="api_key_env")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidArgument("The key holds characters that no HTTP header may hold. Look at its place.", field="api_key_env")
    return key
