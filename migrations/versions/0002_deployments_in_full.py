"""deployments in full: adapters in place, several beside one another, aliases

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

#: What a deployment of the first version is to this one. Adapters of an engine that runs are loaded anew: it had them
#: under other names.
FORMER = {
    "strategy": "'auto'",
    "replaces": "'[]'",
    "wake_requested": "false",
    "current_at": "created_at",
    "loaded": "'[]'",
}


def upgrade() -> None:
    op.create_table(
        "aliases",
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("target", sa.String(length=200), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("updated_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_aliases")),
    )
    with op.batch_alter_table("deployments") as table:
        table.add_column(sa.Column("strategy", sa.String(length=16), nullable=True))
        table.add_column(sa.Column("replaces", sa.JSON(), nullable=True))
        table.add_column(sa.Column("idle_timeout_s", sa.Double(), nullable=True))
        table.add_column(sa.Column("wake_requested", sa.Boolean(), nullable=True))
        table.add_column(sa.Column("current_at", sa.DateTime(), nullable=True))
        table.add_column(sa.Column("loaded", sa.JSON(), nullable=True))
        table.add_column(sa.Column("adapter_failure", sa.JSON(), nullable=True))
        table.add_column(sa.Column("memory_bytes", sa.BigInteger(), nullable=True))
    op.execute("UPDATE deployments SET " + ", ".join(f"{name} = {value}" for name, value in FORMER.items()))
    with op.batch_alter_table("deployments") as table:
        for name in FORMER:
            table.alter_column(name, nullable=False)


def downgrade() -> None:
    with op.batch_alter_table("deployments") as table:
        for name in ("memory_bytes", "adapter_failure", "loaded", "current_at", "wake_requested", "idle_timeout_s",
                     "replaces", "strategy"):  # fmt: skip
            table.drop_column(name)
    op.drop_table("aliases")
