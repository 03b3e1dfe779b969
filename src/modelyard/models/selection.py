"""The files of a repository that are needed: weights as safetensors once, configuration, tokenizer, chat template.

Pure: it looks at names (and at the index, which says what belongs to a model in shards) and answers with names, or
refuses with a reason (`JobFailure`). Pickled weights, Python files, training state, and the same weights in a second
format are never chosen; what was left out and might be missed is told with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from modelyard.errors import JobFailure
from modelyard.models import kinds, shards
from modelyard.models.file_names import MODULE_FOLDER, is_configuration, is_safe_path
from modelyard.models.ids import is_folder_name
from modelyard.models.mistral_format import INDEX as MISTRAL_INDEX
from modelyard.models.mistral_format import PARAMS, has_mistral_tokenizer, is_consolidated
from modelyard.models.scan import parse, read_json
from modelyard.models.shards import INDEX, listed

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SINGLE = "model.safetensors"
#: How many files a model may have.
MAX_FILES = 5000
#: How many names of a kind are told of what was left out.
MAX_TOLD = 5

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".npz")
# Pickled too, but of a training: whoever has only these has no weights at all.
_TRAINING_STATE = ("training_args.bin", "optimizer.", "scheduler.", "rng_state", "scaler.pt")

_UNSAFE = "the name cannot be a file's name here"
_OTHER_FORM = "the same weights are there in another form, or nothing names them"
_NO_READER = "no engine, tokenizer or trainer reads it"
_BESIDE_ADAPTER = "an adapter is served without it, such as a value head of its training"
_RENAME = "Rename it in a copy, and import that: weights end in .safetensors, in small letters and with nothing behind."
_PICKLED_REASON = "pickled weights, code, or a format that is not loaded"


@dataclass(frozen=True)
class LeftOut:
    """Files that were not chosen, for one reason: how many, and the first names."""

    reason: str
    count: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """The files to fetch: `configuration` first, to be looked at before any of `weights` is."""

    configuration: tuple[str, ...]
    weights: tuple[str, ...]
    adapter: bool
    #: Tensor to file, where an index says so: checked against each shard when it is there.
    weight_map: dict[str, str] | None = None
    #: Whether vLLM would take Mistral's tokenizer for the whole repository.
    has_mistral_tokenizer: bool = False
    left_out: tuple[LeftOut, ...] = ()

    @property
    def unindexed(self) -> tuple[str, ...]:
        """The weights that transformers would not find, having neither its name for them nor an index."""
        if self.adapter or self.weight_map is not None or SINGLE in self.weights:
            return ()
        return tuple(path for path in self.weights if "/" not in path and not path.startswith("consolidated"))


def choose(paths: Collection[str], read: Callable[[str], bytes]) -> Selection:
    """Choose the files to fetch from all files of a repository; `read` brings the one that says which weights belong.

    Raises:
        JobFailure: as `select` says; `bad_index`: the index is malformed, or names files that are not there;
            `missing_module`: a layer of a model for embeddings is not there; `too_many_files`.
    """
    chosen = select(paths)
    if INDEX in chosen.configuration:
        chosen = _as_indexed(chosen, read)
    if kinds.MODULES in chosen.configuration:
        _check_modules(parse(kinds.MODULES, read(kinds.MODULES)), paths)
    _distinct(chosen.weights)
    number = len(chosen.configuration) + len(chosen.weights)
    if number > MAX_FILES:
        raise JobFailure(
            "too_many_files",
            f"A loader would read {number} files of the repository, more than {MAX_FILES}.",
            "The largest models have some hundreds: choose another repository.",
        )
    return replace(chosen, left_out=_left_out(paths, chosen))


def select(paths: Collection[str]) -> Selection:
    """Choose by names alone. With an index among `configuration`, `weights` is what it may name: see `choose`.

    Raises:
        JobFailure: `pickle_only`, `unsupported_format`, `unsupported_kind`, `no_weights`, `incomplete_weights`,
            `ambiguous_weights` or `missing_configuration`.
    """
    kinds.refuse_files(paths)
    usable = sorted({path for path in paths if is_safe_path(path)})
    adapter = ADAPTER_CONFIG in usable and not _holds_a_model(usable)
    weights = _adapter_weights(usable, paths) if adapter else _model_weights(usable, paths)
    configuration = [path for path in usable if is_configuration(path)]
    if adapter:
        configuration.append(ADAPTER_CONFIG)
    elif INDEX in usable and _indexable(weights):
        configuration.append(INDEX)
    # transformers takes an adapter_config.json beside a model's weights for an order to load another model below it:
    # it is left out of a model.
    if is_consolidated(weights[0]) and PARAMS in usable:
        configuration.append(PARAMS)
        configuration += [path for path in usable if path == MISTRAL_INDEX]
    elif not adapter and "config.json" not in configuration:
        raise JobFailure(
            "missing_configuration",
            "The repository has weights but no config.json, so that no engine can tell what they are.",
            "Choose a repository in the format of transformers, or one with adapter_config.json for an adapter.",
        )
    tokenizer = not adapter and has_mistral_tokenizer(usable)
    return Selection(tuple(configuration), tuple(weights), adapter, has_mistral_tokenizer=tokenizer)


def _as_indexed(chosen: Selection, read: Callable[[str], bytes]) -> Selection:
    """Keep of the weights what the index names; the whole model beside a bad index, where there is one."""
    modules = [path for path in chosen.weights if "/" in path]
    try:
        weight_map = shards.weight_map_of(read_json(INDEX, read(INDEX)))
        named = shards.check_shards(weight_map, [path for path in chosen.weights if "/" not in path])
    except JobFailure as failure:
        if SINGLE not in chosen.weights or failure.code not in ("bad_index", "bad_configuration"):
            raise
        # Kept, it would make vLLM look for the shards.
        configuration = tuple(path for path in chosen.configuration if path != INDEX)
        return replace(chosen, configuration=configuration, weights=(SINGLE, *modules))
    return replace(chosen, weights=(*named, *modules), weight_map=weight_map)


def _check_modules(modules: object, paths: Collection[str]) -> None:
    """Refuse a model for embeddings without a layer that it names: vLLM would leave it out and give other vectors."""
    for module in modules if isinstance(modules, list) else []:
        kind, folder = (module.get("type"), module.get("path")) if isinstance(module, dict) else (None, None)
        if not isinstance(kind, str) or kind.rpartition(".")[2] != "Dense" or not isinstance(folder, str) or not folder:
            continue
        missing = [name for name in (f"{folder}/config.json", f"{folder}/{SINGLE}") if name not in paths]
        if missing:
            raise JobFailure(
                "missing_module",
                f"{kinds.MODULES} names the layer {folder[:80]!r}, and the repository lacks {listed(missing)}.",
                "Choose a revision that has it as safetensors (pickled weights are not loaded), or convert it in a "
                "copy, and import that.",
            )


def _holds_a_model(usable: list[str]) -> bool:
    """True if there are weights of a model beside an adapter's configuration.

    Some adapters come with their base's config.json: what tells is whose weights are there. Beside an adapter's, others
    are a model's only if they are named so: a training may have left a value head.
    """
    found = [path for path in usable if _is_model_weights(path)]
    if ADAPTER_WEIGHTS not in usable:
        return bool(found) and not {"config.json", PARAMS}.isdisjoint(usable)
    return INDEX in usable or any(path == SINGLE or path.startswith(("model-", "consolidated")) for path in found)


def _is_model_weights(path: str) -> bool:
    return "/" not in path and path.endswith(".safetensors") and not path.startswith("adapter_")


def _indexable(weights: Iterable[str]) -> bool:
    return any("/" not in path and not path.startswith("consolidated") for path in weights)


def _adapter_weights(usable: list[str], paths: Collection[str]) -> list[str]:
    return [path for path in usable if path == ADAPTER_WEIGHTS] or _refuse(usable, paths)


def _model_weights(usable: list[str], paths: Collection[str]) -> list[str]:
    top = [path for path in usable if _is_model_weights(path)]
    other = [path for path in top if not path.startswith("consolidated")]
    # The same weights may be there whole, in shards and in Mistral's format (consolidated): one of them will do.
    if INDEX in usable and other:
        found = other
    elif SINGLE in top:
        found = [SINGLE]
    elif other:
        found, _ = shards.whole_sets(other)
    else:
        found, _ = shards.whole_sets(top)
    if not found:
        return _refuse(usable, paths)
    return found + [path for path in usable if MODULE_FOLDER.fullmatch(path) and path.endswith(".safetensors")]


def _is_misspelt(path: str) -> bool:
    """True if a file at the top would be weights, were its ending not in capitals or followed by a space."""
    name = path.strip().casefold()
    return "/" not in path and name.endswith(".safetensors") and not path.endswith(".safetensors")


def _distinct(weights: Iterable[str]) -> None:
    """Refuse names that are one file on a disk that ignores case."""
    seen: dict[str, str] = {}
    for path in weights:
        first = seen.setdefault(path.casefold(), path)
        if first != path:
            raise JobFailure(
                "ambiguous_weights",
                f"The repository has two weights files whose names differ in case only: {listed([first, path])}.",
                "Choose another revision, or import a folder with one of them.",
            )


def _to_add_one_of(folders: Sequence[str]) -> str:
    """Return how one of several adapters is added; nothing is advised that would be refused for its name."""
    named = next((folder for folder in folders if is_folder_name(folder)), None)
    if named is not None:
        return f"Add one of them: with subfolder={named}, or as model_id with '/{named}' behind it."
    return (
        "Their folders' names cannot be asked for (letters, digits, '-', '_' and '.' can, neither '--' nor '..', two "
        "folders deep at most): copy one of the folders into the import directory under another name, and add that."
    )


def _refuse(usable: list[str], paths: Collection[str]) -> list[str]:
    top = [path for path in usable if "/" not in path and path.endswith(".safetensors")]
    if ADAPTER_CONFIG in usable and top:
        raise JobFailure(
            "no_weights",
            f"{ADAPTER_CONFIG} says that this is an adapter, whose weights are read from {ADAPTER_WEIGHTS}, and that "
            f"is not there; there is {listed(top)}.",
            _RENAME,
        )
    if ADAPTER_WEIGHTS in usable:
        raise JobFailure(
            "missing_configuration",
            f"The repository has an adapter's weights ({ADAPTER_WEIGHTS}) but no {ADAPTER_CONFIG}.",
            "Choose a revision that has it, or save the adapter again with PEFT, and import that.",
        )
    odd = sorted(path for path in paths if _is_misspelt(path))
    if odd:
        raise JobFailure(
            "no_weights",
            f"The only weights in safetensors format have names that no loader looks for: {listed(odd)}.",
            _RENAME,
        )
    unsafe = sorted(path for path in paths if path.endswith(".safetensors") and not is_safe_path(path))
    if unsafe:
        raise JobFailure(
            "no_weights",
            f"The only weights in safetensors format have names that cannot be a file's name here: {listed(unsafe)}.",
            "Names may hold printable characters, up to three folders, neither '..' nor a leading dot: rename them in "
            "a copy, and import that.",
        )
    adapters = [path.removesuffix(f"/{ADAPTER_CONFIG}") for path in usable if path.endswith(f"/{ADAPTER_CONFIG}")]
    adapters = [folder for folder in adapters if f"{folder}/{ADAPTER_WEIGHTS}" in usable]
    if adapters:
        raise JobFailure(
            "adapters_in_folders",
            f"The repository holds adapters in folders of their own, and nothing at the top: {listed(adapters)}.",
            _to_add_one_of(adapters),
        )
    below = [path for path in usable if path.endswith(".safetensors") and "/" in path]
    if below:
        folders = sorted({path.rpartition("/")[0] for path in below})
        raise JobFailure(
            "no_weights",
            f"The repository has weights in safetensors format only in folders of their own: {listed(folders)}.",
            "What is at the top is loaded. Copy one of the folders into the import directory, and add that.",
        )
    if any(path.endswith(_PICKLED) and not path.rpartition("/")[2].startswith(_TRAINING_STATE) for path in usable):
        raise JobFailure(
            "pickle_only",
            "The weights are only there in a pickled format, which can run code when it is loaded; "
            "only safetensors are accepted.",
            "Choose a revision or a repository with .safetensors files, or convert it (huggingface.co/spaces/"
            "safetensors/convert).",
        )
    if any(path.endswith(".gguf") for path in usable):
        raise JobFailure(
            "unsupported_format",
            "The weights are only there as GGUF; only safetensors are accepted.",
            "Choose the repository that the GGUF files were made from.",
        )
    raise JobFailure(
        "no_weights",
        "The repository has no weights in safetensors format.",
        "Check the name: it must be a model, not a data set, a tokenizer or an empty repository.",
    )


def _left_out(paths: Collection[str], chosen: Selection) -> tuple[LeftOut, ...]:
    """Return what was not chosen and might be missed, by reason. Texts, pictures and folders of others are not told."""
    taken = {*chosen.configuration, *chosen.weights}
    named: dict[str, list[str]] = {}
    for path in sorted(set(paths) - taken):
        reason = _reason(path)
        if reason == _OTHER_FORM and chosen.adapter:
            reason = _BESIDE_ADAPTER
        if reason:
            named.setdefault(reason, []).append(_shown(path))
    return tuple(LeftOut(reason, len(files), tuple(files[:MAX_TOLD])) for reason, files in named.items())


def _shown(path: str) -> str:
    """Return a name that any log and database can hold."""
    return path[:120] if path.isprintable() else repr(path[:120])[1:-1]


def _reason(path: str) -> str:
    if not is_safe_path(path):
        return "" if path.startswith(".") else _UNSAFE
    if path.endswith((*_PICKLED, ".py", ".gguf")):
        return _PICKLED_REASON
    if "/" in path:
        return ""
    if path.endswith(".safetensors") or path == INDEX:
        return _OTHER_FORM
    return _NO_READER if path.endswith(".json") else ""
