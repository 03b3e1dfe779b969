"""A vLLM plugin that asks the kernel for the AMX tiles before vLLM's attention kernel uses them.

On a processor with AMX, vLLM's CPU attention runs tile instructions in bfloat16 whether or not its process was
granted them; Linux grants them on request only, and an engine whose first request is short dies by SIGILL before
oneDNN, which asks as a side effect of longer ones, gets its turn. vLLM calls every function in the entry point
group `vllm.general_plugins` in each of its processes, so this one is called in the worker before any request.

Does nothing on other processors, in other builds of torch, and on GPUs.
"""

from __future__ import annotations

from modelyard.engine.plugins.cures import cure


@cure("modelyard_amx")
def enable_amx() -> None:
    """Ask for the AMX tiles where there are any. Safe to repeat; the permission holds for the whole process."""
    # Only an engine's process gets here: the server, which never imports torch, must stay able to import us.
    import torch

    ask = getattr(torch.cpu, "_init_amx", None)
    if ask is None or not torch.cpu._is_amx_tile_supported():
        return
    if not ask():
        raise OSError("the kernel refused the AMX tiles: short requests in bfloat16 may kill this engine")
