"""Adapters that PEFT really makes, and its own answers with them: `python -m tests.peft_adapters BASE FOLDER KIND ...`.

Each kind of `KINDS`, or of those that are named, becomes a folder in FOLDER. Its weights are random and large enough
to change every greedy answer, as a training would; those of "weak" are not, and "idle" changes nothing.
FOLDER/greedy.json has, for the base (named '') and each kind, the tokens that transformers continues PROMPT with. A
process of its own, since torch is slow to load and warns.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PROMPT = "The longest river"
TOKENS = 24
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "another": {"seed": 2},
    "idle": {"scale_b": 0.0},
    "weak": {"scale_b": 0.0003},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 4, "down_proj": 16}, "alpha_pattern": {"v_proj": 64}},
    "one_layer": {"layers_to_transform": [1]},
    "by_regex": {"target_modules": ".*q_proj"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "embeddings": {"target_modules": [*ATTENTION, "embed_tokens", "lm_head"]},
    "parameter": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "biases": {"bias": "lora_only"},
    "saved_norm": {"modules_to_save": ["norm"]},
    "saved_head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 2, 3]},
    "pissa": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "activated": {"alora_invocation_tokens": [1, 2]},
    "replicated": {"layer_replication": [[0, 2], [0, 2]]},
    "headless": {"headless": True},
    "resized": {"vocabulary": 2060},
}


def main(base: str, folder: Path, kinds: list[str]) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    def load(cls: Any = AutoModelForCausalLM) -> Any:
        return cls.from_pretrained(base, dtype=torch.float32)

    def greedy(model: Any) -> list[int]:
        prompt = AutoTokenizer.from_pretrained(base)(PROMPT, return_tensors="pt").input_ids
        model.eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        with torch.no_grad():
            found = model.generate(prompt, max_new_tokens=TOKENS, do_sample=False)
        tokens: list[int] = found[0, prompt.shape[1] :].tolist()
        return tokens

    answers = {"": greedy(load())}
    for kind in kinds or KINDS:
        options = {"r": 8, "lora_alpha": 16, "target_modules": LINEAR, **KINDS[kind]}
        torch.manual_seed(options.pop("seed", 1))
        headless, vocabulary = options.pop("headless", False), options.pop("vocabulary", None)
        scale_b = options.pop("scale_b", 1.0)
        model = load(AutoModel if headless else AutoModelForCausalLM)
        if vocabulary:
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
        tuned = get_peft_model(model, LoraConfig(task_type=None if headless else "CAUSAL_LM", **options))
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.3).mul_(scale_b if "lora_B" in name else 1.0)
        tuned.save_pretrained(str(folder / kind))
        if not headless and not vocabulary:
            answers[kind] = greedy(PeftModel.from_pretrained(load(), str(folder / kind)))
    (folder / "greedy.json").write_text(json.dumps(answers), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
