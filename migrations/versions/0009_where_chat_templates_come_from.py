"""where chat templates come from

Revision ID: 0009
Revises: 0008
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("models", "deployments"):
        with op.batch_alter_table(name) as table:
            table.add_column(sa.Column("chat_template", sa.String(length=16), nullable=True))


def downgrade() -> None:
    for name in ("models", "deployments"):
        with op.batch_alter_table(name) as table:
            table.drop_column("chat_template")
