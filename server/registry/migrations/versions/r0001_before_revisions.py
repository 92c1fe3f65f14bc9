"""The tables as they were made before there were revisions: databases of that time are taken to be here."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes it."""
    _training()
    op.create_table(
        "feedback_requests",
        sa.Column("request_id", sa.String(128), primary_key=True),
        sa.Column("feedback", sa.Text, nullable=False),
        sa.Column("create_ms", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "budget_windows",
        sa.Column("scope", sa.String(160), primary_key=True),
        sa.Column("period", sa.String(10), primary_key=True),
        sa.Column("holder", sa.String(32), primary_key=True),
        sa.Column("ends_ms", sa.BigInteger, nullable=False),
        sa.Column("spent", sa.BigInteger, nullable=False),
        sa.Column("reserved", sa.BigInteger, nullable=False),
        sa.Column("expires_ms", sa.BigInteger, nullable=False),
    )
    op.create_index("budget_windows_by_end", "budget_windows", ["ends_ms"])
    op.create_table(
        "budget_alerts",
        sa.Column("scope", sa.String(160), primary_key=True),
        sa.Column("period", sa.String(10), primary_key=True),
        sa.Column("level", sa.String(16), primary_key=True),
        sa.Column("create_ms", sa.BigInteger, nullable=False),
    )


def _training() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("skill", sa.String(128), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("create_ms", sa.BigInteger, nullable=False),
        sa.Column("heartbeat_ms", sa.BigInteger, nullable=False),
        sa.Column("end_ms", sa.BigInteger),
        sa.Column("report", sa.Text, nullable=False),
        sa.Column("error", sa.Text, nullable=False),
    )
    op.create_index("jobs_by_skill", "jobs", ["skill", "create_ms"])
    op.create_table(
        "datasets",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.id"), nullable=False),
        sa.Column("table_version", sa.BigInteger, nullable=False),
        sa.Column("train_rows", sa.Integer, nullable=False),
        sa.Column("held_out_rows", sa.Integer, nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("create_ms", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "dataset_rows",
        sa.Column("dataset_id", sa.String(32), sa.ForeignKey("datasets.id"), primary_key=True),
        sa.Column("interaction_id", sa.String(40), primary_key=True),
        sa.Column("held_out", sa.Boolean, nullable=False),
    )
    op.create_index("datasets_of_interaction", "dataset_rows", ["interaction_id"])
    op.create_table(
        "adapters",
        sa.Column("skill", sa.String(128), primary_key=True),
        sa.Column("version", sa.String(16), primary_key=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("base", sa.String(160), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("metrics", sa.Text, nullable=False),
        sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.id"), nullable=False),
        sa.Column("create_ms", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    """Takes it back."""
    for table in ("budget_alerts", "budget_windows", "feedback_requests", "adapters", "dataset_rows", "datasets", "jobs"):
        op.drop_table(table)
