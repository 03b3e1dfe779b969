"""A vLLM plugin that keeps other packages' logits processors out of an engine.

VLLM_PLUGINS lists the plugins that may run, and vLLM 0.32 heeds it for every group of entry points but one: whatever
an installed package registers as `vllm.logits_processors` is imported in each process and runs at every token. What
somebody installs beside vLLM for another purpose must not read or change answers here.
"""

from __future__ import annotations

from modelyard.engine.plugins.cures import cure


@cure("modelyard_alone")
def keep_others_out() -> None:
    """Have vLLM load no logits processors that were not asked for by name. Safe to repeat."""
    from vllm.v1.sample import logits_processor
    from vllm.v1.worker.gpu.sample.logits_processor import loader

    for module, name in ((logits_processor, "_load_logitsprocs_plugins"), (loader, "_load_v2_logitsprocs_plugins")):
        if not hasattr(module, name):
            raise AttributeError(f"vLLM has no {module.__name__}.{name} any more")
        setattr(module, name, list)
