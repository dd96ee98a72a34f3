"""`sbatch slurm/distill.sh` on real hosts: whatever the cluster does, the losses equal those of an undisturbed run."""

import getpass
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import ROOT, Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

SETTINGS = (
    "--task rte --num_hidden_layers 2 --global_batch_size 16 --micro_batch_size 4 --dropout 0 --dtype fp32 --lr 1e-3 "
    "--ptp_epochs 4 --distill_epochs 8 --log_steps 1 --save_steps 4 --no_export_unrolled"
).split()
TERMS = ("loss", "hard_loss", "soft_loss", "hidden_loss")
LAST_STAGE = "distill"

Start = Callable[..., int]


@pytest.fixture
def settings(tiny_data: Path, tiny_teacher: Callable[[str], Path]) -> list[str]:
    return [*SETTINGS, "--teacher", str(tiny_teacher("rte")), "--data_dir", str(tiny_data)]


@pytest.fixture
def start(cluster: Cluster, rank_env: dict[str, str], settings: list[str], tmp_path: Path) -> Start:
    """`start(run_dir, *more words, options=, **environment)` submits a run and returns the job's number."""

    def submit(run_dir: Path, *words: Any, options: Sequence[str] = ("--nodes=2",), **more: str) -> int:
        env = {**rank_env, "PEAKD_PREFLIGHT": "no", **more}
        arguments = [*settings, "--run_dir", run_dir, *words]
        all_options = [f"--output={tmp_path}/job-%j.out", *options]
        return cluster.submit("slurm/distill.sh", *arguments, options=all_options, env=env)

    return submit


@pytest.fixture(scope="module")
def _quiet() -> dict[str, Path]:
    return {}


@pytest.fixture
def quiet_run(cluster: Cluster, start: Start, _quiet: dict[str, Path], tmp_path: Path) -> Path:
    """An undisturbed run on two hosts, with preflight; made once."""
    if not _quiet:
        job = start(tmp_path / "quiet", PEAKD_PREFLIGHT="yes")
        assert cluster.wait(job) == "COMPLETED", cluster.output(job)
        output = cluster.output(job)
        assert "preflight node1: " in output and "preflight node2: " in output and "GiB/s a rank" in output
        assert output.rstrip().endswith("the run is finished")
        _quiet["run"] = tmp_path / "quiet"
    return _quiet["run"]


def records(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def steps_of(run_dir: Path, stage: str) -> int:
    return sum(record["stage"] == stage for record in records(run_dir))


def assert_same_curve(run_dir: Path, quiet_run: Path) -> None:
    """Every logged step once, in the quiet run's order, its losses to 1e-5."""
    ours, theirs = ([r for r in records(folder) if "loss" in r] for folder in (run_dir, quiet_run))
    assert [(r["stage"], r["step"]) for r in ours] == [(r["stage"], r["step"]) for r in theirs]
    assert ours
    for one, other in zip(ours, theirs, strict=True):
        assert [one[term] for term in TERMS] == pytest.approx([other[term] for term in TERMS], abs=1e-5), (one, other)
    results = [json.loads((folder / "results.json").read_text()) for folder in (run_dir, quiet_run)]
    assert results[0]["student"]["metrics"] == results[1]["student"]["metrics"]


def wait_until_training(cluster: Cluster, job: int, run_dir: Path, stage: str = LAST_STAGE, steps: int = 6) -> None:
    cluster.until(lambda: steps_of(run_dir, stage) >= steps, 150, f"{stage} trains", job)


def wait_until_restarted(cluster: Cluster, job: int, restarts: int = 1, timeout_s: float = 120) -> None:
    cluster.until(lambda: int(cluster.job(job)["Restarts"]) >= restarts, timeout_s, f"job {job} restarted", job)


def kill_rank(cluster: Cluster, node: str) -> None:
    (pid,) = cluster.pids(node, "^[^ ]*python[^ ]* -m peakd_ds ")
    cluster.exec(node, "kill", "-9", pid)


def starts_in_tensorboard(run_dir: Path, stage: str) -> tuple[list[str], list[int]]:
    """The text about each start, and the steps that have a loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tb" / stage), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("start/text_summary")]
    return texts, [event.step for event in events.Scalars(f"{stage}/loss")]


# -- The same student --------------------------------------------------------------------------------------------------


def test_two_hosts_equal_one(cluster: Cluster, start: Start, quiet_run: Path, tmp_path: Path) -> None:
    job = start(tmp_path / "run", options=["--nodes=1"])
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert_same_curve(tmp_path / "run", quiet_run)


def test_the_run_folder_says_what_ran_where(quiet_run: Path) -> None:
    (folder,) = (quiet_run / "logs").iterdir()
    facts = json.loads((folder / "start.json").read_text())
    assert facts["nodes"] == "node[1-2]" and facts["restart"] == 0 and facts["code"]
    assert (folder / "settings.yaml").exists() and (quiet_run / "config.yaml").exists()
    assert "0: stage distill is over" in (folder / "node1.log").read_text()
    assert (folder / "node2.log").exists()
    assert not (quiet_run / "lock.json").exists()
    texts, steps = starts_in_tensorboard(quiet_run, LAST_STAGE)
    assert texts == [f"Slurm job {facts['job']}, restart 0, nodes node[1-2], 2 ranks"]
    assert steps == sorted(set(steps))


# -- Stopped and continued ---------------------------------------------------------------------------------------------


def test_usr1_saves_requeues_and_goes_on(cluster: Cluster, start: Start, quiet_run: Path, tmp_path: Path) -> None:
    """What `--signal=USR1@300` sends before a time limit, in the middle of an epoch."""
    run_dir = tmp_path / "run"
    job = start(run_dir)
    wait_until_training(cluster, job, run_dir)
    cluster.cancel(job, "USR1")
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert cluster.job(job)["Restarts"] == "1"
    assert "stopped and saved: SIGUSR1" in cluster.output(job)
    assert "requeued, to go on from ptp finished, distill step-" in cluster.output(job)
    assert_same_curve(run_dir, quiet_run)
    texts, steps = starts_in_tensorboard(run_dir, LAST_STAGE)
    assert [f"restart {number}," in text for number, text in enumerate(texts)] == [True, True]
    assert steps == [
        record["step"] for record in records(quiet_run) if record["stage"] == LAST_STAGE and "loss" in record
    ]


def test_usr1_early_and_to_the_batch_script(cluster: Cluster, start: Start, quiet_run: Path, tmp_path: Path) -> None:
    """Before the ranks' imports are done; and as `--signal=B:USR1@300` sends it, to the batch script alone."""
    run_dir = tmp_path / "run"
    job = start(run_dir)
    cluster.until(lambda: bool(cluster.pids("node2", "-m peakd_ds ")), 60, "the ranks are there", job)
    time.sleep(0.3)  # Python has started, torch has not been imported
    cluster.cancel(job, "USR1")
    wait_until_restarted(cluster, job)
    wait_until_training(cluster, job, run_dir)
    cluster.exec("head", "scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert cluster.job(job)["Restarts"] == "2"
    assert cluster.output(job).count("stopped and saved: SIGUSR1") == 2
    assert_same_curve(run_dir, quiet_run)


def test_resume_on_other_numbers_of_hosts(cluster: Cluster, start: Start, quiet_run: Path, tmp_path: Path) -> None:
    """2 hosts at ZeRO stage 1, then 1 at stage 3, then 4 at stage 2."""
    run_dir = tmp_path / "run"
    for nodes, stage, steps in ((2, "ptp", 5), (1, LAST_STAGE, 12)):
        options = [f"--nodes={nodes}", "--no-requeue"]
        config = ["--student_ds_config", "zero1_fp32" if nodes == 2 else "zero3_fp32"]
        job = start(run_dir, *config, options=options)
        wait_until_training(cluster, job, run_dir, stage, steps)
        cluster.cancel(job, "USR1")
        assert cluster.wait(job) == "FAILED", cluster.output(job)
        assert "submit the same command again to go on" in cluster.output(job).splitlines()[-1]
    job = start(run_dir, "--student_ds_config", "zero2_fp32", options=["--nodes=4"])
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert_same_curve(run_dir, quiet_run)


def test_scancel_is_obeyed(cluster: Cluster, start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = start(run_dir)
    wait_until_training(cluster, job, run_dir)
    cluster.cancel(job)
    assert cluster.wait(job) == "CANCELLED"
    cluster.until(cluster.is_idle, 30, "the nodes are free", job)
    time.sleep(4)  # a requeued job would have started by then
    assert cluster.state(job) == "CANCELLED" and cluster.job(job)["Restarts"] == "0"
    assert {note["how"] for note in notes(run_dir, job)} == {"stopped"}
    assert not (run_dir / "results.json").exists()


def test_preemption_with_grace_time_never_ends_as_completed(
    cluster: Cluster, start: Start, quiet_run: Path, rank_env: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    nodes = ["--nodes=2", "--nodelist=node[1-2]"]
    job = start(run_dir, options=[*nodes, "--partition=grace"])
    wait_until_training(cluster, job, run_dir)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/bash\nsleep 2\n")
    options = [*nodes, "--exclusive", "--partition=urgent", f"--output={tmp_path}/urgent.out"]
    urgent_job = cluster.submit(urgent, options=options, env=rank_env)
    cluster.until(lambda: cluster.state(urgent_job) == "COMPLETED", 60, "the urgent job is over", job)
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert cluster.job(job)["Restarts"] == "1"
    assert_same_curve(run_dir, quiet_run)


def notes(run_dir: Path, job: int, restart: int = 0) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in (run_dir / "logs" / f"{job}-{restart}").glob("rank-*.json")]


# -- Faults ------------------------------------------------------------------------------------------------------------


def test_killed_ranks(cluster: Cluster, start: Start, quiet_run: Path, tmp_path: Path) -> None:
    """First the rank of the other host, then, in the next start, rank 0."""
    run_dir = tmp_path / "run"
    job = start(run_dir, options=["--nodes=2", "--nodelist=node[1-2]"])
    for restart, (node, stage) in enumerate([("node2", "ptp"), ("node1", LAST_STAGE)]):
        wait_until_training(cluster, job, run_dir, stage)
        kill_rank(cluster, node)
        wait_until_restarted(cluster, job, restart + 1, timeout_s=60)
        output = cluster.output(job)
        last_lines = output[: output.find(f"start {restart + 1}, on") % len(output)].splitlines()[-4:]
        assert any(f"start {restart}: rank {1 - restart} on {node}: Killed" in line for line in last_lines), output
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert_same_curve(run_dir, quiet_run)


def test_powered_off_node_on_fewer_nodes(cluster: Cluster, start: Start, quiet_run: Path, tmp_path: Path) -> None:
    """`--nodes=1-2` and no third node to take: the run goes on with one host."""
    run_dir = tmp_path / "run"
    job = start(run_dir, options=["--nodes=1-2", "--exclude=node[3-4]"])
    wait_until_training(cluster, job, run_dir)
    cluster.poweroff("node2")
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert "rank 1 on node2 is gone without a note, and rank 0 on node1 lost it" in cluster.output(job)
    assert cluster.job(job)["NodeList"] == "node1" and int(cluster.job(job)["Restarts"]) >= 1
    assert_same_curve(run_dir, quiet_run)


def test_powered_off_batch_host(cluster: Cluster, start: Start, quiet_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = start(run_dir)
    wait_until_training(cluster, job, run_dir)
    cluster.poweroff("node1")
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert int(cluster.job(job)["Restarts"]) >= 1
    assert_same_curve(run_dir, quiet_run)


def test_cut_off_rank_neither_hangs_nor_writes(cluster: Cluster, start: Start, quiet_run: Path, tmp_path: Path) -> None:
    """Its link is down and its connections stay open: both sides give up, and the job continues elsewhere."""
    run_dir = tmp_path / "run"
    job = start(run_dir, "--rank_timeout", 12)
    wait_until_training(cluster, job, run_dir)
    before = time.monotonic()
    cluster.link("node1", "down")  # rank 0, which writes
    wait_until_restarted(cluster, job)
    cluster.until(lambda: not cluster.pids("node1", "-m peakd_ds "), 60, "the old rank 0 is gone", job)
    assert time.monotonic() - before < 120
    cluster.link("node1", "up")
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert_same_curve(run_dir, quiet_run)


def test_starts_without_progress_come_to_an_end(cluster: Cluster, start: Start, tmp_path: Path) -> None:
    dying = tmp_path / "dying.sh"
    dying.write_text('#!/bin/bash\n[[ "${SLURM_STEP_ID:-}" && $SLURM_PROCID == 1 ]] && kill -9 $$\nexec "$@"\n')
    dying.chmod(0o755)
    job = start(tmp_path / "run", PEAKD_CONTAINER=str(dying), PEAKD_VENV=f"{ROOT}/.venv")
    assert cluster.wait(job) == "FAILED"
    assert cluster.job(job)["Restarts"] == "1"
    last = cluster.output(job).splitlines()[-1]
    assert "2 starts in a row have saved nothing new" in last and "rank 1 on node2: Killed" in last


def test_host_name_at_a_loopback_address(cluster: Cluster, start: Start, tmp_path: Path) -> None:
    """As in Debian's /etc/hosts: gloo would listen where no other host can reach it."""
    for number in (1, 2):
        hosts = tmp_path / f"hosts.node{number}"
        lines = (cluster.folder / "hosts").read_text().replace(f"10.77.0.{10 + number} ", "127.0.1.1 ")
        hosts.write_text(lines)
        cluster.exec(f"node{number}", "mount", "--bind", hosts, "/etc/hosts")
    try:
        assert cluster.exec("node1", "getent", "hosts", "node1").stdout.split()[0] == "127.0.1.1"
        job = start(tmp_path / "run", "--dry_run")
        assert cluster.wait(job) == "COMPLETED", cluster.output(job)
        assert "world 2" in (tmp_path / "run" / "logs" / f"{job}-0" / "node1.log").read_text()
    finally:
        for number in (1, 2):
            cluster.exec(f"node{number}", "umount", "/etc/hosts")


def test_stale_jit_lock_is_named_and_not_waited_on(cluster: Cluster, start: Start, tmp_path: Path) -> None:
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    subprocess.run(["touch", "--date=1 hour ago", str(lock)], check=True)
    job = start(tmp_path / "run", "--dry_run", TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert cluster.wait(job, 60) == "COMPLETED", cluster.output(job)
    assert f"warning: {lock} is 60 minutes old" in (tmp_path / "run" / "logs" / f"{job}-0" / "node1.log").read_text()


def test_second_run_on_the_same_folder_is_refused(cluster: Cluster, start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    longer = ("--distill_epochs", 90)
    job = start(run_dir, *longer, options=["--nodes=1"])
    wait_until_training(cluster, job, run_dir, "ptp", 1)
    other = start(run_dir, *longer, options=["--nodes=1"])
    assert cluster.wait(other) == "FAILED"
    assert f"is in use: job {job}, start 0, process" in cluster.output(other).splitlines()[-1]
    cluster.cancel(job)


def test_dead_job_does_not_keep_the_folder(cluster: Cluster, start: Start, quiet_run: Path, tmp_path: Path) -> None:
    """Its lock stays, since the killed rank could not delete it."""
    run_dir = tmp_path / "run"
    job = start(run_dir, options=["--nodes=1", "--no-requeue"])
    wait_until_training(cluster, job, run_dir)
    kill_rank(cluster, "node1")
    assert cluster.wait(job) == "FAILED"
    assert json.loads((run_dir / "lock.json").read_text())["job"] == str(job)
    other = start(run_dir, options=["--nodes=2"])
    assert cluster.wait(other) == "COMPLETED", cluster.output(other)
    assert_same_curve(run_dir, quiet_run)


def test_full_disk(cluster: Cluster, start: Start, tmp_path: Path) -> None:
    """The run folder fills up during training: no hang, no restart, and the reason is in the last line."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    cluster.exec("node1", "mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", run_dir)
    try:
        job = start(run_dir, options=["--nodes=1", "--nodelist=node1"])
        assert cluster.wait(job, 120) == "FAILED"
        assert "No space left on device" in cluster.output(job).splitlines()[-1], cluster.output(job)
    finally:
        cluster.exec("node1", "umount", "--lazy", run_dir)


# -- Watching ----------------------------------------------------------------------------------------------------------


def test_tensorboard_on_the_node_of_a_job(
    cluster: Cluster, quiet_run: Path, rank_env: dict[str, str], tmp_path: Path
) -> None:
    sleeping = tmp_path / "sleep.sh"
    sleeping.write_text("#!/bin/bash\nsleep 100\n")
    job = cluster.submit(sleeping, options=["--nodelist=node3", f"--output={tmp_path}/sleep.out"], env=rank_env)
    cluster.until(lambda: cluster.state(job) == "RUNNING", 20, "the job runs")
    command = f"timeout 60 slurm/tensorboard.sh {quiet_run} --job={job} --port=6123 > {tmp_path}/tb.out 2>&1 &"
    cluster.exec("head", "bash", "-c", command, env=rank_env)
    page = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:6123/data/runs').read().decode())"

    def answers() -> bool:
        done = cluster.exec("node3", "python3", "-c", page, check=False)
        return done.returncode == 0 and LAST_STAGE in done.stdout

    cluster.until(answers, 60, "TensorBoard answers on node3's loopback address")
    assert f"ssh -N -L 6123:localhost:6123 {getpass.getuser()}@node3" in (tmp_path / "tb.out").read_text()
    other_host = page.replace("127.0.0.1", "10.77.0.13")
    assert cluster.exec("node1", "python3", "-c", other_host, check=False).returncode != 0


# -- Preflight ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_scratch(cluster: Cluster) -> Iterator[str]:
    """node2, whose scratch disk is full."""
    scratch = cluster.folder / "scratch"
    cluster.exec("node2", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", scratch)
    cluster.exec("node2", "dd", "if=/dev/zero", f"of={scratch}/filling", check=False)
    yield "node2"
    cluster.exec("node2", "umount", scratch)


def test_bad_node_is_named_and_left_out(cluster: Cluster, start: Start, full_scratch: str, tmp_path: Path) -> None:
    job = start(tmp_path / "run", "--dry_run", PEAKD_PREFLIGHT="yes")
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert "bad nodes, excluded from now on: node2 (scratch" in cluster.output(job)
    assert cluster.job(job)["ExcNodeList"] == "node2" and "2" not in cluster.job(job)["NodeList"]


def test_read_only_run_folder(cluster: Cluster, start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for node in ("node1", "node2"):
        cluster.exec(node, "mount", "--bind", "-o", "ro", run_dir, run_dir)
    try:
        job = start(run_dir, options=["--nodes=2", "--nodelist=node[1-2]"])
        assert cluster.wait(job, 60) == "FAILED"
        last = cluster.output(job).splitlines()[-1]
        assert f"--run_dir {run_dir} cannot be written on node1" in last and "Read-only file system" in last
        cluster.exec("node1", "umount", run_dir)
        job = start(run_dir, options=["--nodes=1-2", "--exclude=node[3-4]"], PEAKD_PREFLIGHT="yes")
        assert cluster.wait(job) == "COMPLETED", cluster.output(job)
        assert f"node2 (run folder {run_dir} cannot be written (Read-only file system))" in cluster.output(job)
        assert cluster.job(job)["NodeList"] == "node1"
    finally:
        for node in ("node1", "node2"):
            cluster.exec(node, "umount", run_dir, check=False)


def test_missing_gpus_are_every_nodes_fault(cluster: Cluster, start: Start, tmp_path: Path) -> None:
    """The test cluster pretends to have GPUs: Slurm allocates them, but none is visible."""
    options = ["--nodes=2", "--gpus-per-node=2"]
    job = start(tmp_path / "run", options=options, PEAKD_PREFLIGHT="yes", DS_ACCELERATOR="")
    assert cluster.wait(job) == "FAILED"
    assert "every node is bad: node1 (0 of 2 GPUs are visible), node2 (0 of 2" in cluster.output(job).splitlines()[-1]
