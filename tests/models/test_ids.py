"""Names of models and revisions, and the folders they stand for."""

from __future__ import annotations

from pathlib import PurePath

import pytest

from modelyard.errors import Unprocessable
from modelyard.models.ids import check_model_id, check_revision, folder_name, repository_of

GOOD = [
    "gpt2", "openchat/openchat-3.5-0106", "a/b", "Org.x/name_y", "local:mine", "local:my.model-2", "a" * 96,
    "acme/adapters/law", "acme/adapters/runs/checkpoint-500", "local:adapters/law", "local:adapters/runs/law",
    "local:models--org--name", "local:models--org--name/law",
]  # fmt: skip
BAD = [
    "", "/", "a/", "/a", "a/b/c/d/e", "a/b/c/", "a/b/..", "a/b/../c", "a/b/.c", "a/b/c--d", "ft:a/b", "..", "a/..",
    "../a", "a..b/c", "a--b/c", ".a/b", "a/b.", "-a/b", "a b/c", "a/b\n", "a/b?x", "a/b%2f", "a\\b", "a:b", "local:",
    "local:a/b/c/d", "local:a/../b", "local:a//b", "local:..", "local:/etc", "ä/b", "a" * 97, "a/" + "b" * 97,
    "a/b/" + "c" * 97, "/".join(["a" * 70] * 3), "a\0b", "hub:a/b", "local:models--../x", "local:--x", "ft:a--b",
]  # fmt: skip


@pytest.mark.parametrize("model_id", GOOD)
def test_names_as_the_hub_has_them_are_accepted(model_id: str) -> None:
    assert check_model_id(model_id) == model_id
    assert PurePath(folder_name(model_id)).name == folder_name(model_id)


@pytest.mark.parametrize("model_id", BAD)
def test_other_names_are_refused_and_never_become_a_path(model_id: str) -> None:
    with pytest.raises(Unprocessable) as caught:
        check_model_id(model_id)
    assert caught.value.param == "model_id"
    with pytest.raises(Unprocessable):
        folder_name(model_id)


def test_no_two_models_share_a_folder() -> None:
    names = [*GOOD, "models/org-name", "local:models-org-name", "local:models/org/name", "local:models--org/name"]
    names += ["models/org/name", "a/b-c/d", "a-b/c/d", "a/b/c-d", "a-b", "a/b-c", "a-b/c", "local/mine", "a.b", "a_b"]
    assert len({folder_name(name) for name in names}) == len(names)


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3", "a" * 40, "feature/x_y"])
def test_branches_tags_and_commits_are_accepted(revision: str) -> None:
    assert check_revision(revision) == revision


@pytest.mark.parametrize(
    "revision", ["", "..", "a/../b", "-x", "/a", "a//b", "a/", "a b", "a\n", "a" * 201, "a?b", "@"]
)
def test_other_revisions_are_refused(revision: str) -> None:
    with pytest.raises(Unprocessable) as caught:
        check_revision(revision)
    assert caught.value.param == "revision"


@pytest.mark.parametrize(
    ("model_id", "repository", "folder"),
    [
        ("gpt2", "gpt2", ""),
        ("acme/tiny", "acme/tiny", ""),
        ("acme/adapters/law", "acme/adapters", "law"),
        ("acme/adapters/runs/law", "acme/adapters", "runs/law"),
        ("local:mine", "local:mine", ""),
        ("local:adapters/law", "local:adapters", "law"),
    ],
)
def test_a_folder_inside_a_repository_follows_its_name(model_id: str, repository: str, folder: str) -> None:
    assert repository_of(model_id) == (repository, folder)
