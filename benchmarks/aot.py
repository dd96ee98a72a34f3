"""Compile the kernels of the fused loss for GPUs that need not be present, and report the resources they take.

    python benchmarks/aot.py [--targets sm_90 gfx942] [--output benchmarks/results/aot_budget.csv]

Each case runs the launching code on CPU tensors with the launches recorded, not made, so the compiled kernels have the
argument types, constants, alignments and warps that a GPU would get. Triton's wheel contains the assemblers and
disassemblers. TRITON_INTERPRET must not be set: kernels are either compiled or interpreted from their import on.
"""

import argparse
import collections
import csv
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from peakd_ds.kernels import triton_backend, triton_kernels, triton_streaming
from peakd_ds.kernels.fused import LossInputs

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
RESULT = Path(__file__).parent / "results" / "aot_budget.csv"


# -- Cases -------------------------------------------------------------------------------------------------------------


def _case(
    num_classes: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    teacher_dtype: torch.dtype | None = None,
    temperature: float = 10.0,
    alpha: float = 0.7,
    num_pairs: int = 0,
    hidden: tuple[int, ...] = (32, 768),
    normalize: bool = True,
    teacher_padding: int = 0,
    has_labels: bool = True,
    counts: int | None = 32,
    is_weighted: bool = False,
    multi_label: bool = False,
) -> LossInputs:
    """Inputs of 32 rows, of which only dtypes, shapes and strides matter."""
    rows = 32
    teacher = torch.empty(rows, num_classes + teacher_padding, dtype=teacher_dtype or dtype)[:, :num_classes]
    is_token = len(hidden) == 3
    return LossInputs(
        student_logits_NC=torch.empty(rows, num_classes, dtype=dtype),
        teacher_logits_NC=teacher,
        labels_N=torch.zeros(rows, dtype=torch.int64) if has_labels and not multi_label else None,
        student_hidden_BSH=tuple(torch.empty(hidden, dtype=dtype) for _ in range(num_pairs)),
        teacher_hidden_BSH=tuple(torch.empty(hidden, dtype=dtype) for _ in range(num_pairs)),
        temperature=temperature,
        alpha=alpha,
        beta=100.0,
        attention_mask_BS=torch.ones(hidden[:2], dtype=torch.int64) if is_token and num_pairs else None,
        normalize=normalize,
        reduction="batchmean",
        ignore_index=-100,
        num_items=counts,
        num_tokens=counts,
        grad_scale=1.0,
        labels_NC=torch.zeros(rows, num_classes) if has_labels and multi_label else None,
        label_weights_N=torch.ones(rows) if is_weighted else None,
        label_divisor=32.0 if is_weighted else None,
        multi_label=multi_label,
    )


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES: dict[str, functools.partial[LossInputs]] = {
    "C=30522 bf16 T=10": functools.partial(_case, 30522),
    "C=30522 bf16 T=4": functools.partial(_case, 30522, temperature=4.0),
    "C=30522 bf16 T=20": functools.partial(_case, 30522, temperature=20.0),
    "C=30522 bf16 T=3.3": functools.partial(_case, 30522, temperature=3.3),
    "C=30522 bf16 T=50, precise KL": functools.partial(_case, 30522, temperature=50.0),
    "C=30522 fp16 T=10": functools.partial(_case, 30522, FP16),
    "C=30522 fp32 T=10": functools.partial(_case, 30522, FP32),
    "C=30522 fp32 T=3.3": functools.partial(_case, 30522, FP32, temperature=3.3),
    "C=30522 bf16, teacher fp32": functools.partial(_case, 30522, BF16, FP32),
    "C=30522 bf16, no labels": functools.partial(_case, 30522, alpha=1.0, has_labels=False),
    "C=30522 bf16, teacher padded to 30528": functools.partial(_case, 30522, teacher_padding=6),
    "C=1025 bf16": functools.partial(_case, 1025),
    "C=300 bf16": functools.partial(_case, 300),
    "C=2 and 12 x [32, 768] bf16": functools.partial(_case, 2, num_pairs=12),
    "C=2 and 12 x [32, 768] fp32": functools.partial(_case, 2, FP32, num_pairs=12),
    "C=3 and 5 x [32, 128, 768] bf16": functools.partial(_case, 3, num_pairs=5, hidden=(32, 128, 768)),
    "C=2 and 12 x [32, 128, 768] bf16, not normalised": functools.partial(
        _case, num_pairs=12, hidden=(32, 128, 768), normalize=False
    ),
    "C=2 and 24 x [32, 128, 1024] bf16": functools.partial(_case, num_pairs=24, hidden=(32, 128, 1024)),
    "C=2 and 4 x [32, 312] bf16": functools.partial(_case, num_pairs=4, hidden=(32, 312)),
    "C=2 and 2 x [32, 128] bf16": functools.partial(_case, num_pairs=2, hidden=(32, 128)),
    "C=41 bf16": functools.partial(_case, 41),
    "C=256 bf16": functools.partial(_case, 256),
    "C=1 fp32": functools.partial(_case, 1, FP32),
    "C=2 and 12 x [32, 768] bf16, weighted": functools.partial(_case, num_pairs=12, is_weighted=True),
    "C=30522 bf16, weighted": functools.partial(_case, 30522, is_weighted=True),
    "C=3 and 12 x [32, 768] bf16, multi-label, weighted": functools.partial(
        _case, 3, num_pairs=12, is_weighted=True, multi_label=True
    ),
    "C=256 bf16, multi-label": functools.partial(_case, 256, multi_label=True),
    "C=30522 bf16, multi-label": functools.partial(_case, 30522, multi_label=True),
    "C=2, rows and tokens counted": functools.partial(_case, num_pairs=2, hidden=(32, 128, 768), counts=None),
}


# -- From a launch to a compiled kernel --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """A recorded kernel launch."""

    kernel: triton.JITFunction
    arguments: dict[str, Any]
    """By parameter name, constants included."""
    num_warps: int


def launches(inputs: LossInputs, warp_size: int) -> list[Launch]:
    """The launches of a forward and backward pass on a GPU of that warp size, in order."""
    recorded: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: triton.JITFunction) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def record(*values: Any, num_warps: int = 4, **constants: Any) -> None:
                names = self.kernel.arg_names
                recorded.append(Launch(self.kernel, dict(zip(names, values, strict=False)) | constants, num_warps))

            return record

    def recorders(module: ModuleType) -> dict[str, Recorder]:
        return {name: Recorder(kernel) for name, kernel in vars(module).items() if name.endswith("_kernel")}

    with (
        mock.patch.multiple(triton_kernels, **recorders(triton_kernels)),
        mock.patch.multiple(triton_streaming, **recorders(triton_streaming)),
        mock.patch.object(triton_backend, "WARP_SIZE", warp_size),
    ):
        result = triton_backend.compute(inputs, True, True)
        grads = [grad for grad in (result.grad_logits_NC, *result.grad_hidden_KBSH) if grad is not None]
        triton_backend.rescale(grads, result.total, inputs.grad_scale)
    return recorded


_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
}


def compile_for(launch: Launch, target: GPUTarget) -> CompiledKernel:
    """The kernel that Triton's JIT compiles for a launch; it specialises on alignment by 16 and on the number 1."""
    signature: dict[str, str | tuple[str, ...]] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    divisible = [["tt.divisibility", 16]]
    unspecialised = launch.kernel.do_not_specialize or ()
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and name not in unspecialised):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                attributes[(index,)] = divisible
        elif isinstance(value, tuple):
            signature[name] = tuple(f"*{_TYPES[item.dtype]}" for item in value)
            attributes |= {(index, i): divisible for i, item in enumerate(value) if item.data_ptr() % 16 == 0}
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in unspecialised:
                attributes[(index,)] = divisible
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": launch.num_warps, "enable_fp_fusion": True})


# -- From a compiled kernel to its resources ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """An innermost loop of NVIDIA machine code: counts of instructions per iteration."""

    num_instructions: int
    loads: dict[int, int]
    """Global loads by width in bits."""
    stores: dict[int, int]
    num_exponentials: int
    num_barriers: int
    num_shuffles: int


@dataclass(frozen=True)
class Report:
    """Resources of one compiled kernel."""

    registers: int
    stack_bytes: int
    spills: int
    """To memory: load and store instructions (NVIDIA), or registers (AMD)."""
    shared_bytes: int
    num_instructions: int
    loads: dict[int, int]
    """Global loads by width in bits."""
    stores: dict[int, int]
    loops: tuple[Loop, ...] = ()
    """NVIDIA only."""


def report(kernel: CompiledKernel) -> Report:
    """Resources of a kernel, read from its machine code."""
    return _nvidia_report(kernel) if "cubin" in kernel.asm else _amd_report(kernel)


def _tool(name: str, *arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def _nvidia_report(kernel: CompiledKernel) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        assembly = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line):
            instructions.append((code[1], code[2]))
    names = [name for name, _ in instructions]
    return Report(
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        spills=_count(names, "LDL", "STL"),
        shared_bytes=kernel.metadata.shared,
        num_instructions=len(names),
        loads=_widths(names, "LDG"),
        stores=_widths(names, "STG"),
        loops=tuple(_loops(instructions, labels)),
    )


def _loops(instructions: list[tuple[str, str]], labels: dict[str, int]) -> Iterator[Loop]:
    """Loops: a backward branch and the instructions from its target to it; these kernels have no nested loops."""
    for position, (name, rest) in enumerate(instructions):
        target = re.search(r"\.L_x_\d+", rest)
        if not name.startswith("BRA") or target is None:
            continue
        start = labels.get(target[0], position)
        if position - start > 3:  # the last instruction of every kernel branches to itself
            names = [name for name, _ in instructions[start : position + 1]]
            yield Loop(
                num_instructions=len(names),
                loads=_widths(names, "LDG"),
                stores=_widths(names, "STG"),
                num_exponentials=_count(names, "MUFU"),
                num_barriers=_count(names, "BAR"),
                num_shuffles=_count(names, "SHFL"),
            )


def _amd_report(kernel: CompiledKernel) -> Report:
    text = kernel.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s+(\d+)", text)[-1])

    names = re.findall(r"^\s+((?:global|buffer|flat|s|v|ds|scratch)_[a-z0-9_]+)", text, re.M)
    return Report(
        registers=number("vgpr_count"),
        stack_bytes=number("private_segment_fixed_size"),
        spills=number("vgpr_spill_count"),  # scalar registers spill to vector registers, not to memory
        shared_bytes=kernel.metadata.shared,
        num_instructions=len(names),
        loads=_widths(names, "global_load", "buffer_load"),
        stores=_widths(names, "global_store", "buffer_store"),
    )


def _count(names: list[str], *prefixes: str) -> int:
    return sum(name.startswith(prefixes) for name in names)


def _widths(names: list[str], *prefixes: str) -> dict[int, int]:
    """Memory instructions counted by bits per thread, read from names like LDG.E.128 or global_load_dwordx4."""
    bits = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    bits |= {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "ushort": 16, "short": 16, "ubyte": 8, "byte": 8, "b8": 8}
    counts: collections.Counter[int] = collections.Counter()
    for name in names:
        if name.startswith(prefixes):
            counts[next((bits[part] for part in re.split(r"[._]", name) if part in bits), 32)] += 1
    return dict(sorted(counts.items(), reverse=True))


# -- The table ---------------------------------------------------------------------------------------------------------


def rows(case: str, target: str, skip_common: bool) -> Iterator[tuple[str, Launch, Report]]:
    """(kernel name, launch, report) of each launch of a case; skip_common leaves out kernels that all cases share."""
    for launch in launches(CASES[case](), TARGETS[target].warp_size):
        name = launch.kernel.__name__
        if not (skip_common and name in ("finish_kernel", "rescale_kernel")):
            yield name, launch, report(compile_for(launch, TARGETS[target]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with arguments.output.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(
            "triton kernel case target warps registers stack spills shared_bytes instructions loads stores".split()
            + ["loops (instructions per element / exponentials / barriers / shuffles)"]
        )
        for target in arguments.targets:
            for case in CASES:
                for name, launch, made in rows(case, target, skip_common=case != next(iter(CASES))):
                    per_iteration = launch.arguments.get("LANES", 0) * launch.arguments.get("WIDTH", 0)
                    per_thread = per_iteration / (TARGETS[target].warp_size * launch.num_warps) or 1
                    loops = [
                        f"{loop.num_instructions / per_thread:.1f}/{loop.num_exponentials / per_thread:.2f}"
                        f"/{loop.num_barriers}/{loop.num_shuffles}"
                        for loop in made.loops
                    ]
                    row = [triton.__version__, name, case, target, launch.num_warps, made.registers, made.stack_bytes]
                    row += [made.spills, made.shared_bytes, made.num_instructions, made.loads, made.stores]
                    table.writerow([*row, "; ".join(loops)])
                    print(*row[1:], *loops, sep="  ")


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") in ("1", "true"):
        raise SystemExit("aot.py: error: TRITON_INTERPRET is set, so nothing can be compiled; unset it")
    main()
