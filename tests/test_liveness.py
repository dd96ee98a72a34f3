"""Ranks that do not come, fall silent, fail or do not belong are named, and the others leave soon."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from torch.utils.file_baton import FileBaton

from peakd_ds.errors import UserError
from peakd_ds.ranks import host, liveness, parents

RANK = """
import itertools, os, sys, time, types
import torch
if "JUMPS" in os.environ:
    clock, number = time.time, itertools.count()
    time.time = lambda: clock() + (1e6 if next(number) % 2 else -1e6)
torch.cuda.device_count = lambda: int(os.environ.get("NUM_GPUS", "0"))
uuid = os.environ.get("GPU_UUID", f"GPU-of-rank-{os.environ['RANK']}")
torch.cuda.get_device_properties = lambda index: types.SimpleNamespace(uuid=uuid)
from peakd_ds.errors import UserError
from peakd_ds.ranks import launch, liveness
try:
    store = launch.find_ranks(float(sys.argv[1]))
except (UserError, liveness.LostRank) as error:
    raise SystemExit(f"{type(error).__name__}: {error}")
liveness.watch(store, float(sys.argv[1]), on_end=lambda cause: None)
print("there", flush=True)
what = sys.stdin.readline().strip()
if what == "fail":
    liveness.report_failure("ZeroDivisionError: it divides by zero")
    raise SystemExit(1)
if what == "lose":
    print(liveness.why_lost(RuntimeError("[pair.cc:547] Connection closed by peer")), flush=True)
    liveness.leave()
    raise SystemExit(1)
if what == "leave":
    time.sleep(0.5 if os.environ["RANK"] == "0" else 0)
    liveness.leave()
    raise SystemExit(0)
time.sleep(60)
"""
HOST = socket.gethostname()


class Ranks:
    def __init__(self, env: dict[str, str]):
        self.env, self.processes = env, []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def start(self, rank: int, timeout_s: float, world_size: int = 2, **more: str) -> subprocess.Popen[str]:
        ranks = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, MASTER_ADDR="127.0.0.1", MASTER_PORT=self.port)
        env = {
            **self.env,
            "TORCH_CPP_LOG_LEVEL": "FATAL",
            **{name: str(value) for name, value in ranks.items()},
            **more,
        }
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        command = [sys.executable, "-c", RANK, str(timeout_s)]
        self.processes.append(subprocess.Popen(command, env=env, text=True, **pipes))
        return self.processes[-1]


@pytest.fixture
def ranks(env: dict[str, str]) -> Iterator[Ranks]:
    made = Ranks({name: value for name, value in env.items() if not name.startswith("SLURM_")})
    yield made
    for process in made.processes:
        process.kill()
        process.communicate()


def pair(ranks: Ranks, timeout_s: float) -> list[subprocess.Popen[str]]:
    both = [ranks.start(rank, timeout_s) for rank in (0, 1)]
    for process in both:
        assert process.stdout.readline() == "there\n"
    return both


@pytest.mark.parametrize("silent", [0, 1])
def test_silent_rank(ranks: Ranks, silent: int) -> None:
    both = pair(ranks, 6)
    both[silent].send_signal(signal.SIGSTOP)
    output = both[1 - silent].communicate(timeout=60)[1]
    both[silent].send_signal(signal.SIGCONT)
    assert both[1 - silent].returncode == 1
    which = "rank 0 has been silent for 6 s" if silent == 0 else f"rank 1 on {HOST} has been silent for 6 s"
    assert f"rank {1 - silent} on {HOST} leaves: {which}" in output


def test_all_are_suspended(ranks: Ranks) -> None:
    """Slurm suspends a job for longer than the timeout: no rank is given up."""
    both = pair(ranks, 6)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in both:
            process.send_signal(number)
        time.sleep(9)
    for process in both:
        process.stdin.write("leave\n")
        process.stdin.flush()
    for process in both:
        assert process.communicate(timeout=30)[1] == "" and process.returncode == 0


@pytest.mark.parametrize("failing", [0, 1])
def test_failing_rank(ranks: Ranks, failing: int) -> None:
    both = pair(ranks, 60)
    both[failing].stdin.write("fail\n")
    both[failing].stdin.flush()
    output = both[1 - failing].communicate(timeout=30)[1]
    assert both[1 - failing].returncode == 1
    assert f"rank {failing} on {HOST} failed: ZeroDivisionError" in output or "rank 0 is gone" in output


def test_ranks_that_finish(ranks: Ranks) -> None:
    both = pair(ranks, 60)
    for process in both:
        process.stdin.write("leave\n")
        process.stdin.flush()
    for process in both:
        assert process.communicate(timeout=30)[1] == "" and process.returncode == 0


@pytest.mark.parametrize(("killed", "name"), [(0, "rank 0 is gone ("), (1, f"rank 1 on {HOST} is gone\n")])
def test_a_failed_collective_names_the_rank_that_was_killed(ranks: Ranks, killed: int, name: str) -> None:
    both = pair(ranks, 60)
    both[killed].kill()
    output, errors = both[1 - killed].communicate("lose\n", timeout=30)
    assert output.startswith(name) and both[1 - killed].returncode == 1 and errors == ""


def test_wall_clocks_that_jump(ranks: Ranks) -> None:
    """A clock that is set while ranks train, by days, ends none of them."""
    both = [ranks.start(rank, 6, JUMPS="1") for rank in (0, 1)]
    for process in both:
        assert process.stdout.readline() == "there\n"
    time.sleep(8)
    for process in both:
        process.stdin.write("leave\n")
        process.stdin.flush()
    for process in both:
        assert process.communicate(timeout=30)[1] == "" and process.returncode == 0


def test_a_monotonic_clock_that_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a suspension that the clock counts: the silence of that time is nobody's fault."""
    monkeypatch.setattr(liveness, "PERIOD_S", 0.01)
    now = [0.0]

    class Clock:
        @staticmethod
        def monotonic() -> float:
            now[0] += 1000.0
            return now[0]

    monkeypatch.setattr(liveness, "time", Clock)
    monitor = liveness._Monitor(SilentStore(), 60, on_end=lambda cause: None)
    monkeypatch.setattr(monitor, "end", lambda cause: pytest.fail(cause))
    threading.Timer(0.5, monitor.is_leaving.set).start()
    monitor.guard()
    assert now[0] > 5000.0


def test_the_store_listens_on_the_address_in_use_alone() -> None:
    for address in ("127.0.0.1", "localhost"):
        number = liveness._listening_socket(address, 0)
        assert number is not None
        with socket.socket(fileno=number) as listener:
            assert listener.getsockname()[0] in ("127.0.0.1", "::1")
    assert liveness._listening_socket("192.0.2.1", 0) is None, "no interface of this host has that address"


PARENTS = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from peakd_ds.ranks import parents
parents.remember()
print(os.getpid(), len(parents._links), flush=True)
sys.stdin.readline()
print("gone" if parents.gone() else "all run", flush=True)
"""
LAUNCH = """
import subprocess, sys, time
subprocess.Popen(sys.argv[1:])
time.sleep(60)
"""


@pytest.mark.parametrize("killed", ["runner", "launcher", "shell"])
@pytest.mark.parametrize("variable", ["CROSS_RANK", ""])
def test_killed_parents(env: dict[str, str], tmp_path: Path, killed: str, variable: str) -> None:
    """A shell starts deepspeed, which starts its launcher, which starts a rank; without the variable, it is no rank."""
    (tmp_path / "deepspeed").write_text(LAUNCH)
    (tmp_path / "rank.py").write_text(PARENTS)
    python = sys.executable
    words = [
        python,
        str(tmp_path / "deepspeed"),
        python,
        str(tmp_path / "deepspeed"),
        python,
        str(tmp_path / "rank.py"),
    ]
    command = ["bash", "-c", '"$@"; true', "bash", *words, str(ROOT)]
    env = env | ({variable: "0"} if variable else {})
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    rank, num_links = map(int, process.stdout.readline().split())
    launcher = psutil.Process(rank).parent()
    runner = launcher.parent()
    assert num_links == (2 if variable else 0)
    {"shell": process, "runner": runner, "launcher": launcher}[killed].kill()
    time.sleep(0.5)
    process.stdin.close()
    assert process.stdout.readline().strip() == ("gone" if variable and killed != "shell" else "all run")
    for one in (launcher, runner):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def test_a_shell_in_an_srun_task_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_PROCID", "0")
    for name in parents.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert parents._launcher_links() == []
    monkeypatch.setattr(parents, "_words_of", lambda process: ["slurmstepd:", "[7.0]"])
    assert parents._launcher_links()[0] == (os.getpid(), os.getppid())


def test_rank_that_does_not_come(ranks: Ranks) -> None:
    first, last = ranks.start(0, 6, world_size=3), ranks.start(2, 6, world_size=3)
    for process in (first, last):
        output = process.communicate(timeout=60)[1]
        assert f"LostRank: rank 1 of 3 did not come within 6 s of rank 0 on {HOST}" in output


def test_rank_0_does_not_come(ranks: Ranks) -> None:
    output = ranks.start(1, 5).communicate(timeout=60)[1]
    assert f"LostRank: rank 0 at 127.0.0.1:{ranks.port} does not answer rank 1 on {HOST}" in output


def test_rank_of_an_earlier_start(ranks: Ranks) -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1"}
    both = [ranks.start(0, 20, SLURM_RESTART_COUNT="1", **job), ranks.start(1, 20, **job)]
    for process in both:
        assert f"rank 1 on {HOST} belongs to job 7 start 0, but rank 0 to job 7 start 1;" in process.communicate()[1]


def test_ranks_on_fewer_hosts_than_slurm_has_given(ranks: Ranks) -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}
    for process in [ranks.start(rank, 20, **job) for rank in (0, 1)]:
        assert f"UserError: all 2 ranks are on {HOST}, but Slurm has given 2 nodes" in process.communicate()[1]


@pytest.mark.parametrize("num_gpus, accelerator", [(2, ""), (2, "cpu"), (3, ""), (1, "")])
def test_ranks_and_gpus_of_a_node(ranks: Ranks, num_gpus: int, accelerator: str) -> None:
    node = {"NUM_GPUS": str(num_gpus), "DS_ACCELERATOR": accelerator}  # 1: srun --gpus-per-task=1
    for process in [ranks.start(rank, 20, world_size=3, **node) for rank in range(3)]:
        if num_gpus == 2 and not accelerator:
            output = process.communicate(timeout=60)[1]
            assert f"UserError: rank 2 on {HOST} has local rank 2 but sees only 2 GPUs; start at most 2" in output
        else:
            assert process.stdout.readline() == "there\n"


def test_two_ranks_with_one_gpu(ranks: Ranks) -> None:
    node = {"NUM_GPUS": "1", "DS_ACCELERATOR": "", "GPU_UUID": "GPU-7"}  # `--num_gpus 2` on a machine with one
    for process in [ranks.start(rank, 20, **node) for rank in (0, 1)]:
        output = process.communicate(timeout=60)[1]
        assert f"UserError: ranks 0 and 1 on {HOST} have one GPU, GPU-7; start one rank a GPU" in output


def test_a_host_without_a_gpu_among_others(ranks: Ranks) -> None:
    for process in [ranks.start(rank, 20, NUM_GPUS=str(1 - rank), DS_ACCELERATOR="") for rank in (0, 1)]:
        output = process.communicate(timeout=60)[1]
        assert f"UserError: rank 1 on {HOST} computes on cpu, but rank 0 on {HOST} on cuda; leave out" in output


RESTARTED = """
import os, sys
from peakd_ds.ranks import launch, liveness
liveness.watch(launch.find_ranks(20), 20, on_end=lambda cause: None)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    liveness.report_failure("the first attempt fails")
    raise SystemExit(1)
import time
time.sleep(3 * liveness.GRACE_S)  # long enough for remains of the first attempt to end this one
# One write: the ranks share the pipe, and it may be unbuffered.
sys.stdout.write(f"there {launch.local_world_size()}\\n")
sys.stdout.flush()
liveness.leave()
"""


class SilentStore:
    """A store whose connection breaks with an error that has no text."""

    def clone(self) -> "SilentStore":
        return self

    def set(self, key: str, value: str) -> None:
        raise RuntimeError("")


def test_an_error_without_a_message_does_not_kill_the_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(liveness, "PERIOD_S", 0.01)
    monitor, causes = liveness._Monitor(SilentStore(), 60, on_end=lambda cause: None), []

    def end(cause: str) -> None:
        causes.append(cause)
        if len(causes) == 2:
            monitor.is_leaving.set()

    monkeypatch.setattr(monitor, "end", end)
    monitor.heart.start()
    monitor.heart.join(30)
    assert causes == ["rank 0 is gone (RuntimeError)"] * 2


def test_a_store_that_went_with_the_launcher_leaves_time_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun keeps the store. When it is killed, ranks have the whole timeout, not seconds, to save and leave."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(liveness, "PERIOD_S", 0.01)
    monkeypatch.setattr(liveness, "GRACE_S", 0.01)
    monkeypatch.setattr(parents, "gone", lambda: 4321)
    monitor = liveness._Monitor(SilentStore(), 60, on_end=pytest.fail)
    monitor.heart.start()
    time.sleep(1)
    assert monitor.heart.is_alive() and monitor.cause == "the launcher (process 4321) is gone"
    monitor.is_leaving.set()
    monitor.heart.join(30)
    assert not monitor.heart.is_alive()


class LiveStore:
    """torchrun's store, which answers while rank 0 sends no heartbeat."""

    def __init__(self) -> None:
        self.values = {"here/0": '["node1", "", "cpu", ""]'}

    def clone(self) -> "LiveStore":
        return self

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def check(self, keys: list[str]) -> bool:
        return keys[0] in self.values

    def compare_set(self, key: str, expected: str, value: str) -> None:
        self.values.setdefault(key, value)


def test_rank_0_that_is_silent_while_the_store_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(liveness, "PERIOD_S", 0.01)
    monitor, causes = liveness._Monitor(LiveStore(), 0.5, on_end=pytest.fail), []

    def end(cause: str) -> None:
        causes.append(cause)
        monitor.is_leaving.set()

    monkeypatch.setattr(monitor, "end", end)
    monitor.heart.start()
    monitor.heart.join(30)
    assert causes == ["rank 0 on node1 has been silent for 0.5 s"]


def test_ranks_that_torchrun_restarts(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(RESTARTED)
    launcher = (
        "-m torch.distributed.run --standalone --nproc_per_node=2 --max_restarts=1 --monitor_interval=0.1".split()
    )
    command = [sys.executable, *launcher, str(tmp_path / "program.py")]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.count("there 2")) == (0, 2), done.stdout + done.stderr


def test_one_rank_in_a_job_of_two_nodes(ranks: Ranks) -> None:
    output = ranks.start(0, 20, world_size=1, SLURM_JOB_ID="7", SLURM_NNODES="2").communicate()[1]
    assert "UserError: Slurm has given 2 nodes, but this run has one rank" in output


def test_stale_build_lock_is_not_waited_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(FileBaton, "wait", FileBaton.wait)
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert host.stale_locks() == []
    os.utime(lock, (0, time.time() - 3600))
    assert host.stale_locks() == [lock]
    host.never_wait_on_stale()
    with pytest.raises(UserError, match=f"{lock} is 60 minutes old"):
        FileBaton(str(lock)).wait()
