"""The same training by somebody else, in a process of its own: `python benchmarks/training_child.py WHO SPEC`.

WHO is `loop` (PyTorch and PEFT, written by hand), `grouped` (the same, batches being of rows alike in length), `trl`
(its SFTTrainer) or `llamafactory`. SPEC is the file that our own trainer is given (`modelyard.trainer.spec`), read as
plain JSON: other environments have no Modelyard. After each step a line `{"kind": "point", "step", "tokens", "loss"?}`
is appended to the spec's `progress`, the tokens being those of all rows so far, without padding. `result` gets what
else shows that everybody did the same: the kinds of numbers, how many learn, the versions; and the padding.

Equal: rows, learnt tokens, base in bfloat16, adapters in float32, LoRA, AdamW (fused), schedule, clipping, batch size,
no gradient checkpointing, no checkpoints. What else the libraries do by default they do here too: both compute
under autocast to bfloat16.
"""

from __future__ import annotations

import json
import os
import random
import sys
import types
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "llamafactory")
#: Steps between two losses of the libraries' own logs, as TRL has it.
LOGGED = 10
CLIPPED_AT = 1.0


class Progress:
    """The lines of progress, as ours."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._file = os.open(spec["progress"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.step = 0
        self.tokens = 0
        self.padded = 0

    def saw(self, mask: Any) -> None:
        """Count the tokens of a batch."""
        self.tokens += int(mask.sum())
        self.padded += mask.numel()

    def stepped(self, loss: float | None = None) -> None:
        """Say that a step is done; a loss that is the mean of several steps comes later, by `learnt`."""
        self.step += 1
        self._say({"step": self.step, "tokens": self.tokens} | ({} if loss is None else {"loss": loss}))

    def learnt(self, loss: float) -> None:
        """Say the mean loss of the last `LOGGED` steps."""
        self._say({"step": self.step, "loss": loss})

    def _say(self, point: dict[str, Any]) -> None:
        os.write(self._file, json.dumps({"kind": "point", **point}).encode() + b"\n")


def read_rows(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the conversations."""
    return [json.loads(line) for line in Path(spec["data"]).read_text("utf-8").splitlines()]


def seeded_model(spec: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return tokenizer, base in its own kind of numbers, and what LoRA is to be."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = spec["hyperparameters"]
    torch.manual_seed(settings["seed"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model_dir"])
    model = AutoModelForCausalLM.from_pretrained(spec["model_dir"], dtype=torch.bfloat16)
    lora = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return tokenizer, model, lora


def with_loop(spec: dict[str, Any], progress: Progress, grouped: bool = False) -> Any:
    """Train as one would by hand: rows in their order, each batch padded to its longest row."""
    import torch
    from peft import get_peft_model
    from transformers import get_scheduler

    settings = spec["hyperparameters"]
    tokenizer, base, lora = seeded_model(spec)
    model = get_peft_model(base, lora)
    rows = [
        tokenizer.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        for row in read_rows(spec)
    ]

    def batch(some: list[Any]) -> dict[str, Any]:
        shape = len(some), max(len(row["input_ids"]) for row in some)
        ids = torch.full(shape, tokenizer.pad_token_id)
        mask, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        for number, row in enumerate(some):
            length = len(row["input_ids"])
            ids[number, :length] = torch.tensor(row["input_ids"])
            mask[number, :length] = 1
            learnt = torch.tensor(row["assistant_masks"], dtype=torch.bool)
            labels[number, :length] = torch.where(learnt, ids[number, :length], -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=settings["learning_rate"], weight_decay=0.0, fused=True)
    size, epochs = settings["batch_size"], round(settings["epochs"])
    starts = [*range(0, len(rows), size)]
    schedule = get_scheduler(settings["lr_schedule"], optimizer, settings["warmup_steps"], epochs * len(starts))
    if grouped:
        rows.sort(key=lambda row: len(row["input_ids"]))
        random.Random(settings["seed"]).shuffle(starts)
    model.train()
    for start in starts * epochs:
        inputs = batch(rows[start : start + size])
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, CLIPPED_AT)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.saw(inputs["attention_mask"])
        progress.stepped(loss.item())
    return model


def trainer_settings(spec: dict[str, Any], output: Path) -> dict[str, Any]:
    """Return what both libraries are told, in transformers' words."""
    settings = spec["hyperparameters"]
    return {
        "output_dir": str(output),
        "num_train_epochs": settings["epochs"],
        "per_device_train_batch_size": settings["batch_size"],
        "gradient_accumulation_steps": settings["gradient_accumulation"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": settings["lr_schedule"],
        "warmup_steps": settings["warmup_steps"],
        "max_grad_norm": CLIPPED_AT,
        "weight_decay": 0.0,
        "optim": "adamw_torch_fused",
        "bf16": True,
        "use_cpu": True,
        "seed": settings["seed"],
        "logging_steps": LOGGED,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def watching(progress: Progress) -> Any:
    """Return a callback for transformers' Trainer that counts the tokens and says each step."""
    from transformers import TrainerCallback

    class Watching(TrainerCallback):  # type: ignore[misc]  # its class is untyped
        model: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.model = more["model"]

            def count(module: Any, inputs: Any, named: dict[str, Any]) -> None:
                progress.saw(named["attention_mask"])

            self.model.register_forward_pre_hook(count, with_kwargs=True)

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            progress.stepped()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if "loss" in (logs or {}):
                progress.learnt(float(logs["loss"]))

    return Watching()


def with_trl(spec: dict[str, Any], progress: Progress) -> Any:
    """Train with SFTTrainer on the assistants' tokens alone; the chat template has the marks that it wants for that."""
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]  # only where this runs

    from datasets import Dataset  # type: ignore[import-not-found]  # only where this runs

    tokenizer, model, lora = seeded_model(spec)
    arguments = SFTConfig(
        **trainer_settings(spec, Path(spec["work_dir"])),
        assistant_only_loss=True,
        gradient_checkpointing=False,
        max_length=spec["hyperparameters"]["max_seq_len"],
    )
    watch = watching(progress)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(read_rows(spec)),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[watch],
    )
    trainer.train()
    return watch.model


def with_llamafactory(spec: dict[str, Any], progress: Progress) -> Any:
    """Train as its command line would with a file of these settings; the template is read from the tokenizer."""
    from transformers.utils.import_utils import is_torchaudio_available

    # It imports this for rows with sound, which there are none of; there is no build for the CPU on the default index.
    # transformers must have looked for it before, and remember that there is none.
    if not is_torchaudio_available():
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    from llamafactory.train.tuner import run_exp  # type: ignore[import-not-found]  # only where this runs

    settings, folder = spec["hyperparameters"], Path(spec["work_dir"])
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    rows = {"file_name": spec["data"], "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": rows}), "utf-8")
    watch = watching(progress)
    run_exp(
        {
            **trainer_settings(spec, folder),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "model_name_or_path": spec["model_dir"],
            "disable_gradient_checkpointing": True,
            "lora_rank": settings["rank"],
            "lora_alpha": settings["alpha"],
            "lora_dropout": settings["dropout"],
            "lora_target": "all",
            "dataset": "rows",
            "dataset_dir": str(folder),
            "cutoff_len": settings["max_seq_len"],
            "overwrite_cache": True,
        },
        [watch],
    )
    return watch.model


TRAININGS: dict[str, Callable[[dict[str, Any], Progress], Any]] = {
    "loop": with_loop,
    "grouped": partial(with_loop, grouped=True),
    "trl": with_trl,
    "llamafactory": with_llamafactory,
}


def versions() -> dict[str, str]:
    """Return the version of each package that there is."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Train, and say what came of it."""
    who, path = sys.argv[1:]
    spec = json.loads(Path(path).read_text("utf-8"))
    progress = Progress(spec)
    model = TRAININGS[who](spec, progress)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = {
        "padding_share": 1 - progress.tokens / progress.padded,
        "learning": sum(parameter.numel() for parameter in learning),
        "kinds": sorted({str(parameter.dtype) for parameter in learning}),
        "base_kinds": sorted({str(parameter.dtype) for parameter in model.parameters() if not parameter.requires_grad}),
        "versions": versions(),
    }
    Path(spec["result"]).write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main()
