"""The sections of the configuration that say who answers and where things are kept; `server.config` reads them.

Secrets are never values here: a setting names an environment variable or a file that holds the secret.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from server.core import Task
from server.errors import InvalidArgument

MIB = 1 << 20
EnvName = Annotated[str, StringConstraints(pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class SkillConfig(Section):
    """A named job. `teacher` is "provider/model"; `base` is a model of the repository; give `labels` or `labels_file` (one a line)."""

    task: Task = Task.TEXT_CLASSIFICATION
    instruction: str = ""
    labels: list[str] = []
    labels_file: str = ""
    teacher: str = ""
    base: str = ""
    deliver_bar: float = Field(default=0.8, ge=0, le=1)
    min_rows: int = Field(default=100, ge=1)  # the trainer refuses fewer
    max_cost_micro_usd: int | None = Field(default=None, ge=0)  # most that one item may cost, in 1e-6 US dollars; unset: no limit

    @field_validator("teacher")
    @classmethod
    def _teacher(cls, value: str) -> str:
        if value and not all(value.partition("/")[::2]):
            raise ValueError('must be "provider/model", for example "openai/gpt-4o-mini"')
        return value

    @model_validator(mode="after")
    def _one_source(self) -> SkillConfig:
        if self.labels and self.labels_file:
            raise ValueError("give labels or labels_file, not both")
        return self

    def read_labels(self) -> list[str]:
        """The classes in order. Raises InvalidArgument when the file cannot be read."""
        if not self.labels_file:
            return list(self.labels)
        return [line.strip() for line in read_text(self.labels_file, "labels_file").splitlines() if line.strip()]


class PriceConfig(Section):
    """Prices of one provider model in US dollars a million tokens."""

    input_per_million_usd: float = Field(default=0.0, ge=0)
    output_per_million_usd: float = Field(default=0.0, ge=0)


class ProviderConfig(Section):
    """A vendor. The key comes from the environment variable `api_key_env` or the file `api_key_file`."""

    kind: Literal["openai"] = "openai"
    base_url: str = ""
    api_key_env: EnvName = ""
    api_key_file: str = ""
    timeout_s: float = Field(default=30.0, gt=0)
    max_retries: int = Field(default=2, ge=0, le=10)
    max_concurrent: int = Field(default=16, ge=1)
    training_allowed: bool = False  # whether the vendor's terms let you train models on its answers; the trainer leaves others out
    prices: dict[str, PriceConfig] = {}

    @field_validator("base_url")
    @classmethod
    def _public(cls, value: str) -> str:
        return without_password(value)

    def read_api_key(self, environ: Mapping[str, str] | None = None) -> str:
        """The key, or "" where none is configured. Raises InvalidArgument when the place that was named holds none."""
        return read_secret(self.api_key_env, self.api_key_file, "api_key", environ)


class LakeConfig(Section):
    """Where interactions are kept."""

    path: str = "data/lake"
    flush_s: float = Field(default=10.0, gt=0)  # how often the log is forced to the disk and sealed segments become Parquet
    segment_bytes: int = Field(default=8 * MIB, ge=4096)


class RegistryConfig(Section):
    """Which database. A password is never in `url`: `password_env` or `password_file` names its place."""

    url: str = "sqlite:///data/registry.db"
    password_env: EnvName = ""
    password_file: str = ""

    @field_validator("url")
    @classmethod
    def _public(cls, value: str) -> str:
        return without_password(value, user_allowed=True)

    def read_password(self, environ: Mapping[str, str] | None = None) -> str:
        """The password, or "" where none is configured. Raises InvalidArgument when the place that was named holds none."""
        return read_secret(self.password_env, self.password_file, "password", environ)


def read_text(path: str, field: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        message = f"{field}: {path} cannot be read: {error}. Give the path of a UTF-8 file."
        raise InvalidArgument(message, field=field, place=path) from error


def read_secret(env: str, file: str, field: str, environ: Mapping[str, str] | None) -> str:
    environ = os.environ if environ is None else environ
    if env:
        if not environ.get(env):
            raise InvalidArgument(f"{field}_env names {env}, which is not set. Export it before the start.", field=f"{field}_env")
        return environ[env].strip()
    return read_text(file, f"{field}_file").strip() if file else ""


def without_password(value: str, *, user_allowed: bool = False) -> str:
    try:
        parts = urlsplit(value)
        secret = parts.password is not None or (parts.username is not None and not user_allowed)
    except ValueError as error:
        raise ValueError("is not a URL") from error
    if secret:
        raise ValueError("must hold no credentials; name the place that holds them with a setting that ends in _env or _file")
    return value
