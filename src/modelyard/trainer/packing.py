"""The trial of packing rows into one line, each as if it were alone: done on the model before it is trained.

transformers keeps packed rows apart by their positions, which begin anew with each row, where neither a mask nor a
cache is given. Attention then never looks across a row's beginning; but what a model carries along otherwise (a
convolution, a state, attention in chunks) it may carry from row to row, and no error would say so.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from modelyard.trainer.batches import Rows, padded
from modelyard.trainer.refusals import attends_in_chunks, packing_unsupported

#: Tokens of the rows that it is tried on, at most.
TRIED_TOKENS = 64
#: How far a row's logits after another row may be from those of the row alone, and from those after a third one, as
#: parts of the largest. The first sums are rounded otherwise; the second are the same ones (tried on 20 families in
#: bfloat16: 0.4 to 1.2 %, and nothing), where experts are not batched otherwise.
ALONE = {"float32": 1e-3, "bfloat16": 5e-2}
BETWEEN = {"float32": 1e-5, "bfloat16": 1e-2}


def capacity_of(model: Any, rows: Rows) -> int:
    """Return the tokens of a line into which rows are packed: those of the longest row.

    Raises:
        JobFailure: `packing_unsupported`: the model answers otherwise to a row that has another before it.
    """
    base = model.get_base_model()
    kind = type(base).__name__
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise packing_unsupported(f"{kind} takes no positions.")
    if getattr(base.config.get_text_config(), "attention_chunk_size", None):
        raise attends_in_chunks(kind)
    dtype = str(base.dtype).removeprefix("torch.")
    from_alone, between = _apart(model, rows)
    if not (from_alone <= ALONE.get(dtype, 0.0) and between <= BETWEEN.get(dtype, 0.0)):
        raise packing_unsupported(
            f"{kind} answers otherwise to a row that has another one before it: of the largest of its logits they are "
            f"{from_alone:.2g} away from those of the row alone, and {between:.2g} from those after a third row."
        )
    return padded(int(rows.lengths.max()))


def _apart(model: Any, rows: Rows) -> tuple[float, float]:
    """Return how far a row's logits after another are from those of it alone, and from those after a third."""
    import torch

    # The adapter is new, and changes nothing yet.
    order = np.argsort(-rows.lengths, kind="stable")
    row, before = (rows.ids(int(order[at]))[:TRIED_TOKENS] for at in (0, -1))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            alone = _logits(model, row)
            one, other = (_logits(model, each, row)[-len(row) :] for each in (before, before[::-1]))
    finally:
        model.train(was_training)
    largest = max(float(alone.abs().max()), 1e-9)
    from_alone = max(float((each - alone).abs().max()) for each in (one, other))
    return from_alone / largest, float((one - other).abs().max()) / largest


def _logits(model: Any, *parts: Any) -> Any:
    import torch

    ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))[None].to(model.device)
    positions = torch.from_numpy(np.concatenate([np.arange(len(part)) for part in parts]))[None].to(model.device)
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()
