"""Options of an engine: the fields that a request may set, and the settings that stand in for what it leaves out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from modelyard.settings import Settings

#: The largest max_model_len that can be asked for.
MOST_TOKENS = 10_000_000


class EngineOptions(BaseModel):
    """Options of an engine that a request may set. Nothing here can name a path, a plugin or remote code.

    What is left out comes from the settings `MODELYARD_ENGINE_*`, and what those leave open from the machine.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = Field(
        default=None, description="Number format of the weights. auto: the model's own."
    )
    max_model_len: int | None = Field(
        default=None, ge=16, le=MOST_TOKENS, description="Longest prompt plus answer, in tokens."
    )
    max_num_seqs: int | None = Field(
        default=None, ge=1, le=4096, description="Requests that the engine works on at the same time."
    )
    gpu_memory_utilization: float | None = Field(
        default=None, gt=0.0, le=1.0, description="Part of a GPU's memory that the engine may take."
    )
    cpu_kv_cache_gib: float | None = Field(
        default=None, gt=0.0, le=4096.0, description="Memory for the KV cache on a CPU, in GiB."
    )
    tensor_parallel_size: int | None = Field(default=None, ge=1, le=64, description="GPUs that share the model.")
    max_loras: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="Adapters that the engine works with at the same time; more of them take turns. 0: none.",
    )
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] | None = Field(
        default=None, description="Highest rank of an adapter."
    )
    enforce_eager: bool | None = Field(default=None, description="Run without compilation.")
    enable_prefix_caching: bool | None = Field(
        default=None, description="Keep the KV cache of prompts' beginnings for the next request."
    )
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2"] | None = Field(
        default=None, description="Number format of the KV cache."
    )
    seed: int | None = Field(default=None, ge=0, le=2**31 - 1, description="Seed of the engine's random numbers.")
    tool_call_parser: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,40}$")] | None = Field(
        default=None, description="vLLM's parser for the model's tool calls, such as hermes; turns tool choice on."
    )
    reasoning_parser: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,40}$")] | None = Field(
        default=None, description="vLLM's parser for the model's reasoning, such as qwen3."
    )

    def over(self, settings: Settings) -> EngineOptions:
        """Return these options with what they leave out taken from the settings."""
        defaults = {
            name: getattr(settings, f"engine_{name}")
            for name in EngineOptions.model_fields
            if hasattr(settings, f"engine_{name}")
        }
        return EngineOptions(**{**defaults, **self.model_dump(exclude_none=True)})
