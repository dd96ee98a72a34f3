"""The shell scripts: lint, and the mistakes that they refuse before any job runs. No cluster is needed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peakd_ds.command_line import parse

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*ROOT.glob("slurm/*.sh"), *ROOT.glob("tests/cluster/*.sh"), ROOT / ".ci" / "run"])
BIN = Path(sys.executable).parent


def run(script: str, *words: str, cwd: Path = ROOT, **environment: str) -> tuple[int, str]:
    env = {"PATH": f"{BIN}:/usr/bin:/bin", **environment}
    done = subprocess.run(["bash", str(ROOT / script), *words], cwd=cwd, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_scripts_pass_shellcheck() -> None:
    assert len(SCRIPTS) >= 6
    done = subprocess.run([BIN / "shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS if path.parent.name == "slurm"])
def test_scripts_state_no_policy(script: str) -> None:
    """No evaluation of strings, no dump of the environment."""
    text = re.sub(r"^\s*#.*", "", (ROOT / "slurm" / script).read_text(), flags=re.MULTILINE)
    assert not re.search(r"\beval\b|\bprintenv\b|^\s*(env|set|declare -p|export -p)\s*($|\|)", text, re.MULTILINE)


@pytest.mark.parametrize("script", ["slurm/distill.sh", "slurm/preflight.sh"])
def test_outside_a_job(script: str) -> None:
    assert run(script) == (2, f"{Path(script).name}: error: not in a Slurm job; submit it: sbatch {script}\n")


@pytest.mark.parametrize("script", ["slurm/distill.sh", "slurm/preflight.sh", "slurm/tensorboard.sh"])
def test_outside_the_repository(script: str, tmp_path: Path) -> None:
    code, output = run(script, cwd=tmp_path)
    assert code == 2 and "error: not in the repository's root" in output


def test_srun_absent(tmp_path: Path) -> None:
    for name in ("bash", "basename", "hostname", "sed", "grep"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    code, output = run("slurm/distill.sh", SLURM_JOB_ID="7", PATH=str(tmp_path))
    assert code == 2 and "distill.sh: error: no srun on " in output and "must be on PATH" in output


@pytest.fixture
def slurm_job(tmp_path: Path) -> dict[str, str]:
    """As in a job, with a stand-in for srun."""
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "srun").chmod(0o755)
    return {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "PATH": f"{tmp_path}:{BIN}:/usr/bin:/bin"}


def test_site_file_missing(slurm_job: dict[str, str]) -> None:
    code, output = run("slurm/distill.sh", **slurm_job, PEAKD_SITE="nowhere.sh")
    assert code == 2 and "PEAKD_SITE nowhere.sh is no file; make one from slurm/site.example.sh" in output


@pytest.mark.parametrize("line", ["PEAKD_SCRACH=/scratch", "export PEAKD_SCRACH=/scratch", "  PEAKD_SCRACH="])
def test_site_file_with_an_unknown_key(slurm_job: dict[str, str], tmp_path: Path, line: str) -> None:
    site = tmp_path / "site.sh"
    site.write_text(f"# ours\nPEAKD_PREFLIGHT=no\n{line}\n")
    code, output = run("slurm/distill.sh", **slurm_job, PEAKD_SITE=str(site))
    assert code == 2 and f"{site}: unknown key PEAKD_SCRACH; slurm/site.example.sh has them all" in output


def test_site_file_that_sets_every_key(slurm_job: dict[str, str], tmp_path: Path) -> None:
    """Every line of the example, made active: known keys all, and the run comes as far as its own mistake."""
    text = (ROOT / "slurm" / "site.example.sh").read_text()
    lines = re.findall(r"^#([A-Z_]+=.*)", text, flags=re.MULTILINE)
    assert len(lines) >= 8
    usable = [line for line in lines if not line.startswith(("PEAKD_MODULES", "PEAKD_CONTAINER", "PEAKD_VENV"))]
    site = tmp_path / "site.sh"
    site.write_text("\n".join(["set -u", *usable, f"PEAKD_VENV={BIN.parent}", "PEAKD_CONTAINER=nice"]) + "\n")
    code, output = run("slurm/distill.sh", "--task", "rte", **slurm_job, PEAKD_SITE=str(site), USER="someone")
    assert code == 2 and output.startswith("distill.sh: error: --teacher is missing"), output


def test_python_absent(slurm_job: dict[str, str]) -> None:
    code, output = run("slurm/distill.sh", **slurm_job, PEAKD_VENV="nowhere")
    assert code == 2 and "no nowhere/bin/python; run make venv, or set PEAKD_VENV" in output


def test_run_folder_unset_or_unwritable(slurm_job: dict[str, str], tmp_path: Path) -> None:
    words, env = ("--task", "rte", "--teacher", "somewhere"), {**slurm_job, "PEAKD_VENV": str(BIN.parent)}
    code, output = run("slurm/distill.sh", *words, **env)
    assert code == 2 and output.startswith("distill.sh: error: --run_dir is missing")
    (tmp_path / "file").touch()
    code, output = run("slurm/distill.sh", *words, **env, RUN_DIR=str(tmp_path / "file" / "run"))
    assert code == 2 and "cannot be written on" in output and output.count("\n") == 1


def test_percent_signs_in_the_run_folders_name(slurm_job: dict[str, str], tmp_path: Path) -> None:
    """srun's --output would read %N and %j there as its own."""
    (tmp_path / "srun").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words\nexit 1\n')
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    run_dir = tmp_path / "100%N %% %j"
    words = ("--task", "rte", "--teacher", "somewhere", "--run_dir", str(run_dir))
    code, output = run("slurm/distill.sh", *words, **slurm_job, PEAKD_VENV=str(BIN.parent), PEAKD_PREFLIGHT="no")
    assert code == 1, output
    given = f"--output={tmp_path}/100%%N %%%% %%j/logs/7-0/%N.log"
    assert given in (tmp_path / "words").read_text().splitlines()
    assert (run_dir / "logs" / "7-0" / "start.json").exists()


@pytest.fixture
def words_of_srun(slurm_job: dict[str, str], tmp_path: Path) -> Path:
    """The file that receives the arguments of each srun, one a line."""
    (tmp_path / "srun").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/words\nexit 1\n')
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    return tmp_path / "words"


OWN_ROWS = ["--train_file", "my rows.csv", "more.csv", "--label_names", "big bill", "it's $HOME", "*"]


def test_words_with_spaces_reach_the_ranks(slurm_job: dict[str, str], words_of_srun: Path, tmp_path: Path) -> None:
    """From a grid through sweep.sh and distill.sh; a run of one's own rows has no name of a task."""
    grid = {"train_file": OWN_ROWS[1:3], "label_names": OWN_ROWS[4:], "teacher": "t", "grid": {"seed": [1, 2]}}
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    words = (str(tmp_path / "grid.yaml"), "--run_dir", str(tmp_path / "runs"), "--validation_file", "dev rows.csv")
    env = {**slurm_job, "PEAKD_VENV": str(BIN.parent), "PEAKD_PREFLIGHT": "no", "SLURM_ARRAY_TASK_ID": "1"}
    code, output = run("slurm/sweep.sh", *words, **env, SLURM_ARRAY_JOB_ID="7")
    assert code == 1, output
    run_dir = tmp_path / "runs" / "my_rows" / "pea-kd" / "seed-2"
    given = words_of_srun.read_text().splitlines()
    config = parse(given[given.index("peakd_ds") + 1 :])
    assert (config.run_dir, config.train_file) == (str(run_dir), ("my rows.csv", "more.csv"))
    assert (config.label_names, config.validation_file) == (("big bill", "it's $HOME", "*"), ("dev rows.csv",))
    start = run_dir / "logs" / "7_1-0"
    assert parse(json.loads((start / "start.json").read_text())["words"]) == config
    assert parse(["--config", str(start / "settings.yaml")]) == config


def test_words_with_spaces_reach_the_workers_that_make_shards(slurm_job: dict[str, str], words_of_srun: Path) -> None:
    code, output = run("slurm/shard_glue.sh", *OWN_ROWS, **slurm_job, PEAKD_VENV=str(BIN.parent))
    assert code == 1, output
    given = words_of_srun.read_text().splitlines()
    assert given[given.index("peakd_ds.programs.shard") + 1 :] == OWN_ROWS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "'' is no run folder; usage: slurm/tensorboard.sh RUN"),
        (("nowhere",), "'nowhere' is no run folder"),
        (("tests", "--prot=1"), "unknown option --prot=1"),
        (("tests", "--port=x"), "--port=x is not a number"),
        (("tests", "--node=node1"), "--node=node1 needs --job=JOBID"),
    ],
)
def test_tensorboard_script_mistakes(words: tuple[str, ...], message: str) -> None:
    code, output = run("slurm/tensorboard.sh", *words, PEAKD_VENV=str(BIN.parent))
    assert code == 2 and f"tensorboard.sh: error: {message}" in output
