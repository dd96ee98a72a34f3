"""Atomic writes, and checksums that reveal damage before a file is used.

Files and folders are written under a hidden name beside the final one, brought to the disk, and renamed: readers see
the old content or the new content. Two kinds have checksums, in the format of `sha256sum -c`:

    checked_folder    FOLDER/SHA256SUMS has a line for each file; FOLDER/DONE is the SHA-256 of SHA256SUMS
    write_checked     NAME.sha256 lies beside NAME.safetensors, in folders that fill file by file
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from peakd_ds.errors import UserError, first_line

CHECKSUMS = "SHA256SUMS"
DONE = "DONE"

# -- Atomic writes -----------------------------------------------------------------------------------------------------


def write_atomically(file: Path, text: str) -> None:
    """Write a text file; readers see the old text or the new text."""
    with whole_file(file) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A hidden name to write to, which becomes `file` at the end of the block; a failure leaves nothing behind."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = hidden_sibling(file, "new")
    try:
        yield temporary
        _follow_umask(temporary)
        flush(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder to write into, which becomes `folder` at the end of the block; a failure leaves nothing behind.

    An earlier `folder` is moved aside, replaced, then deleted. A process that dies between the two renames leaves it
    as `.NAME.old-*`.
    """
    with _new_folder(folder) as new:
        yield new
        for file in _files_in(new):
            _follow_umask(file)
            flush(file)


def create_file(file: Path, text: str) -> bool:
    """Write a text file that is complete as soon as it exists; False, and no change, if there is one already."""
    temporary = hidden_sibling(file, "new")
    try:
        temporary.write_text(text)
        os.link(temporary, file)  # fails if the file exists, on NFS too
        return True
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)


def _follow_umask(file: Path) -> None:
    """Give a file the permissions of a new file: safetensors writes its files for their owner alone."""
    for line in Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else ():
        if line.startswith("Umask:"):
            file.chmod(0o666 & ~int(line.split()[1], 8))


def flush(file: Path) -> None:
    """Bring a file to the disk: a full disk or quota shows here, not after the rename, and a power cut does no harm."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def hidden_sibling(path: Path, role: str) -> Path:
    """A new hidden name beside `path`, so on the same file system."""
    return path.with_name(f".{path.name}.{role}-{secrets.token_hex(4)}")


def remove_leftovers(folder: Path, names: str) -> None:
    """Delete hidden siblings, left by killed writers, of the files and folders in `folder` that match a pattern.

    No other process may be writing them.
    """
    for role in ("new", "old"):
        for path in folder.glob(f".{names}.{role}-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def obstacle(folder: Path) -> Path | None:
    """The file or folder that keeps us from writing to `folder`, which need not be there yet; None if nothing does."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return None if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK) else nearest


@contextlib.contextmanager
def needs_space(path: Path) -> Iterator[None]:
    """Turn a full disk or quota in the block into a UserError that names the path.

    Python raises OSError for it, safetensors and tokenizers raise exceptions of their own that quote the system's.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if is_full or re.search(r"os error (28|122)\b|No space left on device|quota exceeded", str(error)):
            raise UserError(
                f"{path} cannot be written ({first_line(error)}); free some space, then start the same command again: "
                "what is saved is kept"
            ) from error
        raise


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    new = hidden_sibling(folder, "new")
    new.mkdir(parents=True)
    try:
        yield new
        _replace_folder(folder, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # gone already unless something failed


def _replace_folder(folder: Path, new: Path) -> None:
    """Rename `new` to `folder`. A rename cannot replace a folder with files in it, so that one is moved aside first."""
    if not folder.exists():
        new.rename(folder)
        return
    old = hidden_sibling(folder, "old")
    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# -- Reading -----------------------------------------------------------------------------------------------------------


def parse_json(content: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for everything that is none, deep nesting included."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


# -- Checksums ---------------------------------------------------------------------------------------------------------


def sha256_of(file: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


_known: dict[tuple[int, ...], str] = {}


def known_sha256_of(file: Path) -> str:
    """The same, computed once in a process for each file, for files that are checked often."""
    stat = file.stat()
    # The same after the file's folder is renamed. Of two files that have one number after each other, copies with the
    # times of their originals too, the change times differ.
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if key not in _known:
        _known[key] = sha256_of(file)
    return _known[key]


def damage_of_file(file: Path, digest: str, digest_of: Callable[[Path], str] = sha256_of) -> str | None:
    """What is wrong with a file that had the SHA-256 `digest` when it was written, in words; None if nothing is."""
    try:
        return None if digest_of(file) == digest else f"{file.name} is not what was written"
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror}"


def damaged(path: Path, damage: str, remedy: str) -> UserError:
    """The error for a damaged file or folder: what is wrong with it, and what the user can do."""
    return UserError(f"{path} is damaged ({damage}); {remedy}")


@contextlib.contextmanager
def damage_named(path: Path, remedy: str) -> Iterator[None]:
    """Turn any exception in the block, which reads a file or folder of ours, into the error for its damage."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every library has its own kinds for content that it cannot read
        raise damaged(path, first_line(error), remedy) from error


# -- Folders with checksums --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def checked_folder(folder: Path) -> Iterator[Path]:
    """As `whole_folder`, with checksums of all files that are written in the block."""
    with _new_folder(folder) as new:
        yield new
        files = _files_in(new)
        with ThreadPoolExecutor() as pool:  # one file is hashed while another goes to the disk
            digests = list(pool.map(_flush_and_hash, files))
        lines = [f"{digest}  {file.relative_to(new)}\n" for digest, file in zip(digests, files, strict=True)]
        write_atomically(new / CHECKSUMS, "".join(lines))
        write_atomically(new / DONE, sha256_of(new / CHECKSUMS))


def _flush_and_hash(file: Path) -> str:
    _follow_umask(file)
    flush(file)
    return known_sha256_of(file)


def has_checksums(folder: Path) -> bool:
    """Whether `checked_folder` wrote a folder, damaged or not."""
    return (folder / CHECKSUMS).exists() or (folder / DONE).exists()


def damage_of(folder: Path, digest_of: Callable[[Path], str] = sha256_of) -> str | None:
    """What is wrong with a checked folder, as `damage_of_file`, for the first file with damage; None if nothing is.

    Args:
        digest_of: `sha256_of`, or `known_sha256_of` for a folder that is checked often.
    """
    try:
        marker, checksums = (folder / DONE).read_bytes(), (folder / CHECKSUMS).read_bytes()
    except OSError as error:
        return f"{Path(error.filename).name} is missing or cannot be read"
    if hashlib.sha256(checksums).hexdigest().encode() != marker:
        return f"{CHECKSUMS} or {DONE} is not what was written"
    lines = [line.split("  ", 1) for line in checksums.decode().splitlines()]
    with ThreadPoolExecutor() as pool:
        damages = pool.map(lambda line: damage_of_file(folder / line[1], line[0], digest_of), lines)
        return next((damage for damage in damages if damage is not None), None)


# -- Files with a checksum each ----------------------------------------------------------------------------------------


def write_checked(file: Path, content: bytes) -> str:
    """Write a file atomically, then its checksum beside it, which marks it as written; returns the checksum."""
    digest = hashlib.sha256(content).hexdigest()
    checksum_file(file).unlink(missing_ok=True)
    with whole_file(file) as temporary:
        temporary.write_bytes(content)
    write_checksum(file, digest)
    return digest


def write_checksum(file: Path, digest: str) -> None:
    """Mark a file as written."""
    write_atomically(checksum_file(file), f"{digest}  {file.name}\n")


def checksum_file(file: Path) -> Path:
    """Where `write_checked` writes the checksum of a file."""
    return file.with_suffix(".sha256")


def is_written(file: Path) -> bool:
    """Whether a file and its checksum are there."""
    return file.exists() and checksum_file(file).exists()


def damage_of_written(file: Path) -> str | None:
    """As `damage_of_file`, for the checksum beside a file; None if an earlier version wrote the file without one."""
    return damage_of_file(file, written_sha256(file)) if checksum_file(file).exists() else None


def written_sha256(file: Path) -> str:
    """The checksum beside a file; "" if there is none, or if it cannot be read."""
    try:
        return checksum_file(file).read_text().split()[0]
    except (OSError, ValueError, IndexError):
        return ""
