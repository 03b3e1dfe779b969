"""Wire shapes of the routing room: aliases, what they lead to, and their moves."""

from __future__ import annotations

from typing import Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from modelyard.deploy.tables import DeploymentState
from modelyard.jobs.schemas import Time
from modelyard.routing.tables import Alias, AliasMove


class AliasIn(BaseModel):
    """Where an alias is to lead."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"target": "openchat/openchat-3.5-0106"}]}
    )

    target: str = Field(
        min_length=1, max_length=256, description="A model or an adapter in the store; it need not be in service."
    )


class ResolvedOut(BaseModel):
    """The deployment that answers a name right now."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str = Field(examples=["openchat/openchat-3.5-0106"])
    adapter_id: str | None = Field(description="The adapter on that model, if the name leads to one.", examples=[None])
    deployment_id: UUID
    state: DeploymentState = Field(description="Requests are answered if READY, and after a wait if IDLE.")


class AliasOut(BaseModel):
    """A name that requests may use in place of a model's or an adapter's id."""

    name: str = Field(examples=["default"])
    follows: Literal["generate", "embed"] | None = Field(
        description="The kind of model whose current deployment it leads to: a built-in alias that is not pinned. "
        "`default` follows the embedding one in requests for embeddings.",
        examples=["generate"],
    )
    target: str | None = Field(description="The model or adapter that it leads to, if it does not follow.")
    resolves_to: ResolvedOut | None = Field(description="null: nothing in service; requests get a 404.")
    created_at: Time | None = Field(description="null for a built-in alias that is not pinned.")
    updated_at: Time | None = Field(description="When it was last moved.")

    @classmethod
    def of(cls, name: str, follows: str | None, row: Alias | None, resolved: ResolvedOut | None) -> AliasOut:
        """Show an alias; one without a row follows."""
        return cls.model_validate(
            {
                "name": name,
                "follows": follows if row is None else None,
                "target": row.target if row is not None else None,
                "resolves_to": resolved,
                "created_at": row.created_at if row is not None else None,
                "updated_at": row.updated_at if row is not None else None,
            }
        )


class AliasMoveOut(BaseModel):
    """One move of an alias. `before` and `after` are null where it was not there: a built-in one then follows."""

    before: str | None = Field(examples=["openchat/openchat-3.5-0106"])
    after: str | None = Field(examples=["ft:support"])
    reason: str = Field(description="Why, where the server moved it.", examples=["training support"])
    at: Time
    undone_at: Time | None = Field(description="When it was taken back.")

    @classmethod
    def of(cls, move: AliasMove) -> AliasMoveOut:
        """Show a row."""
        return cls(before=move.before, after=move.after, reason=move.reason, at=move.at, undone_at=move.undone_at)
