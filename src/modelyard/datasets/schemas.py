"""Wire shapes of datasets."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_serializer

from modelyard.datasets.faults import Kind
from modelyard.datasets.row_forms import Form

EXAMPLE: dict[str, JsonValue] = {
    "id": "01be6d68-f790-434b-aa6d-5bd492aef202",
    "name": "train.jsonl",
    "s3_path": "01be6d68-f790-434b-aa6d-5bd492aef202/metadata.json",
    "description": "My Description",
    "created_at": "2026-11-20T21:15:00Z",
    "size_bytes": 1048576,
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "format": "messages",
    "rows": 50,
    "skipped_lines": 0,
    "converted_from": None,
    "parent_id": None,
}


class DatasetOut(BaseModel):
    """A dataset."""

    model_config = ConfigDict(
        from_attributes=True, use_attribute_docstrings=True, json_schema_extra={"examples": [EXAMPLE]}
    )

    id: UUID
    """Its id, by which a training names it."""
    name: str
    """The name of the file that was uploaded."""
    s3_path: str
    """The key of the object that describes it; the file lies beside it."""
    description: str | None
    """The description that the upload gave."""
    created_at: datetime
    """When it was uploaded, in UTC."""
    size_bytes: int = Field(ge=0)
    """The size of the file."""
    sha256: str
    """The hash of the file."""
    format: Form | str
    """The format of its rows: messages, sharegpt, prompt_completion, instruction, text, or mixed."""
    rows: int = Field(ge=0)
    """Conversations that can be learnt from."""
    skipped_lines: int = Field(ge=0)
    """Bad lines that are left out of what is learnt from (`on_error=skip`)."""
    converted_from: str | None = Field(examples=["gzip+csv"])
    """The kind of file that was made JSONL: json_array, csv, gzip, zstd, parquet, or jsonl whose keys were mapped; null
    where the file is stored byte for byte."""
    parent_id: UUID | None
    """The dataset that it was made from."""

    @field_serializer("created_at")
    def _utc(self, value: datetime) -> str:
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")


class Problem(BaseModel):
    """A problem of a line."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    line: int = Field(examples=[3596])
    """The line, from 1."""
    path: str = Field(examples=["$.messages[1].role"])
    """Where in it: a JSON path; `$` is the line itself."""
    reason: str = Field(examples=["is 'human', but must be one of system, user, assistant, tool"])
    """The problem, in words."""
    kind: Kind
    """Stable: programs may match it."""
    file_line: int | None = None
    """Of a table: the line of the uploaded file where the row begins."""


class Problems(BaseModel):
    """All that is wrong, counted, and the first 1,000 of it one by one."""

    total: int
    kinds: dict[Kind, int]
    listed: list[Problem]
    unlisted: int


class Warned(BaseModel):
    """Something that is no error but may be a mistake: how many rows have it, and the first lines."""

    kind: str = Field(examples=["not_alternating"])
    rows: int
    lines: list[int]


class IgnoredKey(BaseModel):
    """A key that means nothing in a row of its form, so that nothing is learnt of its value."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    key: str = Field(examples=["messages[].avatar"])
    """Its name and where it stands; `*`: all others, beyond the first 100 different ones or with long names."""
    rows: int
    """The rows that have it, with another value than null."""
    lines: list[int]
    """The first lines of these."""


class Bucket(BaseModel):
    """Rows whose length is below this power of two, and not below the one before."""

    below: int
    rows: int


class Characters(BaseModel):
    """Lengths of the rows' contents, in characters."""

    total: int
    shortest: int
    longest: int
    histogram: list[Bucket]


class Duplicates(BaseModel):
    """Rows whose bytes are those of an earlier one. Not exact above 3 million different rows: then it may miss some."""

    rows: int
    lines: list[int]
    is_exact: bool


class Tokens(BaseModel):
    """Lengths of the rows' contents in tokens of a model, without what its chat template adds."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    model_id: str
    commit: str
    max_length: int | None
    """Tokens that the model takes; null if its files do not say."""
    counted_rows: int
    """The rows that these figures are about: those in the first 32 MiB."""
    is_exact: bool
    """True if these are all rows."""
    total: int
    longest: int
    truncated_rows: int
    """Rows that are longer than the model takes."""
    truncated_lines: list[int]
    """The first lines of these."""
    histogram: list[Bucket]


class LeftOut(BaseModel):
    """A row that a training leaves out."""

    line: int
    reason: str = Field(examples=["the chat template leaves out message 1, whose role is system"])


class Refusal(BaseModel):
    """The error that a training with this model and these rows would be refused with."""

    code: str = Field(examples=["tokens_beyond_embedding"])
    message: str


class Trains(BaseModel):
    """The rows that a training with a model, and without settings, would learn from, by the trainer's own rendering."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    unknown: str | None = None
    """Why that cannot be said; then there is nothing else."""
    refusal: Refusal | None = None
    """The refusal of POST /api/v1/finetune/ and of its plan. With figures only where the rows are the cause."""
    rows: int | None = None
    """Rows that are learnt from, those that would be held back to measure by among them."""
    tried_rows: int | None = None
    """The rows that were tried: those in the first 8 MiB."""
    is_exact: bool | None = None
    """True if these are all rows."""
    left_out_rows: int | None = None
    left_out: list[LeftOut] = []
    """The first rows that are left out, and why."""
    truncated_rows: int | None = None
    """Rows that are cut at `max_seq_len` tokens."""
    max_seq_len: int | None = None
    tokens: int | None = None
    """All tokens of these rows, with what the chat template adds."""
    learnt_tokens: int | None = None
    """Those that are learnt."""
    longest: int | None = None
    template_source: str | None = None
    """Model, or default where the model has no chat template."""


REPORT_EXAMPLE: dict[str, JsonValue] = {
    "format": "messages",
    "formats": {"messages": 50},
    "rows": 50,
    "lines": 51,
    "blank_lines": 1,
    "bad_lines": 0,
    "turns": 100,
    "roles": {"assistant": 50, "user": 50},
    "characters": {"total": 4711, "shortest": 40, "longest": 120, "histogram": [{"below": 128, "rows": 50}]},
    "duplicates": {"rows": 1, "lines": [17], "is_exact": True},
    "nothing_to_learn": 0,
    "warnings": [{"kind": "not_alternating", "rows": 1, "lines": [3]}],
    "ignored_keys": [{"key": "messages[].avatar", "rows": 2, "lines": [3, 8]}],
    "problems": {"total": 0, "kinds": {}, "listed": [], "unlisted": 0},
    "byte_order_mark": False,
    "crlf_lines": 0,
    "stopped_at_line": None,
    "tokens": None,
    "trains": None,
}


class ReportOut(BaseModel):
    """The content of a dataset."""

    model_config = ConfigDict(use_attribute_docstrings=True, json_schema_extra={"examples": [REPORT_EXAMPLE]})

    format: str | None
    """The form of its rows, or mixed."""
    formats: dict[Form, int]
    """Rows by their form."""
    rows: int
    """Conversations that can be learnt from."""
    lines: int
    """Lines of the file, blank and bad ones included."""
    blank_lines: int
    bad_lines: int
    """Lines that cannot be learnt from."""
    turns: int
    """Messages of all rows."""
    roles: dict[str, int]
    """Messages by role."""
    characters: Characters
    duplicates: Duplicates
    nothing_to_learn: int
    """Lines without an answer of the assistant, to anybody, that has anything in it."""
    warnings: list[Warned]
    ignored_keys: list[IgnoredKey] = []
    """Keys that mean nothing in their rows, the most frequent first: what they say is not learnt."""
    problems: Problems
    byte_order_mark: bool
    """True if the file begins with one."""
    crlf_lines: int
    """Lines that end as on Windows."""
    converted_from: str | None = None
    """The format of the file before it became JSONL: its rows are the lines of that."""
    mapping: dict[str, str] | None = None
    """The mapping of keys that the upload said."""
    stopped_at_line: int | None = None
    """Where reading stopped because too much was wrong (10,000 problems, or 64 MiB in bad lines); null: nowhere."""
    tokens: Tokens | None = None
    """With `model_id`: lengths in tokens of that model."""
    trains: Trains | None = None
    """With `model_id`: what a training with that model would learn from."""


class RowOut(BaseModel):
    """A row in the canonical form."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    line: int
    """Its line in the file, from 1."""
    format: Form
    """The format in which it is written there."""
    messages: list[dict[str, Any]] = []
    """The messages: role, content, and where there are any tool_calls, tool_call_id, name, weight, reasoning_content;
    none in a row of the form text."""
    tools: list[dict[str, Any]] | None = None
    """The tools that the conversation knows."""
    text: str | None = None
    """In a row of the form text: what is learnt, as it is."""


PAGE_EXAMPLE: dict[str, JsonValue] = {
    "rows": [
        {
            "line": 1,
            "format": "messages",
            "messages": [
                {"role": "user", "content": "Name a river."},
                {"role": "assistant", "content": "The Volga."},
            ],
        }
    ],
    "offset": 0,
    "next_offset": 1,
    "total": 50,
}


class PageOut(BaseModel):
    """Some rows of a dataset."""

    model_config = ConfigDict(use_attribute_docstrings=True, json_schema_extra={"examples": [PAGE_EXAMPLE]})

    rows: list[RowOut]
    offset: int
    """Rows before the first one here."""
    next_offset: int | None
    """Where the next page begins; null at the end."""
    total: int
    """Rows of the whole dataset."""
