"""Atomic writes, and damage that is found: every file flipped, truncated or deleted."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peakd_ds import files
from peakd_ds.errors import UserError
from peakd_ds.files import (
    CHECKSUMS,
    DONE,
    checked_folder,
    checksum_file,
    damage_of,
    damage_of_file,
    has_checksums,
    is_written,
    known_sha256_of,
    remove_leftovers,
    sha256_of,
    whole_file,
    whole_folder,
    write_checked,
    written_sha256,
)

# -- Damage, for other test files too ----------------------------------------------------------------------------------


def flip(file: Path) -> None:
    """Change one bit in the middle; the size stays."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def delete(file: Path) -> None:
    file.unlink()


DAMAGES = (flip, truncate, delete)


def damageable(folder: Path) -> list[Path]:
    """All files in a folder that have a byte to flip."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- Folders with checksums --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checked folder of two files."""
    with checked_folder(tmp_path / "made") as new:
        (new / "a.bin").write_bytes(bytes(range(256)))
        (new / "b.json").write_text("{}")
    return tmp_path / "made"


def test_a_checked_folder_is_intact(folder: Path) -> None:
    assert names(folder) == [DONE, CHECKSUMS, "a.bin", "b.json"] and names(folder.parent) == ["made"]
    assert damage_of(folder) is None and has_checksums(folder)
    assert (folder / DONE).read_text() == sha256_of(folder / CHECKSUMS)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_other_programs_can_check_it(folder: Path) -> None:
    command = ["sha256sum", "--check", "--strict", CHECKSUMS]
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 0
    flip(folder / "a.bin")
    assert b"a.bin: FAILED" in subprocess.run(command, cwd=folder, capture_output=True).stdout


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [CHECKSUMS, DONE, "a.bin", "b.json"])
def test_each_damaged_file_is_named(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(folder / name)
    found = damage_of(folder)
    assert found is not None and name in found
    assert ("is missing" in found) == (damage is delete)
    assert has_checksums(folder)


def test_a_folder_of_others_has_no_checksums(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_text("a")
    assert not has_checksums(tmp_path)
    assert "DONE is missing" in str(damage_of(tmp_path)) and "DONE is missing" in str(damage_of(tmp_path / "nothing"))


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "a.bin").unlink()
    (folder / "a.bin").mkdir()
    assert damage_of(folder) == "a.bin cannot be read: Is a directory"


def test_files_in_folders_have_checksums_too(tmp_path: Path) -> None:
    with checked_folder(tmp_path / "made") as new:
        (new / "inner").mkdir()
        (new / "inner" / "a.bin").write_bytes(b"abc")
    flip(tmp_path / "made" / "inner" / "a.bin")
    assert damage_of(tmp_path / "made") == "a.bin is not what was written"


def test_a_known_file_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after its folder is renamed, as when a checkpoint gets its final name."""
    hashed: list[Path] = []
    compute = sha256_of

    def counted(file: Path) -> str:
        hashed.append(file)
        return compute(file)

    monkeypatch.setattr(files, "sha256_of", counted)
    assert damage_of(folder, known_sha256_of) is None
    assert hashed == [], "checked_folder has hashed all files"
    os.utime(folder / "a.bin", ns=(0, 0))
    assert damage_of(folder, known_sha256_of) is None and damage_of(folder, known_sha256_of) is None
    assert [file.name for file in hashed] == ["a.bin"]


# -- Atomic writes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", [whole_folder, checked_folder])
def test_a_folder_replaces_another(tmp_path: Path, writer: Callable) -> None:
    for text in ("first", "second"):
        with writer(tmp_path / "deep" / "made") as new:
            assert new.parent == tmp_path / "deep" and new.name.startswith(".made.new-")
            (new / text).write_text(text)
    assert set(names(tmp_path / "deep" / "made")) - {CHECKSUMS, DONE} == {"second"}
    assert names(tmp_path / "deep") == ["made"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("writer", [whole_folder, checked_folder])
def test_a_failure_leaves_the_earlier_folder(tmp_path: Path, writer: Callable, error: BaseException) -> None:
    with writer(tmp_path / "made") as new:
        (new / "file").write_text("first")
    with pytest.raises(type(error)), writer(tmp_path / "made") as new:
        (new / "file").write_text("second")
        raise error
    assert (tmp_path / "made" / "file").read_text() == "first" and names(tmp_path) == ["made"]


def test_a_disk_that_is_full_at_the_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems report it only there; the folder must not get its name."""

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for writer in (whole_folder, checked_folder):
        with pytest.raises(OSError, match="No space left"), writer(tmp_path / "made") as new:
            (new / "file").write_text("text")
    with pytest.raises(OSError, match="No space left"), whole_file(tmp_path / "file") as new:
        new.write_text("text")
    assert names(tmp_path) == []


def test_every_file_is_flushed_before_its_folder_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def recorded_fsync(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def recorded_rename(path: Path, target: Path) -> Path:
        flushed.append(f"rename to {Path(target).name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    with checked_folder(tmp_path / "made") as new:
        (new / "a.bin").write_text("a")
        (new / "b.bin").write_text("b")
    assert sorted(flushed[:2]) == ["a.bin", "b.bin"]
    assert [name.split(".")[1] for name in flushed[2:4]] == [CHECKSUMS, DONE], "both under hidden names"
    assert flushed[4:] == ["rename to made"]


def test_leftovers_of_killed_writers(tmp_path: Path) -> None:
    for name in (".part-00.safetensors.new-00ff00ff", ".lock.json.new-00ff00ff", "part-00.safetensors"):
        (tmp_path / name).write_text("")
    (tmp_path / ".part-01.old-00ff00ff").mkdir()
    remove_leftovers(tmp_path, "part-*")
    assert names(tmp_path) == [".lock.json.new-00ff00ff", "part-00.safetensors"]


# -- Files with a checksum each ----------------------------------------------------------------------------------------


def test_a_checked_file(tmp_path: Path) -> None:
    file = tmp_path / "part-00.safetensors"
    assert not is_written(file) and written_sha256(file) == ""
    digest = write_checked(file, b"content")
    assert digest == sha256_of(file) == written_sha256(file) and is_written(file)
    assert (tmp_path / "part-00.sha256").read_text() == f"{digest}  part-00.safetensors\n"
    assert damage_of_file(file, written_sha256(file)) is None
    for damage in DAMAGES:
        write_checked(file, b"content")
        damage(file)
        state = "is missing" if damage is delete else "is not what was written"
        assert damage_of_file(file, written_sha256(file)) == f"part-00.safetensors {state}"
        assert is_written(file) == (damage is not delete)


@pytest.mark.parametrize("text", [b"", b"\n", b"\xff\xfe", b"0" * 64])
def test_a_damaged_checksum(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "part-00.safetensors"
    write_checked(file, b"content")
    checksum_file(file).write_bytes(text)
    assert damage_of_file(file, written_sha256(file)) == "part-00.safetensors is not what was written"


def test_a_file_without_its_checksum_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the two writes must not leave the checksum of an earlier content."""
    file = tmp_path / "part-00.safetensors"
    write_checked(file, b"first")

    def killed(file: Path, digest: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write_checksum", killed)
    with pytest.raises(KeyboardInterrupt):
        write_checked(file, b"second")
    assert file.read_bytes() == b"second" and not is_written(file)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    """Of weights too, which safetensors writes for their owner alone."""
    before = os.umask(umask)
    try:
        with files.whole_file(tmp_path / "one.safetensors") as file:
            save_file({"a": torch.zeros(1)}, file)
        for context, name in ((files.whole_folder, "whole"), (files.checked_folder, "checked")):
            with context(tmp_path / name) as folder:
                save_file({"a": torch.zeros(1)}, folder / "a.safetensors")
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 5 and {path.stat().st_mode & 0o777 for path in written} == {mode}


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{", b"\xff", b""])
def test_json_that_is_none_is_a_value_error(content: bytes) -> None:
    with pytest.raises(ValueError):
        files.parse_json(content)
    assert files.parse_json(b'{"a": [1]}') == {"a": [1]}


def test_a_full_disk_is_a_line_with_the_remedy(tmp_path: Path) -> None:
    """As Python, safetensors and tokenizers tell it; other errors stay what they are."""
    for error in (OSError(28, "No space left on device"), Exception("No space left on device (os error 28)")):
        with (
            pytest.raises(UserError, match=r"folder cannot be written \(.*free some space"),
            files.needs_space(tmp_path / "folder"),
        ):
            raise error
    with pytest.raises(KeyError), files.needs_space(tmp_path):
        raise KeyError("a bug")
    with (
        pytest.raises(UserError, match=r"is damaged \(KeyError|is damaged \('a'"),
        files.damage_named(tmp_path, "delete it"),
    ):
        raise KeyError("a")
