"""What a model is, by its files: every kind, vLLM's own groups, and the refusal of what has no path here."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from modelyard.errors import JobFailure
from modelyard.models import architectures, kinds
from modelyard.models.kinds import WITHOUT_A_PATH, Kind, Task

ST = "sentence_transformers.models."


def kind_of(config: Mapping[str, Any], **files: Any) -> Kind:
    return kinds.kind_of(config, {name.replace("__", "/") + ".json": value for name, value in files.items()}.get)


def named(*names: str, **more: Any) -> dict[str, Any]:
    return {"architectures": list(names), **more}


def modules(*names: str) -> list[dict[str, Any]]:
    return [{"idx": at, "path": f"{at}_{name}" if at else "", "type": ST + name} for at, name in enumerate(names)]


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (named("LlamaForCausalLM"), Kind.GENERATE),
        (named("GPT2LMHeadModel"), Kind.GENERATE),
        (named("LlavaForConditionalGeneration"), Kind.GENERATE),
        (named("Qwen3_5ForConditionalGeneration"), Kind.GENERATE),
        (named("ChatGLMModel"), Kind.GENERATE),
        (named("NewerThanThisTableForCausalLM"), Kind.GENERATE),
        (named("BertModel"), Kind.EMBED),
        (named("Qwen3Model"), Kind.EMBED),
        (named("XLMRobertaForMaskedLM"), Kind.EMBED),
        (named("BertForSequenceClassification", num_labels=1), Kind.SCORE),
        (named("BertForSequenceClassification", id2label={"0": "LABEL_0"}), Kind.SCORE),
        (named("LlamaForSequenceClassification", num_labels=1), Kind.SCORE),
        (named("BertForSequenceClassification"), Kind.CLASSIFY),
        (named("RobertaForSequenceClassification", id2label={"0": "a", "1": "b", "2": "c"}), Kind.CLASSIFY),
        (named("BertForTokenClassification"), Kind.LABEL_TOKENS),
        (named("DebertaV2ForTokenClassification"), Kind.LABEL_TOKENS),
        (named("Qwen2ForRewardModel"), Kind.REWARD),
        (named("Qwen2ForProcessRewardModel"), Kind.REWARD),
        (named("LlamaForRewardModel"), Kind.REWARD),
        (named("HF_ColBERT"), Kind.LATE_INTERACTION),
        (named("ColPaliForRetrieval"), Kind.LATE_INTERACTION),
        (named("BertSpladeSparseEmbeddingModel"), Kind.SPARSE),
        (named("WhisperForConditionalGeneration", is_encoder_decoder=True), Kind.TRANSCRIBE),
        (named("T5ForConditionalGeneration", is_encoder_decoder=True), Kind.ENCODER_DECODER),
        (named("T5ForConditionalGeneration"), Kind.ENCODER_DECODER),
        (named("MarianMTModel"), Kind.ENCODER_DECODER),
        (named("UnheardOfForConditionalGeneration", is_encoder_decoder=True), Kind.ENCODER_DECODER),
        (named("T5Model", is_encoder_decoder=True), Kind.OTHER),
        (named("JinaVLForRanking"), Kind.SCORE),
        (named("UnheardOfForRanking"), Kind.SCORE),
        (named("EagleLlamaForCausalLM"), Kind.DRAFT),
        (named("LlamaForCausalLMEagle3"), Kind.DRAFT),
        (named("MedusaModel"), Kind.DRAFT),
        (named("Eagle3Speculator", speculators_config={}), Kind.DRAFT),
        (named("ViTModel"), Kind.OTHER),
        (named("ViTForImageClassification"), Kind.OTHER),
        (named("Wav2Vec2ForCTC"), Kind.OTHER),
        (named("BertForQuestionAnswering"), Kind.OTHER),
        (named("OpenVLAForActionPrediction"), Kind.OTHER),
        (named("PatchTSTForPrediction"), Kind.OTHER),
        ({}, Kind.OTHER),
        ({"architectures": []}, Kind.OTHER),
        ({"architectures": None, "model_type": "llama"}, Kind.OTHER),
    ],
)  # fmt: skip
def test_a_models_kind_is_told_by_its_architecture(config: dict[str, Any], kind: Kind) -> None:
    assert kind_of(json.loads(json.dumps(config))) is kind


@pytest.mark.parametrize(
    ("config", "files", "kind"),
    [
        (named("Qwen3ForCausalLM"), {"modules": modules("Transformer", "Pooling", "Normalize")}, Kind.EMBED),
        (named("BertModel"), {"modules": modules("Transformer", "Pooling", "Dense")}, Kind.EMBED),
        (named("MadeUpBackbone"), {"modules": modules("Transformer", "Pooling")}, Kind.EMBED),
        (named("BertModel"), {"modules": modules("Transformer", "Pooling", "LayerNorm")}, Kind.POOLED_OTHERWISE),
        (named("BertModel"), {"modules": modules("Transformer", "WeightedLayerPooling")}, Kind.POOLED_OTHERWISE),
        (named("BertForMaskedLM"), {"modules": modules("MLMTransformer", "SpladePooling")}, Kind.SPARSE),
        (named("BertForMaskedLM"), {"config_sentence_transformers": {"model_type": "SparseEncoder"}}, Kind.SPARSE),
        (named("BertModel"), {"config_sentence_transformers": {"model_type": "CrossEncoder"}}, Kind.SCORE),
        (named("BertModel"), {"config_sentence_transformers": {"model_type": "SentenceTransformer"}}, Kind.EMBED),
        (named("BertForSequenceClassification", num_labels=1), {"modules": modules("Transformer")}, Kind.SCORE),
        (named("BertModel"), {"modules": {"not": "a list"}}, Kind.EMBED),
        (named("BertModel"), {"modules": ["Transformer", 7]}, Kind.POOLED_OTHERWISE),
    ],
)
def test_the_files_of_sentence_transformers_say_more(config: dict[str, Any], files: dict[str, Any], kind: Kind) -> None:
    assert kind_of(config, **files) is kind


@pytest.mark.parametrize(
    ("pooling", "kind"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, Kind.EMBED),
        ({"pooling_mode_mean_tokens": True}, Kind.EMBED),
        ({"pooling_mode_lasttoken": True}, Kind.EMBED),
        ({"pooling_mode": "mean"}, Kind.EMBED),
        ({"word_embedding_dimension": 8}, Kind.EMBED),
        ({"pooling_mode_max_tokens": True}, Kind.POOLED_OTHERWISE),
        ({"pooling_mode_weightedmean_tokens": True}, Kind.POOLED_OTHERWISE),
        ({"pooling_mode": "max"}, Kind.POOLED_OTHERWISE),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, Kind.POOLED_OTHERWISE),
    ],
)
def test_a_way_of_pooling_that_vllm_would_leave_out_is_no_embedding_model(pooling: dict[str, Any], kind: Kind) -> None:
    files = {"modules": modules("Transformer", "Pooling"), "1_Pooling__config": pooling}
    assert kind_of(named("BertModel"), **files) is kind


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in (Kind.GENERATE, Kind.EMBED)])
def test_every_kind_without_a_path_says_what_it_is_and_what_to_do(kind: Kind) -> None:
    what, hint = WITHOUT_A_PATH[kind]
    assert len(what) > 20
    assert hint.endswith(".")


def test_a_kind_without_a_path_is_refused_with_its_name() -> None:
    assert kinds.task_of(named("LlamaForCausalLM"), lambda _: None) is Task.GENERATE
    assert kinds.task_of(named("BertModel"), lambda _: None) is Task.EMBED
    with pytest.raises(JobFailure) as caught:
        kinds.task_of(named("BertForSequenceClassification", num_labels=1), lambda _: None)
    assert caught.value.code == "unsupported_kind"
    assert "reranker (cross-encoder)" in caught.value.message
    assert "BertForSequenceClassification" in caught.value.message
    assert "embedding model" in caught.value.hint


def test_a_pipeline_of_diffusers_is_told_by_its_files() -> None:
    with pytest.raises(JobFailure, match="diffusers"):
        kinds.refuse_files(["model_index.json", "unet/diffusion_pytorch_model.safetensors"])
    kinds.refuse_files(["model_index.json", "config.json", "model.safetensors"])


def test_reading_a_folder_never_leaves_it_and_never_raises(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[" * 100_000, "utf-8")
    (tmp_path.parent / "outside.json").write_text("{}", "utf-8")
    read = kinds.reader(tmp_path)
    assert [read(name) for name in ("modules.json", "none.json", "../outside.json", "a\0b", "/etc/hostname")] == [
        None
    ] * 5


def tables_of(package: str, path: str, ending: str) -> dict[str, Any]:
    """Return the tables of names that a module of an installed package defines, without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    values: dict[str, Any] = {"OrderedDict": OrderedDict}
    for node in ast.parse((Path(found.origin).parent / path).read_text("utf-8")).body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id.endswith(ending)
        ):
            exec(compile(ast.Module([node], []), path, "exec"), values)  # plain tables of an installed package
    return values


def test_the_table_of_architectures_is_vllms_own() -> None:
    found = tables_of("vllm", "model_executor/models/registry.py", "_MODELS")
    generates = {*found["_TEXT_GENERATION_MODELS"], *found["_TRANSFORMERS_SUPPORTED_MODELS"]}
    late = set(found["_LATE_INTERACTION_MODELS"])
    multimodal = set(found["_MULTIMODAL_MODELS"])
    assert generates == architectures.TEXT_GENERATION
    assert multimodal == architectures.MULTIMODAL | architectures.TRANSCRIPTION
    assert set(found["_EMBEDDING_MODELS"]) - generates - multimodal - late == architectures.EMBEDDING
    assert late == architectures.LATE_INTERACTION
    assert set(found["_SEQUENCE_CLASSIFICATION_MODELS"]) == architectures.SEQUENCE_CLASSIFICATION
    assert set(found["_TOKEN_CLASSIFICATION_MODELS"]) == architectures.TOKEN_CLASSIFICATION
    assert set(found["_REWARD_MODELS"]) == architectures.REWARD
    assert set(found["_SPECULATIVE_DECODING_MODELS"]) == architectures.DRAFT


def test_the_speech_recognisers_are_those_that_vllm_lets_do_nothing_else() -> None:
    found = tables_of("vllm", "model_executor/models/registry.py", "_MODELS")
    package = importlib.util.find_spec("vllm")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "model_executor" / "models"
    only = set()
    for name, (module, class_name) in found["_MULTIMODAL_MODELS"].items():
        path = folder / f"{module}.py"
        if not path.is_file():
            continue  # a package of its own, of a model that generates
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                set_here = [ast.unparse(one) for one in node.body if isinstance(one, ast.Assign)]
                only |= {name} if "supports_transcription_only = True" in set_here else set()
    assert only == architectures.TRANSCRIPTION


def test_the_encoders_and_the_encoder_decoders_are_those_of_transformers() -> None:
    found = tables_of("transformers", "models/auto/modeling_auto.py", "_NAMES")

    def names(table: str) -> set[str]:
        flat: set[str] = set()
        for value in found[table].values():
            flat |= set(value) if isinstance(value, tuple | list) else {value}
        return flat

    generates = architectures.TEXT_GENERATION | architectures.MULTIMODAL | architectures.TRANSCRIPTION
    both = names("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES") | names("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES")
    assert both - generates == architectures.ENCODER_DECODER
    known = set().union(*(names(table) for table in found if table.endswith("_NAMES")))
    assert known >= architectures.TEXT_ENCODER
