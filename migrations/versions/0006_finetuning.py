"""finetuning

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "alias_moves",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("before", sa.String(length=200), nullable=True),
        sa.Column("after", sa.String(length=200), nullable=True),
        sa.Column("reason", sa.String(length=200), nullable=False),
        sa.Column("at", sa.DateTime(), nullable=False),
        sa.Column("undone_at", sa.DateTime(), nullable=True),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_alias_moves")),
    )
    op.create_index(op.f("ix_alias_moves_name"), "alias_moves", ["name"])

    op.create_table(
        "finetunes",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("model_id", sa.String(length=200), nullable=False),
        sa.Column("dataset_id", sa.Uuid(), nullable=False),
        sa.Column("adapter_id", sa.String(length=200), nullable=False),
        sa.Column("hyperparameters", sa.JSON(), nullable=False),
        sa.Column("on_busy", sa.String(length=16), nullable=False),
        sa.Column("deploy", sa.Boolean(), nullable=False),
        sa.Column("promote", sa.JSON(), nullable=True),
        sa.Column("phase", sa.String(length=16), nullable=False),
        sa.Column("estimate", sa.JSON(), nullable=True),
        sa.Column("prepared", sa.JSON(), nullable=True),
        sa.Column("figures", sa.JSON(), nullable=True),
        sa.Column("evaluation", sa.JSON(), nullable=True),
        sa.Column("checks", sa.JSON(), nullable=True),
        sa.Column("promotion", sa.JSON(), nullable=True),
        sa.Column("stopped", sa.JSON(), nullable=False),
        sa.Column("unavailable_s", sa.Double(), nullable=True),
        sa.Column("versions", sa.JSON(), nullable=True),
        sa.Column("checkpoint_step", sa.BigInteger(), nullable=True),
        sa.Column("followed", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("first_step_at", sa.DateTime(), nullable=True),
        sa.Column("finished_at", sa.DateTime(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_finetunes_job_id_jobs"), ondelete="RESTRICT"),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_finetunes")),
        sa.UniqueConstraint("adapter_id", name=op.f("uq_finetunes_adapter_id")),
        sa.UniqueConstraint("id", name=op.f("uq_finetunes_id")),
        sa.UniqueConstraint("job_id", name=op.f("uq_finetunes_job_id")),
    )
    op.create_index(op.f("ix_finetunes_dataset_id"), "finetunes", ["dataset_id"])

    op.create_table(
        "finetune_holds",
        sa.Column("finetune_id", sa.Uuid(), nullable=False),
        sa.Column("model_id", sa.String(length=200), nullable=False),
        sa.Column("dataset_id", sa.Uuid(), nullable=False),
        sa.ForeignKeyConstraint(
            ["dataset_id"], ["datasets.id"], name=op.f("fk_finetune_holds_dataset_id_datasets"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["finetune_id"], ["finetunes.id"], name=op.f("fk_finetune_holds_finetune_id_finetunes"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["model_id"], ["models.model_id"], name=op.f("fk_finetune_holds_model_id_models"), ondelete="RESTRICT"
        ),
        sa.PrimaryKeyConstraint("finetune_id", name=op.f("pk_finetune_holds")),
    )
    op.create_index(op.f("ix_finetune_holds_dataset_id"), "finetune_holds", ["dataset_id"])
    op.create_index(op.f("ix_finetune_holds_model_id"), "finetune_holds", ["model_id"])

    op.create_table(
        "finetune_points",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("finetune_id", sa.Uuid(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.DateTime(), nullable=False),
        sa.Column("epoch", sa.Double(), nullable=True),
        sa.Column("loss", sa.Double(), nullable=True),
        sa.Column("validation_loss", sa.Double(), nullable=True),
        sa.Column("learning_rate", sa.Double(), nullable=True),
        sa.Column("grad_norm", sa.Double(), nullable=True),
        sa.Column("tokens", sa.BigInteger(), nullable=True),
        sa.Column("tokens_per_s", sa.Double(), nullable=True),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["finetune_id"], ["finetunes.id"], name=op.f("fk_finetune_points_finetune_id_finetunes"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_finetune_points")),
    )
    op.create_index("ix_finetune_points_finetune_id_step", "finetune_points", ["finetune_id", "step"], unique=True)

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
    )

    with op.batch_alter_table("models") as table:
        table.add_column(sa.Column("training", sa.JSON(), nullable=True))
    with op.batch_alter_table("deployments") as table:
        table.add_column(sa.Column("restores", sa.Uuid(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("deployments") as table:
        table.drop_column("restores")
    with op.batch_alter_table("models") as table:
        table.drop_column("training")

    op.drop_table("memory_promises")

    op.drop_index("ix_finetune_points_finetune_id_step", table_name="finetune_points")

    op.drop_table("finetune_points")
    op.drop_index(op.f("ix_finetune_holds_model_id"), table_name="finetune_holds")
    op.drop_index(op.f("ix_finetune_holds_dataset_id"), table_name="finetune_holds")

    op.drop_table("finetune_holds")
    op.drop_index(op.f("ix_finetunes_dataset_id"), table_name="finetunes")

    op.drop_table("finetunes")
    op.drop_index(op.f("ix_alias_moves_name"), table_name="alias_moves")

    op.drop_table("alias_moves")
