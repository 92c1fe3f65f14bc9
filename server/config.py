"""The one place that reads settings: flag > environment > file > default.

- file: TOML, `understudy.toml` in the working directory, or the one that `--config` or `UNDERSTUDY_CONFIG` names;
- environment: `UNDERSTUDY_SECTION__KEY`, e.g. `UNDERSTUDY_SERVER__PORT=50052`; lists as JSON or with commas;
- flag: `--port`, and `--set section.key=value` for the rest.

Unknown keys are errors. Secrets are never values here: a setting names an environment variable or a file that holds the secret.
Relative paths are taken from the working directory. Times end in `_s` and are seconds; sizes end in `_bytes`.
"""

from __future__ import annotations

import json
import os
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from server.core import Task
from server.errors import InvalidArgument, near_names
from server.settings import (
    MIB,
    SKILL_TASKS,
    AuthConfig,
    BudgetConfig,
    CurationConfig,
    LakeConfig,
    Name,
    ProviderConfig,
    RegistryConfig,
    RolloutConfig,
    RoutingConfig,
    Section,
    SkillConfig,
    TrainingConfig,
    read_text,
    without_password,
)

DEFAULT_FILE = "understudy.toml"
PREFIX = "UNDERSTUDY_"


class TlsConfig(Section):
    """Off while `cert_file` is empty. With `client_ca_file`, only clients with a certificate of that authority get in."""

    cert_file: str = ""
    key_file: str = ""
    client_ca_file: str = ""
    reload_s: float = Field(default=10.0, gt=0)  # how often the files' times are looked at

    @model_validator(mode="after")
    def _whole(self) -> TlsConfig:
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("needs both cert_file and key_file, or neither")
        if self.client_ca_file and not self.cert_file:
            raise ValueError("client_ca_file needs cert_file and key_file too")
        return self


class KeepaliveConfig(Section):
    """HTTP/2 pings and the age of connections; 0 means "no limit" where it says so."""

    time_s: float = Field(default=300.0, ge=1)  # the server pings a silent connection this often
    timeout_s: float = Field(default=20.0, ge=1)  # and closes it after this long without an answer
    client_interval_s: float = Field(default=10.0, ge=0)  # clients that ping more often are sent away (ENHANCE_YOUR_CALM)
    max_connection_idle_s: float = Field(default=0.0, ge=0)  # 0: no limit
    max_connection_age_s: float = Field(default=0.0, ge=0)  # 0: no limit


class ServerConfig(Section):
    """The gRPC front. `port` 0 takes a free one, `metrics_port` 0 turns the Prometheus page off."""

    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535)
    metrics_host: str = "127.0.0.1"
    metrics_port: int = Field(default=9464, ge=0, le=65535)
    grace_s: float = Field(default=30.0, ge=0)  # how long accepted calls may run on after SIGTERM
    max_message_bytes: int = Field(default=64 * MIB, ge=1024, le=2_147_483_647)
    max_items: int = Field(default=2048, ge=1, le=2048)  # the protos promise 2048 at most
    max_concurrent_calls: int = Field(default=4096, ge=1)
    reflection: bool = True
    reuse_port: bool = False
    keepalive: KeepaliveConfig = KeepaliveConfig()
    tls: TlsConfig = TlsConfig()


class LogConfig(Section):
    """`format` auto: for people on a terminal, JSON lines elsewhere. `access` writes one line a call."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"
    access: bool = True


class TelemetryConfig(Section):
    """OpenTelemetry. Off while there is no endpoint; OTEL_EXPORTER_OTLP_ENDPOINT is read where `otlp_endpoint` is empty."""

    otlp_endpoint: str = ""
    otlp_insecure: bool = True
    service_name: str = "understudy"
    sample_ratio: float = Field(default=1.0, ge=0, le=1)

    @field_validator("otlp_endpoint")
    @classmethod
    def _public(cls, value: str) -> str:
        return without_password(value)


class ModelsConfig(Section):
    """`load`: what is loaded at start, as "name" (its newest version) or "name@version"; "*" is every model of the repository.

    `default`: which model answers for a task when a call names none, e.g. {"feature-extraction": "all-minilm-l6-v2"}.
    """

    path: str = "models"
    load: list[str] = ["*"]
    default: dict[Task, Name] = {}
    adapter_poll_s: float = Field(default=1.0, gt=0)  # how often new adapter versions are looked for


class RuntimeConfig(Section):
    """The engines. `threads` 0: as many as there are cores; `token_budget` 0: the engine's own choice."""

    threads: int = Field(default=0, ge=0, le=1024)
    token_budget: int = Field(default=0, ge=0)
    queue_sequences: int = Field(default=4096, ge=1)
    queue_tokens: int = Field(default=1_048_576, ge=1)
    spinning: bool = False
    execution_providers: list[str] = ["CPUExecutionProvider"]


class GenerationConfig(Section):
    """The engines of decoder models; sizes are of each model. `kv_cache_bytes` 0: 1 GiB, or a quarter of the free memory if less.

    `adapter_slots` adapters of up to `adapter_rank` fit into a model's bank at a time; 0 turns adapters off. Encoders that take adapters
    have such a bank too. `adapters`: what is loaded with its model, as "model/adapter" (its newest version) or "model/adapter@version"; "*"
    is every adapter that fits.
    """

    max_sequences: int = Field(default=32, ge=1, le=1024)  # answers that run at once
    token_budget: int = Field(default=512, ge=1, le=65536)  # tokens a step: one an answer, and pieces of prompts
    kv_cache_bytes: int = Field(default=0, ge=0)
    max_waiting: int = Field(default=256, ge=1)
    max_waiting_tokens: int = Field(default=1_048_576, ge=1)
    prefix_cache: bool = True
    prompt_share: float = Field(default=1.2, gt=0)  # how much a prompt may lengthen the steps of running answers
    ageing_s: float = Field(default=10.0, gt=0)  # a low priority that waited so long counts as one level higher
    message_rate: float = Field(default=300.0, gt=0)  # messages a second over all streams, before tokens travel together
    adapter_slots: int = Field(default=8, ge=0, le=1024)
    adapter_rank: int = Field(default=16, ge=1, le=512)
    adapters: list[str] = ["*"]


class Config(Section):
    """Everything, frozen. Names of skills and providers are those that callers use."""

    server: ServerConfig = ServerConfig()
    auth: AuthConfig = AuthConfig()
    log: LogConfig = LogConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    models: ModelsConfig = ModelsConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    generation: GenerationConfig = GenerationConfig()
    skills: dict[Name, SkillConfig] = {}
    providers: dict[Name, ProviderConfig] = {}
    routing: RoutingConfig = RoutingConfig()
    rollout: RolloutConfig = RolloutConfig()
    training: TrainingConfig = TrainingConfig()
    curation: CurationConfig = CurationConfig()
    budget: BudgetConfig = BudgetConfig()
    lake: LakeConfig = LakeConfig()
    registry: RegistryConfig = RegistryConfig()

    @model_validator(mode="after")
    def _providers_exist(self) -> Config:
        named = {f"skills.{name}.teacher": skill.teacher for name, skill in self.skills.items()}
        named |= {f"skills.{name}.fallbacks[{i}]": model for name, skill in self.skills.items() for i, model in enumerate(skill.fallbacks)}
        named |= {f"routing.default_fallbacks[{i}]": model for i, model in enumerate(self.routing.default_fallbacks)}
        named["routing.default_teacher"] = self.routing.default_teacher
        for place, model in named.items():
            provider = model.partition("/")[0]
            if provider and provider not in self.providers:
                raise ValueError(f"{place} names the provider {provider!r}; {near_names(provider, list(self.providers))}")
        return self

    @model_validator(mode="after")
    def _budgets_name_what_exists(self) -> Config:
        for kind, budgets, known in (
            ("providers", self.budget.providers, list(self.providers)),
            ("skills", self.budget.skills, [*self.skills, *SKILL_TASKS]),
        ):
            for name in budgets:
                if name not in known:
                    raise ValueError(f"budget.{kind}.{name} has a limit, but there is no such name in {kind}; {near_names(name, known)}")
        return self


def load_config(
    file: str | Path | None = None,
    *,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Reads and joins all sources.

    Args:
        file: the TOML file; None means UNDERSTUDY_CONFIG, else understudy.toml where it exists.
        flags: dotted keys ("server.port") with values; None values are skipped.
        environ: the environment; None means the process's.

    Raises:
        InvalidArgument: unknown key, wrong value, unreadable file; metadata `field` is the dotted key, `place` where it stands.
    """
    environ = os.environ if environ is None else environ
    named = file if file is not None else environ.get(PREFIX + "CONFIG") or None
    path = Path(named) if named is not None else Path(DEFAULT_FILE)
    tree: dict[str, Any] = {}
    places: dict[str, str] = {}
    text = ""
    if named is not None or path.exists():
        text = read_text(str(path), "config")
        try:
            tree = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InvalidArgument(f"{path} is not TOML: {error}", field="config", place=str(path)) from error
    for name, value in sorted(environ.items()):
        if name.startswith(PREFIX) and "__" in name:
            key = name[len(PREFIX) :].lower().split("__")
            _put(tree, _real_names(tree, key), value, places, f"environment variable {name}")
    for dotted, flag in (flags or {}).items():
        if flag is not None:
            _put(tree, _split_flag(dotted), flag, places, f"flag {dotted}")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, places, path, text) from None


def known_keys() -> list[str]:
    """All dotted keys, `*` standing for names that the user chooses."""
    return sorted(_leaves(Config, ""))


def _leaves(model: type[BaseModel], prefix: str) -> list[str]:
    found: list[str] = []
    for name, info in model.model_fields.items():
        inner, many = _section_of(info.annotation)
        if inner is None:
            found.append(prefix + name)
        else:
            found += _leaves(inner, f"{prefix}{name}.{'*.' if many else ''}")
    return found


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section class that a field holds, and whether it holds a table of them by name."""
    if get_origin(annotation) is dict:
        value = get_args(annotation)[1]
        return (value, True) if isinstance(value, type) and issubclass(value, BaseModel) else (None, False)
    return (annotation, False) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else (None, False)


def _real_names(tree: dict[str, Any], key: list[str]) -> list[str]:
    """Variables cannot carry `-` or `.`: a chosen name matches the file's where only those differ."""
    if key[0] == "budget" and len(key) > 3:
        return ["budget", *_real_names({key[1]: {**tree.get(key[1], {}), **tree.get("budget", {}).get(key[1], {})}}, key[1:])]
    if key[0] not in ("skills", "providers", "keys") or len(key) < 2:
        return key
    for name in tree.get(key[0], {}):
        if name.lower().replace("-", "_").replace(".", "_") == key[1]:
            return [key[0], name, *key[2:]]
    return key


def _split_flag(dotted: str) -> list[str]:
    """Names may hold dots: under skills and providers everything between the first and the last dot is the name."""
    parts = dotted.split(".")
    if parts[0] == "budget" and len(parts) > 3:
        return [*parts[:2], ".".join(parts[2:-1]), parts[-1]]
    if parts[0] in ("skills", "providers") and len(parts) > 3 and "prices" not in parts:
        return [parts[0], ".".join(parts[1:-1]), parts[-1]]
    return parts


def _put(tree: dict[str, Any], key: list[str], value: object, places: dict[str, str], place: str) -> None:
    """Sets one leaf. Text is turned into a list or table where the setting is one."""
    node = tree
    for part in key[:-1]:
        below = node.setdefault(part, {})
        if not isinstance(below, dict):
            raise InvalidArgument(f"{place}: {part!r} is a setting, not a section.", field=".".join(key), place=place)
        node = below
    node[key[-1]] = _from_text(_annotation(key), value) if isinstance(value, str) else value
    places[".".join(key)] = place


def _annotation(key: list[str]) -> Any:
    """The declared type of a dotted key, or None for an unknown one."""
    model: type[BaseModel] | None = Config
    annotation: Any = None
    many = False
    for part in key:
        if many:
            many = False
            continue
        if model is None or part not in model.model_fields:
            return None
        annotation = model.model_fields[part].annotation
        model, many = _section_of(annotation)
    return annotation


def _from_text(annotation: Any, value: str) -> object:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return value
    if origin in (list, dict) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except ValueError:
            return value
    if origin is list:
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _explain(error: ValidationError, places: Mapping[str, str], path: Path, text: str) -> InvalidArgument:
    """One paragraph a problem: the key, where it stands, what is wrong, what is known instead. Values are not repeated."""
    lines: list[str] = []
    first_key = first_place = ""
    for problem in error.errors(include_url=False, include_input=False):
        parts = [str(part) for part in problem["loc"] if part != "[key]"]
        key = ".".join(parts)
        place = _place_outside(key, places) or _place_in_file(path, text, parts)
        what = _unknown_key(parts) if problem["type"] == "extra_forbidden" else problem["msg"].removeprefix("Value error, ")
        lines.append(f"{place + ': ' if place else ''}{key + ': ' if key else ''}{what}")
        first_key, first_place = first_key or key, first_place or place
    return InvalidArgument("\n".join(lines), field=first_key, place=first_place)


def _place_outside(key: str, places: Mapping[str, str]) -> str:
    """The variable or flag that set `key` or, for an unknown section, something inside it."""
    for name, place in places.items():
        if key and (name == key or name.startswith(key + ".") or key.startswith(name + ".")):
            return place
    return ""


def _unknown_key(parts: list[str]) -> str:
    if parts[-1] in ("api_key", "password", "token", "secret"):
        return f"secrets are never written here; name the place that holds it with {parts[-1]}_env or {parts[-1]}_file."
    model: type[BaseModel] | None = Config
    many = False
    for part in parts[:-1]:
        if many:
            many = False
        elif model is not None and part in model.model_fields:
            model, many = _section_of(model.model_fields[part].annotation)
    return f"unknown key; {near_names(parts[-1], list(model.model_fields) if model else [])}"


def _place_in_file(path: Path, text: str, parts: list[str]) -> str:
    """`file:line` of a key, or of the nearest table above it that the file names; "" where the file is not to blame."""
    if not text:
        return ""
    table: list[str] = []
    best, best_depth = "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split("#", 1)[0].strip()
        if line.startswith("["):
            table = _dotted(line.strip("[] "))
            here = table
        elif "=" in line:
            here = table + _dotted(line.split("=", 1)[0])
        else:
            continue
        if here == parts[: len(here)] and len(here) > best_depth:
            best, best_depth = f"{path}:{number}", len(here)
    return best


def _dotted(text: str) -> list[str]:
    return [part.strip().strip("\"'") for part in text.split(".")] if text.strip() else []
