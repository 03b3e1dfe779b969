"""The memory that a training will want, worked out before it begins from the model's shape and the settings.

An estimate from above, to decide who must make room; the trainer measures, and keeps to what it was given. The parts:

    processes    Python, torch, transformers and PEFT; on a GPU CUDA's context instead
    weights      the frozen base: in 16 bits on a GPU and where the CPU has AMX, else in 32; about 4.5 with quantization
    adapter      each of its numbers in float32 four times: weight, gradient, and Adam's two moments
    activations  what the backward pass needs, for each token of a row and each layer: the inputs of the adapted
                 layers, in float32 because the adapter computes in that (twice with dropout), the attention's
                 queries, keys, values and output, what the feed-forward multiplies, and the norms' inputs; and for
                 each token the output over the vocabulary, in its own format and twice in float32 (loss, gradient);
                 of a mixture of experts what each of a token's experts multiplies, beside those that all go through
    dataset      all rows as tokens and labels

`needed_bytes` holds one row of `batch_size` (one, where that is found by trying), `useful_bytes` as many as are worth
while. Where the configuration does not tell the shape, activations are taken to be as large as the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from modelyard.hardware import GIB, gib
from modelyard.models import shape
from modelyard.models.config_file import ACTIVE_EXPERTS, EXPERTS, HEADS, HIDDEN, LAYERS, SHARED_EXPERTS, whole
from modelyard.models.shape import DTYPE_BYTES
from modelyard.trainer.spec import Hyperparameters

# Measured: 0.47 GiB, with everything imported and a model of 0.7 million weights. With AMX it is 0.65 GiB: the limit of
# the process counts what its kernels and allocators reserve, too.
CPU_PROCESS_BYTES = int(0.8 * GIB)
#: CUDA's context and what its allocator keeps in reserve. An estimate, not measured.
GPU_PROCESS_BYTES = int(1.5 * GIB)
#: Measured: 16 rows of 1,017 tokens took 1.11 times what is worked out.
ROW_MARGIN = 1.2
#: Rows of one forward pass above which more of them hardly gain anything.
USEFUL_ROWS = 16
LONGEST_TOKENS = 4096
#: Settings that say that some layers have no experts.
DENSE_LAYERS = (
    "decoder_sparse_step", "interleave_moe_layer_step", "mlp_layer_types", "mlp_only_layers",
    "moe_layer_start_index",
)  # fmt: skip
#: Experts of a token where the configuration does not tell.
ACTIVE = 8
#: Rows are held as tokens and labels, and for a moment twice: 16 bytes for some four characters.
ROW_BYTES_PER_CHARACTER = 4
QUANTISED_BITS = 4.5


@dataclass(frozen=True)
class Need:
    """Memory that a training will want, in bytes."""

    processes_bytes: int
    weights_bytes: int
    adapter_bytes: int
    #: Of one row of the length that was counted on.
    row_bytes: int
    row_tokens: int
    needed_bytes: int
    useful_bytes: int
    #: Of all rows as tokens.
    dataset_bytes: int = 0
    #: `needed_bytes` is from steps that were made, and not the sum of the parts.
    is_measured: bool = False

    def as_dict(self) -> dict[str, int]:
        """Return it as JSON has it."""
        return asdict(self)

    def in_words(self) -> str:
        """Return it as people read it: with its parts, unless it was measured."""
        if self.is_measured:
            return f"about {gib(self.needed_bytes)}, as measured"
        return (
            f"about {gib(self.needed_bytes)} ({gib(self.processes_bytes)} for the trainer, {gib(self.weights_bytes)} "
            f"for the weights, {gib(self.adapter_bytes)} for the adapter, {gib(self.dataset_bytes)} for the dataset, "
            f"{gib(self.row_bytes)} for a row of {self.row_tokens} tokens)"
        )


def estimate(
    config: Mapping[str, Any], size_bytes: int, settings: Hyperparameters, *, has_gpu: bool,
    longest_tokens: int | None = None, characters: int = 0, processes: int = 1,
) -> Need:  # fmt: skip
    """Return what a training will want.

    Args:
        config: The base's `config.json`.
        size_bytes: The size of its weights' files.
        settings: The training's settings.
        has_gpu: Whether it runs on a GPU.
        longest_tokens: The longest row, as far as it is known; None: as long as rows may be.
        characters: Those of all rows together, as far as they are known.
        processes: Processes that share the training; each has it all, on a GPU of its own if there are any.
    """
    number_bytes = 2 if has_gpu or has_amx() else 4
    process = GPU_PROCESS_BYTES if has_gpu else CPU_PROCESS_BYTES
    weights = _weights(config, size_bytes, settings, number_bytes)
    tokens = min(settings.max_seq_len or LONGEST_TOKENS, shape.longest(config) or LONGEST_TOKENS)
    tokens = min(tokens, max(1, longest_tokens)) if longest_tokens is not None else tokens
    per_token = _activations(config, number_bytes, settings)
    row = int(tokens * per_token * ROW_MARGIN) if per_token is not None else weights
    adapter = 16 * (_adapter_numbers(config, settings) or weights // number_bytes // 50)
    # On a GPU they are in the machine's memory, not in its own.
    dataset = 0 if has_gpu else ROW_BYTES_PER_CHARACTER * characters
    fixed = process + weights + adapter + dataset
    rows, times = settings.batch_size, 1 if has_gpu else processes
    return Need(
        processes_bytes=times * process,
        weights_bytes=times * weights,
        adapter_bytes=times * adapter,
        dataset_bytes=times * dataset,
        row_bytes=times * row,
        row_tokens=tokens,
        needed_bytes=times * (fixed + row * (rows or 1)),
        useful_bytes=times * (fixed + row * (rows or USEFUL_ROWS)),
    )


@cache
def has_amx(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """True if this processor multiplies numbers of 16 bits fast, so that a trainer computes in them."""
    try:
        return " amx_tile " in cpuinfo.read_text("ascii", errors="replace").replace("\n", " ")
    except OSError:
        return False


def _weights(config: Mapping[str, Any], size_bytes: int, settings: Hyperparameters, number_bytes: int) -> int:
    stored = shape.stored_dtype(config)
    # Where the configuration does not tell, the files may be in 16 bits.
    numbers = size_bytes // (DTYPE_BYTES[stored] if stored else 2)
    if settings.quantization is None:
        return numbers * number_bytes
    whole = min(numbers, shape.embedding_numbers(config))
    return int(whole * number_bytes + (numbers - whole) * QUANTISED_BITS / 8)


@dataclass(frozen=True)
class _Shape:
    layers: int
    hidden: int
    queries: int
    keys: int
    #: Widths of what adapters are put on in feed-forwards: those of layers without experts, and the shared experts of
    #: layers with some. 0: there are none.
    inner: int
    shared: int
    vocabulary: int
    #: Experts that each token goes through, and the width of one; 0 where there are none.
    experts: int = 0
    expert_inner: int = 0


def _shape(config: Mapping[str, Any]) -> _Shape | None:
    text = shape.text_part(config)

    layers, heads, hidden = whole(text, *LAYERS), whole(text, *HEADS), whole(text, *HIDDEN)
    vocabulary = whole(text, "vocab_size")
    if not (layers and heads and hidden and vocabulary):
        return None
    size = whole(text, "head_dim") or hidden // heads
    inner = whole(text, "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    keys = (whole(text, "num_key_value_heads") or heads) * size
    if (whole(text, *EXPERTS) or 1) <= 1:
        return _Shape(layers, hidden, heads * size, keys, inner, 0, vocabulary)
    width = whole(text, "moe_intermediate_size") or inner
    shared = whole(text, "shared_expert_intermediate_size") or (whole(text, *SHARED_EXPERTS) or 0) * width
    dense = inner if any(_is_set(text.get(name)) for name in DENSE_LAYERS) or text.get("first_k_dense_replace") else 0
    active = whole(text, *ACTIVE_EXPERTS) or ACTIVE
    return _Shape(layers, hidden, heads * size, keys, dense, shared, vocabulary, active, width)


def _is_set(value: Any) -> bool:
    """True if a setting says that some layers have no experts: a step above 1, a number of layers, or their names."""
    return bool(value) and value != 1


def _adapter_numbers(config: Mapping[str, Any], settings: Hyperparameters) -> int | None:
    """Return how many numbers the adapter has; of layers whose names are not known here, all are counted."""
    shape = _shape(config)
    if shape is None:
        return None
    inner = max(shape.inner, shape.shared)
    by_layer = {
        "q_proj": shape.hidden + shape.queries,
        "k_proj": shape.hidden + shape.keys,
        "v_proj": shape.hidden + shape.keys,
        "o_proj": shape.queries + shape.hidden,
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), shape.hidden + inner if inner else 0),
    }
    names = settings.target_modules
    if names is None or not set(names) <= by_layer.keys():
        names = list(by_layer)
    return settings.rank * shape.layers * sum(by_layer[name] for name in set(names))


def _activations(config: Mapping[str, Any], number_bytes: int, settings: Hyperparameters) -> int | None:
    """Return the bytes that one token takes until the backward pass, over all layers."""
    shape = _shape(config)
    if shape is None:
        return None

    def layer(inner: int, experts: int) -> int:
        inputs = (3 + 2 * bool(inner)) * shape.hidden + shape.queries + inner
        adapted = 4 * inputs * (2 if settings.dropout else 1)
        # Each expert has a copy of the token, and gives one back; it has no adapter.
        routed = experts * (2 * shape.hidden + 3 * shape.expert_inner)
        own = number_bytes * (4 * shape.hidden + 2 * shape.queries + 2 * shape.keys + 3 * inner + routed)
        return adapted + own + 4 * 2 * shape.hidden

    # Where layers are of both kinds, each is taken for the larger.
    each = max(layer(shape.inner, 0), layer(shape.shared, shape.experts) if shape.experts else 0)
    return shape.layers * each + shape.vocabulary * (number_bytes + 8)
