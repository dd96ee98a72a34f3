"""A Slurm cluster for the tests of this folder, which `make test` leaves out and `make test-cluster` runs.

Use it so, with the fixtures of tests/conftest.py (tiny_encoder, tiny_data, ...) beside it:

    pytestmark = pytest.mark.cluster

    def test_something(cluster: Cluster, rank_env: dict[str, str]) -> None:
        job = cluster.submit("slurm/some.sh", "--run_dir", folder, options=["--nodes=2"], env=rank_env)
        assert cluster.wait(job) == "COMPLETED", cluster.output(job)

slurm_cluster.py says what a Cluster can do. One cluster of 4 nodes serves all tests; after each, its jobs are cancelled
and its nodes are on again.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, why_not


@pytest.fixture(scope="session")
def _cluster() -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Cluster(num_nodes=4) as cluster:
        yield cluster


@pytest.fixture
def cluster(_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, idle."""
    yield _cluster
    _cluster.settle()


@pytest.fixture
def rank_env(env: dict[str, str], _cluster: Cluster) -> dict[str, str]:
    """Environment for jobs: this Python first on PATH, one thread a rank, CPU engines."""
    here = str(Path(sys.executable).parent)
    return {
        **env,
        "PATH": f"{here}:{env['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PEAKD_SCRATCH": str(_cluster.folder / "scratch"),
    }
