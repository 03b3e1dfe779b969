"""The processes of one training where it has more than one: which of them this is, and what they agree on.

`accelerate` starts them, one for each GPU, and brings them together. Each has the whole model and prepares all rows;
the forward passes of a step are dealt out, and the gradients of all are summed by one reduction when the last pass is
done. (Trainer would begin that in the midst of a backward pass: a process whose memory did not suffice there would
leave the others waiting.) So all have the same weights, and decide alike; process 0 alone reports and writes.
With one process nothing here does anything. A process that dies ends all: the launcher sees to that.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

from modelyard.keeper import PR_SET_PDEATHSIG, prctl

T = TypeVar("T")

#: The others wait while one tokenises more slowly or writes a checkpoint; for one that died nobody waits.
PATIENCE = timedelta(days=1)


def count() -> int:
    """Return how many processes this training has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """Return which one of them this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """True if this is the one that reports and writes."""
    return number() == 0


def end_with_the_launcher() -> None:
    """Have the system kill this process when its launcher is gone: each has a session of its own."""
    if count() > 1:
        launcher = os.getppid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher or launcher == 1:
            os._exit(1)


def meet() -> None:
    """Come together with the others, and take a GPU of one's own. Blocks until all are there."""
    if count() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def share(parts: Iterable[T]) -> Iterator[T]:
    """Yield what this process takes of parts that all of them have."""
    return islice(parts, number(), None, count())


def summed(tensor: Any) -> Any:
    """Return the sum of a tensor over all processes, the same in each. All must ask."""
    if count() == 1:
        return tensor
    from accelerate.utils import reduce

    return reduce(tensor, "sum")


def least(value: int, device: Any) -> int:
    """Return the least of a number of each process. All must ask."""
    if count() == 1:
        return value
    import torch
    from accelerate.utils import gather

    return int(gather(torch.tensor([value], device=device)).min())


def sum_gradients(trained: Sequence[Any]) -> None:
    """Give the weights the sum of what all processes have as their gradients. All must ask."""
    if count() == 1:
        return
    import torch

    flat = summed(torch.cat([(torch.zeros_like(one) if one.grad is None else one.grad).flatten() for one in trained]))
    for one, gradient in zip(trained, flat.split([one.numel() for one in trained]), strict=True):
        one.grad = gradient.view_as(one)


def seed_step(seed: int, step: int) -> None:
    """Make chance depend on the step and on this process, so that a checkpoint need not keep that of each."""
    if count() > 1:
        import torch

        torch.manual_seed(hash((seed, step, number())) % 2**63)


def has_lost_another(error: BaseException) -> bool:
    """True if an error only says that another process is gone, which is that one's to explain."""
    if count() == 1:
        return False
    import torch

    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
