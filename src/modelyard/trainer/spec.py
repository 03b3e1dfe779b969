"""The files between the server and a trainer: the spec, lines of progress, one result.

The spec is written by the server before the child starts. The child appends JSON lines to `progress`, each with `kind`:

    phase       {phase}: loading | tokenizing | training | evaluating | saving
    note        {level, message, data}: an event for whoever follows the job
    prepared    {rows, held_out_rows, left_out_rows, truncated_rows, tokens, learnt_tokens, longest, steps, ...}
    estimate    {seconds, memory_bytes, tokens_per_s, basis}
    point       {step, epoch, loss?, learning_rate?, grad_norm?, tokens, tokens_per_s, validation_loss?, memory_bytes}
    checkpoint  {step, folder}: a whole checkpoint is in place; older ones may have gone
    progress    {done, total, unit}

and writes `result` once, moved into place when it is whole. One of:

    {"adapter_dir", "figures", "evaluation", "probes", "versions", "chosen", "learnt_from"}   of mode train
    {"plan"}                                                                        of mode plan
    {"model_dir"}                                                                   of mode merge
    {"stopped": true, "step"}            asked to end by SIGTERM: a checkpoint of this step is in place, if there is one
    {"failure": {"code", "message", "hint", "evidence"}}

A child that ends without a result was killed, or died. Imports nothing that either side would mind.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol


class Mode(StrEnum):
    """The work of a child."""

    #: Train an adapter, going on from the newest checkpoint, and score it.
    TRAIN = "train"
    #: Say what the training would take, by preparing the rows and measuring a few steps.
    PLAN = "plan"
    #: Put an adapter into its base's weights.
    MERGE = "merge"


@dataclass(frozen=True)
class Hyperparameters:
    """The settings of a training, as the request gave them with the defaults filled in. None: as its comment says."""

    #: One of these two is None; both: epochs by how many rows there are (`choices`).
    epochs: float | None
    max_steps: int | None
    #: None: by the rows of a step, the adapter and the model (`choices`).
    learning_rate: float | None
    #: linear, cosine or constant, after the warm-up.
    lr_schedule: str
    #: None: 3 % of the steps.
    warmup_steps: int | None
    #: Rows of one forward pass. None: those of a step by how many there are (`choices`), in as many passes as memory
    #: asks for.
    batch_size: int | None
    gradient_accumulation: int
    rank: int
    alpha: float
    dropout: float
    #: Names of linear layers. None: all of them but the output layer.
    target_modules: list[str] | None
    #: Tokens. None: what the model takes, 4,096 at most.
    max_seq_len: int | None
    seed: int
    #: Several rows in one line of a batch, each as if it were alone.
    packing: bool
    #: "4bit" or None.
    quantization: str | None
    #: Part of the rows that is held back. None: 5 %, at least one row, none of fewer than 20.
    validation_split: float | None
    #: Evaluations without improvement after which the training ends. None: it does not.
    early_stopping: int | None
    #: Steps between two checkpoints. None: a tenth of the training, but no more than a few minutes of it.
    checkpoint_steps: int | None
    #: Weight of what holds the adapter to the base on ordinary texts (`retention`). None: as `choices` says. A training
    #: that was asked for before there was such a setting has none of it.
    retention: float | None = 0.0
    #: The loss below which rows are learnt, and the training ends before its epochs do (`ending`). None: it does not.
    #: No request has it: `choices` says so where it chooses the epochs.
    learnt_loss: float | None = None


class Base(Protocol):
    """A model whose folder is read: what a spec says of it."""

    @property
    def model_id(self) -> str: ...

    @property
    def model_dir(self) -> str: ...


@dataclass(frozen=True)
class Spec:
    """One run of the trainer. Paths are absolute; sizes in bytes.

    `work_dir` outlives attempts: `checkpoints/step-<n>/` and `adapter/` in it are whole or not there.
    """

    mode: Mode
    name: str
    model_id: str
    model_dir: str
    adapter_id: str
    #: The dataset's file; empty in mode merge.
    data: str
    max_line_bytes: int
    hyperparameters: Hyperparameters
    work_dir: str
    progress: str
    result: str
    #: The time that chat templates are told, in seconds since 1970: the same for all attempts of a training.
    #: None: the time of the attempt.
    now: float | None = None
    #: Where TensorBoard's files of this training go; None: nowhere.
    tensorboard_dir: str | None = None
    #: Most memory that the training may take; None: what is free.
    memory_bytes: int | None = None
    #: Disk space that must stay free.
    disk_reserve_bytes: int = 0
    #: Mode plan: what the last training of the same model and settings took (`finetune.planning`); None: there is none.
    history: dict[str, Any] | None = None
    #: Mode plan: whether steps may be measured where the history does not tell.
    measure: bool = True
    #: Mode merge: the adapter, and where the merged model goes.
    adapter_dir: str = ""
    merged_dir: str = ""

    @classmethod
    def read(cls, path: Path) -> Spec:
        """Read the file that `write` wrote."""
        values: dict[str, Any] = json.loads(path.read_text("utf-8"))
        values["mode"] = Mode(values["mode"])
        values["hyperparameters"] = Hyperparameters(**values["hyperparameters"])
        return cls(**values)

    def write(self, path: Path) -> None:
        """Write it down, in a folder that may have to be made."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(json.dumps(asdict(self)), "utf-8")
