"""A vLLM plugin that makes an engine's processes sleep while they wait for one another, instead of yielding in a loop.

vLLM's processes on one machine talk through shared memory, and a reader spins on `sched_yield` for up to a second. On
a CPU the spinning processes share their cores with everyone else: the engine's own API server, the gateway, the
clients. Linux's scheduler then leaves others without a turn for seconds (6.18 was seen to; kernels since 6.6 have had
faults with loops of yields), and the stream of every client stands still: see benchmarks/RESULTS.md. A sleep of no
length, which the kernel makes about 50 microseconds, gives the core away for certain.

For engines on a CPU only, whose steps take milliseconds: `command` names it in VLLM_PLUGINS. Does nothing with a
vLLM that waits in another way, and says so.
"""

from __future__ import annotations

from modelyard.engine.plugins.cures import cure


@cure("modelyard_sleep")
def sleep_while_waiting() -> None:
    """Have vLLM's readers of shared memory sleep between two looks. Safe to repeat; holds for the whole process."""
    from vllm.distributed import utils

    if not hasattr(utils, "USE_SCHED_YIELD"):
        raise AttributeError("this vLLM has no switch for how its processes wait for one another")
    utils.USE_SCHED_YIELD = False  # vLLM's own way for Pythons in which a yield would keep the interpreter's lock
