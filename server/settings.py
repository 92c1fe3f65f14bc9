"""The sections of the configuration that say who answers and where things are kept; `server.config` reads them.

Secrets are never values here: a setting names an environment variable or a file that holds the secret.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from server.core import Preference
from server.errors import InvalidArgument, near_names

MIB = 1 << 20
EnvName = Annotated[str, StringConstraints(pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")]
KeyName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,127}$")]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


SKILL_TASKS = (
    "text-classification",
    "zero-shot-classification",
    "token-classification",
    "question-answering",
    "table-question-answering",
    "translation",
    "summarization",
    "text-generation",
    "fill-mask",
    "feature-extraction",
    "text-ranking",
    "sentence-similarity",
)
"""Tasks that skills do, as Hugging Face pipeline tags. All of them take text."""


def _model_of_provider(value: str) -> str:
    if value and not all(value.partition("/")[::2]):
        raise ValueError('must be "provider/model", for example "openai/gpt-4o-mini"')
    return value


ProviderModel = Annotated[str, AfterValidator(_model_of_provider)]


class ExampleConfig(Section):
    """An input and the answer that is wanted; the teacher is shown it."""

    input: str
    output: str


class SkillConfig(Section):
    """A named job.

    `teacher` and `fallbacks` are "provider/model"; `base` is a model of the repository that heads are trained on; `student_model` is a
    local model that answers by itself, "model" or "model/adapter". Give `labels` or `labels_file` (one a line), `json_schema` or
    `json_schema_file`. `rollout` auto: by the evidence, see RolloutConfig; full where there is no teacher to compare with.
    """

    task: str = "text-classification"
    instruction: str = ""
    examples: list[ExampleConfig] = Field(default=[], max_length=64)
    labels: list[str] = []
    labels_file: str = ""
    json_schema: str = ""
    json_schema_file: str = ""
    teacher: ProviderModel = ""
    fallbacks: list[ProviderModel] = []  # asked after the teacher, in order
    base: str = ""
    student_model: str = ""
    deliver_bar: float = Field(default=0.8, ge=0, le=1)
    second_try_bar: float = Field(default=0.6, ge=0, le=1)  # from here to deliver_bar a generated answer gets a second try
    preference: Preference = Preference.LOCAL_FIRST
    rollout: Literal["auto", "held", "shadow", "canary", "full"] = "auto"
    rollout_percent: Literal[10, 50, 80] = 10  # of a canary: the share of requests that the student may answer
    min_rows: int = Field(default=100, ge=1)  # the trainer refuses fewer
    # How the student is trained; auto: the cheapest that reaches the bar, from a linear head to a whole model.
    method: Literal["auto", "linear-head", "lora", "full", "prefix", "prompt"] = "auto"
    schedule: str = ""  # "daily at 02:30", "weekly", "when 500 new good rows", or five fields of cron; "": by command alone
    assess_schedule: str = ""  # when quality and difficulty are assessed anew, e.g. "weekly"; the same words, but for rows
    train_budget_s: float = Field(default=3600.0, gt=0)  # most that one job may take, its search included
    max_cost_micro_usd: int | None = Field(default=None, ge=0)  # most that one item may cost, in 1e-6 US dollars; unset: no limit
    max_latency_s: float | None = Field(default=None, gt=0)  # candidates expected to take longer are passed over; unset: no limit
    max_tokens: int = Field(default=512, ge=1)  # most that an answer may have, and so what it may cost
    temperature: float = Field(default=0.0, ge=0, le=2)
    # So many of the teacher's likeliest tokens at each place are kept with its answers, to train a student of its tokenizer on; 0: none.
    teacher_logprobs: int = Field(default=0, ge=0, le=20)

    @field_validator("task")
    @classmethod
    def _task(cls, value: str) -> str:
        if value not in SKILL_TASKS:
            raise ValueError(f"is {value!r}; skills do text tasks; {near_names(value, list(SKILL_TASKS))}")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> SkillConfig:
        for name in ("labels", "json_schema"):
            if getattr(self, name) and getattr(self, f"{name}_file"):
                raise ValueError(f"give {name} or {name}_file, not both")
        if self.second_try_bar > self.deliver_bar and "second_try_bar" in self.model_fields_set:
            raise ValueError(f"second_try_bar {self.second_try_bar:g} is above deliver_bar {self.deliver_bar:g}")
        return self

    def read_labels(self) -> list[str]:
        """The classes in order. Raises InvalidArgument when the file cannot be read."""
        if not self.labels_file:
            return list(self.labels)
        return [line.strip() for line in read_text(self.labels_file, "labels_file").splitlines() if line.strip()]

    def read_json_schema(self) -> str:
        """The schema as text, or "". Raises InvalidArgument when the file cannot be read."""
        return read_text(self.json_schema_file, "json_schema_file") if self.json_schema_file else self.json_schema


class RoutingConfig(Section):
    """What holds for all skills. The built-in skill of each task has `default_teacher`, then `default_fallbacks`, as its teachers."""

    default_teacher: ProviderModel = ""
    default_fallbacks: list[ProviderModel] = []
    embedder: Name | Literal[""] = (
        ""  # model that finds the task of plain words and compares answers; "": the default for feature-extraction
    )
    hold_tokens: int = Field(default=24, ge=1)  # a routed stream of a local model is held back for so many tokens until it was looked at
    max_difficulty: float = Field(default=0.6, ge=0, le=1)  # inputs that are likelier than this to be beyond the student go past it
    least_gain: float = Field(default=0.1, ge=-1, le=1)  # but only where the teacher is expected to add so much quality
    run_many_in_flight: int = Field(default=64, ge=1)  # requests of one RunMany stream that run at once


class PriceConfig(Section):
    """Prices of one provider model in US dollars a million tokens. Input that the vendor had in its cache costs as much where unset."""

    input_per_million_usd: float = Field(default=0.0, ge=0)
    output_per_million_usd: float = Field(default=0.0, ge=0)
    cached_input_per_million_usd: float | None = Field(default=None, ge=0)


ProviderKind = Literal[
    "openai", "anthropic", "gemini", "mistral", "deepseek", "together", "groq", "huggingface", "vllm", "ollama", "compatible"
]


class ProviderConfig(Section):
    """A vendor. `kind` gives base_url, key variable and the vendor's peculiarities (server/providers/presets.json); see there for each.

    The key comes from the environment variable `api_key_env` or the file `api_key_file`. Where neither is named, the kind's own variable is
    read, but only for the kind's own address: a key never goes to a `base_url` that it was not named for.
    """

    kind: ProviderKind = "openai"
    base_url: str = ""
    api_key_env: EnvName = ""
    api_key_file: str = ""
    timeout_s: float = Field(default=60.0, gt=0)  # the whole answer, streamed or not
    connect_timeout_s: float = Field(default=5.0, gt=0)
    first_token_timeout_s: float = Field(default=30.0, gt=0)  # of streams
    between_tokens_timeout_s: float = Field(default=15.0, gt=0)  # of streams
    max_retries: int = Field(default=2, ge=0, le=10)
    max_concurrent: int = Field(default=16, ge=1)
    requests_per_minute: int | None = Field(default=None, ge=1)  # the vendor's limits; unset: none
    tokens_per_minute: int | None = Field(default=None, ge=1)
    requests_per_month: int | None = Field(default=None, ge=1)  # of the calendar month in UTC
    tokens_per_month: int | None = Field(default=None, ge=1)
    circuit_failures: int = Field(default=5, ge=1)  # so many failures in a row, and the vendor is left alone
    circuit_rest_s: float = Field(default=5.0, gt=0)  # before one request probes it again
    training_allowed: bool = False  # whether the vendor's terms let you train models on its answers; the trainer leaves others out
    prices: dict[str, PriceConfig] = {}  # over those of server/providers/prices.json
    training_prices: dict[str, Annotated[float, Field(ge=0)]] = {}  # US dollars a million trained tokens; over trainer/hosted/offers.json

    @field_validator("base_url")
    @classmethod
    def _public(cls, value: str) -> str:
        parts = urlsplit(without_password(value))
        if value and (parts.scheme not in ("http", "https") or not parts.netloc):
            raise ValueError('must begin with "https://" (or "http://")')
        if parts.query or parts.fragment:
            raise ValueError("must have no query and no fragment: keys are named by api_key_env or api_key_file")
        return value

    @model_validator(mode="after")
    def _placed(self) -> ProviderConfig:
        if self.kind == "compatible" and not self.base_url:
            raise ValueError('kind "compatible" is any server that speaks OpenAI\'s format: give its base_url')
        if self.api_key_env and self.api_key_file:
            raise ValueError("give api_key_env or api_key_file, not both")
        return self

    def read_api_key(self, environ: Mapping[str, str] | None = None) -> str:
        """The key, or "" where none is configured. Raises InvalidArgument when the place that was named holds none."""
        return read_secret(self.api_key_env, self.api_key_file, "api_key", environ)


class LakeConfig(Section):
    """Where interactions are kept."""

    path: str = "data/lake"
    flush_s: float = Field(default=10.0, gt=0)  # how often the log is forced to the disk and sealed segments become Parquet
    segment_bytes: int = Field(default=8 * MIB, ge=4096)
    encrypt: bool = False  # payloads of requests that name a user are kept under a key of that user's; deleting the key erases them
    retention_days: int | None = Field(default=None, ge=1)  # older rows are deleted by `understudy lake compact`; unset: none are
    store: str = ""  # where the tables are, e.g. "s3://bucket/lake"; "": under `path`, where the log is in any case
    store_options_env: dict[str, EnvName] = {}  # options of the store by name, each from an environment variable


class TrainingConfig(Section):
    """The trainer's side of the loop; the server reads it to take orders for jobs, and works on none itself."""

    path: str = "data/training"  # checkpoints, logs and reports, a folder a job
    poll_s: float = Field(default=2.0, gt=0)  # how often a trainer without work looks for some
    lease_s: float = Field(default=30.0, gt=0)  # a trainer that has not been heard of for so long has lost its job to the next
    max_attempts: int = Field(default=3, ge=1)  # trainers that may die over one job before it fails
    checkpoint_s: float = Field(default=30.0, gt=0)  # longest stretch of training that a death may cost
    sources: dict[Name, str] = {}  # of a base in the repository: the folder or Hub id of its torch model; "": what its manifest says


class CurationConfig(Section):
    """What of the lake is worth learning from; docs/curation.md has the steps. The defaults are those that were measured."""

    above_quality: float = Field(default=0.7, ge=0, lt=1)  # answers are kept above it, where their quality is known
    above_rating: int = Field(default=3, ge=0, le=4)  # answers are kept above it, where a person rated them
    own_answers: bool = True  # a student's answers that a person liked are learnt from too
    agreement_bonus: float = Field(default=0.25, ge=0, le=10)  # added to a row's weight where teacher, student or repeated askings agree
    feedback_bonus: float = Field(default=0.5, ge=0, le=10)  # added where a person liked or corrected the answer
    licences: dict[str, str] = {}  # of source models: name, or its beginning with "*", to a licence id such as "apache-2.0"
    allowed_licences: list[str] = []  # licence ids whose models' answers may be learnt from, beyond those that are known to allow it
    licence_is_enough: bool = False  # such a licence will do, also where the provider's training_allowed is false
    max_text_bytes: int = Field(default=65536, ge=64)  # longer inputs and answers are left out
    max_rows: int = Field(default=500_000, ge=1)  # the newest are taken
    split_by: Literal["text", "user"] = "text"  # what is held out: one text in five, or all texts of one user in five
    pii: Literal["scrub", "drop", "off"] = "scrub"  # personal data: placeholders in their place, the row left out, or left as they are
    pii_entities: list[str] = ["EMAIL_ADDRESS", "PHONE_NUMBER", "IBAN_CODE", "CREDIT_CARD", "IP_ADDRESS", "URL", "US_SSN"]
    pii_names_model: Name | Literal[""] = ""  # a token-classification model of the repository that finds names; "": names stay
    near_duplicates: float = Field(default=0.9, gt=0, le=1)  # Jaccard similarity from which two rows are one; 1: only equal ones
    label_errors: Literal["drop", "weigh", "off"] = "drop"  # labels that are likely wrong: the row left out, or given less weight
    label_errors_cap: float = Field(default=0.5, gt=0, lt=1)  # most of the training rows that may be taken for wrong
    balance: float = Field(default=0.0, ge=0, le=1)  # weights of rare labels: 0 as they come, 1 every label counts the same
    max_rows_per_label: int | None = Field(default=None, ge=1)  # the best are kept; unset: no limit


class RolloutConfig(Section):
    """When a student takes over and when it goes back; for every skill whose `rollout` is auto. Shares are of requests."""

    alpha: float = Field(default=0.05, gt=0, lt=0.5)  # chance of a wrong step over a student's whole life, however often one looks
    margin: float = Field(default=0.03, ge=0, lt=1)  # a student may be so much worse than what it was measured to be
    min_comparisons: int = Field(default=50, ge=1)  # in a stage, before it can be passed
    canary_share: float = Field(default=0.2, ge=0, le=1)  # of what a student answers at 10 and 50 %, that the teacher answers too
    teacher_share: float = Field(default=0.05, ge=0, le=1)  # the same at 80 % and at full, for ever
    first_share: float = Field(default=0.1, ge=0, le=1)  # the same for the first requests at full
    first_requests: int = Field(default=500, ge=0)
    max_error_share: float = Field(default=0.02, ge=0, le=1)  # of the student's answers that fail
    max_latency_ratio: float = Field(default=2.0, gt=0)  # the student's p95 against the teacher's
    drift_window: int = Field(default=500, ge=20)  # requests that are compared with those of the stages before
    poll_s: float = Field(default=1.0, gt=0)  # how often servers tell each other what they have seen


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


class AuthConfig(Section):
    """API keys, made by `understudy keys create`. `keys` auto: asked for unless only this machine reaches the server (server.host)."""

    keys: Literal["auto", "required", "off"] = "auto"
    poll_s: float = Field(default=1.0, gt=0, le=60)  # how soon keys that were made or revoked elsewhere are seen
    audit_keep_days: int = Field(default=400, ge=0)  # 0: for ever


class BudgetLimits(Section):
    """The most that may be paid in a calendar day and month, in US dollars; unset: no limit; 0: nothing may be paid."""

    day_usd: float | None = Field(default=None, ge=0, le=1e9, allow_inf_nan=False)
    month_usd: float | None = Field(default=None, ge=0, le=1e9, allow_inf_nan=False)

    def micro_usd(self) -> dict[str, int]:
        """The limits that are set, by window ("day", "month"), in 1e-6 US dollars, rounded down."""
        given = {"day": self.day_usd, "month": self.month_usd}
        return {window: int(Decimal(repr(usd)) * 1_000_000) for window, usd in given.items() if usd is not None}


class BudgetConfig(Section):
    """What may be paid to providers. Every limit that applies to a call holds: all calls', its provider's, its skill's, its key's.

    `default_key` is the limit of each key that has none of its own. Days and months begin at midnight in `time_zone`, an IANA name.
    """

    time_zone: str = "UTC"
    alert_at: float = Field(default=0.7, gt=0, le=1)  # share of a limit at which the log and the webhook tell, once a window
    stop_at: float = Field(default=0.95, gt=0, le=1)  # share, reservations included, from which no paid call is begun
    lease_s: float = Field(default=120.0, ge=1)  # what a killed server had reserved is free again after this long
    webhook_url_env: EnvName = ""  # where alerts are posted as JSON; such addresses are secrets
    webhook_url_file: str = ""
    total: BudgetLimits = BudgetLimits()
    providers: dict[Name, BudgetLimits] = {}
    skills: dict[Name, BudgetLimits] = {}
    keys: dict[KeyName, BudgetLimits] = {}
    default_key: BudgetLimits = BudgetLimits()

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        from zoneinfo import ZoneInfo

        try:
            if value != "UTC":
                ZoneInfo(value)
        except (ValueError, OSError) as error:  # ZoneInfoNotFoundError is a KeyError
            raise ValueError(f"{value!r} is no time zone's name, such as Europe/Oslo") from error
        except KeyError as error:
            message = f"there is no time zone {value!r}; expected a name such as Europe/Oslo. Where the system has none, install tzdata"
            raise ValueError(message) from error
        return value

    @model_validator(mode="after")
    def _sensible(self) -> BudgetConfig:
        if self.alert_at > self.stop_at:
            raise ValueError(f"alert_at {self.alert_at:g} is above stop_at {self.stop_at:g}")
        if self.webhook_url_env and self.webhook_url_file:
            raise ValueError("give webhook_url_env or webhook_url_file, not both")
        return self

    @property
    def limited(self) -> bool:
        """Whether anything has a limit."""
        tables = (*self.providers.values(), *self.skills.values(), *self.keys.values())
        return any(one.micro_usd() for one in (self.total, self.default_key, *tables))

    def read_webhook_url(self, environ: Mapping[str, str] | None = None) -> str:
        """The address, or "" where none is configured. Raises InvalidArgument when the place that was named holds none."""
        url = read_secret(self.webhook_url_env, self.webhook_url_file, "budget.webhook_url", environ)
        if url and urlsplit(url).scheme not in ("http", "https"):
            raise InvalidArgument("budget.webhook_url must begin with https:// (or http://).", field="budget.webhook_url")
        return url


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
