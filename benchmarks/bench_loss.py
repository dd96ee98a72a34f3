"""Time the fused loss and its alternatives in one run, and check each against float64.

    python benchmarks/bench_loss.py                     all cases, on a GPU if there is one
    python benchmarks/bench_loss.py --case "GLUE bf16"  one case
    python benchmarks/bench_loss.py --tune              also other tiles of the streaming kernel (GPU)

A measurement is a forward and a backward pass. Systems take turns in each round, so other load on the machine affects
all of them. Writes a row per case and system to benchmarks/results/loss_DEVICE.csv, and a plot next to it. Needs only
torch (and triton, on a GPU) and this package, installed with `pip install --no-deps .`; Liger-Kernel is included if it
is installed.
"""

import argparse
import csv
import datetime
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from facts import commit, machine, version_of

from peakd_ds.kernels import distillation_loss

RESULTS = Path(__file__).parent / "results"
TEMPERATURE, ALPHA, BETA = 4.0, 0.7, 100.0
SETTINGS = {"temperature": TEMPERATURE, "alpha": ALPHA, "beta": BETA}
CHECKED_ROWS = 64

Systems = dict[str, Callable[[], torch.Tensor]]


@dataclass
class Case:
    """Inputs of one comparison."""

    name: str
    student_logits: torch.Tensor
    teacher_logits: torch.Tensor
    labels: torch.Tensor
    student_hidden: list[torch.Tensor]
    teacher_hidden: list[torch.Tensor]
    is_launch_bound: bool = False
    """So small that kernel launches dominate the time; on a GPU it is also timed in a CUDA graph."""

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [leaf for leaf in (self.student_logits, *self.student_hidden) if leaf.requires_grad]

    @property
    def bytes_once(self) -> int:
        """Least memory traffic in bytes: each input read once, each gradient written once."""
        inputs = [self.student_logits, self.teacher_logits, *self.student_hidden, *self.teacher_hidden]
        return sum(tensor.nbytes for tensor in inputs) + sum(leaf.nbytes for leaf in self.leaves)


def make_case(
    name: str,
    device: str,
    dtype: torch.dtype,
    logits: tuple[int, int],
    hidden: tuple[int, ...] = (),
    num_pairs: int = 0,
    is_launch_bound: bool = False,
) -> Case:
    torch.manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    return Case(
        name,
        draw(*logits, scale=2).requires_grad_(),
        draw(*logits, scale=2),
        torch.randint(logits[1], (logits[0],), device=device),
        [draw(*hidden).requires_grad_() for _ in range(num_pairs)],
        [draw(*hidden) for _ in range(num_pairs)],
        is_launch_bound,
    )


def case_makers(device: str) -> dict[str, Callable[[], Case]]:
    """Cases by name. Those with hidden states also have the logits of a GLUE task, as in training."""
    makers: dict[str, Callable[[], Case]] = {}
    for dtype, word in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        makers |= {
            f"vocabulary {word}": lambda dtype=dtype, word=word: make_case(
                f"[4096, 30522] {word}", device, dtype, (4096, 30522)
            ),
            f"tokens {word}": lambda dtype=dtype, word=word: make_case(
                f"12 x [32, 128, 768] {word}", device, dtype, (32, 2), (32, 128, 768), 12
            ),
            f"GLUE {word}": lambda dtype=dtype, word=word: make_case(
                f"[32, 2] + 12 x [32, 768] {word}", device, dtype, (32, 2), (32, 768), 12, is_launch_bound=True
            ),
        }
    return makers


# -- Systems -----------------------------------------------------------------------------------------------------------


def eager_loss(case: Case) -> torch.Tensor:
    """The usual code: cross-entropy, kl_div and a loop of normalised squared errors, in fp32 as under autocast."""
    student, teacher = case.student_logits.float(), case.teacher_logits.float()
    soft = F.kl_div((student / TEMPERATURE).log_softmax(1), (teacher / TEMPERATURE).softmax(1), reduction="batchmean")
    total = (1 - ALPHA) * F.cross_entropy(student, case.labels) + ALPHA * TEMPERATURE**2 * soft
    return total + _eager_hidden(case)


def _eager_hidden(case: Case) -> torch.Tensor | float:
    pairs = list(zip(case.student_hidden, case.teacher_hidden, strict=True))
    distances = (F.mse_loss(F.normalize(s.float(), dim=-1), F.normalize(t.float(), dim=-1)) for s, t in pairs)
    return BETA * sum(distances) / max(1, len(pairs))


def fused_loss(case: Case, backend: str = "auto") -> torch.Tensor:
    return distillation_loss(
        case.student_logits,
        case.teacher_logits,
        case.labels,
        case.student_hidden,
        case.teacher_hidden,
        **SETTINGS,
        num_items=len(case.labels),
        num_tokens=case.student_hidden[0].shape[:-1].numel() if case.student_hidden else 0,
        backend=backend,
    ).total


def liger_loss(case: Case) -> torch.Tensor:
    """Liger-Kernel's cross-entropy and KL kernels; it has none for the softmaxes before KL, or for hidden states."""
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

    soft = LigerKLDIVLoss(reduction="batchmean")(
        (case.student_logits / TEMPERATURE).log_softmax(1), (case.teacher_logits / TEMPERATURE).softmax(1)
    )
    # its cross-entropy overwrites the logits with their gradient, and the KL term still needs them
    hard = LigerCrossEntropyLoss()(case.student_logits.clone(), case.labels)
    return (1 - ALPHA) * hard + ALPHA * TEMPERATURE**2 * soft + _eager_hidden(case)


def systems_for(case: Case, tune: bool) -> Systems:
    compiled = torch.compile(eager_loss, dynamic=False)
    systems: Systems = {
        "ours": lambda: fused_loss(case),
        "eager": lambda: eager_loss(case),
        "torch.compile": lambda: compiled(case),
    }
    if case.leaves[0].is_cuda and importlib.util.find_spec("liger_kernel"):
        systems["Liger"] = lambda: liger_loss(case)
    if tune and case.leaves[0].is_cuda and case.student_logits.shape[1] > 256:
        systems |= _other_tiles(case)
    return systems


def _other_tiles(case: Case) -> Systems:
    """Tiles with more lanes per program: fewer rows at a time, which may stay in the L2 cache for both passes."""
    from peakd_ds.kernels import triton_backend

    def with_tile(lanes: int, num_warps: int) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            chosen = triton_backend.stream_tile
            triton_backend.stream_tile = lambda *_: (lanes, 16 // case.student_logits.itemsize, num_warps)
            try:
                return fused_loss(case)
            finally:
                triton_backend.stream_tile = chosen

        return run

    tiles = ((128, 4), (256, 4), (256, 8), (512, 8), (512, 16), (1024, 16), (1024, 32))
    return {f"ours, {lanes} lanes {warps} warps": with_tile(lanes, warps) for lanes, warps in tiles}


# -- Measuring ---------------------------------------------------------------------------------------------------------


def step(case: Case, loss: Callable[[], torch.Tensor]) -> None:
    for leaf in case.leaves:
        leaf.grad = None
    loss().backward()


def check(case: Case, loss: Callable[[], torch.Tensor]) -> float:
    """Relative error of the gradients of the first rows against float64."""
    step(case, loss)
    rows = slice(0, CHECKED_ROWS)
    exact = [
        leaf.detach()[rows].cpu().double().requires_grad_() for leaf in (case.student_logits, *case.student_hidden)
    ]
    states = case.teacher_hidden
    distillation_loss(
        exact[0],
        case.teacher_logits[rows].cpu().double(),
        case.labels[rows].cpu(),
        exact[1:],
        [state[rows].cpu().double() for state in states],
        **SETTINGS,
        num_items=len(case.labels),
        num_tokens=states[0].shape[:-1].numel() if states else 0,
        backend="reference",
    ).total.backward()
    squared_error = squared_norm = 0.0
    for leaf, expected in zip((case.student_logits, *case.student_hidden), exact, strict=True):
        squared_error += (leaf.grad[rows].cpu().double() - expected.grad).square().sum().item()
        squared_norm += expected.grad.square().sum().item()
    return (squared_error / squared_norm) ** 0.5


def times_ms(case: Case, systems: Systems, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of forward and backward by system, one per round; systems take turns."""
    on_gpu = case.leaves[0].is_cuda
    for loss in systems.values():  # compile, allocate, fill caches
        for _ in range(3):
            step(case, loss)
    flushed = torch.empty(2**28 if on_gpu else 0, dtype=torch.uint8, device=case.leaves[0].device)
    taken: dict[str, list[float]] = {name: [] for name in systems}
    steps = 100 if case.is_launch_bound else 1  # on a CPU: a single step of a millisecond is too short to time
    for _ in range(rounds):
        for name, loss in systems.items():
            if on_gpu:
                flushed.zero_()  # the L2 cache
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                start.record()
                step(case, loss)
                end.record()
                torch.cuda.synchronize()
                taken[name].append(start.elapsed_time(end))
            else:
                began = time.perf_counter()
                for _ in range(steps):
                    step(case, loss)
                taken[name].append((time.perf_counter() - began) * 1e3 / steps)
    return taken


def graph_ms(case: Case, loss: Callable[[], torch.Tensor], rounds: int) -> list[float]:
    """Milliseconds of forward and backward in a CUDA graph, so without launches from Python; one per round."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(case, loss)
    torch.cuda.current_stream().wait_stream(side)
    for leaf in case.leaves:
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss().backward()
    taken = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(20):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) / 20)
    return taken


def peak_mib(case: Case, loss: Callable[[], torch.Tensor]) -> float | None:
    """Peak device memory of a step, without its inputs, in MiB; None on a CPU, where torch does not count it."""
    if not case.leaves[0].is_cuda:
        return None
    for leaf in case.leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss().backward()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_bytes_per_s(device: str) -> float:
    """Bytes read plus written per second in the copy of a large tensor, the best of ten."""
    source = torch.empty(2**30 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * source.nbytes / best


# -- Rows and plot -----------------------------------------------------------------------------------------------------


def measure(case: Case, tune: bool, rounds: int, bandwidth: float) -> list[dict[str, str]]:
    """A row of the table for each system."""
    systems = systems_for(case, tune)
    errors = {name: check(case, loss) for name, loss in systems.items()}
    memory = {name: peak_mib(case, loss) for name, loss in systems.items()}
    taken = times_ms(case, systems, rounds)
    if case.is_launch_bound and case.leaves[0].is_cuda:
        taken["ours, CUDA graph"] = graph_ms(case, systems["ours"], rounds)
    ours = statistics.median(taken["ours"])
    floor = case.bytes_once / bandwidth * 1e3
    rows = []
    for name, all_ms in taken.items():
        median, quantiles = statistics.median(all_ms), statistics.quantiles(all_ms, n=5)
        row = {
            "case": case.name,
            "system": name,
            "median_ms": f"{median:.4f}",
            "p20_ms": f"{quantiles[0]:.4f}",
            "p80_ms": f"{quantiles[-1]:.4f}",
            "times_ours": f"{median / ours:.2f}",
            "floor_ms": f"{floor:.4f}",
            "times_floor": f"{median / floor:.2f}",
            "peak_mib": "" if memory.get(name) is None else f"{memory[name]:.1f}",
            "input_gradient_mib": f"{sum(leaf.nbytes for leaf in case.leaves) / 2**20:.1f}",
            "gradient_error": f"{errors[name]:.1e}" if name in errors else "",
        }
        rows.append(row)
        print(
            f"{case.name:34s} {name:24s} {median:9.3f} ms  {row['times_ours']:>7s} x ours  {row['times_floor']:>7s} x "
            f"floor  {row['peak_mib']:>8s} MiB  gradient error {row['gradient_error']}",
            flush=True,
        )
    return rows


def plot(rows: list[dict[str, str]], title: str, file: Path) -> None:
    """Bars of milliseconds, one panel per case; skipped, with a message, if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print(f"{file} is skipped: matplotlib is not installed")
        return

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, panels = plt.subplots(len(cases), 1, figsize=(8, 0.6 + 1.35 * len(cases)), squeeze=False)
    for panel, case in zip(panels[:, 0], cases, strict=True):
        chosen = [row for row in rows if row["case"] == case and "lanes" not in row["system"]][::-1]
        values = [float(row["median_ms"]) for row in chosen]
        colors = ["tab:blue" if row["system"].startswith("ours") else "lightgray" for row in chosen]
        panel.barh([row["system"] for row in chosen], values, color=colors)
        for position, row in enumerate(chosen):
            median = float(row["median_ms"])
            shown = f"{median:,.0f}" if median >= 100 else f"{median:.3g}"
            panel.text(median, position, f" {shown} ms ({row['times_ours']}x)", va="center")
        panel.axvline(float(chosen[0]["floor_ms"]), color="tab:red", linewidth=1)
        panel.set_xlim(0, max(values) * 1.3)
        panel.set_title(case, fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel(
        "milliseconds, forward and backward (red line: least memory traffic at the bandwidth of a copy)"
    )
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--case", action="append", choices=list(case_makers("cpu")), help="may be repeated; default all"
    )
    parser.add_argument("--rounds", type=int, help="runs of each system; default 100 on a GPU, 10 on a CPU")
    parser.add_argument("--tune", action="store_true", help="also time other tiles of the streaming kernel (GPU)")
    parser.add_argument("--output", type=Path, help="CSV file; default benchmarks/results/loss_DEVICE.csv")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here; use --device cpu")
    if arguments.rounds is not None and arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds}: quantiles need at least 2")
    rounds = arguments.rounds or (100 if arguments.device == "cuda" else 10)
    bandwidth = copy_bytes_per_s(arguments.device)
    print(f"{machine(arguments.device)}, copy {bandwidth / 1e9:.0f} GB/s, {rounds} rounds")
    where = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(arguments.device),
        "copy_gb_per_s": f"{bandwidth / 1e9:.0f}",
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "liger": version_of("liger-kernel"),
        "commit": commit(),
    }
    rows = []
    for name, make in case_makers(arguments.device).items():
        if not arguments.case or name in arguments.case:
            rows += measure(make(), arguments.tune, rounds, bandwidth)
    output = arguments.output or RESULTS / f"loss_{arguments.device}.csv"
    with output.open("w", newline="") as file:
        table = csv.DictWriter(file, [*where, *rows[0]])
        table.writeheader()
        table.writerows([where | row for row in rows])
    plot(
        rows, f"Distillation loss on {machine(arguments.device)}, torch {torch.__version__}", output.with_suffix(".png")
    )
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
