"""Inspection of every node of a Slurm job before training; slurm/preflight.sh starts one task per rank.

A bad node is named and written to START/bad_nodes.json, and cluster/job.py has the job requeued without it.
"""

import json
import os
import resource
import shutil
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed

from peakd_ds import command_line
from peakd_ds.config import RunConfig
from peakd_ds.errors import UserError
from peakd_ds.files import write_atomically
from peakd_ds.ranks import dist, launch, liveness, preempt, signals
from peakd_ds.ranks.notes import START_DIR, note
from peakd_ds.ranks.outcome import noted

MIN_RUN_FOLDER_MIB = 2048
MIN_SCRATCH_MIB = 1024
MIN_OPEN_FILES = 1024
MAX_CLOCK_OFFSET_S = 5.0
NUM_FLOATS = 8 * 2**20  # in the timed all-reduce: 32 MiB


class Report(NamedTuple):
    """What one rank says of its node."""

    node: str
    clock: float
    """Seconds since 1970."""
    facts: dict[str, str]
    """What the node has, by name; filled by one rank of each node."""
    faults: list[str]
    uses_gpu: bool


def inspect_node(run_dir: Path) -> tuple[dict[str, str], list[str]]:
    """What this node has, by name, and its faults."""
    faults = []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if "SLURM_GPUS_ON_NODE" in os.environ else None
    num_requested, num_visible = len(visible.split(",")) if visible else 0, torch.cuda.device_count()
    if num_visible < num_requested and os.environ.get("DS_ACCELERATOR") != "cpu":
        faults.append(f"{num_visible} of {num_requested} GPUs are visible")
    facts = {"GPUs": f"{num_visible} of {num_requested}", "driver": _driver() if num_visible else "-"}
    disks = [("run folder", run_dir, MIN_RUN_FOLDER_MIB)]
    if os.environ.get("PEAKD_SCRATCH"):
        disks.append(("scratch", Path(os.environ["PEAKD_SCRATCH"]), MIN_SCRATCH_MIB))
    for name, folder, min_free in disks:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free // 2**20
            facts[name] = f"{free} MiB free"
            probe = folder / f".preflight-{os.environ.get('SLURM_JOB_ID', '')}-{os.environ['RANK']}"
            probe.write_bytes(b"\0" * 4096)
            probe.unlink()
            if free < min_free:
                faults.append(f"{name} {folder} has {free} MiB free, but {min_free} are required")
        except OSError as error:
            faults.append(f"{name} {folder} cannot be written ({error.strerror})")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    facts["open files"] = str(files)
    if files < MIN_OPEN_FILES:
        faults.append(f"the open-file limit is {files}, but {MIN_OPEN_FILES} are required")
    return facts, faults


def check_ranks_per_gpu() -> None:
    """Raise UserError unless this node has one rank per GPU."""
    num_gpus, num_ranks = int(os.environ.get("SLURM_GPUS_ON_NODE", "0")), launch.local_world_size()
    if num_gpus and num_gpus != num_ranks:
        raise UserError(
            f"a node has {num_gpus} GPUs and {num_ranks} ranks; each rank takes one GPU: "
            f"set --ntasks-per-node={num_gpus}"
        )


def _driver() -> str:
    """Version of the NVIDIA driver, or "?"."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().split("Kernel Module")[1].split()[0]
    except (OSError, IndexError):
        return "?"


def clock_faults(clocks: dict[str, float]) -> dict[str, str]:
    """The nodes whose clock is too far off the median of all, and a message; if two nodes differ, both have the fault.

    Args:
        clocks: Time of each node in seconds.
    """
    median = statistics.median(clocks.values())
    max_offset = MAX_CLOCK_OFFSET_S if len(clocks) > 2 else MAX_CLOCK_OFFSET_S / 2
    return {
        node: f"its clock is {clock - median:+.1f} s off the median of all nodes"
        for node, clock in clocks.items()
        if abs(clock - median) > max_offset
    }


def find_bad_nodes(reports: Sequence[Report]) -> dict[str, str]:
    """The bad nodes and all faults of each, separated by "; "."""
    faults = {report.node: list(report.faults) for report in reports if report.faults}
    for node, fault in clock_faults({report.node: report.clock for report in reports}).items():
        faults.setdefault(node, []).append(fault)
    return {node: "; ".join(node_faults) for node, node_faults in faults.items()}


def all_reduce_speed(on_gpu: bool) -> float:
    """GiB per second that each rank sends in a ring all-reduce over all ranks (collective)."""
    group = torch.distributed.new_group(backend="nccl") if on_gpu else None
    numbers = torch.ones(NUM_FLOATS, device="cuda" if on_gpu else "cpu")
    seconds = []
    for _ in range(3):  # the first one opens the connections
        start = time.perf_counter()
        torch.distributed.all_reduce(numbers, group=group)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    world_size = torch.distributed.get_world_size()
    return numbers.numel() * 4 * 2 * (world_size - 1) / world_size / min(seconds[1:]) / 2**30


def main(config: RunConfig) -> int:
    """Check all nodes (collective), print a line for each, and return 0 if all are fit.

    Raises:
        UserError: the options are wrong, or the ranks do not fit the nodes' GPUs.
        LostRank: a rank did not come.
    """
    store = launch.find_ranks(config.rank_timeout, needs_devices=False)
    uses_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    torch.distributed.init_process_group("gloo", timeout=dist.COLLECTIVE_TIMEOUT)  # nccl needs a GPU on every node
    if store is not None:
        liveness.watch(store, config.rank_timeout, on_end=lambda cause: note("lost", cause))
    reports = _gather_reports(Path(config.run_dir), uses_gpu)
    bad_nodes = find_bad_nodes(reports)
    speed = "not measured" if bad_nodes else _measure_all_reduce(all(report.uses_gpu for report in reports))
    if dist.is_main():
        for report in reports:
            if report.facts:
                facts = ", ".join(f"{name} {fact}" for name, fact in report.facts.items())
                print(f"preflight {report.node}: {facts}; {bad_nodes.get(report.node, 'fit')}", flush=True)
        print(f"preflight all-reduce of {NUM_FLOATS * 4 // 2**20} MiB: {speed}", flush=True)
        if bad_nodes and os.environ.get(START_DIR):
            write_atomically(Path(os.environ[START_DIR]) / "bad_nodes.json", json.dumps(bad_nodes))
    preempt.leave_if(preempt.stop_agreed())
    torch.distributed.barrier()
    return 1 if bad_nodes else 0


def _gather_reports(run_dir: Path, uses_gpu: bool) -> list[Report]:
    """The reports of all ranks (collective); one rank of each node inspects it."""
    node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    facts, faults = inspect_node(run_dir) if launch.local_rank() == 0 else ({}, [])
    torch.distributed.barrier()  # so that the clocks are read at the same time
    reports: list[Report | None] = [None] * dist.world_size()
    torch.distributed.all_gather_object(reports, Report(node, time.time(), facts, faults, uses_gpu))
    return [report for report in reports if report is not None]


def _measure_all_reduce(on_gpu: bool) -> str:
    """The speed of an all-reduce over all ranks, as text (collective)."""
    if on_gpu:
        dist.agree(check_ranks_per_gpu)
        torch.cuda.set_device(launch.local_rank() % torch.cuda.device_count())
    return f"{all_reduce_speed(on_gpu):.2f} GiB/s a rank" if dist.world_size() > 1 else "one rank"


run_rank = noted(marks_finished=False)(main)
"""One rank of the program, from joining the others to leaving them."""

if __name__ == "__main__":
    signals.listen()
    command_line.start("peakd_ds.cluster.preflight:run_rank", "preflight", on_refusal=partial(note, "refused"))
