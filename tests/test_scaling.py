"""The bytes of a step: the formula of docs/scaling.md against the counts of DeepSpeed's comms logger."""

import json
from dataclasses import replace
from pathlib import Path

import measure_traffic
import pytest
from measure_traffic import Machine, Measured

from peakd_ds.command_line import parse
from peakd_ds.errors import UserError
from peakd_ds.programs.traffic import Sizes, Traffic, step_traffic

DOCS = Path(__file__).parent.parent / "docs"
PADDING = 64
"""A count may exceed the formula by this many bytes: padding to the number of ranks, norms and flags."""


def measure(argv: list[str]) -> Measured:
    """Runs on every rank."""
    return measure_traffic.measure(parse(argv))


@pytest.fixture
def argv(tiny_data: Path, tiny_teacher, tmp_path: Path) -> list[str]:
    words = "--task rte --num_hidden_layers 2 --dropout 0 --no_ptp --stages distill --layer_map 1:1,2:2"
    paths = ["--teacher", str(tiny_teacher("rte")), "--data_dir", str(tiny_data), "--run_dir", str(tmp_path / "run")]
    return [*words.split(), "--global_batch_size", "16", *paths]


def stage_3(folder: Path) -> str:
    """A config that shards most tensors of this test; smaller ones stay unsharded."""
    file = folder / "zero3.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 1000}
    file.write_text(json.dumps({"zero_optimization": zero}))
    return str(file)


@pytest.mark.parametrize(("world_size", "num_accum_steps"), [(1, 1), (2, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize(("student", "teacher"), [(0, 0), (1, 0), (2, 0), (3, 0), (1, 3), (3, 3)])
def test_the_formula_equals_the_counts(
    pools, argv: list[str], tmp_path: Path, world_size: int, student: int, teacher: int, num_accum_steps: int
) -> None:
    configs = ["--student_ds_config", f"zero{student}_fp32" if student < 3 else stage_3(tmp_path)]
    configs += ["--teacher_ds_config", "teacher_zero0" if teacher == 0 else stage_3(tmp_path)]
    batch = ["--micro_batch_size", str(16 // world_size // num_accum_steps)]
    for measured in pools(world_size).run(measure, [*argv, *configs, *batch, "--dtype", "fp32"]):
        sizes = measured.sizes
        assert (sizes.num_ranks, sizes.num_accum_steps, sizes.bytes_per_number) == (world_size, num_accum_steps, 4)
        assert (sizes.student_stage, sizes.teacher_stage) == (student, teacher)
        assert_agrees(measured)


@pytest.mark.parametrize("student", [0, 1, 2, 3])
def test_bf16_sends_half(two_ranks, argv: list[str], student: int) -> None:
    words = ["--student_ds_config", f"zero{student}_bf16", "--dtype", "bf16"]
    measured = two_ranks.run(measure, [*argv, *words])[0]
    assert measured.sizes.bytes_per_number == 2
    assert_agrees(measured)


def assert_agrees(measured: Measured) -> None:
    expected = step_traffic(measured.sizes)
    for name in ("all_reduce", "reduce_scatter", "all_gather"):
        counted = getattr(measured.traffic, name)
        assert 0 <= counted - getattr(expected, name) <= PADDING, (name, measured)
    if (measured.sizes.num_ranks, measured.sizes.student_stage) == (1, 0):
        assert expected.all_reduce == 0, "one rank has no other to reduce with"
    else:
        assert max(expected.all_reduce, expected.reduce_scatter) > 100 * PADDING, "padding is small in comparison"


# -- docs/scaling.md ---------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded() -> list[Measured]:
    return [Measured.from_json(line) for line in (DOCS / "scaling.jsonl").read_text().splitlines()]


def test_the_page_s_counts_agree_with_the_step_traffic(recorded: list[Measured]) -> None:
    stages = {(s.num_ranks, s.student_stage, s.teacher_stage) for s in (one.sizes for one in recorded)}
    expected = {(n, student, 0) for n in (1, 2, 4) for student in range(4)} | {
        (n, s, 3) for n in (1, 2, 4) for s in (1, 3)
    }
    assert stages == expected
    for measured in recorded:
        assert_agrees(measured)


def test_the_page_shows_the_tables_that_the_program_prints() -> None:
    text = (DOCS / "scaling.md").read_text()
    for table in measure_traffic.tables([str(DOCS / "scaling.jsonl")]).split("\n\n"):
        assert table in text


# -- Arithmetic --------------------------------------------------------------------------------------------------------

SIZES = Sizes(
    num_ranks=4,
    num_accum_steps=1,
    student_stage=0,
    teacher_stage=0,
    student_params=1000,
    student_small_params=200,
    teacher_sharded_params=500,
    bytes_per_number=2,
)


def test_bytes_sent_in_a_ring() -> None:
    assert Traffic(all_reduce=100, reduce_scatter=0, all_gather=0).sent(4) == 150
    assert Traffic(all_reduce=0, reduce_scatter=100, all_gather=0).sent(4) == 75
    assert Traffic(all_reduce=0, reduce_scatter=0, all_gather=25).sent(4) == 75
    assert Traffic(100, 100, 100).sent(1) == 0


def test_accumulation_costs_nothing_below_stage_2() -> None:
    def sent(stage: int, accum: int) -> float:
        return step_traffic(replace(SIZES, student_stage=stage, num_accum_steps=accum)).sent(SIZES.num_ranks)

    assert sent(0, 1) == sent(0, 4) == 2 * 0.75 * 2000
    assert sent(1, 1) == sent(1, 4) == sent(2, 1) == sent(0, 1) + 0.75 * 2000
    assert sent(2, 4) == 4 * sent(0, 1) + 0.75 * 2000
    assert sent(3, 1) == 2 * 0.75 * 2000
    assert sent(3, 4) == 0.75 * (4 * 2000 + 2 * (4 * 800 + 200))


def test_projection() -> None:
    machine = Machine(gpus_per_node=8, gpu_flops_per_s=1e6, node_bytes_per_s=1e3, seconds_per_call=0.01)
    one_node = measure_traffic.project(replace(SIZES, num_ranks=8), 1e6, 3, machine)
    assert (one_node.compute_s, one_node.comm_s, one_node.efficiency) == (1, 0, 1)
    four_nodes = measure_traffic.project(replace(SIZES, num_ranks=32), 1e6, 3, machine)
    assert four_nodes.comm_s == pytest.approx(2 * 31 / 32 * 2000 / 1e3 + 3 * 0.01 * 2)
    two_nodes = measure_traffic.project(replace(SIZES, num_ranks=8), 1e6, 3, replace(machine, gpus_per_node=6))
    assert two_nodes.comm_s == pytest.approx(2 * 7 / 8 * 2000 / 1e3 + 3 * 0.01)
    assert four_nodes.efficiency == pytest.approx(1 / (1 + four_nodes.comm_s))


def test_flops() -> None:
    assert measure_traffic.layer_params(768, 12) == 84_934_656  # BERT-base's layers without biases and LayerNorms
    assert measure_traffic.flops_per_rank(10, 5, 100) == 100 * (20 + 30)


def test_wrong_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give measure and train.py's options"):
        measure_traffic.main([])
    (tmp_path / "file").write_text("{}\n")
    with pytest.raises(UserError, match=r"holds no lines of `measure`"):
        measure_traffic.main(["tables", str(tmp_path / "file")])
