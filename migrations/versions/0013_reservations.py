"""one ledger of memory: which device, who holds it, how much of it is taken

What an engine of the version before holds of a GPU is not known: it is written down as held of the machine's memory
until the server takes the engine up.

Revision ID: 0013
Revises: 0012
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "reservations",
        sa.Column("number", BIG, autoincrement=True, nullable=False),
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=True),
        sa.Column("holder", sa.String(length=300), nullable=False),
        sa.Column("node", sa.String(length=64), nullable=False),
        sa.Column("device", sa.Integer(), nullable=False),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=False),
        sa.Column("taken_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_reservations_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_reservations")),
    )  # fmt: skip
    op.create_index(op.f("ix_reservations_job_id"), "reservations", ["job_id"])
    op.create_index("ix_reservations_run_id_node_device", "reservations", ["run_id", "node", "device"], unique=True)
    op.execute(
        "INSERT INTO reservations (run_id, kind, job_id, holder, node, device, memory_bytes, taken_bytes) "
        "SELECT id, 'engine', job_id, model_id, 'local', -1, memory_bytes, "
        "CASE WHEN state IN ('READY', 'DRAINING', 'STOPPING') THEN memory_bytes ELSE 0 END "
        "FROM deployments WHERE memory_bytes IS NOT NULL ORDER BY number"
    )
    op.execute(
        "INSERT INTO reservations (run_id, kind, job_id, holder, node, device, memory_bytes, taken_bytes) "
        "SELECT job_id, 'training', job_id, holder, 'local', -1, memory_bytes, taken_bytes FROM memory_promises"
    )
    with op.batch_alter_table("deployments") as table:
        table.drop_column("memory_bytes")
    op.drop_table("memory_promises")


def downgrade() -> None:
    op.create_table(
        "memory_promises",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("holder", sa.String(length=300), nullable=False),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=False),
        sa.Column("taken_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_memory_promises_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_memory_promises")),
    )  # fmt: skip
    with op.batch_alter_table("deployments") as table:
        table.add_column(sa.Column("memory_bytes", sa.BigInteger(), nullable=True))
    op.execute(
        "UPDATE deployments SET memory_bytes = (SELECT SUM(memory_bytes) FROM reservations "
        "WHERE reservations.run_id = deployments.id)"
    )
    op.execute(
        "INSERT INTO memory_promises (job_id, holder, memory_bytes, taken_bytes) "
        "SELECT run_id, MIN(holder), SUM(memory_bytes), SUM(taken_bytes) FROM reservations "
        "WHERE kind = 'training' GROUP BY run_id"
    )
    op.drop_index("ix_reservations_run_id_node_device", table_name="reservations")
    op.drop_index(op.f("ix_reservations_job_id"), table_name="reservations")
    op.drop_table("reservations")
