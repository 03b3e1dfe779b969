"""The index of a model in shards: which files it names, and whether they hold what it promises.

Pure. transformers and vLLM load what `model.safetensors.index.json` names and nothing else; so that is what a model
is, however many other shards lie beside it, and a shard or a tensor that isn't there makes a model that is not whole.
Weights that came without an index get one, by which transformers finds them.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping

from modelyard.errors import JobFailure
from modelyard.plurals import counted

INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"^(.+)-(\d{1,6})-of-(\d{1,6})\.safetensors")
_OTHER_REVISION = "Tell its authors, or try another revision."


def weight_map_of(index: Mapping[str, object]) -> dict[str, str]:
    """Return the map from tensors to files of a parsed index.

    Raises:
        JobFailure: `bad_index`: there is none, or it is malformed.
    """
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise JobFailure("bad_index", f"{INDEX} has no map from weights to files.", _OTHER_REVISION)
    return found


def check_shards(weight_map: Mapping[str, str], present: Collection[str]) -> list[str]:
    """Return the shards that the index names, all of which are there.

    Raises:
        JobFailure: `bad_index`: some are not in the repository.
    """
    named = set(weight_map.values())
    missing = sorted(named.difference(present))
    if missing:
        raise JobFailure(
            "bad_index",
            f"{INDEX} names {counted(len(named), 'file')}, of which the repository lacks {len(missing)}: "
            f"{listed(missing)}. The model is not whole.",
            "Wait until its authors have uploaded all of it, or try another revision; for a folder of your own, copy "
            "the rest.",
        )
    return sorted(named)


def promised(weight_map: Mapping[str, str]) -> dict[str, set[str]]:
    """Return the tensors that the index promises, by file."""
    found: dict[str, set[str]] = defaultdict(set)
    for tensor, file in weight_map.items():
        found[file].add(tensor)
    return dict(found)


def check_tensors(promise: Collection[str], shard: str, tensors: Collection[str]) -> None:
    """Check that a shard holds every tensor that the index promises to be in it.

    Raises:
        JobFailure: `bad_index`.
    """
    missing = sorted(set(promise).difference(tensors))
    if missing:
        more = f" and {counted(len(missing) - 3, 'tensor')} more" if len(missing) > 3 else ""
        raise JobFailure(
            "bad_index",
            f"{INDEX} says that {shard} holds {listed(missing)}{more}, and it does not. The model is not whole.",
            _OTHER_REVISION,
        )


def index_of(tensors: Mapping[str, Iterable[str]]) -> bytes:
    """Return an index of weights that came without one, from the tensors that each file holds.

    Raises:
        JobFailure: `ambiguous_weights`: two files hold the same tensor, and nothing says which is the model's.
    """
    weight_map: dict[str, str] = {}
    for file, names in sorted(tensors.items()):
        for tensor in names:
            other = weight_map.setdefault(tensor, file)
            if other != file:
                raise JobFailure(
                    "ambiguous_weights",
                    f"{listed([other, file])} both hold the tensor {tensor[:80]!r}, and there is no {INDEX} to say "
                    "which is the model's.",
                    "Choose another revision, or import a folder with one of them.",
                )
    return json.dumps({"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}).encode()


def whole_sets(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Sort weights that no index describes into those that make a whole and shards of a set that is not whole.

    A shard's own name says how many there should be. Names that are no shard's count as whole.

    Raises:
        JobFailure: `incomplete_weights`: shards are missing, and nothing else is there; `ambiguous_weights`: several
            whole sets of the same weights, with nothing to say which of them is the model.
    """
    whole: list[str] = []
    sets: dict[tuple[str, int], dict[int, str]] = defaultdict(dict)
    for name in names:
        match = _SHARD.fullmatch(name)
        if match is None:
            whole.append(name)
        else:
            sets[match[1], int(match[3])][int(match[2])] = name
    # Their numbers differ: that many of them, within bounds, are all of them.
    complete = {
        (stem, total): shards
        for (stem, total), shards in sets.items()
        if len(shards) == total and min(shards) == 1 and max(shards) == total
    }
    times = Counter(stem for stem, _ in complete)
    doubled = sorted(stem for stem, found in times.items() if found > 1)
    if doubled:
        raise JobFailure(
            "ambiguous_weights",
            f"The repository has several sets of shards of {listed(doubled)} and no {INDEX} to say which is the model.",
            "Choose another revision, or import a folder with one of the sets.",
        )
    partial = sorted(name for key, shards in sets.items() if key not in complete for name in shards.values())
    whole += [name for shards in complete.values() for name in shards.values()]
    if partial and not whole:
        (stem, total), shards = next((key, found) for key, found in sets.items() if key not in complete)
        missing = total - len(shards)
        raise JobFailure(
            "incomplete_weights",
            f"Of the {total} shards of {stem} that their names announce, {missing} are not in the repository: "
            f"there are only {listed(sorted(shards.values()))}.",
            "Wait until its authors have uploaded all of it, or try another revision; for a folder of your own, copy "
            "the rest.",
        )
    return sorted(whole), partial


def listed(names: Collection[str], most: int = 3) -> str:
    """Return some names in quotes, cut, for a message."""
    return ", ".join(repr(name[:80]) for name in list(names)[:most]) + (", ..." if len(names) > most else "")
