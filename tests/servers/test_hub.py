"""The hub of the tests speaks the real protocol: the real client's own high-level download says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.models.repositories import llama, sharded
from tests.servers.hub import Hub, commit_of

DOWNLOAD = """
import sys
from huggingface_hub import HfApi, snapshot_download
print(snapshot_download(sys.argv[1], revision=sys.argv[2]))
tree = list(HfApi().list_repo_tree(sys.argv[1], revision=sys.argv[2]))
print(sum(entry.size for entry in tree))
"""


def test_the_real_client_downloads_a_snapshot_from_it(tmp_path: Path) -> None:
    files = {**sharded(), "1_Pooling/config.json": b"{}", "README.md": llama()["README.md"]}
    with Hub() as hub:
        hub.add("acme/sharded", files, revision="refs/pr/1")
        done = subprocess.run(
            [sys.executable, "-c", DOWNLOAD, "acme/sharded", "refs/pr/1"],
            env={
                **os.environ,
                "HF_ENDPOINT": hub.endpoint,
                "HF_HOME": str(tmp_path),
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    folder, size = done.stdout.splitlines()
    assert Path(folder).name == commit_of(files)
    assert {name: (Path(folder) / name).read_bytes() for name in files} == files
    assert int(size) == sum(map(len, files.values()))
