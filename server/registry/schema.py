"""Tables of the registry: what must outlive processes and be shared by them. Times are milliseconds since 1970, UTC."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Index, Integer, MetaData, String, Table, Text

METADATA = MetaData()

# A run of the trainer. `state`: running, succeeded, rejected (trained, not better), failed.
JOBS = Table(
    "jobs",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("skill", String(128), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("state", String(16), nullable=False),
    Column("create_ms", BigInteger, nullable=False),
    Column("heartbeat_ms", BigInteger, nullable=False),
    Column("end_ms", BigInteger),
    Column("report", Text, nullable=False, default="{}"),
    Column("error", Text, nullable=False, default=""),
    Index("jobs_by_skill", "skill", "create_ms"),
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
