"""A vLLM plugin that keeps adapters off the requests that name none, on a CPU.

vLLM 0.32's operations for a CPU take a token's adapter by its slot, and -1, which stands for no adapter, takes the last
slot of all. As long as that is empty nothing is wrong. Once as many adapters have been loaded as there are slots, every
request to the base that shares a step with a request to any adapter is answered with the last slot's adapter, without
a word: the kernels for GPUs heed the -1, and a step without any adapter skips all of this. So the rows of such tokens
are made zero before the operations, which then add nothing to them.

For engines on a CPU only: `vllm_args` names it in VLLM_PLUGINS. Does nothing with a vLLM that works in another way;
never raises, never costs an engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

#: Each takes the inputs, the slots' weights, the output and the slot of each row, in this order.
OPERATIONS = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")


def keep_adapters_off_the_base() -> None:
    """Have vLLM's operations for a CPU add nothing where there is no adapter. Safe to repeat."""
    try:
        from vllm.lora.ops import torch_ops
        from vllm.lora.ops.torch_ops import lora_ops
        from vllm.lora.punica_wrapper import punica_cpu

        for name in OPERATIONS:
            operation = getattr(lora_ops, name)
            if hasattr(operation, "minds_the_base"):
                continue
            minding = _minding_the_base(operation)
            # Whoever imported it by name has to get the new one too.
            for module in (lora_ops, torch_ops, punica_cpu):
                setattr(module, name, minding)
    except Exception:  # vLLM would end the engine over a plugin that raises
        log.warning("Could not keep adapters off requests to the base.", exc_info=True)


def _minding_the_base(operation: Callable[..., None]) -> Callable[..., None]:
    def apply(inputs: Any, weights: Any, output: Any, slots: Any, *rest: Any, **named: Any) -> None:
        operation(inputs.where((slots >= 0).unsqueeze(1), 0), weights, output, slots, *rest, **named)

    apply.minds_the_base = True  # type: ignore[attr-defined]
    return apply
