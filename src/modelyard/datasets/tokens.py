"""Token counts of datasets: how long the rows are for a model, counted when somebody asks and kept beside the dataset.

Counted are the contents of the messages, without what a chat template puts around them: templates are run by children.
The model's own `tokenizer.json` is read in a child with limits (`token_counter`). Of a large dataset the first 32 MiB
are counted, and the answer says of how many rows it speaks.
"""

from __future__ import annotations

from typing import Any

from modelyard.datasets.model_figures import Question, StoredModel, ask
from modelyard.datasets.tables import Dataset
from modelyard.db import Sessions
from modelyard.errors import JobFailure, ModelyardError, Unavailable, Unprocessable
from modelyard.models.tokenizer_child import NO_PROCESS, TokenizerChildren
from modelyard.storage import Storage


def _program(model: StoredModel, longest: int | None) -> str:
    arguments = f"{str(model.folder)!r}, {longest}, {model.max_line_bytes}"
    return f"from modelyard.datasets.token_counter import count; count({arguments})"


QUESTION = Question("tokens", _program, most_bytes=32 * 1024 * 1024, counted="counted_rows")


async def tokens_of(
    sessions: Sessions, storage: Storage, children: TokenizerChildren, dataset: Dataset, model: StoredModel
) -> dict[str, Any]:
    """Return the token figures of a dataset for a model (`schemas.Tokens`), counted now or earlier.

    Raises:
        Unprocessable: the model has no tokenizer that can be read, or not within the limits.
        Unavailable: the machine has no room for the child.
        DatasetNotFound: the dataset went meanwhile.
    """
    try:
        found = await ask(QUESTION, sessions, storage, children, dataset, model)
    except JobFailure as failure:
        raise _refusal(failure) from failure
    if "refusal" in found:
        raise Unprocessable(
            f"The tokens of '{model.model_id}' cannot be counted: its tokenizer.json is missing or cannot be read "
            f"({found['refusal']}).",
            param="model_id",
            code="no_tokenizer",
        )
    figures: dict[str, Any] = found["figures"]
    return {"model_id": model.model_id, "commit": model.commit} | figures


def _refusal(failure: JobFailure) -> ModelyardError:
    message = f"{failure.message} {failure.hint}"
    if failure.code == NO_PROCESS:
        return Unavailable(message, code=failure.code)
    return Unprocessable(message, param="model_id", code=failure.code)
