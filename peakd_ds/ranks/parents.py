"""The launcher that started this rank: which processes it is, and whether they still run.

A launcher that is killed leaves its ranks behind; `deepspeed` does. So a rank remembers the launcher's processes at its
start, and preempt.py has all ranks stop when one of them is gone. Environment variables that launchers set say whether
there is a launcher. A shell or a terminal is none: a run that was started without a launcher goes on when they are
gone.
"""

import os
from pathlib import Path

VARIABLES = ("TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "CROSS_RANK")
"""Set by torchrun, mpirun (three of them), and deepspeed. The launcher is the rank's parent process."""
NAMES = (
    *("deepspeed", "deepspeed.pt", "deepspeed.launcher.runner", "deepspeed.launcher.launch"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate"),
    *("mpirun", "mpiexec", "orterun", "prterun", "orted", "prted", "hydra_pmi_proxy"),
)
"""Programs and modules that are launchers: `deepspeed` starts another process, which starts the ranks."""

_links: list[tuple[int, int]] = []
"""(process, its parent), from this process up to the launcher's topmost process."""


def remember() -> None:
    """Remember the launcher's processes, if a launcher started this one. Call it before imports that take seconds."""
    _links.clear()
    _links.extend(_launcher_links())


def gone() -> int | None:
    """The launcher's process that is gone; None if all run, or if there is no launcher.

    A process whose parent ends gets another parent, so a link that is no longer true means that the parent is gone.
    """
    return next((parent for process, parent in _links if _parent_of(process) != parent), None)


def _launcher_links() -> list[tuple[int, int]]:
    env = os.environ
    process: int = os.getpid()
    parent: int | None = os.getppid()
    is_task = "SLURM_STEP_ID" in env and "SLURM_PROCID" in env
    has_launcher = any(name in env for name in VARIABLES) or (
        is_task and _words_of(os.getppid())[:1] == ["slurmstepd:"]
    )
    links = []
    while has_launcher and parent is not None and parent > 1:  # 1 adopts processes: it is nobody's launcher
        links.append((process, parent))
        process, parent = parent, _parent_of(parent)
        has_launcher = parent is not None and _is_launcher(parent)
    return links


def _parent_of(process: int) -> int | None:
    """Number of a process's parent; None if there is no such process, or no /proc."""
    if process == os.getpid():
        return os.getppid()
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None


def _is_launcher(process: int) -> bool:
    """Whether a process runs a launcher's program, or Python with a launcher's script or module."""
    names = [word.rpartition("/")[2] for word in _words_of(process)[:4]]
    is_python = bool(names) and names[0].startswith("python")
    return any(name in NAMES for name in names[: 4 if is_python else 1])


def _words_of(process: int) -> list[str]:
    """Program and arguments of a process; slurmstepd has one word, "slurmstepd: [JOB.STEP]"."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
    except OSError:
        return []
