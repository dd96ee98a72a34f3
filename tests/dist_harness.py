"""Real ranks on one machine: a pool of processes that have joined one gloo group and run what a test sends them.

Importing torch, transformers and DeepSpeed takes seconds, so a pool lives for the whole test session. A rank that
raises or hangs leaves the others inside a collective: the pool is then killed, and the next call starts a new one.
"""

import gc
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 240


class RankPool:
    """`pool.run(function, *args)` calls it on every rank and returns the results by rank."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.processes: list[Any] = []
        self.pipes: list[Any] = []

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.world_size, port), daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(ours)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """Results by rank; AssertionError with the first rank's traceback if one fails or takes too long."""
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((function, args))
        results = []
        for rank, pipe in enumerate(self.pipes):
            is_done, value = pipe.recv() if pipe.poll(timeout_s) else (False, f"no answer within {timeout_s} s")
            if not is_done:
                others = [p.recv()[1] for p in self.pipes[rank + 1 :] if p.poll(1)]
                self.stop()
                raise AssertionError(f"rank {rank} of {self.world_size}: {value}\n" + "\n".join(map(str, others)))
            results.append(value)
        return results


def _serve(pipe: Any, rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - it lives as long as the process
    from peakd_ds.ranks import dist

    dist.init(timeout_s=TIMEOUT_S)
    is_frozen = False
    while True:
        function, args = pipe.recv()
        if not is_frozen:  # the end of every engine collects garbage, and need not search all modules for it
            gc.collect()
            gc.freeze()
            is_frozen = True
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
