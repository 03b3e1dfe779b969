"""A vLLM plugin that mends what vLLM 0.32 does wrong with adapters: three things, each with its reason.

1. On a CPU, its operations take a token's adapter by its slot, and -1, which stands for no adapter, takes the last slot
   of all. Once as many adapters have been loaded as there are slots, every request to the base that shares a step with
   a request to any adapter is answered with the last slot's adapter: the kernels for GPUs heed the -1. So the rows of
   such tokens are made zero before the operations, which then add nothing to them.
2. On a CPU, the log probabilities of a prompt (`echo` with `logprobs`, `prompt_logprobs`) are worked out from one row
   for each of its tokens, but the mapping from rows to adapters has one entry for each request of the step: with two
   requests the shapes differ and the engine ends, or they agree by chance and a row gets another request's adapter. A
   mapping of one entry, which is what a request alone has, fits any number of rows: each prompt gets its own.
3. Everywhere, layers of an adapter whose names the model does not have are passed over without a word, so that the
   adapter acts by half or not at all. Here the engine knows both lists, after all renaming: it refuses the adapter,
   and says what it has instead.

`command` names it in VLLM_PLUGINS. Does nothing with a vLLM that works in another way, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from modelyard.engine.plugins.cures import cure
from modelyard.plurals import counted

#: Each takes the inputs, the slots' weights, the output and the slot of each row, in this order.
OPERATIONS = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")
#: So many names are said of those that are passed over, and of those that the model has.
NAMES_SAID = 3


@cure("modelyard_lora")
def keep_adapters_off_the_base() -> None:
    """Have vLLM apply adapters where they belong, and nowhere else. Safe to repeat."""
    _add_nothing_without_an_adapter()
    _map_the_rows_of_prompts()
    _refuse_layers_that_are_passed_over()


def _add_nothing_without_an_adapter() -> None:
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name in OPERATIONS:
        operation = getattr(lora_ops, name)
        if hasattr(operation, "is_mended"):
            continue
        minding = _minding_the_base(operation)
        # Whoever imported it by name has to get the new one too.
        for module in (lora_ops, torch_ops, punica_cpu):
            setattr(module, name, minding)


def _minding_the_base(operation: Callable[..., None]) -> Callable[..., None]:
    def apply(inputs: Any, weights: Any, output: Any, slots: Any, *rest: Any, **named: Any) -> None:
        operation(inputs.where((slots >= 0).unsqueeze(1), 0), weights, output, slots, *rest, **named)

    apply.is_mended = True  # type: ignore[attr-defined]  # a mark, for a second call
    return apply


def _map_the_rows_of_prompts() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner._get_prompt_logprobs_dict
    if hasattr(original, "is_mended"):
        return

    def one_prompt_at_a_time(runner: Any, hidden_states: Any, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
        asked = runner.num_prompt_logprobs
        if not asked or not runner.lora_config:
            return original(runner, hidden_states, num_scheduled_tokens)  # type: ignore[no-any-return]  # vLLM's
        found: dict[str, Any] = {}
        try:
            for request_id in [one for one in asked if one in num_scheduled_tokens]:
                runner.num_prompt_logprobs = {request_id: asked[request_id]}
                with _rows_belong_to(runner, request_id):
                    found |= original(runner, hidden_states, num_scheduled_tokens)
                if request_id not in runner.num_prompt_logprobs:  # its prompt is done
                    del asked[request_id]
        finally:
            runner.num_prompt_logprobs = asked
        return found

    one_prompt_at_a_time.is_mended = True  # type: ignore[attr-defined]  # a mark, for a second call
    CPUModelRunner._get_prompt_logprobs_dict = one_prompt_at_a_time


@contextmanager
def _rows_belong_to(runner: Any, request_id: str) -> Iterator[None]:
    """Have every row of what is worked out meanwhile get the adapter of this request."""
    manager = runner.lora_manager._adapter_manager
    number = int(runner.input_batch.request_lora_mapping[runner.input_batch.req_id_to_index[request_id]])
    slot = manager.lora_index_to_id.index(number) if number > 0 else -1
    wrappers = list({id(one): one for one in manager.punica_wrapper_mapping.values()}.values())
    before = [(wrapper.indices_len[1], wrapper._sampler_indices[0].item()) for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.indices_len[1] = 1
            wrapper._sampler_indices[0] = slot
        yield
    finally:
        for wrapper, (length, first) in zip(wrappers, before, strict=True):
            wrapper.indices_len[1] = length
            wrapper._sampler_indices[0] = first


def _refuse_layers_that_are_passed_over() -> None:
    from vllm.lora.worker_manager import WorkerLoRAManager

    original = WorkerLoRAManager._load_adapter
    if hasattr(original, "is_mended"):
        return

    def load(manager: Any, request: Any) -> Any:
        lora = original(manager, request)
        if wrong := passed_over(lora.loras, manager._adapter_manager):
            raise ValueError(wrong)
        return lora

    load.is_mended = True  # type: ignore[attr-defined]  # a mark, for a second call
    WorkerLoRAManager._load_adapter = load


def passed_over(layers: Any, manager: Any) -> str:
    """Return in words which of an adapter's layers vLLM would pass over; '' if it uses all of them.

    `layers` has their names as vLLM has renamed them, `manager` is the one that puts them into the model's layers.
    """
    # Of a model that is spread over several workers by layers, each has some.
    if not manager.modules or _is_spread(manager):
        return ""
    known = set(manager.modules)
    for packed, parts in manager.packed_modules.items():
        # Whoever trained the packed layer itself names that.
        known |= {packed, *parts}
    if manager.is_pooling_model:
        known |= {name.removeprefix("model.") for name in known}
    unknown = [name for name in layers if name not in known and not _is_of_experts(name, known)]
    if not unknown:
        return ""
    kinds = {name.rpartition(".")[2] for name in unknown}
    alike = sorted(name for name in known if name.rpartition(".")[2] in kinds) or sorted(known)
    return (
        f"of the adapter's {counted(len(layers), 'layer')} the model lacks {len(unknown)}, which would be passed over, "
        f"such as {_some(sorted(unknown))}; the model has {_some(alike)}"
    )


def _is_of_experts(name: str, known: set[str]) -> bool:
    # Weights of experts come in several forms, which vLLM takes apart itself.
    head, found, _ = name.partition(".experts")
    return bool(found) and any(one.startswith(head + found) for one in known)


def _is_spread(manager: Any) -> bool:
    return any(type(module).__name__ == "PPMissingLayer" for module in manager.model.modules())


def _some(names: list[str]) -> str:
    return ", ".join(repr(name[:120]) for name in names[:NAMES_SAID])
