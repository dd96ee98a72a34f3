"""The faults that preflight finds on one node; the cluster tests run it on several."""

import os
import resource
from pathlib import Path

import pytest

from peakd_ds.cluster import preflight
from peakd_ds.errors import UserError


@pytest.fixture(autouse=True)
def _one_rank_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "PEAKD_", "CUDA_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "")
    monkeypatch.setattr(preflight.torch.cuda, "device_count", lambda: 0)


def test_fit_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "MIN_RUN_FOLDER_MIB", 1)
    facts, faults = preflight.inspect_node(tmp_path)
    assert faults == [] and list(facts) == ["GPUs", "driver", "run folder", "open files"]
    assert not any(tmp_path.iterdir())


def test_faults_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    (tmp_path / "file").touch()
    monkeypatch.setenv("PEAKD_SCRATCH", str(tmp_path / "file" / "nowhere"))
    monkeypatch.setattr(preflight, "MIN_RUN_FOLDER_MIB", 2**60)
    monkeypatch.setattr(preflight, "MIN_OPEN_FILES", resource.getrlimit(resource.RLIMIT_NOFILE)[0] + 1)
    _, faults = preflight.inspect_node(tmp_path)
    assert faults[0] == "0 of 2 GPUs are visible"
    assert "MiB free, but" in faults[1] and "nowhere cannot be written" in faults[2] and "open-file limit" in faults[3]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert "0 of 2 GPUs are visible" not in preflight.inspect_node(tmp_path)[1]


@pytest.mark.parametrize(
    ("clocks", "bad"),
    [
        ({"a": 100.0, "b": 100.4}, set()),
        ({"a": 110.0, "b": 100.0}, {"a", "b"}),  # either may be wrong
        ({"a": 110.0, "b": 100.0, "c": 100.1}, {"a"}),  # not the two that agree, though a is the first
        ({"a": 100.0, "b": 104.0, "c": 93.0, "d": 101.0}, {"c"}),
        ({"a": 100.0}, set()),
    ],
)
def test_clocks(clocks: dict[str, float], bad: set[str]) -> None:
    assert preflight.clock_faults(clocks).keys() == bad
    assert all("off the median of all" in fault for fault in preflight.clock_faults(clocks).values())


def test_all_faults_of_a_node_are_joined() -> None:
    def report(node: str, clock: float, *faults: str) -> preflight.Report:
        return preflight.Report(node, clock, {}, list(faults), uses_gpu=False)

    reports = [report("a", 100.0), report("a", 100.0), report("b", 107.0, "full", "no GPU"), report("c", 100.0, "full")]
    bad_nodes = preflight.find_bad_nodes(reports)
    assert bad_nodes == {"b": "full; no GPU; its clock is +7.0 s off the median of all nodes", "c": "full"}


def test_every_gpu_has_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    preflight.check_ranks_per_gpu()
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    with pytest.raises(UserError, match="4 GPUs and 1 ranks; each rank takes one GPU: set --ntasks-per-node=4"):
        preflight.check_ranks_per_gpu()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    preflight.check_ranks_per_gpu()
