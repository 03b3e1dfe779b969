"""The kinds of models: what each does, and whether there is a path for it here.

A model's kind is decided from the architectures that its `config.json` names, by vLLM's own groups (`architectures`),
and from the files of sentence-transformers beside it. Nothing generates by omission: a kind without a path here, and an
architecture of which nothing is known, are refused with what they are, before their weights are fetched and before an
engine is started. Apart from the tables, so that the download child needs no database library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from modelyard.errors import JobFailure
from modelyard.models import architectures as known
from modelyard.models.config_file import names_of, text_part
from modelyard.models.file_names import is_safe_path

#: Of a file of settings that is longer the rest is not read: a file that is cut is no JSON, and so tells nothing.
MAX_BYTES = 16 * 1024 * 1024


class Task(StrEnum):
    """The use that a model is for."""

    #: It continues text.
    GENERATE = "generate"
    #: It turns text into vectors.
    EMBED = "embed"


class Source(StrEnum):
    """Where a model came from."""

    #: Downloaded from the hub.
    HUB = "hub"
    #: Copied from the import directory.
    IMPORT = "import"
    #: Trained by this server.
    TRAINING = "training"


class Kind(StrEnum):
    """The work that a model does. GENERATE and EMBED are served."""

    GENERATE = "generate"
    EMBED = "embed"
    SCORE = "score"
    CLASSIFY = "classify"
    LABEL_TOKENS = "label_tokens"
    REWARD = "reward"
    LATE_INTERACTION = "late_interaction"
    SPARSE = "sparse"
    POOLED_OTHERWISE = "pooled_otherwise"
    TRANSCRIBE = "transcribe"
    ENCODER_DECODER = "encoder_decoder"
    DRAFT = "draft"
    DIFFUSION = "diffusion"
    OTHER = "other"


_GENERATIVE = "Choose a generative model, or an embedding model."
#: What each kind without a path is, and what to do instead.
WITHOUT_A_PATH: Mapping[Kind, tuple[str, str]] = {
    Kind.SCORE: (
        "a reranker (cross-encoder): it gives a pair of texts a score, and neither continues text nor turns it into a "
        "vector",
        "To search, choose an embedding model; to rank, ask a generative model. There is no /rerank or /score here.",
    ),
    Kind.CLASSIFY: ("a classifier: it chooses one of fixed labels for a text", _GENERATIVE),
    Kind.LABEL_TOKENS: ("a token classifier: it labels each token of a text", _GENERATIVE),
    Kind.REWARD: ("a reward model: it scores answers, and writes none", _GENERATIVE),
    Kind.LATE_INTERACTION: (
        "a late-interaction retriever (ColBERT): it turns text into one vector for each token",
        "Choose an embedding model that gives one vector for a text.",
    ),
    Kind.SPARSE: (
        "a sparse encoder (SPLADE): it gives words weights, and no dense vector",
        "Choose an embedding model that gives one dense vector for a text.",
    ),
    Kind.POOLED_OTHERWISE: (
        "an embedding model with a step that the engine would leave out without a word, so that its vectors were wrong",
        "Choose an embedding model of a Transformer with pooling by CLS, mean or last token.",
    ),
    Kind.TRANSCRIBE: ("a speech recogniser: it turns sound into text, and does nothing else", _GENERATIVE),
    Kind.ENCODER_DECODER: (
        "an encoder-decoder model (such as T5, BART or a speech model): it rewrites a whole input, and vLLM does not "
        "serve it",
        "Choose a decoder-only model (its architecture ends in ForCausalLM).",
    ),
    Kind.DRAFT: (
        "a draft model for speculative decoding: it proposes tokens to another model, and answers nothing alone",
        "Choose the model that it was made for.",
    ),
    Kind.DIFFUSION: ("a pipeline of diffusers, which makes images, video or sound", _GENERATIVE),
    Kind.OTHER: (
        "of a kind that is not known to continue text or to turn it into vectors",
        "Choose a generative model (its architecture ends in ForCausalLM or ForConditionalGeneration) or an embedding "
        "model.",
    ),
}
#: vLLM's and transformers' groups, the first that has a name tells. See `architectures`.
_GROUPS = (
    (known.TRANSCRIPTION, Kind.TRANSCRIBE),
    (known.DRAFT, Kind.DRAFT),
    (known.LATE_INTERACTION, Kind.LATE_INTERACTION),
    (known.REWARD, Kind.REWARD),
    (known.TOKEN_CLASSIFICATION, Kind.LABEL_TOKENS),
    (known.SEQUENCE_CLASSIFICATION, Kind.SCORE),
    (known.ENCODER_DECODER, Kind.ENCODER_DECODER),
    (frozenset({"NemotronParseForConditionalGeneration"}), Kind.ENCODER_DECODER),
    (frozenset({"OpenVLAForActionPrediction", "Terratorch"}), Kind.OTHER),
    (frozenset({"BertSpladeSparseEmbeddingModel"}), Kind.SPARSE),
    (known.TEXT_GENERATION | known.MULTIMODAL, Kind.GENERATE),
    (known.EMBEDDING | known.TEXT_ENCODER, Kind.EMBED),
)
#: What a name ends in tells the rest, as in vLLM (`_SUFFIX_TO_DEFAULTS`), which serves more than its registry names.
_ENDINGS = (
    (("ForRewardModel", "ForRewardModeling", "RewardModel"), Kind.REWARD),
    (("ForCausalLM", "LMHeadModel", "ChatModel"), Kind.GENERATE),
    (("ForConditionalGeneration",), Kind.GENERATE),
    (("ForTextEncoding", "EmbeddingModel"), Kind.EMBED),
    (("ForSequenceClassification", "ClassificationModel", "ForRanking"), Kind.SCORE),
    (("ForTokenClassification",), Kind.LABEL_TOKENS),
)  # fmt: skip
DIFFUSERS_INDEX = "model_index.json"
MODULES = "modules.json"
CROSS_ENCODER = "CrossEncoder"
SPARSE_ENCODER = "SparseEncoder"
_MODULE = re.compile(r"sentence_transformers\.(?:[a-z_]+\.)*(?P<name>\w+)")
#: The modules of sentence-transformers that vLLM heeds (`transformers_utils/config.py`), and how it can pool.
_HEEDED = frozenset({"Transformer", "Pooling", "Normalize", "Dense"})
_POOLING = frozenset({"cls", "mean", "lasttoken", "last"})

#: A configuration file of the model, parsed; None where there is none.
Read = Callable[[str], Any]


def kind_of(config: Mapping[str, Any], read: Read) -> Kind:
    """Return what a model does, by its `config.json` and the files that `read` gives."""
    kind = _by_architecture(config)
    modules = read(MODULES)
    by_library = _by_sentence_transformers(modules, read)
    if by_library is not None and kind in (Kind.GENERATE, Kind.EMBED, Kind.OTHER):
        return by_library
    return kind


def refuse_files(paths: Collection[str]) -> None:
    """Refuse a repository that by the names of its files is no language model.

    Raises:
        JobFailure: `unsupported_kind`.
    """
    if DIFFUSERS_INDEX in paths and "config.json" not in paths:
        raise _refusal(Kind.DIFFUSION, f"it has {DIFFUSERS_INDEX}")


def task_of(config: Mapping[str, Any], read: Read) -> Task:
    """Return what a model is for.

    Raises:
        JobFailure: `unsupported_kind`: there is no path for its kind here; the message says what it is.
    """
    kind = kind_of(config, read)
    if kind in (Kind.GENERATE, Kind.EMBED):
        return Task(kind)
    _, names = names_of(config)
    raise _refusal(kind, f"its architecture is {', '.join(names)[:200]}" if names else "it names no architecture")


def reader(folder: Path) -> Read:
    """Return a function that reads the configuration files of a model in a folder. It blocks, and never raises."""

    def read(name: str) -> Any:
        # The names come from files of the model, too.
        if not is_safe_path(name):
            return None
        try:
            with open(folder / name, "rb") as file:
                return json.loads(file.read(MAX_BYTES))
        except (OSError, ValueError, RecursionError):
            return None

    return read


def _by_architecture(config: Mapping[str, Any]) -> Kind:
    kind, names = names_of(config)
    if "speculators_config" in config or kind in ("eagle", "medusa", "mlp_speculator", "speculators"):
        return Kind.DRAFT
    # The engine takes the first that it knows.
    found = next((found for name in names if (found := _of_name(name)) is not None), Kind.OTHER)
    is_ranker = any(name.endswith("ForRanking") for name in names)
    if found == Kind.SCORE and _labels(config) > 1 and not is_ranker:
        return Kind.CLASSIFY
    is_encoder_decoder = any(part.get("is_encoder_decoder") is True for part in (config, text_part(config)))
    if found in (Kind.GENERATE, Kind.EMBED) and is_encoder_decoder and not known.MULTIMODAL.intersection(names):
        return Kind.ENCODER_DECODER
    return found


def _of_name(name: str) -> Kind | None:
    for group, kind in _GROUPS:
        if name in group:
            return kind
    if name.startswith("Auto"):
        return None  # transformers' chooser among classes, no class of a model
    return next((kind for endings, kind in _ENDINGS if name.endswith(endings)), None)


def _labels(config: Mapping[str, Any]) -> int:
    """Return how many labels a classifier has; transformers' default is two."""
    number, names = config.get("num_labels"), config.get("id2label")
    if type(number) is int:
        return number
    return len(names) if isinstance(names, Mapping) and names else 2


def _by_sentence_transformers(modules: Any, read: Read) -> Kind | None:
    """Return what the files of sentence-transformers say; None where there are none."""
    about = read("config_sentence_transformers.json")
    said = about.get("model_type") if isinstance(about, Mapping) else None
    if said == CROSS_ENCODER:
        return Kind.SCORE
    if said == SPARSE_ENCODER:
        return Kind.SPARSE
    if not isinstance(modules, list):
        return None
    for module in modules:
        kind = module.get("type") if isinstance(module, Mapping) else None
        match = _MODULE.fullmatch(kind) if isinstance(kind, str) else None
        name = match["name"] if match is not None else ""
        if "sparse_encoder" in str(kind) or name.startswith(("Splade", "MLMTransformer", "Sparse")):
            return Kind.SPARSE
        if "cross_encoder" in str(kind):
            return Kind.SCORE
        if name not in _HEEDED or (name == "Pooling" and not _is_heeded(module, read)):
            return Kind.POOLED_OTHERWISE
    return Kind.EMBED


def _is_heeded(module: Mapping[str, Any], read: Read) -> bool:
    """True if vLLM pools as this module says: in exactly one of the ways that it knows."""
    folder = module.get("path")
    pooling = read(f"{folder}/config.json") if isinstance(folder, str) and folder else None
    if not isinstance(pooling, Mapping):
        return True  # vLLM takes the architecture's own
    ways = {
        str(key).removeprefix("pooling_mode_").partition("_")[0]
        for key, value in pooling.items()
        if str(key).startswith("pooling_mode_") and value is True
    }
    if isinstance(pooling.get("pooling_mode"), str):
        ways.add(pooling["pooling_mode"])
    return len(ways) <= 1 and ways <= _POOLING


def _refusal(kind: Kind, why: str) -> JobFailure:
    what, hint = WITHOUT_A_PATH[kind]
    return JobFailure("unsupported_kind", f"The model is {what} ({why}).", hint)
