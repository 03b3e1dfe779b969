"""texts that can be continued

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "continuations",
        sa.Column("caller", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("asked_model", sa.String(length=200), nullable=True),
        sa.Column("model_id", sa.String(length=200), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("texts", sa.LargeBinary(), nullable=False),
        sa.Column("used_at", sa.DateTime(), nullable=False),
        sa.Column("expires_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("caller", "key", name=op.f("pk_continuations")),
    )
    with op.batch_alter_table("continuations", schema=None) as batch_op:
        batch_op.create_index("ix_continuations_expires_at", ["expires_at"], unique=False)
        batch_op.create_index("ix_continuations_used_at", ["used_at"], unique=False)


def downgrade() -> None:
    with op.batch_alter_table("continuations", schema=None) as batch_op:
        batch_op.drop_index("ix_continuations_used_at")
        batch_op.drop_index("ix_continuations_expires_at")
    op.drop_table("continuations")
