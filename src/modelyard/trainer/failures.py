"""Why a training did not work, in words for its user: from what libraries raise to a code, numbers and what to do.

The codes that this side knows: `out_of_memory`, `disk_full`, `loss_not_finite`, `unsupported_architecture`,
`unsupported_quantization`, `quantization_needs_gpu`, `unknown_target_modules`, `bad_tokenizer`, `bad_weights`,
`bad_configuration`, `packing_unsupported`, `tokens_beyond_embedding`, `adapter_not_as_asked`, `experts_without_dropout`
and, for what nobody foresaw, `trainer_failed`. Those of the rows are in `rows`, `rendering` and `stall_watch`. One that
the system killed says nothing: that is the server's to find.
"""

from __future__ import annotations

import errno
import traceback

from modelyard import evidence
from modelyard.errors import JobFailure

GIB = 1024**3
MIB = 1024**2

#: How allocators say that they have no more: torch's for the CPU, oneDNN, C++.
_NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "not enough memory",
    "std::bad_alloc",
    "could not create a memory",
    "could not create a primitive",
    "could not execute a primitive",
    "failed to allocate",
    "unable to mmap",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory did not suffice, on a GPU or without one."""
    if isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "AcceleratorError"):
        return isinstance(error, MemoryError) or "memory" in str(error).lower()
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def disk_full(what: str, needed: int, free: int, reserve: int) -> JobFailure:
    """Return the failure of a disk without room for `what`."""
    kept = f", of which {size(reserve)} stay in reserve" if reserve else ""
    return JobFailure(
        "disk_full",
        f"{what} needs {size(needed)}, and the disk has {size(free)} free{kept}.",
        "Free disk space and start the training again: it goes on from its last checkpoint.",
    )


def as_failure(error: BaseException) -> JobFailure:
    """Return what to tell of an error that ended the trainer."""
    if isinstance(error, JobFailure):
        return error
    shown = evidence.clipped(line for part in traceback.format_exception(error) for line in part.splitlines())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return JobFailure(
            "disk_full",
            f"The disk has no room for what the training writes ({error.strerror}).",
            "Free disk space and start the training again: it goes on from its last checkpoint.",
            shown,
        )
    if is_out_of_memory(error):
        return JobFailure(
            "out_of_memory",
            f"Memory did not suffice: {evidence.in_words(error)}.",
            "Train with a smaller batch_size or max_seq_len, or free memory.",
            shown,
        )
    return JobFailure(
        "trainer_failed",
        f"The trainer ended by an error that it does not know: {evidence.in_words(error)}.",
        "Its log has the whole of it.",
        shown,
    )


def size(number: int | float) -> str:
    """Return bytes in words, such as `1.50 GiB`."""
    return f"{number / GIB:.2f} GiB" if number >= GIB / 10 else f"{number / MIB:.1f} MiB"
