"""Names of models: what is allowed, and which folder a name stands for.

A name is a hub id (`name` or `org/name`, the hub's own rules) or `local:NAME` for a folder under the import
directory. Behind `org/name` or `local:NAME` there may be a folder inside it, such as one of several adapters that a
repository holds: `org/name/folder`. No name reaches a path but through `folder_name`, which has exactly one folder for
each name.
"""

from __future__ import annotations

import re

from modelyard.errors import Unprocessable

LOCAL = "local:"
TRAINED = "ft:"
MAX_PART = 96
#: What the database has room for.
MAX_NAME = 200
#: Folders inside a repository that a name may lead to.
MAX_FOLDERS = 2
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_BELOW = rf"(?:/{_PART}){{0,{MAX_FOLDERS}}}"
_HUB_ID = re.compile(rf"{_PART}|{_PART}/{_PART}{_BELOW}")
_LOCAL_NAME = re.compile(_PART + _BELOW)
_TRAINED_NAME = re.compile(_PART)
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,199}")


def is_local(model_id: str) -> bool:
    """True if the model comes from the import directory rather than from the hub."""
    return model_id.startswith(LOCAL)


def is_trained(model_id: str) -> bool:
    """True if it names an adapter that was trained here, and so can't be downloaded."""
    return model_id.startswith(TRAINED)


def is_model_id(text: str) -> bool:
    """True if the text names a model that could exist."""
    kind = LOCAL if is_local(text) else TRAINED if is_trained(text) else ""
    pattern = {LOCAL: _LOCAL_NAME, TRAINED: _TRAINED_NAME, "": _HUB_ID}[kind]
    name = text.removeprefix(kind)
    if len(text) > MAX_NAME or not pattern.fullmatch(name):
        return False
    # A folder may be one of the hub's cache, models--org--name.
    doubled = "--" in name and not is_local(text)
    return not (doubled or ".." in name) and all(len(part) <= MAX_PART for part in name.split("/"))


def repository_of(model_id: str) -> tuple[str, str]:
    """Return the repository, or the folder of an import, that a model is in, and the folder inside; '' if it is all."""
    first = 1 if is_local(model_id) else 2
    parts = model_id.split("/")
    return "/".join(parts[:first]), "/".join(parts[first:])


def is_folder_name(text: str) -> bool:
    """True if a folder inside a repository can be named in a model's id."""
    return is_model_id(f"a/b/{text}")


def check_model_id(text: str, param: str = "model_id") -> str:
    """Return the name unchanged.

    Raises:
        Unprocessable: it is no model's name.
    """
    if not is_model_id(text):
        raise Unprocessable(
            f"'{text[:200]}' is not the name of a model. Give org/name or name as on the Hugging Face hub "
            f"(letters, digits, '-', '_' and '.', neither '--' nor '..', at most {MAX_PART} characters a part), "
            "or local:NAME for a folder in the import directory; a folder inside follows after a slash.",
            param=param,
        )
    return text


def check_revision(text: str) -> str:
    """Return the branch, tag or commit unchanged.

    Raises:
        Unprocessable: it cannot be one.
    """
    if not _REVISION.fullmatch(text) or ".." in text or "//" in text or text.endswith(("/", ".")):
        raise Unprocessable(
            f"'{text[:200]}' is not a revision: give a branch, a tag or a commit, such as main.", param="revision"
        )
    return text


def folder_name(model_id: str) -> str:
    """Return the name of the model's folder in the store; no two models share one.

    '@' is in no name, and '--' only in names of folders of the import directory, which have no '/' before them.
    """
    repository, below = repository_of(check_model_id(model_id))
    inside = f"@{below.replace('/', '@')}" if below else ""
    return repository.replace(":", "@").replace("/", "--") + inside
