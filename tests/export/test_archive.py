"""The zip archive that is streamed: what other programs read of it, byte for byte and beyond 4 GiB."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from modelyard.export import archive
from modelyard.export.archive import Entry, FileChanged, blocks, files_below, length


def folder(path: Path) -> Path:
    for name, content in {"b.txt": b"second", "a.bin": os.urandom(3_000_000), "in/ü.json": b"{}", "empty": b""}.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def test_python_reads_every_file_back_and_the_length_was_known_before(tmp_path: Path) -> None:
    entries = files_below(folder(tmp_path))
    whole = b"".join(blocks(entries))
    assert len(whole) == length(entries)
    with zipfile.ZipFile(io.BytesIO(whole)) as opened:
        assert opened.namelist() == ["a.bin", "b.txt", "empty", "in/ü.json"]
        assert opened.testzip() is None
        for name in opened.namelist():
            assert opened.read(name) == (tmp_path / name).read_bytes()


def test_the_same_files_are_the_same_archive_whenever_they_were_written(tmp_path: Path) -> None:
    first = b"".join(blocks(files_below(folder(tmp_path / "one"))))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for path in (tmp_path / "two").rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    assert b"".join(blocks(files_below(tmp_path / "two"))) == first


def test_hidden_files_and_links_stay_at_home(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/config").write_text("no")
    (tmp_path / "link").symlink_to("/etc/passwd")
    assert [entry.name for entry in files_below(tmp_path)] == ["a.bin", "b.txt", "empty", "in/ü.json"]


def test_an_empty_archive_is_one(tmp_path: Path) -> None:
    whole = b"".join(blocks([]))
    assert len(whole) == length([])
    assert zipfile.ZipFile(io.BytesIO(whole)).namelist() == []


def test_more_files_than_16_bits_can_count_are_all_there() -> None:
    entries = [Entry(f"{number:05}", 1, b"x") for number in range(70_000)]
    whole = b"".join(blocks(entries))
    assert len(whole) == length(entries)
    with zipfile.ZipFile(io.BytesIO(whole)) as opened:
        assert len(opened.namelist()) == 70_000
        assert opened.read("69999") == b"x"


def test_the_length_is_right_on_both_sides_of_each_limit_of_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    assert archive.ZIP64_LIMIT == zipfile.ZIP64_LIMIT
    for module in (zipfile, archive):
        monkeypatch.setattr(module, "ZIP64_LIMIT", 1000)
    monkeypatch.setattr(archive, "LARGE", 500)
    edges = [0, 499, 500, 501, 999, 1000, 1001]
    for sizes in [[size] for size in edges] + [[one, other, 0] for one in edges for other in edges]:
        entries = [Entry(f"{number}", size, bytes(size)) for number, size in enumerate(sizes)]
        whole = b"".join(blocks(entries))
        assert len(whole) == length(entries), sizes
        with zipfile.ZipFile(io.BytesIO(whole)) as opened:
            assert opened.testzip() is None
            assert [one.file_size for one in opened.infolist()] == sizes


def test_an_archive_that_nobody_reads_to_its_end_leaves_no_file_open(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(3 * archive.BLOCK))
    before = len(os.listdir("/proc/self/fd"))
    reading = blocks(files_below(tmp_path))
    assert [len(next(reading)) for _ in range(2)][1] == archive.BLOCK
    assert len(os.listdir("/proc/self/fd")) == before + 1
    reading.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("change", [b"longer than it was", b"sh", None])
def test_a_file_that_changes_meanwhile_breaks_the_archive_off(tmp_path: Path, change: bytes | None) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"as it was")
    entries = files_below(tmp_path)
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change)
    with pytest.raises(FileChanged, match="weights"):
        b"".join(blocks(entries))


#: The CRC-32 of as many zeros as the test below has, as `unzip -t` found it, too.
SUM_OF_HOLE = 0xC71C0011


@pytest.mark.slow
def test_a_file_beyond_4_gib_and_one_behind_it_are_read_by_other_programs(tmp_path: Path) -> None:
    size = (1 << 32) + 4095
    with (tmp_path / "large").open("wb") as file:
        file.truncate(size)  # a hole: it takes no room on the disk
    (tmp_path / "small").write_bytes(b"behind it")
    entries = files_below(tmp_path)
    path = tmp_path / "archive.zip"
    hole = b""
    with path.open("wb") as out:
        for block in blocks(entries):
            # Holes stay holes.
            hole = hole if len(hole) == len(block) else bytes(len(block))
            if block == hole:
                out.seek(len(block), os.SEEK_CUR)
            else:
                out.write(block)
        out.truncate()
        assert out.tell() == length(entries)
    with zipfile.ZipFile(path) as opened:
        assert [(one.filename, one.file_size) for one in opened.infolist()] == [("large", size), ("small", 9)]
        assert opened.read("small") == b"behind it"
        assert opened.infolist()[0].CRC == SUM_OF_HOLE
    # Reading so much again would take long: the other program finds what lies behind it.
    if (unzip := shutil.which("unzip")) is not None:
        command = [unzip, "-tq", str(path), "small"]
        checked = subprocess.run(command, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr
