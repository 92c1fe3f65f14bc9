"""Tables of the registry: what must outlive processes and be shared by them. Times are milliseconds since 1970, UTC.

A change here needs the same change in migrations/versions: until the next release in its newest file, after it in a new one.
tests/registry/test_migrations.py says what differs.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    false,
    text,
)

METADATA = MetaData()

# A run of the trainer. `state`: queued, running, succeeded, rejected (trained, not better), failed, cancelled. `spec`: JSON, what was asked
# for; `progress`: JSON, stage to [done, total]; a trainer that holds the lease is `holder`, and writes before `lease_ms` or has lost it.
# `error`: JSON with reason, message, metadata, or "". Two jobs that ask for the same never wait at once: they would read the same rows.
_WAITS = text("state = 'queued' AND start_ms IS NULL")
JOBS = Table(
    "jobs",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("skill", String(128), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("state", String(16), nullable=False),
    Column("spec", Text, nullable=False, server_default="{}"),
    Column("progress", Text, nullable=False, server_default="{}"),
    Column("attempt", Integer, nullable=False, server_default="0"),
    Column("holder", String(64), nullable=False, server_default=""),
    Column("lease_ms", BigInteger, nullable=False, server_default="0"),
    Column("cancel", Boolean, nullable=False, server_default=false()),
    Column("request_id", String(128)),
    Column("create_ms", BigInteger, nullable=False),
    Column("start_ms", BigInteger),
    Column("heartbeat_ms", BigInteger, nullable=False),
    Column("end_ms", BigInteger),
    Column("report", Text, nullable=False, default="{}"),
    Column("error", Text, nullable=False, default=""),
    Index("jobs_by_skill", "skill", "create_ms"),
    Index("jobs_by_state", "state", "create_ms"),
    Index("jobs_by_request", "request_id", unique=True),
    Index("jobs_that_wait", "skill", "kind", "spec", unique=True, sqlite_where=_WAITS, postgresql_where=_WAITS),
)

# What a job said, in order.
JOB_LOGS = Table(
    "job_logs",
    METADATA,
    Column("job_id", String(32), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("time_ms", BigInteger, nullable=False),
    Column("text", Text, nullable=False),
)

# Points of a job's curves, for example ("train/loss", 120, 0.31). A repeated step is written over.
JOB_METRICS = Table(
    "job_metrics",
    METADATA,
    Column("job_id", String(32), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("value", Float, nullable=False),
    Column("time_ms", BigInteger, nullable=False),
)

# When skills are trained without being told to. `spec` as in skills.<name>.schedule, or "" for never; `origin`: configuration, or command,
# which wins; `next_ms`: when it is due (unset where rows decide); `last_ms`: when it last made a job; `mark`: JSON, what was seen then.
SCHEDULES = Table(
    "schedules",
    METADATA,
    Column("skill", String(128), primary_key=True),
    Column("spec", String(128), nullable=False),
    Column("origin", String(16), nullable=False, server_default="configuration"),
    Column("next_ms", BigInteger),
    Column("last_ms", BigInteger),
    Column("mark", Text, nullable=False, server_default="{}"),
)

# Skills as the servers that share this registry know them; `config`: JSON.
SKILLS = Table(
    "skills",
    METADATA,
    Column("name", String(128), primary_key=True),
    Column("task", String(64), nullable=False),
    Column("config", Text, nullable=False),
    Column("update_ms", BigInteger, nullable=False),
)

# Models that a job made or that a vendor trained. `kind`: local (a version in the repository) or provider ("openai/ft:...").
MODELS = Table(
    "models",
    METADATA,
    Column("name", String(256), primary_key=True),
    Column("version", String(16), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("skill", String(128), nullable=False),
    Column("base", String(160), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("metrics", Text, nullable=False),
    Column("job_id", String(32), ForeignKey("jobs.id")),
    Column("create_ms", BigInteger, nullable=False),
)

# Which version a skill means by a name: "champion" serves, "challenger" is on its way, "shadow" is compared.
ALIASES = Table(
    "aliases",
    METADATA,
    Column("skill", String(128), primary_key=True),
    Column("alias", String(32), primary_key=True),
    Column("version", String(160), nullable=False),
    Column("update_ms", BigInteger, nullable=False),
)

# Where a skill's rollout is. `state`: JSON, its evidence included; `revision` grows with every change, so that of two servers that decide
# at once one finds that it was late.
ROLLOUTS = Table(
    "rollouts",
    METADATA,
    Column("skill", String(128), primary_key=True),
    Column("stage", String(16), nullable=False),
    Column("percent", Integer, nullable=False),
    Column("student", String(160), nullable=False),
    Column("state", Text, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("update_ms", BigInteger, nullable=False),
)

# The audit trail: every step of every rollout, for ever. `actor`: "auto", or who asked; `evidence`: JSON.
ROLLOUT_EVENTS = Table(
    "rollout_events",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("skill", String(128), nullable=False),
    Column("time_ms", BigInteger, nullable=False),
    Column("actor", String(128), nullable=False),
    Column("from_stage", String(32), nullable=False),
    Column("to_stage", String(32), nullable=False),
    Column("student", String(160), nullable=False),
    Column("reason", Text, nullable=False),
    Column("evidence", Text, nullable=False),
    Index("rollout_events_by_skill", "skill", "time_ms"),
)

# What one server saw of a rollout since it began its stage: sums that add up over servers. `epoch`: the stage's revision.
ROLLOUT_EVIDENCE = Table(
    "rollout_evidence",
    METADATA,
    Column("skill", String(128), primary_key=True),
    Column("epoch", BigInteger, primary_key=True),
    Column("holder", String(32), primary_key=True),
    Column("sums", Text, nullable=False),
    Column("update_ms", BigInteger, nullable=False),
)

# Keys that users' payloads in the lake are sealed with. A user whose `key` is gone is erased, and `erase_ms` says since when.
USER_KEYS = Table(
    "user_keys",
    METADATA,
    Column("user_hash", String(32), primary_key=True),
    Column("key", LargeBinary),
    Column("create_ms", BigInteger, nullable=False),
    Column("erase_ms", BigInteger),
)

# What a job trained on: enough to find every adapter that an erased interaction went into. `fingerprint` is the SHA-256 of the sorted ids.
DATASETS = Table(
    "datasets",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("job_id", String(32), ForeignKey("jobs.id"), nullable=False),
    Column("table_version", BigInteger, nullable=False),
    Column("train_rows", Integer, nullable=False),
    Column("held_out_rows", Integer, nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("report", Text, nullable=False, server_default="{}"),
    Column("create_ms", BigInteger, nullable=False),
)

DATASET_ROWS = Table(
    "dataset_rows",
    METADATA,
    Column("dataset_id", String(32), ForeignKey("datasets.id"), primary_key=True),
    Column("interaction_id", String(40), primary_key=True),
    Column("held_out", Boolean, nullable=False),
    Index("datasets_of_interaction", "interaction_id"),
)

ADAPTERS = Table(
    "adapters",
    METADATA,
    Column("skill", String(128), primary_key=True),
    Column("version", String(16), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("base", String(160), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("metrics", Text, nullable=False),
    Column("job_id", String(32), ForeignKey("jobs.id"), nullable=False),
    Column("create_ms", BigInteger, nullable=False),
)

# Feedback that carried a request id, so that repeating the call keeps it once.
FEEDBACK_REQUESTS = Table(
    "feedback_requests",
    METADATA,
    Column("request_id", String(128), primary_key=True),
    Column("feedback", Text, nullable=False),
    Column("create_ms", BigInteger, nullable=False),
)

# What was spent of a budget, by one holder (a server process). `scope`: "total", "provider:openai", "skill:triage", "key:acme"; `period`:
# the local day "2026-11-21" or month "2026-11"; amounts in 1e-6 US dollars. `reserved` counts until `expires_ms`. Rows have one writer,
# their holder; those of holders that are long gone are summed up under the holder "".
BUDGET_WINDOWS = Table(
    "budget_windows",
    METADATA,
    Column("scope", String(160), primary_key=True),
    Column("period", String(10), primary_key=True),
    Column("holder", String(32), primary_key=True),
    Column("ends_ms", BigInteger, nullable=False),
    Column("spent", BigInteger, nullable=False),
    Column("reserved", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
    Index("budget_windows_by_end", "ends_ms"),
)

# Alerts that some server has taken upon itself to give, so that no other does. `level`: alert or stopped.
BUDGET_ALERTS = Table(
    "budget_alerts",
    METADATA,
    Column("scope", String(160), primary_key=True),
    Column("period", String(10), primary_key=True),
    Column("level", String(16), primary_key=True),
    Column("create_ms", BigInteger, nullable=False),
)

# Keys that callers name themselves with, and what they may do; never deleted. `secret_hash`: SHA-256 in hexadecimal; `skills`: JSON list;
# budgets in 1e-6 US dollars. Only `last_use_ms` and `revoke_ms` ever change.
API_KEYS = Table(
    "api_keys",
    METADATA,
    Column("id", String(8), primary_key=True),
    Column("secret_hash", String(64), nullable=False),
    Column("display_name", String(128), nullable=False),
    Column("role", Integer, nullable=False),
    Column("skills", Text, nullable=False),
    Column("expire_ms", BigInteger),
    Column("requests_per_minute", Integer, nullable=False),
    Column("budget_day", BigInteger),
    Column("budget_month", BigInteger),
    Column("creator", String(64), nullable=False),
    Column("create_ms", BigInteger, nullable=False),
    Column("last_use_ms", BigInteger),
    Column("revoke_ms", BigInteger),
    Index("api_keys_by_time", "create_ms", "id"),
)

# What was changed by whom, or refused for want of a role. `id` begins with the time, so that its order is the events'.
AUDIT_EVENTS = Table(
    "audit_events",
    METADATA,
    Column("id", String(40), primary_key=True),
    Column("time_ms", BigInteger, nullable=False),
    Column("actor", String(64), nullable=False),
    Column("method", String(160), nullable=False),
    Column("resource", String(256), nullable=False),
    Column("code", String(32), nullable=False),
    Column("request_id", String(128), nullable=False),
    Column("peer", String(128), nullable=False),
    Index("audit_events_by_actor", "actor", "id"),
    Index("audit_events_by_time", "time_ms"),
)
