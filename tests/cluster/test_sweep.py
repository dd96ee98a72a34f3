"""A sweep as an array job: each element a job of its own on its own nodes, and a report of them all."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from slurm_cluster import Cluster

pytestmark = pytest.mark.cluster

SWEEP = str(Path(sys.executable).with_name("peakd-sweep"))
REPORT = str(Path(sys.executable).with_name("peakd-report"))


@pytest.fixture
def words(tmp_path: Path, tiny_teacher: Callable[[str], Path], tiny_data: Path) -> list[str]:
    """Options of peakd-sweep for a grid of two elements, sst2 and rte."""
    teachers = {task: tiny_teacher(task) for task in ("sst2", "rte")}
    grid = {
        "teacher": str(teachers["rte"].parent / "{task}"),
        "num_hidden_layers": 2,
        "dtype": "fp32",
        "epochs": 1,
        "global_batch_size": 16,
        "lr": 1e-3,
        "grid": {"task": ["sst2", "rte"], "method": ["kd"], "seed": [7]},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    return ["--grid", str(tmp_path / "grid.yaml"), "--run_dir", str(tmp_path / "runs"), "--data_dir", str(tiny_data)]


def elements(cluster: Cluster, array: int) -> list[int]:
    """The job numbers of an array's elements, in its order."""
    told = cluster.exec("head", "scontrol", "--oneliner", "show", "job", array).stdout
    numbers = {int(re.search(r"ArrayTaskId=(\d+)", line)[1]): int(line.split()[0][6:]) for line in told.splitlines()}  # type: ignore[index]
    return [numbers[index] for index in sorted(numbers)]


def test_two_elements_of_two_nodes_and_their_report(
    cluster: Cluster, rank_env: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    options = ["--nodes=2", "--parsable", f"--output={tmp_path}/%a.out"]
    done = cluster.exec("head", SWEEP, *words, "--submit", *options, env=rank_env)
    assert " --array=0-1 --nodes=2 " in done.stdout
    array = int(done.stdout.splitlines()[-1])
    cluster.until(lambda: not cluster.exec("head", "squeue", "-h").stdout, 240, "array over", array)
    for index, task in enumerate(("sst2", "rte")):
        output = (tmp_path / f"{index}.out").read_text()
        results = json.loads((tmp_path / "runs" / task / "kd" / "seed-7" / "results.json").read_text())
        assert (results["task"], results["world_size"]) == (task, 2), output
    done = cluster.exec("head", REPORT, tmp_path / "runs", env=rank_env)
    assert re.findall(r"^\| (\w+) +\| kd +\| 1 ", done.stdout, re.MULTILINE) == ["sst2", "rte"]
    assert "Not in the table" not in done.stdout
    done = cluster.exec("head", SWEEP, *words, "--submit", env=rank_env)
    assert "finished already: 2" in done.stdout and "sbatch" not in done.stdout
