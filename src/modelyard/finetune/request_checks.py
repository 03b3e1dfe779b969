"""Refusals of a training that need no child: for the request that starts one, and for its plan.

Whatever the rows, the settings and the model's files tell is said at once, in the words and with the code that the
trainer would end with; what takes the tokenizer or the weights to know, a plan says.
"""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

from modelyard.datasets.row_forms import Form
from modelyard.datasets.tables import Dataset
from modelyard.db import Sessions
from modelyard.engine import adapter_support
from modelyard.errors import JobFailure, Unprocessable
from modelyard.finetune import actions, target_layers
from modelyard.finetune.errands import refusal
from modelyard.finetune.schemas import FinetuneIn, HyperparametersIn
from modelyard.hardware import this_machine
from modelyard.models import config_file, rescan, store, trainable
from modelyard.models.config_file import Config
from modelyard.models.lost import bring_back
from modelyard.models.tables import Model
from modelyard.settings import Settings
from modelyard.trainer import refusals
from modelyard.trainer.layer_names import EXPERTS


async def check(wanted: FinetuneIn, sessions: Sessions, settings: Settings) -> None:
    """Refuse what the rows, the files and the settings show to be impossible.

    Raises:
        Unprocessable: `param` is the field that it is about.
        ModelNotFound, DatasetNotFound: there is no such thing.
        AliasTaken: the alias that is to lead to the adapter is the name of a model.
        ModelLost: the model's files are gone.
    """
    rank, most = wanted.hyperparameters.rank, settings.engine_max_lora_rank
    if rank > most:
        raise Unprocessable(
            f"Engines have room for adapters of rank {most} at most (MODELYARD_ENGINE_MAX_LORA_RANK), and this one "
            f"would have {rank}: train with a lower rank, or raise the setting.",
            param="hyperparameters.rank",
        )
    async with sessions.read() as session:
        model, dataset = await actions.check(session, wanted)
    await bring_back(settings.models_dir, [model], None)  # a base is not kept in the storage
    await asyncio.to_thread(_check_files, wanted, settings, model, dataset)


def _check_files(wanted: FinetuneIn, settings: Settings, model: Model, dataset: Dataset) -> None:
    folder = store.folder_of(settings.models_dir, model.path)
    is_own = settings.trainer_python is not None
    config = trainable.check(model.model_id, folder, model.chat_template, is_own_python=is_own)
    if wanted.deploy or dataset.format != Form.TEXT:
        trainable.check_rendering(model.model_id, config)
    try:
        if rescan.is_small(folder):
            rescan.check(model.model_id, folder)
        check_settings(model.model_id, folder, config, wanted.hyperparameters, is_own_python=is_own)
    except JobFailure as failure:
        raise refusal(failure) from failure
    if wanted.deploy and (fault := adapter_support.fault(config)) is not None:
        raise Unprocessable(
            f"{model.model_id} {fault}: the adapter could not be put into service. Train without deploy; then "
            f"{adapter_support.remedy('ADAPTER_ID')}",
            param="deploy",
            code="adapters_unsupported",
        )


def check_settings(
    model_id: str, folder: Path, config: Config, settings: HyperparametersIn, *, is_own_python: bool
) -> None:
    """Refuse hyperparameters that the model does not take, as the trainer would. Blocks on the disk.

    Raises:
        JobFailure: with the trainer's code.
    """
    if settings.quantization is not None:
        if not this_machine().has_gpu:
            raise refusals.quantization_needs_gpu(refusals.NO_GPU)
        if not is_own_python and importlib.util.find_spec("bitsandbytes") is None:
            raise refusals.quantization_needs_gpu(refusals.NO_BITSANDBYTES)
    taken = trainable.max_length(config)
    if settings.max_seq_len is not None and taken is not None and settings.max_seq_len > taken:
        raise refusals.max_seq_len_too_long(settings.max_seq_len, taken)
    if settings.packing and config_file.text_part(config).get("attention_chunk_size"):
        raise refusals.attends_in_chunks(next(iter(config_file.names_of(config)[1]), "The model"))
    if isinstance(settings.target_modules, list):
        target_layers.check(model_id, folder, config, settings.target_modules, is_own_python=is_own_python)
        if settings.dropout and any(name.rpartition(".")[2] == EXPERTS for name in settings.target_modules):
            raise refusals.experts_without_dropout()
