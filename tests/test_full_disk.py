"""A disk that is really full while the student is exported: one line, nothing lost, and the same command goes on.

The test starts this file as a program in a mount namespace of its own, where a small tmpfs is the run folder.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import conftest
import pytest

DISK_MIB = 64
ROOM_KIB = 64
"""What is left for the log when an export begins, less than the student's weights."""
WORDS = (
    "--task rte --num_hidden_layers 2 --epochs 1 --global_batch_size 32 --save_steps 0 --no_ptp --dtype fp32 "
    "--stages teacher,distill"
)
UNSHARE = ("unshare", "--user", "--map-root-user", "--mount")


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each start of the program did, by the export for which the disk was full, if any."""
    place = tmp_path_factory.mktemp("full_disk")
    probe = [*UNSHARE, "mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(place)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("a small disk needs unshare and the right to mount in a namespace of one's own")
    conftest.save_encoder(place / "encoder", hidden_size=64)
    for split, num_rows in (("train", conftest.NUM_TRAIN_ROWS), ("validation", conftest.NUM_DEV_ROWS)):
        conftest.write_split(place / "data", "rte", split, conftest.made_up_rows("rte", num_rows, split))
    command = [*UNSHARE, sys.executable, __file__, str(place)]
    done = subprocess.run(command, env=conftest.ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return dict(json.loads((place / "starts.json").read_text()))


@pytest.mark.starts(1)
@pytest.mark.parametrize("name", ["student", "student_unrolled"])
def test_a_full_disk_ends_an_export_with_one_line(starts: dict[str, Any], name: str) -> None:
    start = starts[name]
    (line,) = [line for line in start["error"].splitlines() if "error" in line.lower()]
    assert f"/{name} cannot be written (" in line and "No space left on device" in line
    assert line.endswith("free some space, then start the same command again: what is saved is kept")
    assert "Traceback" not in start["error"] and start["code"] == 2
    assert not any(file.split("/")[0] == name or ".new-" in file for file in start["after"])


@pytest.mark.parametrize("name", ["student", "student_unrolled"])
def test_what_was_saved_is_untouched(starts: dict[str, Any], name: str) -> None:
    start = starts[name]
    assert "teacher/model.safetensors" in start["before"] and any("best" in file for file in start["before"])
    assert start["before"].items() <= start["after"].items()


def test_with_space_the_same_command_finishes(starts: dict[str, Any]) -> None:
    assert starts[""]["code"] is None, starts[""]["error"]
    written = starts[""]["after"]
    assert {"student/model.safetensors", "student_unrolled/model.safetensors", "results.json"} <= written.keys()
    kept = starts["student_unrolled"]["before"]  # the student that was exported when there was room for it
    assert written["student/model.safetensors"] == kept["student/model.safetensors"]


# -- In the namespace --------------------------------------------------------------------------------------------------


def models_in(folder: Path) -> dict[str, str]:
    """The digest of every file of checkpoints and models, and of results.json, by its name in the run folder."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in names
        if name.split("/")[0] not in ("ballast", "tb", "metrics.jsonl", "lock.json")
    }


@contextlib.contextmanager
def full_at(name: str, run_dir: Path, before: dict[str, str]) -> Iterator[None]:
    """Fill the disk when the model of that name is about to be exported; `before` gets what is there then."""
    from peakd_ds import exports, stages
    from peakd_ds.results.export import export_model

    def export(model: Any, tokenizer: Any, folder: Path, *args: Any, **settings: Any) -> None:
        if folder.name == name:
            before.update(models_in(run_dir))
            space = os.statvfs(run_dir)
            (run_dir / "ballast").write_bytes(bytes(space.f_bavail * space.f_frsize - ROOM_KIB * 1024))
        export_model(model, tokenizer, folder, *args, **settings)

    with mock.patch.object(stages, "export_model", export), mock.patch.object(exports, "export_model", export):
        yield
    (run_dir / "ballast").unlink(missing_ok=True)


def main(place: Path) -> None:
    """Three starts of one command: the disk is full for the first export, for the second, and never."""
    from peakd_ds import command_line
    from peakd_ds.ranks import dist

    run_dir = place / "run"
    run_dir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(run_dir)], check=True)
    paths = ["--teacher", str(place / "encoder"), "--data_dir", str(place / "data"), "--run_dir", str(run_dir)]
    dist.init()
    starts = {}
    for name in ("student", "student_unrolled", ""):
        before: dict[str, str] = {}
        with (
            mock.patch.object(sys, "argv", ["train.py", *WORDS.split(), *paths]),
            contextlib.redirect_stderr(io.StringIO()) as error,
            full_at(name, run_dir, before),
        ):
            try:
                command_line.start("peakd_ds.train:main", "train.py")
            except SystemExit as end:
                code = end.code
            after = models_in(run_dir)
        starts[name] = {"code": code, "error": error.getvalue(), "before": before, "after": after}
    (place / "starts.json").write_text(json.dumps(starts))
    dist.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
