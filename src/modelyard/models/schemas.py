"""Wire shapes of models."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_serializer

from modelyard.models.chat_template import TemplateSource
from modelyard.models.kinds import Task

EXAMPLE: dict[str, JsonValue] = {
    "model_id": "Qwen/Qwen3-0.6B",
    "adapter": False,
    "base_model_id": None,
    "task": "generate",
    "chat_template": "own",
    "revision": "main",
    "commit": "c1899de289a04d12100db370d81485cdf75e47ca",
    "size_bytes": 1518834176,
    "added_at": "2026-11-20T21:15:00Z",
    "lost": False,
    "training": None,
    "differs_from_base": None,
}
ADAPTER_EXAMPLE: dict[str, JsonValue] = {
    **EXAMPLE,
    "model_id": "acme/qwen3-support-lora",
    "adapter": True,
    "chat_template": None,
    "differs_from_base": [],
    "base_model_id": "Qwen/Qwen3-0.6B",
    "commit": "5f0b02c75b57c5855da9ae460ce51323ea669d8a",
    "size_bytes": 18874368,
}


class TrainingOut(BaseModel):
    """The training of an adapter that was trained here."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    finetune_id: UUID
    """The training: GET /api/v1/finetune/{id} has its curve."""
    name: str
    """The training's name."""
    base_commit: str
    """The commit of the base that it was trained on."""
    dataset_id: UUID
    """The dataset, which may have been deleted since."""
    dataset_name: str
    """The name of the dataset's file."""
    dataset_sha256: str
    """The hash of the dataset's file."""
    learnt_from: JsonValue
    """The hash of what it learnt from: the rows as tokens, without those held back."""
    hyperparameters: dict[str, JsonValue]
    """The settings, with their defaults."""
    seed: int
    """The number that all chance in the training came from."""
    figures: dict[str, JsonValue] | None
    """Its cost, and its losses."""
    evaluation: dict[str, JsonValue] | None
    """Base and adapter on the rows that were held back; null where none were."""
    checks: dict[str, JsonValue] | None
    """The checks that it passed before it was first named to clients; null before."""
    versions: dict[str, str] | None
    """Of the libraries that it was trained with."""


class ModelOut(BaseModel):
    """A model or a LoRA adapter in the store."""

    model_config = ConfigDict(
        from_attributes=True, use_attribute_docstrings=True, json_schema_extra={"examples": [EXAMPLE]}
    )

    model_id: str
    """Its name: the id on the Hugging Face hub, or local:NAME."""
    adapter: bool
    """True if it is a LoRA adapter, which is served together with its base."""
    base_model_id: str | None
    """The model that an adapter belongs to; null where its files name none, and nobody has."""
    task: Task
    """generate, or embed."""
    chat_template: TemplateSource | None = None
    """Renderer of chats: own, the model's template; mistral, Mistral's tokenizer; guessed, a default, since the model
    has none. null for what renders none, and where it was added before this was looked at."""
    revision: str
    """The branch, tag or commit that was asked for."""
    commit: str
    """The commit that is in the store (for an import: a digest of its files)."""
    size_bytes: int = Field(ge=0)
    """Its size on disk."""
    added_at: datetime
    """When it became available, in UTC."""
    lost: bool = False
    """True if its files are gone from the data folder: add it again. An adapter trained here comes back by itself."""
    training: TrainingOut | None = None
    """The training of an adapter that was trained here; null for all else."""

    differs_from_base: list[str] | None = None
    """Parts that differ from its base's in an adapter: chat_template, tokenizer. It is served with its base's all the
    same. null for a model, and until adapter and base were compared: at its arrival, or when it is deployed."""

    @classmethod
    def of(cls, model: object, lost: Collection[str] = ()) -> ModelOut:
        """Return a model as clients see it; `lost` are the ids of those whose files are gone."""
        found = cls.model_validate(model)
        return found.model_copy(update={"lost": found.model_id in lost})

    @field_serializer("added_at")
    def _utc(self, value: datetime) -> str:
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
