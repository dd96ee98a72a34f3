"""Machine, versions and commit of a measurement; every result records them."""

import platform
import subprocess
from pathlib import Path

import torch


def machine(device: str) -> str:
    """Name of the GPU (device "cuda"), or of the CPU with its number of threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit of this repository, with a + if files differ from it; "unknown" outside of a repository."""
    try:
        here = Path(__file__).parent
        command = ["git", "describe", "--always", "--dirty=+", "--abbrev=10"]
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def version_of(name: str) -> str:
    """The version of an installed package, "" if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return ""
