"""Architectures that the engine serves, but not with adapters: what is learnt has to be in the weights themselves.

Read in vLLM 0.32.0: causal language models of its own registry whose class is no `SupportsLoRA`; a test compares. What
vLLM has no class of its own for, it serves through transformers, with adapters.
"""

from __future__ import annotations

from modelyard.models.config_file import Config, names_of

ARCHITECTURES = frozenset(
    {
        "BloomForCausalLM", "Cohere2MoeForCausalLM", "DbrxForCausalLM", "DeepseekV32ForCausalLM",
        "DeepseekV4ForCausalLM", "FalconForCausalLM", "FalconMambaForCausalLM", "GPT2LMHeadModel",
        "GPTJForCausalLM", "Gemma3nForCausalLM", "Gemma3nForConditionalGeneration", "GlmMoeDsaForCausalLM",
        "HYV4ForCausalLM", "HrmTextForCausalLM", "InklingForCausalLM", "KimiLinearForCausalLM",
        "Mamba2ForCausalLM", "MambaForCausalLM", "MiMoV2FlashForCausalLM", "Qwen4ExpForCausalLM",
        "StableLmForCausalLM", "Zamba2ForCausalLM",
    }
)  # fmt: skip


def fault(config: Config) -> str | None:
    """Return what keeps adapters from being served on a model, as a clause about it; None: nothing that is known."""
    _, named = names_of(config)
    found = next((name for name in named if name in ARCHITECTURES), None)
    return f"is a {found}, which the engine serves without adapters" if found is not None else None


def remedy(adapter_id: str) -> str:
    """Return what to do with an adapter of such a model."""
    return (
        f"GET /api/v1/models/{adapter_id}/export?merged=true is the whole model with the adapter inside its weights, "
        "which can be imported and deployed."
    )
