"""The run folder: what is the user's is never replaced, and every start of a run finds its own folder again."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from peakd_ds.cluster import run_folder
from peakd_ds.cluster.job import open_start
from peakd_ds.command_line import parse, to_yaml
from peakd_ds.config import RunConfig
from peakd_ds.errors import UserError
from peakd_ds.run import open_run

FOLDERS = {"logs", "tb", "teacher", "student", "student_unrolled", "checkpoints", "cache", "teacher_cache"}
EARLIER_RUNS = Path(__file__).parent / "fixtures" / "run_folders_of_7503deb.tar.xz"


def config_of(run_dir: Path, *more: str) -> RunConfig:
    return parse(["--task", "rte", "--teacher", "encoder", "--dtype", "fp32", "--run_dir", str(run_dir), *more])


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_refused(config: RunConfig, *words: str) -> None:
    before = snapshot(Path(config.run_dir))
    with pytest.raises(UserError) as caught:
        run_folder.check(config)
    message = str(caught.value)
    assert "\n" not in message and "take another --run_dir" in message
    for word in words:
        assert word in message
    assert snapshot(Path(config.run_dir)) == before


# -- The user's folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(run_folder.NAMES))
def test_a_folder_of_the_user_s_is_refused(tmp_path: Path, name: str) -> None:
    if name in FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    else:
        (tmp_path / name).write_text("task: mine\n")
    assert_refused(config_of(tmp_path), str(tmp_path / name) if name == "config.yaml" else name)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "1",
        "task: rte",
        "a: [",
        "\xff",
        "task: rte\nteacher: x\nrun_dir: y\nmine: 1\n",
        "? [1]\n: 2\n",
        "[" * 9999,
    ],
)
def test_a_config_yaml_of_the_user_s_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_bytes(content.encode("latin-1"))
    assert_refused(config_of(tmp_path), "config.yaml")


@pytest.mark.parametrize("content", ["[]", "1", "{}", '{"train": 1}', "", "{", "\xff"])
def test_a_data_json_of_the_user_s_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.json").write_bytes(content.encode("latin-1"))
    assert_refused(config_of(tmp_path), "data.json")


def test_a_folder_with_other_names_is_taken(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    run_folder.check(config_of(tmp_path))


def test_the_current_folder_keeps_its_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert_refused(config_of(Path()), "README.md")


def test_slurm_makes_no_logs_in_a_folder_of_the_user_s(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"holds README\.md"):
        open_start(["--task", "rte", "--teacher", "encoder", "--run_dir", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


# -- Folders that the run reads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["teacher", "student_init", "shard_dir", "teacher_cache", "data_dir"])
@pytest.mark.parametrize("is_link", [False, True])
def test_a_folder_that_the_run_reads_is_refused(tmp_path: Path, option: str, is_link: bool) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    run_dir = tmp_path / ("link" if is_link else "folder")
    assert_refused(config_of(run_dir, f"--{option}", f"{tmp_path}/folder"), f"--{option}")


def test_a_folder_below_the_data_is_taken(tmp_path: Path) -> None:
    run_folder.check(config_of(tmp_path / "runs" / "rte", "--data_dir", str(tmp_path)))


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("config.json", "model.safetensors"), "a model"),
        (("manifest.json", "shard-00.safetensors"), "a folder of shards"),
        (("manifest.json", "part-00.safetensors"), "a teacher cache"),
    ],
)
@pytest.mark.parametrize("below", ["", "runs/rte"])
def test_a_folder_in_a_model_a_cache_or_shards_is_refused(
    tmp_path: Path, names: tuple[str, ...], kind: str, below: str
) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    assert_refused(config_of(tmp_path / below), kind)


# -- A run's own folder ------------------------------------------------------------------------------------------------


def test_a_run_finds_its_folder_again(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    run_folder.create(config, {"train": "abc"})
    for name in FOLDERS:
        (tmp_path / "run" / name).mkdir()
    (tmp_path / "run" / "README.md").write_text("of the run")
    run_folder.check(config)
    run_folder.check_data(config, {"train": "abc"}, "the hub")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    run_folder.check(config_of(tmp_path / "moved"))
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    run_folder.check(config_of(tmp_path / "link"))
    assert_refused(config_of(tmp_path / "moved", "--lr", "1e-3"), "lr: 2e-05 -> 0.001")
    with pytest.raises(UserError, match=r"on other rows than the hub has now"):
        run_folder.check_data(config_of(tmp_path / "moved"), {"train": "def"}, "the hub")


def test_a_start_that_was_cut_off_before_its_settings_goes_on(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run_folder.create(config, {"train": "abc"})
    (tmp_path / "config.yaml").unlink()
    (tmp_path / ".config.yaml.new-12345678").write_text("task: r")
    run_folder.check(config)
    run_folder.create(config, {"train": "abc"})
    run_folder.check(config)


def test_starts_of_a_slurm_job_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh, requeued before anything was written, and requeued from the middle of the making of its log folder."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    words = ["--task", "rte", "--teacher", "encoder", "--run_dir", str(tmp_path / "run")]
    open_start(words)
    run_folder.check(config_of(tmp_path / "run"))
    (tmp_path / "run" / "logs" / "7-1").mkdir()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    open_start(words)
    run_folder.check(config_of(tmp_path / "run"))
    (tmp_path / "run" / "logs" / "mine.log").write_text("mine")
    assert_refused(config_of(tmp_path / "run"), "logs")


def test_settings_that_were_edited_or_damaged_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run_folder.create(config, {"train": "abc"})
    text = (tmp_path / "config.yaml").read_text()
    assert text.startswith(to_yaml(config))
    for changed in (text.replace("seed: 42", "seed: 43"), text[5:], text.replace("rte", "rt\xe9")):
        (tmp_path / "config.yaml").write_text(changed)
        assert_refused(config, "config.yaml")


def test_settings_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    with tarfile.open(EARLIER_RUNS) as archive:
        archive.extractall(tmp_path, filter="data")
    for stage in ("teacher", "ptp", "distill"):
        run_folder.check_owner(tmp_path / f"stopped_in_{stage}")


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff"])
def test_damaged_fingerprints_are_named(tmp_path: Path, content: bytes) -> None:
    config = config_of(tmp_path)
    run_folder.create(config, {"train": "abc"})
    (tmp_path / "data.json").write_bytes(content)
    run_folder.check(config)
    with pytest.raises(UserError, match=r"data\.json is damaged; delete it"):
        run_folder.check_data(config, {"train": "abc"}, "the hub")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*take another --run_dir"):
        run_folder.check(config_of(tmp_path / "file" / "run"))


def test_a_whole_run_leaves_the_user_s_files(
    tmp_path: Path, tiny_data: Path, tiny_encoder: Path, single_rank: None
) -> None:
    for name in ("README.md", "results.json", "metrics.jsonl"):
        (tmp_path / name).write_text(json.dumps({"name": name}))
    before = snapshot(tmp_path)
    words = ["--task", "rte", "--teacher", str(tiny_encoder), "--data_dir", str(tiny_data), "--run_dir", str(tmp_path)]
    with pytest.raises(UserError, match=f"holds .*{os.sep}?README.md"):
        open_run(parse(words))
    assert snapshot(tmp_path) == before
