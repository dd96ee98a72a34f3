"""Files and folders that are whole whenever they can be seen: written under another name, then renamed."""

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_atomically(file: Path, text: str) -> None:
    """Write a text file so that whoever reads it finds the old text or the new one, whole."""
    with whole_file(file) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A name to write to, of its own for each writer, which becomes `file` at the end; a failure leaves nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = hidden_sibling(file, "new")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def create_file(file: Path, text: str) -> bool:
    """Write a text file that is whole from its first moment; False, and nothing is changed, if there is one."""
    temporary = hidden_sibling(file, "new")
    try:
        temporary.write_text(text)
        os.link(temporary, file)  # fails if the file exists, on NFS too
        return True
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)


def flush(file: Path) -> None:
    """Bring it to the disk: a full disk or quota shows here and not after the rename, and a power cut spares it."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def sha256_of(file: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def hidden_sibling(path: Path, role: str) -> Path:
    """A new hidden name beside `path`, and so on the same file system."""
    return path.with_name(f".{path.name}.{role}-{secrets.token_hex(4)}")


def replace_folder(folder: Path, new: Path) -> None:
    """Give `new` the name `folder`, whose earlier contents are moved aside first (a folder that has files cannot be
    replaced in one step) and then deleted."""
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
