"""A real Slurm cluster of several hosts inside this machine: slurmctld, slurmd and munge as distributed, in seconds.

Each host has its own name, address, processes, /dev/shm and scratch disk; the file system is shared. Needs slurm-wlm,
munge and iproute2, and the right to make namespaces: as root, or as a user where user namespaces are allowed.

    with Cluster(num_nodes=4) as cluster:
        job = cluster.submit("slurm/distill.sh", "--task", "rte", ..., options=["--nodes=2"], env={...})
        assert cluster.wait(job) == "COMPLETED", cluster.output(job)
        cluster.exec("node1", "hostname")            # subprocess.CompletedProcess; "head", "node1", "node2", ...
        cluster.job(job)["Restarts"]                 # every field of `scontrol show job`
        cluster.cancel(job, "USR1"); cluster.poweroff("node2"); cluster.boot("node2"); cluster.link("node2", "down")

Leaving the block kills one process, the head's first, and the kernel then kills every process of every host.
"""

import getpass
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NET = "10.77.0"
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE")
NAMESPACES = "--net --uts --mount --pid --fork --kill-child --mount-proc --propagation private".split()
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "unshare", "nsenter", "ip", "pgrep")
SYSTEM_PROGRAMS = ":/usr/sbin:/sbin"
PATH = os.environ["PATH"] + SYSTEM_PROGRAMS


def why_not() -> str | None:
    """Why no cluster can be started here; None if one can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"no {missing[0]}; on Debian install slurm-wlm, munge and iproute2"
    trial = subprocess.run(["unshare", *_user_options(), *NAMESPACES, "true"], capture_output=True, text=True)
    return None if trial.returncode == 0 else f"namespaces are not allowed here ({trial.stderr.strip()})"


class Cluster:
    """`num_nodes` hosts node1.. of `cpus` cores and as many pretended GPUs, and the host `head`."""

    def __init__(self, num_nodes: int = 2, cpus: int = 2, slurmd_timeout_s: int = 15, kill_wait_s: int = 10):
        self.num_nodes, self.cpus = num_nodes, cpus
        self.slurmd_timeout_s, self.kill_wait_s = slurmd_timeout_s, kill_wait_s
        self.folder = Path()
        self.head: subprocess.Popen[bytes] | None = None

    @property
    def nodes(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.num_nodes + 1)]

    # -- Up and down ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Cluster":
        self.folder = Path(tempfile.mkdtemp(prefix="pk-", dir="/tmp"))  # short: paths of unix sockets have a limit
        try:
            self._write_files()
            log = (self.folder / "log" / "head.log").open("wb")
            self.head = subprocess.Popen(
                ["unshare", *_user_options(), *NAMESPACES, str(HERE / "host.sh"), "head"],
                env={**os.environ, **self._settings()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.until(self.is_idle, 60, "all nodes idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.head is not None:
            for pid in _children(self.head.pid):  # the head's first process; its death is that of all
                os.kill(pid, signal.SIGKILL)
            try:
                self.head.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.head.kill()
                self.head.wait()
            self.head = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_files(self) -> None:
        folder = self.folder
        for name in [
            "ctld",
            "log",
            "scratch",
            *(f"{kind}.{node}" for kind in ("spool", "scratch") for node in self.nodes),
        ]:
            (folder / name).mkdir()
        values = dict(
            folder=folder,
            net=NET,
            user=getpass.getuser(),
            num_nodes=self.num_nodes,
            last_address=10 + self.num_nodes,
            cpus=self.cpus,
            slurmd_timeout_s=self.slurmd_timeout_s,
            kill_wait_s=self.kill_wait_s,
        )
        (folder / "slurm.conf").write_text((HERE / "slurm.conf.in").read_text().format(**values))
        for number in range(self.cpus):  # --gpus-per-node and CUDA_VISIBLE_DEVICES work, nothing is behind them
            (folder / f"gpu{number}").symlink_to("/dev/null")
        (folder / "gres.conf").write_text(
            f"NodeName=node[1-{self.num_nodes}] Name=gpu File={folder}/gpu[0-{self.cpus - 1}]\n"
        )
        hosts = ["127.0.0.1 localhost", f"{NET}.1 head"]
        hosts += [f"{NET}.{10 + number} node{number}" for number in range(1, self.num_nodes + 1)]
        (folder / "hosts").write_text("\n".join(hosts) + "\n")
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        for name in ("ctl", "reply"):
            os.mkfifo(folder / name)

    def _settings(self) -> dict[str, str]:
        return {
            "CLUSTER_DIR": str(self.folder),
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "NUM_NODES": str(self.num_nodes),
            "NET": NET,
            "PATH": PATH,
        }

    # -- Hosts ---------------------------------------------------------------------------------------------------------

    def exec(
        self,
        host: str,
        *command: Any,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        timeout_s: float = 60,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host and wait for it; without `env` in this process's environment."""
        enter = ["nsenter", *([] if os.geteuid() == 0 else ["-U", "--preserve-credentials"])]
        enter += ["-t", str(self._init_of(host)), "-n", "-u", "-m", "-p", "--"]
        given = os.environ if env is None else env
        done = subprocess.run(
            [*enter, "bash", "-c", 'cd "$0"; exec "$@"', str(cwd), *map(str, command)],
            env={**given, **self._settings(), "PATH": given["PATH"] + SYSTEM_PROGRAMS},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert not check or done.returncode == 0, f"{command} on {host}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def pids(self, node: str, pattern: str) -> list[int]:
        """Processes on the node (its own numbers) whose command line matches; end one with exec(node, "kill", pid)."""
        found = self.exec(node, "pgrep", "-f", "--", pattern, check=False).stdout.split()
        return [int(pid) for pid in found]

    def poweroff(self, node: str) -> None:
        """Kill every process of the node at once."""
        os.kill(self._init_of(node), signal.SIGKILL)

    def boot(self, node: str) -> None:
        self._order("boot", node)

    def link(self, node: str, state: str) -> None:
        """Plug ("up") or pull ("down") the node's network cable."""
        self._order("link", node, state)

    def _order(self, *words: str) -> None:
        (self.folder / "ctl").write_text(" ".join(words) + "\n")
        answer = subprocess.run(
            ["head", "-n", "1", str(self.folder / "reply")], capture_output=True, text=True, timeout=20
        )
        assert answer.stdout.strip() == "0", (words, (self.folder / "log" / "head.log").read_text())

    def is_on(self, host: str) -> bool:
        return self._find(host) is not None

    def _init_of(self, host: str) -> int:
        """This machine's number of the host's first process."""
        pid = self._find(host)
        assert pid is not None, f"{host} is off"
        return pid

    def _find(self, host: str) -> int | None:
        assert self.head is not None, "the cluster is down"
        head = next(iter(_children(self.head.pid)), None)
        if host == "head" or head is None:
            return head
        words = f"host.sh\0node\0{host.removeprefix('node')}\0"
        outer = next((pid for pid in _children(head) if words in _command_line(pid)), None)
        return None if outer is None else next(iter(_children(outer)), None)

    # -- Jobs ----------------------------------------------------------------------------------------------------------

    def submit(
        self,
        script: str | Path,
        *arguments: Any,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> int:
        """Run sbatch on the head; returns the number of the job."""
        done = self.exec("head", "sbatch", "--parsable", *options, script, *arguments, env=env, cwd=cwd)
        return int(done.stdout.split(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        text = self.exec("head", "scontrol", "show", "job", job).stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def state(self, job: int) -> str:
        return self.job(job)["JobState"]

    def output(self, job: int) -> str:
        """The job's output file so far."""
        file = Path(self.job(job)["StdOut"])
        return file.read_text() if file.exists() else ""

    def wait(self, job: int, timeout_s: float = 180) -> str:
        """Wait for the job's end; returns its state."""
        self.until(lambda: self.state(job) in FINISHED, timeout_s, f"job {job} over", job)
        return self.state(job)

    def wait_for(self, job: int, text: str, timeout_s: float = 120) -> None:
        """Wait until the job's output holds the text."""
        self.until(lambda: text in self.output(job), timeout_s, f"job {job} said {text!r}", job)

    def cancel(self, job: int, signal_name: str = "") -> None:
        self.exec("head", "scancel", *([f"--signal={signal_name}"] if signal_name else []), job)

    def is_idle(self) -> bool:
        """Whether every node is up and without a job."""
        if not self.is_on("head"):
            return False
        done = self.exec("head", "sinfo", "-h", "-N", "-p", "debug", "-t", "idle", "-o", "%N %T", check=False)
        return [line.split()[1:] for line in done.stdout.splitlines()] == [["idle"]] * self.num_nodes

    def until(self, is_so: Callable[[], bool], timeout_s: float, what: str, job: int | None = None) -> None:
        """Poll until `is_so()`; AssertionError with the job's output when time is up."""
        deadline = time.monotonic() + timeout_s
        while not is_so():
            if time.monotonic() > deadline:
                details = "" if job is None else f"\n{self.state(job)}\n{self.output(job)[-6000:]}"
                raise AssertionError(f"not within {timeout_s} s: {what}{details}")
            time.sleep(0.2)

    def settle(self, timeout_s: float = 90) -> None:
        """Cancel all jobs and have every node on, plugged in and idle again, after a test."""
        for node in self.nodes:
            if not self.is_on(node):
                self.boot(node)
            self.link(node, "up")
        self.exec("head", "scancel", "--state=PENDING", "--user", getpass.getuser())
        self.exec("head", "scancel", "--user", getpass.getuser())
        deadline = time.monotonic() + timeout_s
        while not self.is_idle():
            assert time.monotonic() < deadline, self.exec("head", "sinfo", "-N", "-l").stdout
            self.exec("head", "scancel", "--user", getpass.getuser())
            self.exec("head", "scontrol", "update", f"nodename=node[1-{self.num_nodes}]", "state=resume", check=False)
            time.sleep(0.3)


def _user_options() -> list[str]:
    return [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
