"""The scanner: what in a model would run code, or lies about itself, and is refused before anything loads it.

Pure but for reading a weights file's header. Configuration: any key that makes a library run code or load from
elsewhere (`references` has the table), at any depth. Weights: a safetensors header that does not cover its file
exactly, byte for byte (overlaps, holes, ends beyond the file). Everything refused is a `JobFailure` that says what,
where and what to do.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelyard.errors import JobFailure
from modelyard.models import config_file, references
from modelyard.models.ids import is_model_id, repository_of
from modelyard.plurals import counted

MAX_CONFIG_BYTES = 64 * 1024 * 1024
MAX_HEADER_BYTES = 100 * 1024 * 1024
#: Of an adapter's weights, which requests wait for. One on every expert of a large model has some MiB of names.
MAX_ADAPTER_HEADER_BYTES = 16 * 1024 * 1024
# Files whose every string is data, not settings: looking for keys in a vocabulary would refuse honest models.
VOCABULARIES = frozenset(
    {"tokenizer.json", "vocab.json", "tekken.json", "added_tokens.json", "model.safetensors.index.json"}
)
#: What the names of files end in that hold one object each.
_OBJECTS = ("_config.json", "special_tokens_map.json")
#: What a file begins with that git has put in the place of the real one; it has some 130 bytes.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MAX_POINTER_BYTES = 1024

#: Number formats of weights that can be trained.
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


def read_json(name: str, content: bytes) -> dict[str, Any]:
    """Parse a configuration file that holds one JSON object.

    Raises:
        JobFailure: `bad_configuration`.
    """
    value = parse(name, content)
    if not isinstance(value, dict):
        raise _bad_configuration(name, "is not a JSON object")
    return value


def scan_configuration(name: str, content: bytes) -> None:
    """Refuse a configuration file that would make a library run code, load from elsewhere, or fail at every start.

    Raises:
        JobFailure: `remote_code`, `loads_from_elsewhere` or `bad_configuration`.
    """
    if name.endswith(".jinja"):
        try:
            config_file.text_of(content)
        except ValueError as error:
            raise _bad_configuration(name, f"cannot be read ({error})") from None
    if not name.endswith(".json"):
        return
    value = config_file.parse(content) if name == config_file.CONFIG else parse(name, content)
    if name in VOCABULARIES:
        return
    if name.endswith(_OBJECTS) and not isinstance(value, dict):
        raise _bad_configuration(name, "is not a JSON object")
    references.check(name, value)


def scan_adapter(config: Mapping[str, Any]) -> str | None:
    """Return what an adapter's `adapter_config.json` names as its base; None where that is no model's name.

    It is a hint: often a path on the machine of the training, or the name in other letters. Whoever deploys the adapter
    says on what, and its layers tell whether they fit.

    Raises:
        JobFailure: `unsupported_adapter`.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise JobFailure(
            "unsupported_adapter",
            f"adapter_config.json describes an adapter of type {str(kind)[:40]}; only LORA can be served.",
            "Choose a LoRA adapter, or merge this one into its base.",
        )
    base = config.get("base_model_name_or_path")
    return base if isinstance(base, str) and is_model_id(base) and not repository_of(base)[1] else None


def refuse_pointer(path: Path, name: str) -> None:
    """Refuse a file that is only git's note of where the real one lies.

    Raises:
        JobFailure: `lfs_pointer`.
    """
    if os.stat(path).st_size > MAX_POINTER_BYTES:
        return
    with open(path, "rb") as file:
        if not file.read(len(LFS_POINTER)).startswith(LFS_POINTER):
            return
    raise JobFailure(
        "lfs_pointer",
        f"{name} is a Git LFS pointer, not the file: run git lfs pull.",
        "Run it in the clone that the files were copied from (after git lfs install), and copy them again; if a hub "
        "has them so, tell the model's authors, or try another revision.",
    )


def scan_safetensors(path: Path, name: str, max_header_bytes: int = MAX_HEADER_BYTES) -> frozenset[str]:
    """Refuse a weights file whose header and size disagree, and return its tensors' names. Reads the header only.

    Raises:
        JobFailure: `bad_weights`.
    """
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise _bad_weights(name, f"has {counted(size, 'byte')}, too few for a header")
        (length,) = struct.unpack("<Q", start)
        if length > max_header_bytes or length + 8 > size:
            raise _bad_weights(name, f"declares a header of {counted(length, 'byte')} in a file of {size:,}")
        raw = file.read(length)
    return check_header(name, raw, size - 8 - length)


def header_of(path: Path) -> dict[str, Any]:
    """Return the tensors' entries of a weights file that has been scanned."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header


def check_header(name: str, raw: bytes, data_bytes: int) -> frozenset[str]:
    """Check that the tensors of a safetensors header cover `data_bytes` exactly, and return their names.

    Raises:
        JobFailure: `bad_weights`.
    """
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _bad_weights(name, f"has a header that cannot be read ({str(error)[:80]})") from None
    if not isinstance(header, dict):
        raise _bad_weights(name, "has a header that is not an object")
    spans = []
    for tensor, entry in header.items():
        if tensor == "__metadata__":
            continue
        spans.append((*_span(name, tensor, entry), tensor))
    expected = 0
    for begin, end, tensor in sorted(spans):
        if begin != expected:
            raise _bad_weights(name, f"has an overlap or a hole before {tensor[:80]!r} (byte {begin}, not {expected})")
        expected = end
    if expected != data_bytes:
        raise _bad_weights(name, f"describes {counted(expected, 'byte')} of tensors and has {data_bytes:,}")
    return frozenset(tensor for _, _, tensor in spans)


def _span(name: str, tensor: str, entry: object) -> tuple[int, int]:
    shown = f"tensor {tensor[:80]!r}"
    if not isinstance(entry, dict):
        raise _bad_weights(name, f"has a malformed {shown}")
    shape, offsets, dtype = _sizes(entry.get("shape")), _sizes(entry.get("data_offsets")), entry.get("dtype")
    if shape is None or offsets is None or len(offsets) != 2:
        raise _bad_weights(name, f"has a malformed shape or offsets at {shown}")
    begin, end = offsets
    if begin > end:
        raise _bad_weights(name, f"has {shown} end before it begins")
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise _bad_weights(name, f"has an unknown number format {str(dtype)[:20]!r} at {shown}")
    if math.prod(shape) * bits != (end - begin) * 8:
        raise _bad_weights(
            name, f"has {shown} of {counted(end - begin, 'byte')}, which do not match its shape and {dtype}"
        )
    return begin, end


def _sizes(value: object) -> list[int] | None:
    # Bounded, so that a product of many huge numbers cannot keep the scanner busy.
    if not isinstance(value, list) or len(value) > 16:
        return None
    return value if all(type(number) is int and 0 <= number < 1 << 62 for number in value) else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name appears twice")
    return value


def parse(name: str, content: bytes) -> Any:
    """Parse a configuration file.

    Raises:
        JobFailure: `bad_configuration`.
    """
    if len(content) > MAX_CONFIG_BYTES:
        raise _bad_configuration(name, f"has {len(content)} bytes, more than {MAX_CONFIG_BYTES}")
    try:
        return json.loads(config_file.text_of(content))
    except (ValueError, RecursionError) as error:
        raise _bad_configuration(name, f"is not readable JSON ({str(error)[:80]})") from None


def _bad_configuration(name: str, what: str) -> JobFailure:
    return JobFailure("bad_configuration", f"{name} {what}.", "Tell the model's authors, or try another revision.")


def _bad_weights(name: str, what: str) -> JobFailure:
    return JobFailure(
        "bad_weights",
        f"{name} {what}: the file is damaged or made to deceive.",
        "Load it nowhere. Tell the model's authors, or try another revision.",
    )
