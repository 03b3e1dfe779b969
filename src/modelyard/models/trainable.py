"""Models that an adapter can be trained for, as far as `config.json` tells; the trainer has the last word.

Reads one small file of the store.
"""

from __future__ import annotations

from pathlib import Path

from modelyard.errors import JobFailure, NotTrainable, Unprocessable
from modelyard.models import config_file
from modelyard.models.causal_models import CLASSES
from modelyard.models.chat_template import TemplateSource, has_chat_template
from modelyard.models.kinds import Task
from modelyard.models.mistral_format import is_mistral_format
from modelyard.models.tables import Model

_OTHER = "Train a decoder model such as Llama, Qwen, Mistral, Gemma or Phi: GET /api/v1/finetune/models/ lists them."
#: What models are for that continue no text.
_OTHER_USES = (
    "ForAudioClassification", "ForCTC", "ForImageClassification", "ForMaskedLM", "ForMultipleChoice",
    "ForQuestionAnswering", "ForSequenceClassification", "ForSpeechSeq2Seq", "ForTokenClassification",
)  # fmt: skip
#: Decoders whose layers are no linear ones in the sense that engines put adapters on.
_WITHOUT_LINEAR_LAYERS = frozenset({"gpt2", "openai-gpt", "mamba", "mamba2", "rwkv"})
#: Architectures, and one kind of model, whose chats vLLM 0.32 renders by code of its own, whatever template there is.
RENDERED_BY_CODE = frozenset(
    {
        "DeepseekV32ForCausalLM", "DeepseekV41ForCausalLM", "DeepseekV4ForCausalLM",
        "DeepseekV4ForConditionalGeneration", "InklingForCausalLM", "InklingForConditionalGeneration",
        "KimiK3ForConditionalGeneration", "MoonshotKimiaForCausalLM", "gpt_oss",
    }
)  # fmt: skip


def check_kind(model: Model) -> None:
    """Refuse what is no base of a training, as far as its row tells.

    Raises:
        Unprocessable: `is_adapter` or `not_generative`.
    """
    if model.adapter:
        raise Unprocessable(
            f"'{model.model_id}' is an adapter: train its base"
            + (f", '{model.base_model_id}'" if model.base_model_id else "")
            + ", on a dataset that has what the adapter has learnt as well.",
            param="model_id",
            code="is_adapter",
        )
    if model.task != Task.GENERATE:
        raise Unprocessable(
            f"'{model.model_id}' turns text into vectors, and only generative models are trained: "
            "GET /api/v1/finetune/models/ lists them.",
            param="model_id",
            code="not_generative",
        )


def check(
    model_id: str, folder: Path, chat_template: str | None = None, *, is_own_python: bool = False
) -> config_file.Config:
    """Refuse a model whose files show that it cannot be trained; return its configuration. Blocks on the disk.

    `chat_template` is where its template comes from, as its row says. `is_own_python`: trainers run in another Python
    (MODELYARD_TRAINER_PYTHON), whose transformers may know more types of models than the one that comes with this.

    Raises:
        NotTrainable: with the reason.
    """
    try:
        config = config_file.read(folder)
    except JobFailure as failure:
        raise NotTrainable(
            f"{model_id} cannot be trained: its {failure.message} {failure.hint}", param="model_id"
        ) from None
    fault = _mistral_fault(folder, chat_template) or _fault(config) or _unknown(config, is_own_python)
    if fault is not None:
        raise NotTrainable(f"{model_id} {fault}", param="model_id")
    return config


def check_rendering(model_id: str, config: config_file.Config) -> None:
    """Refuse conversations, or the way into service, for a model whose chats the engine renders without a template.

    Raises:
        NotTrainable: with the reason, and what can be trained.
    """
    kind, named = config_file.names_of(config)
    if kind in RENDERED_BY_CODE or RENDERED_BY_CODE.intersection(named):
        raise NotTrainable(
            f"{model_id} is a {next(iter(named), kind)}, whose chats the engine renders by code of its own instead of "
            "a chat template: an adapter would learn from other prompts than it is then asked, and would not be put "
            'into service. Train it on plain texts ({"text": "..."}) without deploy, or another model.',
            param="model_id",
        )


def max_length(config: config_file.Config) -> int | None:
    """Return how many tokens the model takes, as `trainer.model.max_length` has it; None where it is not said."""
    text = config_file.text_part(config)
    found = (config_file.whole(text, name) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((length for length in found if length), None)


def _mistral_fault(folder: Path, chat_template: str | None) -> str | None:
    if is_mistral_format(folder):
        return (
            "has weights in Mistral's own format, which the trainer does not read. Train a repository of the model in "
            "the format of transformers."
        )
    if chat_template == TemplateSource.MISTRAL and not has_chat_template(folder):
        return (
            "is served with Mistral's own tokenizer and has no chat template in the format of transformers: an adapter "
            "would learn from other prompts than it is then asked. Train a repository of the model that has one."
        )
    return None


def _unknown(config: config_file.Config, is_own_python: bool) -> str | None:
    """Return what is wrong with a model that is no causal language model of transformers (as `trainer.model` says)."""
    kind, named = config_file.names_of(config)
    classes = CLASSES.get(kind, ())
    if set(named) & set(classes) or (classes and not named) or (not classes and is_own_python):
        return None
    shown = f"{', '.join(named[:3]) or 'model'} (model_type {kind[:60] or 'unknown'})"
    return f"is a {shown}, which is not a causal language model that can be trained here. {_OTHER}"


def _fault(config: config_file.Config) -> str | None:
    kind, named = config_file.names_of(config)
    shown = ", ".join(named[:3]) or kind or "model of an unknown type"
    if config.get("is_encoder_decoder") or (named and all(name.endswith(_OTHER_USES) for name in named)):
        return f"is a {shown}, which does not continue text as a decoder does. {_OTHER}"
    if kind in _WITHOUT_LINEAR_LAYERS:
        return f"is a {shown}, which has no layers that an adapter could be served on. {_OTHER}"
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else None
        return (
            f"has weights that are quantised ({str(method or 'in some way')[:40]}), and adapters are trained on whole "
            "ones. Train the model that it was made from."
        )
    return None
