"""The layers that an adapter is put on: linear ones that text reaches and that PEFT trains, each by its full name.

Which layers text reaches is not guessed from names but tried: a few tokens go forward and back, and a layer takes part
if a gradient comes through it. So vision and audio towers get no adapters, nor what a model computes without gradients.
PEFT is told full names, and kept from rewriting them: for mixtures of experts it would turn `gate_proj` into the routed
experts' weights, of twice the rank, and leave the dense layers out. What it made is held against what was asked before
anything is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from modelyard.errors import JobFailure
from modelyard.plurals import counted
from modelyard.trainer.layer_names import EXPERTS_SERVED, ROUTED, ROUTERS, is_named, is_unserved
from modelyard.trainer.refusals import experts_without_dropout, unknown_target_modules

_PARTS = ("gate_up_proj", "down_proj")
#: So many tokens are tried.
TRIED_TOKENS = 8
_OTHER_MODEL = "Train a decoder model such as Llama, Qwen, Mistral, Gemma or Phi."
#: PEFT's function, by its name in `peft.utils.transformers_weight_conversion`.
_REWRITES = "convert_peft_config_for_transformers"


def layers_to_adapt(model: Any, wanted: list[str] | None, model_id: str) -> list[str]:
    """Return the full names of the layers to adapt: all linear ones that can be trained and served, or those `wanted`.

    A wanted name is the end of a layer's full name: `q_proj`, `self_attn.q_proj` or `layers.0.self_attn.q_proj`.
    `experts` stands for the routed experts, all of a layer, where the engine serves them.

    Raises:
        JobFailure: `unknown_target_modules`, naming what there is; `unsupported_architecture` where nothing fits.
    """
    there = trainable_layers(model)
    if not there:
        raise JobFailure(
            "unsupported_architecture",
            f"{model_id} has no linear layers that an adapter could be put on.",
            _OTHER_MODEL,
        )
    if wanted is None:
        return there
    routed = [name for name, module in model.named_modules() if _is_experts(name, module)]
    is_served = str(model.config.get_text_config().model_type) in EXPERTS_SERVED
    there += routed if is_served else []
    unknown = sorted(name for name in set(wanted) if not any(is_named(layer, name) for layer in there))
    if unknown or not wanted:
        kinds = {layer.rpartition(".")[2] for layer in there}
        raise unknown_target_modules(model_id, unknown, kinds, has_unserved_experts=bool(routed) and not is_served)
    return [layer for layer in there if any(is_named(layer, name) for name in wanted)]


def trainable_layers(model: Any) -> list[str]:
    """Return the full names of the linear layers that text reaches and that PEFT can train, in the model's order."""
    from torch import nn

    output = model.get_output_embeddings()
    candidates = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name
        and module is not output
        and name.rpartition(".")[2] not in ROUTERS
        and not ROUTED.search(name)
        and not _is_read_by_a_kernel(model, name)
        and not is_unserved(str(model.config.get_text_config().model_type), name)
    }
    reached = _reached(model, candidates) if candidates else set()
    return [name for name in candidates if name in reached]


def adapted(model: Any, config: Any, layers: list[str]) -> Any:
    """Return a PeftModel with an adapter on exactly these layers, of exactly the configuration's rank.

    Raises:
        JobFailure: `adapter_not_as_asked`: PEFT made another one; `experts_without_dropout`.
    """
    from peft import get_peft_model

    routed = [name for name in layers if _is_experts(name, model.get_submodule(name))]
    linear = [name for name in layers if name not in set(routed)]
    if routed and config.lora_dropout:
        raise experts_without_dropout()
    ranks = dict.fromkeys(linear, config.r)
    for name in routed:
        # One matrix for all experts, one's rank after the other's; the outer of the two is that of down_proj.
        ranks[name] = ranks[f"{name}.base_layer"] = config.r * len(model.get_submodule(name).down_proj)
    config.target_modules = set(linear)
    config.target_parameters = [f"{name}.{part}" for name in routed for part in _PARTS] or None
    with names_as_they_are():
        made = get_peft_model(model, config)
    check(made, ranks)
    _write_down(made.peft_config["default"], model, linear)
    return made


def check(model: Any, ranks: Mapping[str, int]) -> None:
    """Hold the adapter of a PeftModel against the layers and their ranks that were asked for.

    Raises:
        JobFailure: `adapter_not_as_asked`.
    """
    prefix, found = "base_model.model.", dict[str, set[int]]()
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        layer, part, _ = name.partition(".lora_")
        found.setdefault(layer.removeprefix(prefix), set()).add(
            weight.shape[0] if name.startswith("A.", len(layer) + len(part)) else weight.shape[1]
        )
    missing, more = ranks.keys() - found.keys(), found.keys() - ranks.keys()
    other = sorted(name for name in ranks.keys() & found.keys() if found[name] != {ranks[name]})
    if missing or more or other:
        said = [
            f"{counted(len(missing), 'layer')} without one ({_some(missing)})" if missing else "",
            f"{counted(len(more), 'other layer')} with one ({_some(more)})" if more else "",
            f"{counted(len(other), 'layer')} with another rank ({_some(other)})" if other else "",
        ]
        raise JobFailure(
            "adapter_not_as_asked",
            f"The adapter that PEFT made is not the one that was asked for: {'; '.join(filter(None, said))}.",
            "Report this model and its settings; with target_modules of attention layers alone (q_proj, v_proj) it may "
            "train.",
        )


def shortest_names(model: Any, layers: Iterable[str]) -> list[str]:
    """Return names that stand for exactly these layers: the last part where all layers of that name are among them."""
    chosen = set(layers)
    kinds = {name.rpartition(".")[2] for name in chosen}
    others = {
        kind
        for name in (each.replace(".base_layer", "") for each, _ in model.named_modules())
        if (kind := name.rpartition(".")[2]) in kinds and name not in chosen
    }
    return sorted({name if (kind := name.rpartition(".")[2]) in others else kind for name in chosen})


def _write_down(config: Any, model: Any, layers: list[str]) -> None:
    """Have a configuration name layers so that PEFT by itself makes this adapter again, in the same words each time."""
    rewritten = {kind for kind in {name.rpartition(".")[2] for name in layers} if _is_rewritten(kind, model)}
    plain = [name for name in layers if name.rpartition(".")[2] not in rewritten]
    config.target_modules = set(shortest_names(model, plain))
    if len(plain) < len(layers):
        # By their weights, which it does not rewrite. It takes no dropout there, and needs none to read.
        by_weight = [f"{name}.weight" for name in layers if name not in set(plain)]
        config.target_parameters = [*(config.target_parameters or ()), *by_weight]
        config.lora_dropout = 0.0


def _is_rewritten(kind: str, model: Any) -> bool:
    """Return whether PEFT takes a layer's name for that of an expert's weights in transformers 4."""
    from peft import LoraConfig
    from peft.utils import transformers_weight_conversion

    convert = getattr(transformers_weight_conversion, _REWRITES, None)
    if convert is None:
        return False
    config = LoraConfig(target_modules=[kind])
    try:
        convert(config, model=model, conversions=None)
    except ValueError:
        # It wants another name beside this one.
        return True
    return bool(config.target_parameters)


@contextmanager
def names_as_they_are() -> Iterator[None]:
    """Keep PEFT from rewriting names of layers, which are this model's own.

    It takes a configuration that names `gate_proj` in a model whose experts transformers 5 keeps in one tensor for one
    of transformers 4, and puts the adapter on the experts instead.
    """
    from peft.utils import transformers_weight_conversion

    original = getattr(transformers_weight_conversion, _REWRITES, None)
    if original is None:
        yield
        return
    setattr(transformers_weight_conversion, _REWRITES, lambda *_, **__: None)
    try:
        yield
    finally:
        setattr(transformers_weight_conversion, _REWRITES, original)


def _reached(model: Any, candidates: dict[str, Any]) -> set[str]:
    """Return which layers a gradient comes through when text is read. Nothing of the model changes."""
    import torch

    found: set[str] = set()

    def watch(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            if not torch.is_grad_enabled() or not torch.is_tensor(output):
                return None
            # A layer whose output depends on nothing that is trained yet: with an adapter it will.
            watched = output if output.requires_grad else output.detach().requires_grad_()
            watched.register_hook(lambda _gradient: found.add(name))
            # Not the leaf itself, which the model could not change in place.
            return None if output.requires_grad else watched.clone()

        return hook

    model.requires_grad_(False)
    hooks = [module.register_forward_hook(watch(name)) for name, module in candidates.items()]
    was_training = model.training
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            model.train()
            ids = torch.tensor([_plain_tokens(model.config)], device=model.device)
            model(input_ids=ids, use_cache=False).logits.float().sum().backward()
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found


def _plain_tokens(config: Any) -> list[int]:
    """Return tokens that stand for nothing but text, as far as the configuration tells."""
    text = config.get_text_config()
    special: set[int] = set()
    for part in (config, text):
        for name, value in vars(part).items():
            if "token" in name:
                special.update(one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))
    plain = [token for token in range(min(text.vocab_size, len(special) + TRIED_TOKENS)) if token not in special]
    return plain[:TRIED_TOKENS] or [0]


def _is_read_by_a_kernel(model: Any, name: str) -> bool:
    """Return whether a layer's weight goes into a fused kernel, past the layer and so past its adapter.

    The kernels of Mamba do so with `out_proj`; PEFT refuses it in some of these models, and trains nothing in others.
    """
    parent_name, _, last = name.rpartition(".")
    if last != "out_proj":
        return False
    parent = model.get_submodule(parent_name)
    return hasattr(parent, "A_log") and hasattr(parent, "D")


def _is_experts(name: str, module: Any) -> bool:
    """Return whether a module is the routed experts of a layer, in one tensor for each of the two steps."""
    return name.endswith(".experts") and all(getattr(getattr(module, part, None), "ndim", 0) == 3 for part in _PARTS)


def _some(names: Iterable[str]) -> str:
    return ", ".join(f"'{name[:120]}'" for name in sorted(names)[:3])
