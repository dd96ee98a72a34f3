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


def test_stopped_element_continues_and_leaves_the_others_alone(
    cluster: Cluster, rank_env: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    """The last element has the job number of the array, so the element must not be named by its number."""
    options = ["--parsable", f"--output={tmp_path}/%a.out"]
    done = cluster.exec("head", SWEEP, *words, "--epochs=40", "--submit", *options, env=rank_env)
    array = int(done.stdout.splitlines()[-1])
    metrics = tmp_path / "runs" / "rte" / "kd" / "seed-7" / "metrics.jsonl"
    cluster.until(lambda: metrics.exists() and metrics.stat().st_size > 0, 180, "rte trains", array)
    cluster.exec("head", "scancel", "--signal=USR1", f"{array}_1")
    cluster.until(lambda: not cluster.exec("head", "squeue", "-h").stdout, 240, "array over", array)
    fields = cluster.exec("head", "scontrol", "--oneliner", "show", "job", array).stdout
    restarts = dict(re.findall(r"ArrayTaskId=(\d+) .* Restarts=(\d+)", fields))
    assert restarts == {"0": "0", "1": "1"}, (tmp_path / "1.out").read_text()
    done = cluster.exec("head", REPORT, tmp_path / "runs", env=rank_env)
    assert len(re.findall(r"^\| (?:sst2|rte) +\| kd +\| 1 ", done.stdout, re.MULTILINE)) == 2


def test_refused_element_is_listed_and_a_job_without_array_is_refused(
    cluster: Cluster, rank_env: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    grid, runs, data = words[1::2]
    only_sst2 = tmp_path / "only_sst2"
    only_sst2.mkdir()
    (only_sst2 / "sst2").symlink_to(Path(data) / "sst2")
    arguments = [grid, "--run_dir", runs, "--data_dir", only_sst2]
    for number, (options, wanted) in enumerate(
        {
            (): f"sweep.sh: error: not an array job; use peakd-sweep --grid {grid} --submit",
            ("--array=7",): "peakd-sweep: error: the grid has no element 7; choose from 0 to 1",
        }.items()
    ):
        output = tmp_path / f"wrong-{number}.out"
        job = cluster.submit("slurm/sweep.sh", *arguments, options=[*options, f"--output={output}"], env=rank_env)
        assert cluster.wait(job) == "FAILED" and wanted in output.read_text()
    job = cluster.submit(
        "slurm/sweep.sh", *arguments, options=["--array=1", f"--output={tmp_path}/1.out"], env=rank_env
    )
    assert cluster.wait(job) == "FAILED"
    assert cluster.job(job)["Restarts"] == "0"
    done = cluster.exec("head", REPORT, runs, env=rank_env, check=False)
    assert done.returncode == 2 and "none of the 2 runs" in done.stderr and "sst2/kd/seed-7: missing" in done.stderr
    assert "no rte/train-*.parquet in data folder" in (tmp_path / "1.out").read_text()
