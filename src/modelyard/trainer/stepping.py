"""One step of the optimizer at a time, inside transformers' Trainer.

Trainer asks for batches and gets steps: the rows that one update learns from. `training_step` is ours, and takes them
in as many forward and backward passes as memory asks for, shared by the processes of the training (`ranks`). What
Trainer does for each step beside that, and nobody here reads, is left out: counting operations, walking through all
modules, and waiting for the loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from modelyard.trainer import ranks
from modelyard.trainer.batches import Rows, Step, Steps, micros
from modelyard.trainer.failures import is_out_of_memory
from modelyard.trainer.spec import Hyperparameters

MAX_GRADIENT = 1.0
WARMUP_SHARE = 0.03
#: What AdamW keeps of a weight.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
#: A step that takes longer is left unfinished when the training is asked to end.
LONG_STEP_S = 5.0


class Left(Exception):
    """A step was left unfinished: the training is to end, and the state is that before the step."""


class Sizes(Protocol):
    """The size of forward passes (`sizing`)."""

    def at(self, step: int) -> int: ...

    def shrink(self, step: int, error: BaseException) -> None: ...

    def make_room(self) -> None: ...


class Owner(Protocol):
    """Who the steps are taken for."""

    model: Any
    rows: Rows
    pad: int
    #: Of a line that rows are packed into, in tokens; 0: each row is a line of its own.
    capacity: int
    settings: Hyperparameters

    @property
    def sizing(self) -> Sizes: ...

    def loss(self, model: Any, micro: Any) -> Any: ...

    def retention_loss(self, model: Any, step: int) -> Any: ...

    def rate_share(self, step: int) -> float: ...

    def is_to_end(self) -> bool: ...

    def after_step(self, stepper: Stepper, step: Step) -> bool: ...


class Stepper(Trainer):  # type: ignore[misc]
    """Takes the steps of a training from `start` on, with the optimizer's `moments` where it goes on."""

    def __init__(
        self, owner: Owner, steps: Steps | Sequence[Step], start: int, moments: Mapping[str, Any] | None, folder: str
    ) -> None:
        self.owner = owner
        self._steps = steps
        self._start = start
        self._restored = moments
        self._trained = [(name, each) for name, each in owner.model.named_parameters() if each.requires_grad]
        #: Adapted layers in which no weight has had a gradient so far; of several processes, in this one.
        self.idle = {_layer_of(name) for name, _ in self._trained}
        self._random: list[Any] = []
        self._all_asked = False
        #: Of the step that was done last.
        self.step: Step
        self.loss: Any = None
        self.norm: Any = None
        self.rate = 0.0
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=len(steps),
            per_device_train_batch_size=1,
            learning_rate=rate_of(owner.settings),
            max_grad_norm=MAX_GRADIENT,
            use_cpu=not torch.cuda.is_available(),
            seed=owner.settings.seed,
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            average_tokens_across_devices=False,
            ddp_timeout=int(ranks.PATIENCE.total_seconds()),
            dataloader_pin_memory=False,
        )
        if not arguments.parallel_mode.value.startswith("distributed"):
            # Without `accelerate launch` Trainer would copy the model to every GPU for each step, which is slower.
            arguments._n_gpu = min(1, arguments.n_gpu)
        super().__init__(model=owner.model, args=arguments, train_dataset=None, callbacks=[_AfterStep(self)])
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> Any:
        """Return the steps that are left."""
        return self._steps

    def get_batch_samples(
        self, epoch_iterator: Iterator[Step], num_batches: int, device: Any
    ) -> tuple[list[Step], None]:
        """Return the next step: what is learnt in it has been counted already."""
        return list(islice(epoch_iterator, num_batches)), None

    def create_optimizer(self, model: Any = None) -> Any:
        """Make AdamW over the adapter's weights, with the moments of the checkpoint.

        It has moments of the weights that had a gradient by then, and of no others.
        """
        self.optimizer = torch.optim.AdamW(
            [each for _, each in self._trained], lr=rate_of(self.owner.settings), weight_decay=0.0, fused=True
        )
        if self._restored:
            for name, each in self._trained:
                found = {key: self._restored[f"{name}:{key}"] for key in MOMENTS if f"{name}:{key}" in self._restored}
                if found:
                    self.optimizer.state[each] = {key: moment.to(each.device) for key, moment in found.items()}
                    self.idle.discard(_layer_of(name))
            self._restored = None
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule of learning rates, as far on as the training is."""
        optimizer = optimizer if optimizer is not None else self.optimizer
        for group in optimizer.param_groups:
            group["initial_lr"] = rate_of(self.owner.settings)
        self.lr_scheduler = LambdaLR(optimizer, self.owner.rate_share, last_epoch=self._start - 1)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: Step, num_items_in_batch: Any = None) -> Any:
        """Learn from a step's rows; return the mean loss of their learnt tokens, on the device."""
        if not model.training:
            model.train()
        self.step, self.rate = inputs, self.lr_scheduler.get_last_lr()[0]
        while True:
            self._random = random_tensors()
            ranks.seed_step(self.owner.settings.seed, inputs.number)
            shortage: BaseException | None = None
            left = False
            try:
                self.loss = self._learn(inputs)
            except Left:
                left = True
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                # Without its frames, which hold the tensors that were too many.
                shortage = error.with_traceback(None)
            left, is_short = self._agree(left, shortage is not None)
            if left:
                raise Left
            if not is_short:
                ranks.sum_gradients([each for _, each in self._trained])
                return self.loss
            self.owner.sizing.shrink(inputs.number, shortage or MemoryError("in another process of this training"))
            self._undo()

    def floating_point_ops(self, inputs: Any) -> int:
        """Count none."""
        return 0

    def step_back(self) -> None:
        """Bring back the state from before a step that was left."""
        self._undo()

    def moments(self) -> dict[str, Any]:
        """Return the optimizer's moments as tensors on the CPU."""
        state = self.optimizer.state if self.optimizer is not None else {}
        return {
            f"{name}:{key}": value.detach().cpu().contiguous()
            for name, each in self._trained
            for key, value in state.get(each, {}).items()
        }

    def random_state(self) -> list[Any]:
        """Return the state of chance before the next step."""
        return random_tensors()

    @property
    def is_to_end(self) -> bool:
        """True if the training is to end after the step that was done last; all processes say the same."""
        return self._all_asked if ranks.count() > 1 else self.owner.is_to_end()

    def _agree(self, left: bool, is_short: bool) -> tuple[bool, bool]:
        """Return whether any process has left the step, and whether the memory of any did not suffice."""
        if ranks.count() == 1:
            return left, is_short
        mine = torch.tensor([left, is_short, self.owner.is_to_end()], dtype=torch.float32, device=self.args.device)
        loss = torch.zeros(1, device=self.args.device) if left or is_short or self.loss is None else self.loss.view(1)
        found = ranks.summed(torch.cat((mine, loss.float())))
        self.loss = found[3]
        anyone_left, anyone_short, self._all_asked = (flag > 0 for flag in found[:3].tolist())
        return anyone_left, anyone_short

    def _learn(self, step: Step) -> Any:
        """Take this process's share of a step; return its part of the loss, None if it has none."""
        began, total = time.monotonic(), None
        share = 1.0 / max(1, step.learnt)
        owner = self.owner
        for micro in micros(owner.rows, step.rows, owner.sizing.at(step.number), owner.pad, owner.capacity):
            if self.owner.is_to_end() and time.monotonic() - began > LONG_STEP_S:
                raise Left
            loss = self.owner.loss(self.owner.model, micro) * share
            self.accelerator.backward(loss)
            total = loss.detach() if total is None else total + loss.detach()
        # Beside what the step says of its rows: its loss stays that of what is taught.
        if (kept := owner.retention_loss(owner.model, step.number)) is not None:
            self.accelerator.backward(kept)
        if self.idle:
            self.idle -= {_layer_of(name) for name, each in self._trained if each.grad is not None}
        return total

    def _undo(self) -> None:
        for _, each in self._trained:
            each.grad = None
        self.owner.sizing.make_room()
        set_random_tensors(self._random)

    def _clip_grad_norm(self, model: Any) -> Any:
        self.norm = torch.nn.utils.clip_grad_norm_([each for _, each in self._trained], MAX_GRADIENT)
        return self.norm


class _AfterStep(TrainerCallback):  # type: ignore[misc]
    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        stepper = self._stepper
        if stepper.owner.after_step(stepper, stepper.step):
            control.should_training_stop = True
        return control


def _layer_of(weight: str) -> str:
    return weight.partition(".lora_")[0].removeprefix("base_model.model.")


def rate_of(settings: Hyperparameters) -> float:
    """Return the learning rate of settings in which it has been chosen (`choices.filled`)."""
    assert settings.learning_rate is not None
    return settings.learning_rate


def rate_share(schedule: str, step: int, total: int, warmup: int) -> float:
    """Return which share of the learning rate step number `step` (from 0) has."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    left = max(0.0, (total - step) / max(1, total - warmup))
    if schedule == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * left))
    return left


def random_tensors() -> list[Any]:
    """Return the state of torch's chance: the CPU's, then each GPU's."""
    state = [torch.get_rng_state()]
    return state + (torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])


def set_random_tensors(state: list[Any]) -> None:
    """Bring back what `random_tensors` returned; more or fewer GPUs than then get what there is."""
    torch.set_rng_state(state[0])
    for index, each in enumerate(state[1:]):
        if torch.cuda.is_available() and index < torch.cuda.device_count():
            torch.cuda.set_rng_state(each, index)
