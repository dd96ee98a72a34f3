"""Look at every node of a Slurm job before training: one task per rank, started by slurm/preflight.sh.

A node that is not fit is named and written to START/bad_nodes.json, and slurm_job.py has the job requeued without it.
"""

import json
import os
import resource
import shutil
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

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
NUM_FLOATS = 8 * 2**20  # of the all-reduce that is timed: 32 MiB


def look_at_node(run_dir: Path) -> tuple[dict[str, str], list[str]]:
    """What this node has, by name, and what is wrong with it."""
    faults = []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if "SLURM_GPUS_ON_NODE" in os.environ else None
    asked, seen = len(visible.split(",")) if visible else 0, torch.cuda.device_count()
    if seen < asked and os.environ.get("DS_ACCELERATOR") != "cpu":
        faults.append(f"{seen} of {asked} GPUs are seen")
    facts = {"GPUs": f"{seen} of {asked}", "driver": _driver() if seen else "-"}
    places = [("run folder", run_dir, MIN_RUN_FOLDER_MIB)]
    if os.environ.get("PEAKD_SCRATCH"):
        places.append(("scratch", Path(os.environ["PEAKD_SCRATCH"]), MIN_SCRATCH_MIB))
    for name, folder, least in places:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free // 2**20
            facts[name] = f"{free} MiB free"
            probe = folder / f".preflight-{os.environ.get('SLURM_JOB_ID', '')}-{os.environ['RANK']}"
            probe.write_bytes(b"\0" * 4096)
            probe.unlink()
            if free < least:
                faults.append(f"{name} {folder} has {free} MiB free, and {least} are wanted")
        except OSError as error:
            faults.append(f"{name} {folder} cannot be written ({error.strerror})")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    facts["open files"] = str(files)
    if files < MIN_OPEN_FILES:
        faults.append(f"the open-file limit is {files}, and {MIN_OPEN_FILES} are wanted")
    return facts, faults


def check_ranks_per_gpu() -> None:
    """Raise UserError if a node has GPUs that no rank would use, or ranks without one."""
    num_gpus, num_ranks = int(os.environ.get("SLURM_GPUS_ON_NODE", "0")), launch.local_world_size()
    if num_gpus and num_gpus != num_ranks:
        raise UserError(
            f"a node has {num_gpus} GPUs and {num_ranks} ranks; each rank takes one GPU: "
            f"set --ntasks-per-node={num_gpus}"
        )


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().split("Kernel Module")[1].split()[0]
    except (OSError, IndexError):
        return "?"


def clock_faults(clocks: dict[str, float]) -> dict[str, str]:
    """What is wrong with the nodes whose clock, in seconds, is off the median; of two nodes both, if they differ."""
    median = statistics.median(clocks.values())
    most = MAX_CLOCK_OFFSET_S if len(clocks) > 2 else MAX_CLOCK_OFFSET_S / 2
    return {
        node: f"its clock is {clock - median:+.1f} s off the middle of all"
        for node, clock in clocks.items()
        if abs(clock - median) > most
    }


def all_reduce_speed(on_gpu: bool) -> float:
    """GiB a second that each rank sends in a ring all-reduce over all ranks (collective)."""
    group = torch.distributed.new_group(backend="nccl") if on_gpu else None
    numbers = torch.ones(NUM_FLOATS, device="cuda" if on_gpu else "cpu")
    seconds = []
    for _ in range(3):  # the first opens the connections
        start = time.perf_counter()
        torch.distributed.all_reduce(numbers, group=group)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    world_size = torch.distributed.get_world_size()
    return numbers.numel() * 4 * 2 * (world_size - 1) / world_size / min(seconds[1:]) / 2**30


def main(config: RunConfig) -> int:
    """Check, print a line for each node, and return 0 if all are fit.

    Raises:
        UserError: options are wrong, or the ranks do not fit the nodes' GPUs. LostRank: a rank did not come.
    """
    store = launch.find_ranks(config.rank_timeout, needs_devices=False)
    uses_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    torch.distributed.init_process_group("gloo", timeout=dist.COLLECTIVE_TIMEOUT)  # NCCL wants a GPU on every node
    if store is not None:
        liveness.watch(store, config.rank_timeout, on_end=lambda cause: note("lost", cause))
    node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    facts, faults = look_at_node(Path(config.run_dir)) if launch.local_rank() == 0 else ({}, [])
    torch.distributed.barrier()
    told: list[Any] = [None] * dist.world_size()
    torch.distributed.all_gather_object(told, (node, time.time(), facts, faults, uses_gpu))
    bad_nodes = {name: "; ".join(node_faults) for name, _, _, node_faults, _ in told if node_faults}
    for name, fault in clock_faults({name: clock for name, clock, *_ in told}).items():
        bad_nodes[name] = "; ".join([*([bad_nodes[name]] if name in bad_nodes else []), fault])
    lines = [
        f"preflight {name}: {', '.join(f'{key} {value}' for key, value in node_facts.items())}; "
        f"{bad_nodes.get(name, 'fit')}"
        for name, _, node_facts, *_ in told
        if node_facts
    ]
    speed = "not measured" if bad_nodes else "one rank"
    if not bad_nodes:
        all_use_gpus = all(uses for *_, uses in told)
        if all_use_gpus:
            dist.agree(check_ranks_per_gpu)
            torch.cuda.set_device(launch.local_rank() % torch.cuda.device_count())
        if dist.world_size() > 1:
            speed = f"{all_reduce_speed(all_use_gpus):.2f} GiB/s a rank"
    if dist.is_main():
        print("\n".join([*lines, f"preflight all-reduce of {NUM_FLOATS * 4 // 2**20} MiB: {speed}"]), flush=True)
        if bad_nodes and os.environ.get(START_DIR):
            write_atomically(Path(os.environ[START_DIR]) / "bad_nodes.json", json.dumps(bad_nodes))
    preempt.leave_if(preempt.stop_agreed())
    torch.distributed.barrier()
    return 1 if bad_nodes else 0


run_rank = noted(tells_end=False)(main)
"""One rank of the program, from joining the others to leaving them."""

if __name__ == "__main__":
    signals.listen()
    command_line.start("peakd_ds.cluster.preflight:run_rank", "preflight", on_refusal=partial(note, "refused"))
