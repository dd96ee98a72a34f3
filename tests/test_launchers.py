"""Every launcher gives the same ranks: deepspeed, torchrun, mpirun, srun, and none."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from peakd_ds.ranks import launch

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture
def argv(tiny_data: Path, tiny_encoder: Path, tmp_path: Path) -> list[str]:
    words = ["peakd_ds/train.py", "--task", "rte", "--num_hidden_layers", "2", "--dry_run", "--dtype", "fp32"]
    paths = ["--teacher", str(tiny_encoder), "--data_dir", str(tiny_data), "--run_dir", str(tmp_path / "run")]
    return [*words, *paths]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def output_of(command: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_no_launcher_is_one_rank(argv: list[str], env: dict[str, str], tmp_path: Path) -> None:
    assert "global 32 = micro 32 x accum 1 x world 1" in output_of([sys.executable, *argv], env)
    assert not (tmp_path / "run").exists(), "a dry run writes nothing"


@pytest.mark.starts(1)
def test_deepspeed(argv: list[str], env: dict[str, str]) -> None:
    command = [str(BIN / "deepspeed"), "--master_port", free_port(), "--num_gpus", "2", *argv]
    assert output_of(command, env).count("global 32 = micro 16 x accum 1 x world 2") == 1


@pytest.mark.starts(1)
def test_torchrun(argv: list[str], env: dict[str, str]) -> None:
    command = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", free_port(), *argv]
    assert output_of(command, env).count("global 32 = micro 16 x accum 1 x world 2") == 1


class Training:
    """A long run of two ranks under a launcher, which is started in a process group of its own, as a terminal does."""

    def __init__(self, place: Path, data: Path, teacher: Path, env: dict[str, str]) -> None:
        self.run_dir, self.log, self.env = place / "run", place / "log", env
        words = "--task rte --num_hidden_layers 2 --teacher_epochs 500 --global_batch_size 16 --log_steps 1"
        words += " --save_steps 4 --dtype fp32 --rank_timeout 10"
        self.words = [
            *words.split(),
            "--teacher",
            str(teacher),
            "--data_dir",
            str(data),
            "--run_dir",
            str(self.run_dir),
        ]

    def start(self, launcher: str, num_records: int) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
        """Start and wait until so many steps are logged; returns the launcher and the ranks."""
        count = "--num_gpus" if launcher == "deepspeed" else "--nproc_per_node"
        command = [str(BIN / launcher), "--master_port", free_port(), count, "2", "peakd_ds/train.py", *self.words]
        with self.log.open("w") as opened:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.env, stdout=opened, stderr=opened, start_new_session=True
            )
        metrics, deadline = self.run_dir / "metrics.jsonl", time.monotonic() + 240
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= num_records):
            assert process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        parent = psutil.Process(process.pid)
        if launcher == "deepspeed":
            (parent,) = parent.children()
        return process, sorted(parent.children(), key=lambda rank: rank.environ()["RANK"])

    def assert_ctrl_c_saves(self, process: subprocess.Popen[bytes], ranks: list[psutil.Process]) -> None:
        """One Ctrl-C in the terminal: all ranks save and leave, with one line that is ours."""
        checkpoints = self.run_dir / "checkpoints" / "teacher"
        before = (checkpoints / "latest").read_text()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) != 0
        assert not any(rank.is_running() for rank in psutil.wait_procs(ranks, timeout=60)[1])
        output = self.log.read_text()
        line = f"rank 0 on {socket.gethostname()}: stopped by SIGINT (Ctrl-C); the same command goes on from here\n"
        assert output.count(line) == output.count("stopped by") == 1 and "peakd_ds" not in output.partition(line)[2], (
            output
        )
        assert (checkpoints / "latest").read_text() > before and not (self.run_dir / "lock.json").exists()


@pytest.fixture
def training(tiny_data: Path, tiny_encoder: Path, tmp_path: Path, env: dict[str, str]) -> Training:
    return Training(tmp_path, tiny_data, tiny_encoder, env)


@pytest.mark.starts(1)
def test_ctrl_c_under_torchrun(training: Training) -> None:
    """torchrun's ranks are in sessions of their own; it hands its SIGINT on."""
    training.assert_ctrl_c_saves(*training.start("torchrun", 6))


@pytest.mark.starts(2)
def test_killed_under_deepspeed(training: Training) -> None:
    """One rank, then the launcher: whoever is left leaves soon, says why in one line, and gives the run folder back.

    The same run is started once more and meets Ctrl-C.
    """
    run_dir, log = training.run_dir, training.log

    process, ranks = training.start("deepspeed", 6)
    ranks[1].kill()
    assert process.wait(timeout=60) != 0
    output, host = log.read_text(), socket.gethostname()
    assert f"rank 0 on {host} leaves: rank 1 on {host} is gone\n" in output and "Traceback" not in output, output

    process, ranks = training.start("deepspeed", 20)
    process.kill()
    psutil.wait_procs(ranks, timeout=60)
    assert not any(rank.is_running() for rank in ranks)
    process.wait()
    output = log.read_text()
    for number in (0, 1):
        line = f"rank {number} on {host}: stopped, since the launcher (process {process.pid}) is gone; the same command"
        assert line in output and "Traceback" not in output, output
    assert not (run_dir / "lock.json").exists() and (run_dir / "checkpoints" / "teacher" / "latest").exists()

    training.assert_ctrl_c_saves(*training.start("deepspeed", 40))


@pytest.mark.skipif(shutil.which("mpirun", path=str(BIN)) is None, reason="no mpirun in the environment")
def test_mpirun(argv: list[str], env: dict[str, str]) -> None:
    options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
    command = [str(BIN / "mpirun"), *options, "-n", "2", sys.executable, *argv]
    assert output_of(command, env).count("global 32 = micro 16 x accum 1 x world 2") == 1


@pytest.mark.skipif(
    shutil.which("srun") is None or subprocess.run(["sinfo"], capture_output=True).returncode != 0,
    reason="no Slurm cluster answers",
)
def test_srun(argv: list[str], env: dict[str, str]) -> None:
    command = ["srun", "--overlap", "-n", "2", sys.executable, *argv]
    assert output_of(command, env).count("global 32 = micro 16 x accum 1 x world 2") == 1


SRUN_TASK = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[3-4]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}


@pytest.fixture
def srun_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """The environment of an srun task, and a stand-in for scontrol."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in SRUN_TASK.items():
        monkeypatch.setenv(name, value)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[3-4]" ] && printf "node3\\nnode4\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "environ", dict(os.environ))  # undo what the code sets
    return monkeypatch


def test_srun_tasks_become_ranks(srun_task: pytest.MonkeyPatch) -> None:
    launch._set_rank_variables()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    assert [os.environ[name] for name in names] == ["5", "8", "1", "4", "node3"]


def test_a_requeued_job_gets_another_port(srun_task: pytest.MonkeyPatch) -> None:
    first = launch._ranks_from_srun()["MASTER_PORT"]
    srun_task.setitem(os.environ, "SLURM_RESTART_COUNT", "1")
    assert launch._ranks_from_srun()["MASTER_PORT"] != first


def test_batch_shell_is_no_rank(srun_task: pytest.MonkeyPatch) -> None:
    srun_task.delitem(os.environ, "SLURM_STEP_ID")
    launch._set_rank_variables()
    assert os.environ["WORLD_SIZE"] == "1"
