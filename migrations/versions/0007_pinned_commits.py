"""deployments and trainings keep the commit that they began with

Revision ID: 0007
Revises: 0006
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("deployments", "finetunes"):
        with op.batch_alter_table(name) as table:
            table.add_column(sa.Column("pinned", sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    for name in ("deployments", "finetunes"):
        with op.batch_alter_table(name) as table:
            table.drop_column("pinned")
