"""Ways to start ranks on two hosts: some work, and those that would silently use one host are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster import ROOT, Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
PLAN = "global 32 = micro 16 x accum 1 x world 2"
HOSTFILE = 'scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/ slots=1/" > hostfile; '
MASTER = 'M=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1); '

Launch = Callable[..., tuple[str, str]]


@pytest.fixture
def launch(cluster: Cluster, rank_env: dict[str, str], tiny_data: Path, tiny_encoder: Path, tmp_path: Path) -> Launch:
    """`launch(command)` runs it as a batch job on two hosts, TRAIN standing for train.py's dry run: (state, output)."""
    words = "--task rte --num_hidden_layers 2 --dry_run --dtype fp32"
    paths = f"--teacher {tiny_encoder} --data_dir {tiny_data} --run_dir {tmp_path / 'run'}"

    def submit(command: str) -> tuple[str, str]:
        script = tmp_path / "job.sh"
        train = f"{ROOT / 'peakd_ds' / 'train.py'} {words} {paths}"
        script.write_text(f"#!/bin/bash\n{command.replace('TRAIN', train)}\n")
        options = ["--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/job.out", "--time=3"]
        job = cluster.submit(script, options=options, env=rank_env, cwd=tmp_path)
        return cluster.wait(job), cluster.output(job)

    return submit


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("srun python TRAIN", id="srun"),
        pytest.param(
            f"{HOSTFILE}{MASTER}export M; srun bash -c 'exec deepspeed --hostfile hostfile --no_ssh "
            "--node_rank $SLURM_NODEID --master_addr $M --master_port 29611 TRAIN'",
            id="deepspeed --no_ssh",
        ),
        pytest.param(
            f"{HOSTFILE}{MASTER}deepspeed --launcher slurm --hostfile hostfile --no_ssh_check --master_addr $M TRAIN",
            id="deepspeed --launcher slurm with a hostfile",
        ),
        pytest.param("mpirun --allow-run-as-root -n 2 --map-by node python TRAIN", id="mpirun"),
        pytest.param(
            f"{MASTER}srun torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint $M:29612 TRAIN",
            id="torchrun",
        ),
    ],
)
def test_works(launch: Launch, command: str) -> None:
    state, output = launch(command)
    assert state == "COMPLETED" and output.count(PLAN) == 1, output


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("deepspeed --launcher slurm TRAIN", id="deepspeed --launcher slurm without a hostfile"),
        pytest.param("deepspeed TRAIN", id="deepspeed"),
        pytest.param("python TRAIN", id="python"),
        pytest.param("srun deepspeed TRAIN", id="each host for itself"),
    ],
)
def test_would_run_on_one_host_and_is_refused(launch: Launch, command: str) -> None:
    state, output = launch(command)
    assert state == "FAILED", output
    assert "Slurm has given 2 nodes, but this run has one rank" in output and "use slurm/distill.sh" in output
    assert "global 32" not in output


def test_uneven_hosts_are_refused(launch: Launch) -> None:
    state, output = launch("srun --ntasks=3 --overcommit python TRAIN")
    assert state == "FAILED" and "the nodes run 2, 1 ranks, but each must run the same number" in output


def test_one_rank_in_a_part_of_the_job(launch: Launch) -> None:
    state, output = launch("srun --nodes=1 --ntasks=1 python TRAIN")
    assert state == "COMPLETED" and "world 1" in output
