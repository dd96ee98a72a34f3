"""The test cluster itself: real hosts, with their own names, addresses, processes and disks."""

from pathlib import Path

import pytest
from slurm_cluster import NET, Cluster

pytestmark = pytest.mark.cluster


def test_hosts_have_their_own_names_addresses_and_scratch(cluster: Cluster) -> None:
    output = cluster.exec("head", "srun", "-N4", "bash", "-c", 'echo "$(hostname) $(hostname -I)"').stdout.split()
    assert sorted(output) == sorted([*cluster.nodes, *(f"{NET}.{10 + number}" for number in (1, 2, 3, 4))])
    scratch = cluster.folder / "scratch"
    cluster.exec("node1", "touch", scratch / "here")
    assert cluster.exec("node1", "ls", scratch).stdout.split() == ["here"]
    assert cluster.exec("node2", "ls", scratch).stdout == ""


def test_a_batch_job_runs_to_its_end(cluster: Cluster, tmp_path: Path, rank_env: dict[str, str]) -> None:
    script = tmp_path / "job.sh"
    script.write_text('#!/bin/bash\necho "$1"\nsrun hostname\n')
    job = cluster.submit(script, "two words", options=["--nodes=2", f"--output={tmp_path}/%j.out"], env=rank_env)
    assert cluster.wait(job) == "COMPLETED"
    assert sorted(cluster.output(job).splitlines()) == ["node1", "node2", "two words"]
