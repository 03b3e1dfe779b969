"""Files of a model as an engine, or a trainer, is to read them."""

from __future__ import annotations

import importlib.util

from modelyard.errors import JobFailure
from modelyard.models import config_file, kinds, store
from modelyard.models.architectures import MULTIMODAL
from modelyard.models.chat_template import TemplateSource
from modelyard.models.mistral_format import is_mistral_format
from modelyard.models.shape import ModelFiles
from modelyard.models.tables import Model
from modelyard.settings import Settings


def model_files(settings: Settings, model: Model) -> ModelFiles:
    """Return a model's files as the store has them. Blocks.

    Raises:
        JobFailure: `broken_model`: its configuration cannot be read.
    """
    path = store.folder_of(settings.models_dir, model.path)
    try:
        config = config_file.read(path)
    except JobFailure as failure:
        raise JobFailure(
            "broken_model",
            f"{model.model_id} cannot be used: its {failure.message}",
            "Delete the model and add it again, or another revision of it.",
        ) from failure
    return ModelFiles(
        model.model_id, path, model.size_bytes, config, model.task,
        has_mistral_tokenizer=model.chat_template == TemplateSource.MISTRAL,
        is_mistral_format=is_mistral_format(path),
        is_for_text_alone=bool(MULTIMODAL.intersection(config_file.names_of(config)[1])) and _lacks_vision(settings),
    )  # fmt: skip


def _lacks_vision(settings: Settings) -> bool:
    """Return True if this Python runs the engines and has no torchvision; of another nothing is known."""
    return settings.engine_python is None and importlib.util.find_spec("torchvision") is None


def servable_files(settings: Settings, model: Model) -> ModelFiles:
    """Return the files of a model that an engine is to serve. Blocks.

    Raises:
        JobFailure: `broken_model`, or `unsupported_kind`: it is of a kind that is not served. Downloads refuse such
            models; this one was added before they did.
    """
    files = model_files(settings, model)
    kinds.task_of(files.config, kinds.reader(files.path))
    return files
