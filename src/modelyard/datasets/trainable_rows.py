"""The rows of a dataset that a training with a model would learn from, and reasons by line; kept beside the dataset.

A model that a training would be refused for is told with that refusal, from the function that refuses
(`models.trainable`). For others the trainer's own rendering says it, in a child with limits (`trainer.row_trial`). Of a
large dataset the first 8 MiB are tried: a chat template renders a row once for each of its turns.
"""

from __future__ import annotations

import asyncio
from typing import Any

from modelyard.datasets.model_figures import Question, StoredModel, ask
from modelyard.datasets.row_forms import Form
from modelyard.datasets.tables import Dataset
from modelyard.db import Sessions
from modelyard.errors import JobFailure, Unprocessable
from modelyard.models import trainable
from modelyard.models.tables import Model
from modelyard.models.tokenizer_child import TokenizerChildren
from modelyard.storage import Storage


def _program(model: StoredModel, longest: int | None) -> str:
    arguments = f"{str(model.folder)!r}, {model.model_id!r}, {longest}, {model.max_line_bytes}"
    return f"from modelyard.trainer.row_trial import main; main({arguments})"


#: Refusals of the server's transformers, which may be older than the trainer's.
_OF_THIS_PYTHON = frozenset({"unsupported_architecture", "bad_configuration", "bad_tokenizer"})
QUESTION = Question("trainable", _program, most_bytes=8 * 1024 * 1024, counted="tried_rows")


async def trains(
    sessions: Sessions,
    storage: Storage,
    children: TokenizerChildren,
    dataset: Dataset,
    model: StoredModel,
    *,
    named: Model,
    is_own_python: bool,
) -> dict[str, Any]:
    """Return `schemas.Trains` for a model, tried now or earlier: with `refusal`, or `unknown` where nobody can say.

    `named` is what the request names, which may be an adapter of `model`; `is_own_python` as `trainable.check` has it.

    Raises:
        DatasetNotFound: the dataset went meanwhile.
    """
    try:
        trainable.check_kind(named)
        config = await asyncio.to_thread(
            trainable.check, model.model_id, model.folder, named.chat_template, is_own_python=is_own_python
        )
        if dataset.format != Form.TEXT:
            trainable.check_rendering(model.model_id, config)
    except Unprocessable as refused:
        return {"refusal": {"code": refused.code, "message": refused.message}}
    try:
        found = await ask(QUESTION, sessions, storage, children, dataset, model)
    except JobFailure as failure:
        return {"unknown": f"{failure.message} {failure.hint}"}
    if is_own_python and found.get("refusal", {}).get("code") in _OF_THIS_PYTHON:
        said = found["refusal"]["message"]
        return {"unknown": f"MODELYARD_TRAINER_PYTHON may take it, and this server's Python does not: {said}"}
    if "figures" not in found:
        return found
    figures: dict[str, Any] = found["figures"]
    # Of a part of the rows, that none of them is learnt from says nothing of the others.
    return figures if figures["is_exact"] else figures | {"refusal": None}
