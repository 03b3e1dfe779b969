"""Names of models: what is allowed, and which folder a name stands for.

A name is a hub id (`name` or `org/name`, the hub's own rules) or `local:NAME` for a folder under the import
directory. No name reaches a path but through `folder_name`, which has exactly one folder for each name.
"""

from __future__ import annotations

import re

from modelyard.errors import Unprocessable

LOCAL = "local:"
TRAINED = "ft:"
MAX_PART = 96
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_HUB_ID = re.compile(rf"(?:{_PART}/)?{_PART}")
_LOCAL_NAME = re.compile(_PART)
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,199}")


def is_local(model_id: str) -> bool:
    """Whether the model comes from the import directory rather than from the hub."""
    return model_id.startswith(LOCAL)


def is_trained(model_id: str) -> bool:
    """Whether it names an adapter that was trained here, and so can't be downloaded."""
    return model_id.startswith(TRAINED)


def is_model_id(text: str) -> bool:
    """Whether the text names a model that could exist."""
    ours = is_local(text) or is_trained(text)
    name = text.partition(":")[2] if ours else text
    if not (_LOCAL_NAME if ours else _HUB_ID).fullmatch(name):
        return False
    # A folder may be one of the hub's cache, models--org--name.
    doubled = "--" in name and not is_local(text)
    return not (doubled or ".." in name) and all(len(part) <= MAX_PART for part in name.split("/"))


def check_model_id(text: str) -> str:
    """Return the name unchanged.

    Raises:
        Unprocessable: it is no model's name.
    """
    if not is_model_id(text):
        raise Unprocessable(
            f"'{text[:200]}' is not the name of a model. Give org/name or name as on the Hugging Face hub "
            f"(letters, digits, '-', '_' and '.', neither '--' nor '..', at most {MAX_PART} characters a part), "
            "or local:NAME for a folder in the import directory.",
            param="model_id",
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

    '@' is in no name, and '--' only in names of folders, which have no '/'.
    """
    return check_model_id(model_id).replace(":", "@").replace("/", "--")
