"""What the learning loop keeps: jobs with leases, logs and curves, schedules, models, aliases, rollouts, users' keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes it."""
    op.create_table(
        "aliases",
        sa.Column("skill", sa.String(length=128), nullable=False),
        sa.Column("alias", sa.String(length=32), nullable=False),
        sa.Column("version", sa.String(length=160), nullable=False),
        sa.Column("update_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("skill", "alias"),
    )
    op.create_table(
        "rollout_events",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("skill", sa.String(length=128), nullable=False),
        sa.Column("time_ms", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.String(length=128), nullable=False),
        sa.Column("from_stage", sa.String(length=32), nullable=False),
        sa.Column("to_stage", sa.String(length=32), nullable=False),
        sa.Column("student", sa.String(length=160), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("evidence", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("rollout_events_by_skill", "rollout_events", ["skill", "time_ms"], unique=False)
    op.create_table(
        "rollout_evidence",
        sa.Column("skill", sa.String(length=128), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("holder", sa.String(length=32), nullable=False),
        sa.Column("sums", sa.Text(), nullable=False),
        sa.Column("update_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("skill", "epoch", "holder"),
    )
    op.create_table(
        "rollouts",
        sa.Column("skill", sa.String(length=128), nullable=False),
        sa.Column("stage", sa.String(length=16), nullable=False),
        sa.Column("percent", sa.Integer(), nullable=False),
        sa.Column("student", sa.String(length=160), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("update_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("skill"),
    )
    op.create_table(
        "schedules",
        sa.Column("skill", sa.String(length=128), nullable=False),
        sa.Column("spec", sa.String(length=128), nullable=False),
        sa.Column("origin", sa.String(length=16), server_default="configuration", nullable=False),
        sa.Column("next_ms", sa.BigInteger(), nullable=True),
        sa.Column("last_ms", sa.BigInteger(), nullable=True),
        sa.Column("mark", sa.Text(), server_default="{}", nullable=False),
        sa.PrimaryKeyConstraint("skill"),
    )
    op.create_table(
        "skills",
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("task", sa.String(length=64), nullable=False),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("update_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "user_keys",
        sa.Column("user_hash", sa.String(length=32), nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=True),
        sa.Column("create_ms", sa.BigInteger(), nullable=False),
        sa.Column("erase_ms", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("user_hash"),
    )
    op.create_table(
        "job_logs",
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("time_ms", sa.BigInteger(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "number"),
    )
    op.create_table(
        "job_metrics",
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("value", sa.Float(), nullable=False),
        sa.Column("time_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "name", "step"),
    )
    op.create_table(
        "models",
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("version", sa.String(length=16), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("skill", sa.String(length=128), nullable=False),
        sa.Column("base", sa.String(length=160), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("metrics", sa.Text(), nullable=False),
        sa.Column("job_id", sa.String(length=32), nullable=True),
        sa.Column("create_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"],
            ["jobs.id"],
        ),
        sa.PrimaryKeyConstraint("name", "version"),
    )
    op.add_column("datasets", sa.Column("report", sa.Text(), server_default="{}", nullable=False))
    op.add_column("jobs", sa.Column("spec", sa.Text(), server_default="{}", nullable=False))
    op.add_column("jobs", sa.Column("progress", sa.Text(), server_default="{}", nullable=False))
    op.add_column("jobs", sa.Column("attempt", sa.Integer(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("holder", sa.String(length=64), server_default="", nullable=False))
    op.add_column("jobs", sa.Column("lease_ms", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("cancel", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("jobs", sa.Column("request_id", sa.String(length=128), nullable=True))
    op.add_column("jobs", sa.Column("start_ms", sa.BigInteger(), nullable=True))
    op.create_index("jobs_by_request", "jobs", ["request_id"], unique=True)
    op.create_index("jobs_by_state", "jobs", ["state", "create_ms"], unique=False)
    op.create_index(
        "jobs_that_wait",
        "jobs",
        ["skill", "kind", "spec"],
        unique=True,
        sqlite_where=sa.text("state = 'queued' AND start_ms IS NULL"),
        postgresql_where=sa.text("state = 'queued' AND start_ms IS NULL"),
    )


def downgrade() -> None:
    """Takes it back."""
    op.drop_index(
        "jobs_that_wait",
        table_name="jobs",
        sqlite_where=sa.text("state = 'queued' AND start_ms IS NULL"),
        postgresql_where=sa.text("state = 'queued' AND start_ms IS NULL"),
    )
    op.drop_index("jobs_by_state", table_name="jobs")
    op.drop_index("jobs_by_request", table_name="jobs")
    op.drop_column("jobs", "start_ms")
    op.drop_column("jobs", "request_id")
    op.drop_column("jobs", "cancel")
    op.drop_column("jobs", "lease_ms")
    op.drop_column("jobs", "holder")
    op.drop_column("jobs", "attempt")
    op.drop_column("jobs", "progress")
    op.drop_column("jobs", "spec")
    op.drop_column("datasets", "report")
    op.drop_table("models")
    op.drop_table("job_metrics")
    op.drop_table("job_logs")
    op.drop_table("user_keys")
    op.drop_table("skills")
    op.drop_table("schedules")
    op.drop_table("rollouts")
    op.drop_table("rollout_evidence")
    op.drop_index("rollout_events_by_skill", table_name="rollout_events")
    op.drop_table("rollout_events")
    op.drop_table("aliases")
