"""Refusals of a training that the trainer finds at the model, and the server at the files before: the same words.

Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Collection

from modelyard.errors import JobFailure

#: So many names are said of a kind.
NAMES_SAID = 10


def unknown_target_modules(
    model_id: str, unknown: Collection[str], there: Collection[str], *, has_unserved_experts: bool = False
) -> JobFailure:
    """Return the failure of names that stand for no layer; `there` are the last parts of those that could be named."""
    named = ", ".join(f"'{name[:60]}'" for name in sorted(unknown)[:NAMES_SAID]) or "no layer at all"
    without = " Its routed experts are served without adapters." if has_unserved_experts else ""
    return JobFailure(
        "unknown_target_modules",
        f"target_modules names {named}; the linear layers of {model_id} that can be trained are: "
        f"{', '.join(sorted(there))}.{without}",
        "Name some of these, or leave target_modules out: then all linear ones are trained.",
    )


def experts_without_dropout() -> JobFailure:
    """Return the failure of an adapter on experts with dropout."""
    return JobFailure(
        "experts_without_dropout",
        "Adapters on experts cannot be trained with dropout.",
        "Leave dropout out, or 'experts' out of target_modules.",
    )


def packing_unsupported(why: str) -> JobFailure:
    """Return the failure of rows that cannot share a line."""
    return JobFailure(
        "packing_unsupported",
        f"Rows cannot be packed for this model: {why}",
        "Leave packing out: rows of like length are then trained together, so that there is little padding.",
    )


def attends_in_chunks(kind: str) -> JobFailure:
    """Return the failure of packing for a model of a class whose attention is cut into chunks."""
    return packing_unsupported(f"{kind} attends in chunks, which rows would not begin with.")


def quantization_needs_gpu(lacking: str) -> JobFailure:
    """Return the failure of a base in 4 bits where something is lacking, in words."""
    return JobFailure(
        "quantization_needs_gpu",
        f"A base in 4 bits (quantization: 4bit) needs an NVIDIA GPU and bitsandbytes; here {lacking}.",
        "Train without quantization, or on a machine with a GPU.",
    )


NO_GPU = "there is no such GPU"
NO_BITSANDBYTES = "bitsandbytes is not installed"


def max_seq_len_too_long(wanted: int, taken: int) -> JobFailure:
    """Return the failure of rows that may be longer than the model takes."""
    return JobFailure(
        "max_seq_len_too_long",
        f"max_seq_len is {wanted} tokens, but the model takes {taken}.",
        f"Leave max_seq_len out, or set it to {taken} at most.",
    )
