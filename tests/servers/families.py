"""Forks processes that train, resume and serve tiny models of families; each has torch, PEFT and vLLM imported.

On standard input, lines `{"do", "family", "folder"}`; on standard output, after each, what came of it as JSON:
`{"result"}`, `{"error"}`, or `{"signal"}` if it was killed. One at a time; it ends with its standard input. `do` is:

    train    train an adapter, and be killed by SIGKILL after the second of four steps
    resume   go on from the checkpoint to the last step, and hold the adapter against PEFT
    serve    load the adapter as an engine does, into vLLM's own model of the architecture
    list     say which families transformers has as language models, and whether vLLM serves them with adapters
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelyard.errors import JobFailure
from tests.trainer.families import OTHERS, model_of
from tests.trainer.runs import DEFAULTS, Run, make_run

STEPS, KILLED_AFTER = 4, 2
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS, "checkpoint_steps": 1, "batch_size": 2, "gradient_accumulation": 1, "dropout": 0.0, "rank": 4,
    "alpha": 8.0,
}  # fmt: skip
#: vLLM has no kernels for them on a processor: sparse attention, and what Triton alone can compile.
NEED_A_GPU = frozenset({"deepseek_v32", "glm_moe_dsa", "hy_v4", "inkling_text", "olmo_hybrid", "qwen4_exp_text"})


class Never:
    """A training that nobody asks to end."""

    asked = False


class KilledAfter:
    """The end of a training by SIGKILL, once there is a checkpoint of so many steps."""

    def __init__(self, run: Run) -> None:
        self._run = run

    @property
    def asked(self) -> bool:
        if len(self._run.told("checkpoint")) >= KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)
        return False


def rows() -> Any:
    """Return rows of chance tokens, of each of which all but the first is learnt."""
    from modelyard.trainer.batches import Rows
    from modelyard.trainer.examples import Example

    chance = random.Random(1)
    drawn = [[chance.randrange(3, 2000) for _ in range(length)] for length in (40, 30, 24, 16, 16, 12, 8, 8)]
    return Rows([Example(at + 1, ids, [-100, *ids[1:]]) for at, ids in enumerate(drawn)])


def training_of(run: Run, stop: Any) -> tuple[Any, Any]:
    """Return the training of a run, as the trainer makes it, and the model with its adapter."""
    from modelyard.trainer.batches import Rows
    from modelyard.trainer.checkpoints import Checkpoints
    from modelyard.trainer.loop import Training
    from modelyard.trainer.model import load_base, with_adapter
    from modelyard.trainer.reports import Reports

    report = Reports(Path(run.spec.progress))
    # In the same format on every machine: what is near the limits of `packing` would differ.
    model = with_adapter(load_base(run.spec, report).float(), run.spec)
    checkpoints = Checkpoints(run.work, "mine", 0, report)
    return Training(run.spec, model, rows(), Rows([]), 0, report, checkpoints, stop), model


def train(family: str, folder: Path) -> dict[str, Any]:
    """Make the model and train it until it is killed."""
    model_of(family).save_pretrained(folder / "model")
    run = make_run(folder / "run", folder / "model", 1, **SETTINGS)
    training, _ = training_of(run, KilledAfter(run))
    training.run()
    return {"killed": False}


def resume(family: str, folder: Path) -> dict[str, Any]:
    """Train on to the end, write the adapter down, and say what PEFT makes of it."""
    import torch
    from safetensors.torch import load_file, save_file

    from modelyard.trainer.model import CONFIG, WEIGHTS, adapter_config, adapter_weights
    from modelyard.trainer.packing import capacity_of

    spec = replace(read_spec(folder), hyperparameters=replace(DEFAULTS, **SETTINGS))
    run = Run(spec, folder / "run")
    training, model = training_of(run, Never())
    # Before it is trained: the model is tried on packed rows with an adapter that changes nothing.
    try:
        packs = capacity_of(model, rows()) > 0
    except JobFailure as failure:
        if failure.code != "packing_unsupported":
            raise
        packs = False
    outcome = training.run()
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file(adapter_weights(model), adapter / WEIGHTS, metadata={"format": "pt"})
    (adapter / CONFIG).write_text(adapter_config(model), "utf-8")
    acts = [float(each.abs().max()) for name, each in adapter_weights(model).items() if ".lora_B." in name]
    model.eval()
    with torch.inference_mode():
        expected = logits(model)
        ours = logits(merge_loads(run, adapter))
        plain = logits(peft_loads(run, adapter))
    return {
        "architecture": type(model.get_base_model()).__name__,
        "steps": outcome.step,
        "resumed_from": [note["data"]["step"] for note in run.told("note") if note["message"].startswith("It goes on")],
        "untrained_layers": outcome.figures["untrained_layers"],
        "layers_without_effect": sum(one == 0.0 for one in acts),
        "layers": sorted(
            name.partition(".lora_")[0].removeprefix("base_model.model.")
            for name in load_file(adapter / WEIGHTS)
            if ".lora_A." in name
        ),
        "packs": packs,
        "merges": same(ours, expected),
        "peft_reads": plain is not None and same(plain, expected),
    }


def logits(model: Any) -> Any:
    """Return a model's logits of a few tokens; None: there is no model."""
    import torch

    return None if model is None else model(input_ids=torch.arange(3, 19)[None], use_cache=False).logits.float()


def same(found: Any, expected: Any) -> bool:
    """Return whether two models answer alike."""
    return float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def read_spec(folder: Path) -> Any:
    """Return the spec that the training was started with."""
    from modelyard.trainer.spec import Spec

    return Spec.read(folder / "run" / "training.json")


def merge_loads(run: Run, adapter: Path) -> Any:
    """Return the model with its adapter as a merge reads them."""
    from modelyard.trainer.merge import _with_adapter
    from modelyard.trainer.model import load_base
    from modelyard.trainer.reports import Reports

    return _with_adapter(load_base(run.spec, Reports(Path(os.devnull))).float(), run.spec, adapter).eval()


def peft_loads(run: Run, adapter: Path) -> Any:
    """Return the model with its adapter as anyone's PEFT reads them; None: it refuses."""
    from peft import PeftModel

    from modelyard.trainer.model import load_base
    from modelyard.trainer.reports import Reports

    try:
        base = load_base(run.spec, Reports(Path(os.devnull))).float()
        return PeftModel.from_pretrained(base, str(adapter)).eval()
    except (ValueError, RuntimeError, KeyError):
        return None


def serve(family: str, folder: Path) -> dict[str, Any]:
    """Load the adapter into vLLM's own model, by the engine's own code and our plugin, after our own check of it."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.models.interfaces import supports_lora
    from vllm.model_executor.models.registry import ModelRegistry

    from modelyard.models.adapter_checks import check_adapter

    config_json = json.loads((folder / "model" / "config.json").read_text("utf-8"))
    if family not in OTHERS:
        check_adapter(folder / "adapter", config_json, base_folder=folder / "model")
    architecture = config_json["architectures"][0]
    kind = ModelRegistry.models[architecture].load_model_cls()
    found = {"class": kind.__name__, "lora": bool(supports_lora(kind))}
    if family in OTHERS or family in NEED_A_GPU:
        return found
    # Else vLLM looks at the class in a process of its own, which takes seconds.
    ModelRegistry.register_model(architecture, kind)
    config = EngineArgs(
        model=str(folder / "model"), enable_lora=True, max_lora_rank=8, max_loras=1, skip_tokenizer_init=True,
        max_model_len=256, dtype="bfloat16", enforce_eager=True, language_model_only=True,
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{tempfile.mktemp(dir=folder)}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        model: Any = initialize_model(config)
        manager = LRUCacheWorkerLoRAManager(config, torch.device("cpu"), model.embedding_modules)
        manager.create_lora_manager(model, config)
    manager.add_adapter(LoRARequest("tiny", 1, str(folder / "adapter")))
    return {**found, "loaded": len(manager.list_adapters())}


def known(family: str, folder: Path) -> dict[str, Any]:
    """Return the families of both packages: whether vLLM takes adapters, and those on experts in PEFT's form."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm.model_executor.models.interfaces import supports_lora
    from vllm.model_executor.models.registry import ModelRegistry

    found: dict[str, Any] = {}
    for kind, named in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for architecture in (named,) if isinstance(named, str) else named:
            if architecture in ModelRegistry.models:
                made = ModelRegistry.models[architecture].load_model_cls()
                experts = bool(getattr(made, "is_3d_moe_weight", False))
                found[kind] = {"lora": bool(supports_lora(made)), "experts": experts}
    return found


def main() -> None:
    """Import what every family needs, then fork for each line."""
    from modelyard.engine.plugins.lora import keep_adapters_off_the_base
    from modelyard.engine.plugins.vision import stand_in_for_torchvision

    stand_in_for_torchvision()
    import peft  # noqa: F401
    import vllm.engine.arg_utils  # noqa: F401
    import vllm.lora.model_manager as manager
    from vllm.model_executor.layers.fused_moe import MoERunner

    import modelyard.trainer.loop
    import modelyard.trainer.merge
    import modelyard.trainer.model  # noqa: F401

    keep_adapters_off_the_base()
    wrapping = manager.from_layer
    # On a processor vLLM cannot wrap routed experts, on which these adapters have nothing.
    manager.from_layer = lambda layer, *args, **named: (
        layer if isinstance(layer, MoERunner) else wrapping(layer, *args, **named)
    )
    # What children would walk through, and copy by that, each time they collect garbage.
    gc.collect()
    gc.freeze()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(forked(order["do"], order["family"], Path(order["folder"]))), flush=True)


def forked(do: str, family: str, folder: Path) -> dict[str, Any]:
    """Do one thing in a process of its own, and return what came of it."""
    answer = folder / f"{do}.json"
    pid = os.fork()
    if pid == 0:
        log = os.open(folder / f"{do}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        said: dict[str, Any]
        try:
            said = {"result": {"train": train, "resume": resume, "serve": serve, "list": known}[do](family, folder)}
        except Exception as error:  # noqa: BLE001
            import traceback

            traceback.print_exc()
            said = {"error": f"{type(error).__name__}: {error}"}
        answer.write_text(json.dumps(said), "utf-8")
        sys.stderr.flush()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    return dict(json.loads(answer.read_text("utf-8")))


if __name__ == "__main__":
    main()
