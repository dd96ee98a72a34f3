"""peakd-plan: its numbers against the memory and traffic of DeepSpeed's engines, and its errors for wrong input.

Ranks over gloo run the distill stage itself, with a teacher and a student of hidden size 256; memory is counted from
the storages of live tensors.
"""

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import measure_traffic
import numpy as np
import pytest
import torch
from conftest import new_pools, save_encoder
from deepspeed import DeepSpeedEngine
from torch import nn
from torch._subclasses import FakeTensor
from transformers import AutoConfig, BertConfig, BertForSequenceClassification

from peakd_ds import stages
from peakd_ds.cluster import run_lock
from peakd_ds.command_line import parse
from peakd_ds.config import RunConfig
from peakd_ds.data.batches import global_batches
from peakd_ds.data.division import epoch_slots
from peakd_ds.data.tasks import get_task
from peakd_ds.engine import engines
from peakd_ds.engine.ds_config import DTYPES, load_ds_config
from peakd_ds.engine.state import MOMENTS, _master_tensors
from peakd_ds.families import family_of
from peakd_ds.model.build import task_head
from peakd_ds.packed.packing import pack
from peakd_ds.programs import planner, scripts
from peakd_ds.programs.planner import Batch, Engine
from peakd_ds.programs.traffic import Sizes
from peakd_ds.ranks import dist
from peakd_ds.results.log import RunLog
from peakd_ds.run import open_run

WITHIN = 0.01
SLACK = 24_000
"""Bytes of what is not planned (inputs, norms, flags, AdamW's step counts), in engines that hold megabytes."""
EXACT = ("weights", "gradients", "masters", "moments")
BUCKET = 3_000_017
"""reduce_bucket_size: no tensor has this size; between the student's largest parameter and all of them."""
ACCUM = 2
ENCODER = dict(num_hidden_layers=4, hidden_size=256, num_attention_heads=4, intermediate_size=1024, vocab_size=8000)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("planner") / "teacher", task_head(get_task("rte")), **ENCODER)


@pytest.fixture(scope="module")
def own_pools() -> Iterator[Callable[[int], Any]]:
    """Ranks that hold no tensors of other tests."""
    with new_pools() as pool_of:
        yield pool_of


# -- Memory of engines -------------------------------------------------------------------------------------------------


def live_storages() -> list[torch.UntypedStorage]:
    """Storages of all live tensors; gradients are found through their parameters."""
    found = []
    for thing in gc.get_objects():
        if isinstance(thing, FakeTensor) or not isinstance(thing, torch.Tensor):  # fake ones have no storage
            continue
        if thing.layout == torch.strided and thing.device.type == "cpu":
            found += [t.untyped_storage() for t in (thing, thing.grad if thing.is_leaf else None) if t is not None]
    return found


def storages() -> dict[int, int]:
    """Bytes of every live tensor's storage, by address."""
    return {storage.data_ptr(): storage.nbytes() for storage in live_storages()}


def bytes_of(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of the tensors' storages, by address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


def measure(argv: list[str]) -> tuple[dict[str, int], dict[str, int], Sizes]:
    """Runs on every rank: bytes that student and teacher hold in the third step, by the fields of planner.Memory."""
    run = open_run(parse(argv))
    with run_lock.owned(run.folder):
        stage = stages.build_stage("distill", run, RunLog(run.folder))
        teacher = run.teacher.engine()
        gathered = watch_gathering(teacher)
        module = stages.build_module(stage, run)
        gc.collect()
        kept = live_storages()  # keeps their addresses taken
        before = {storage.data_ptr(): storage.nbytes() for storage in kept}
        engine = engines.training_engine(module, run.config, run.student_ds_config, 3, "distill")
        held, slots = {}, epoch_slots(len(run.train_rows), run.config.global_batch_size, 0, 0)[:3]
        batches = global_batches(run.train, run.train_rows, slots, ACCUM)
        for number, batch in enumerate(stage.with_teacher_outputs(batches)):
            for micro in batch.micro_batches:
                loss, _ = stage.loss(engine, micro, batch, False)
                backward = loss.total * engines.undo_averaging(engine)
                del loss
                if number == 2:  # by now stage 3 gathers in its final order
                    held = held_in_backward(engine, backward, before | bytes_of(teacher.parameters()))
                else:
                    engine.backward(backward)
                engine.step()
        sizes, parameters = measure_traffic.sizes_of(run, engine), list(teacher.parameters())
        shards = bytes_of(p.ds_tensor for p in parameters) if gathered else {}
        host = shards if "offload" in run.config.teacher_ds_config else {}
        weights = bytes_of(parameters) | ({} if host else shards)
        engine.destroy()
        run.teacher.stop()
    teacher_held = {name: sum(sizes.values()) for name, sizes in (("weights", weights), ("host", host))}
    return held, teacher_held | {"buffers": max(gathered, default=0)}, sizes


def gradient_tensors(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """What holds this rank's gradients: those of parameters, and the flat tensors of DeepSpeed's optimizers."""
    found = [grad for p in engine.module.parameters() for grad in (p.grad, getattr(p, "grad_accum", None))]
    found += [
        tensor for group in getattr(engine.optimizer, "averaged_gradients", {}).values() for tensor in group or ()
    ]
    found += getattr(engine.optimizer, "fp32_groups_gradients_flat", ())
    found.append(getattr(engine.optimizer, "grad_partitions_flat_buffer", None))
    return [tensor for tensor in found if tensor is not None]


def held_in_backward(engine: DeepSpeedEngine, loss: torch.Tensor, others: dict[int, int]) -> dict[str, int]:
    """Bytes held at the end of the backward pass (at stage 1, when it starts to reduce), without the `others`.

    "rest" is what none of the fields of planner.Memory has.
    """
    parameters, stage = list(engine.module.parameters()), engine.zero_optimization_stage()
    bucket_bytes = BUCKET * (2 if engine.bfloat16_enabled() else 4)
    gathered = bytes_of(p.data for p in parameters if stage == 3 and not p.ds_persist)
    found: list[dict[int, int]] = []
    found_gradients: list[dict[int, int]] = []

    def count_before(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found.append(storages())
        found_gradients.append(bytes_of(gradient_tensors(engine)))
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("reduce_gradients", "average_tensor"):
            if stage in (1, 2) and hasattr(engine.optimizer, name):
                patch.setattr(engine.optimizer, name, partial(count_before, getattr(engine.optimizer, name)))
        engine.backward(loss)
    time.sleep(1)  # a thread of gloo may hold the tensors of the last collective a moment longer
    gc.collect()
    found.append(storages())
    found_gradients.append(bytes_of(gradient_tensors(engine)))
    held, gradients = (every[0 if stage == 1 else -1] for every in (found, found_gradients))
    weights = bytes_of([*parameters, *(p.ds_tensor for p in parameters if stage == 3)])
    masters = bytes_of(_master_tensors(engine))
    moments = bytes_of(s[key] for s in engine.basic_optimizer.state.values() for key in MOMENTS)
    weights = {
        key: size for key, size in weights.items() if key not in gathered or stage != 3 or dist.world_size() == 1
    }
    known = masters.items() | moments.items() | weights.items() | gathered.items() | others.items()  # addresses repeat
    return {
        "weights": sum(weights.values()),
        "masters": sum(size for key, size in masters.items() if key not in weights),
        "moments": sum(moments.values()),
        "gradients": sum(gradients.values()),
        "rest": sum(size for key, size in held.items() - known - gradients.items() if size != bucket_bytes),
        "buffers": max(list(live.values()).count(bucket_bytes) for live in found) * bucket_bytes
        + sum(size for key, size in gathered.items() if key not in weights),
    }


def watch_gathering(engine: DeepSpeedEngine) -> list[int]:
    """A list that gets the bytes gathered at stage 3 whenever a layer starts; at other stages it stays empty."""
    gathered: list[int] = []
    if engine.zero_optimization_stage() == 3:
        parameters = list(engine.module.parameters())
        shards = bytes_of(p.ds_tensor for p in parameters)

        def count(module: nn.Module, args: Any) -> None:
            flat = [part for handle in gathers_in_flight(engine) for part in handle.partitions]
            now = bytes_of([*(p.data for p in parameters if not p.ds_persist), *flat])
            gathered.append(sum(size for key, size in now.items() if key not in shards))

        model = engine.module.model
        for layer in model.base_model.get_submodule(family_of(model.config).layers).children():
            layer.register_forward_pre_hook(count)
    return gathered


def gathers_in_flight(engine: DeepSpeedEngine) -> list[Any]:
    """Handles of gathers of several parameters, of which at least one is not used yet."""
    coordinator = engine.optimizer.get_param_coordinator()
    found = coordinator._PartitionedParameterCoordinator__inflight_param_registry.values()
    single = [one for handle in found for one in getattr(handle, "handles", [handle])]
    return [handle for handle in single if hasattr(handle, "partitions")]


def check_memory(
    pool: Any, argv: list[str], stage: int, dtype: str, run_dir: Path, slack: int = SLACK, **options: Any
) -> tuple[dict[str, int], dict[str, int]]:
    """Run three steps of a distill stage on every rank and compare what they hold with the plan.

    Args:
        argv: Settings of the run, without the student's ds_config and the run folder.
        slack: Most bytes of what is not planned.
        options: Of the pool's `run`.

    Returns:
        The teacher's bytes, measured and planned.
    """
    student_config = run_dir.with_suffix(".json")
    ds_config = load_ds_config(f"zero{stage}_{dtype}", "student_ds_config")
    ds_config["zero_optimization"]["reduce_bucket_size"] = BUCKET
    student_config.write_text(json.dumps(ds_config))
    argv = [*argv, "--run_dir", str(run_dir), "--dtype", dtype, "--student_ds_config", str(student_config)]
    measured = pool.run(measure, argv, **options)

    config = parse(argv)
    encoder, student_init = (AutoConfig.from_pretrained(path or config.teacher) for path in (None, config.student_init))
    frozen, matched = planner.build_on_meta(config, encoder, student_init)
    student = Engine.of(matched, str(student_config), "student_ds_config", dtype, pool.world_size)
    frozen_engine = Engine.of(frozen, config.teacher_ds_config, "teacher_ds_config", dtype, pool.world_size)
    planned, teacher_planned = vars(planner.student_memory(student)), vars(planner.teacher_memory(frozen_engine))
    held, teacher_held = ({name: max(rank[i][name] for rank in measured) for name in measured[0][i]} for i in (0, 1))
    print(f"\n{pool.world_size} ranks, zero{stage}_{dtype}, {config.teacher_ds_config}")
    print(f" planned {planned} {teacher_planned}\n held    {held} {teacher_held}")
    for name in EXACT:
        assert planned[name] == held[name], name
    assert planned["buffers"] == pytest.approx(held["buffers"], rel=WITHIN, abs=SLACK)
    assert held["rest"] <= slack
    for name in ("weights", "host"):
        assert teacher_planned[name] == teacher_held[name], f"teacher {name}"
    assert teacher_held["buffers"] <= teacher_planned["buffers"]
    sizes = planner.traffic_sizes(student, frozen_engine, ACCUM)
    assert sizes == measured[0][2], "test_scaling.py compares the bytes for these sizes with DeepSpeed's comms logger"
    return teacher_held, teacher_planned


CASES = [  # one rank gathers nothing; offloaded weights are copied only to a GPU
    *((2, stage, dtype, "teacher_zero0") for stage in (0, 1) for dtype in ("fp32", "bf16")),
    *((2, stage, dtype, "teacher_zero3") for stage in (2, 3) for dtype in ("fp32", "bf16")),
    (2, 1, "bf16", "teacher_zero3_offload"),
    *((1, stage, dtype, "teacher_zero3") for stage, dtype in ((1, "fp32"), (2, "fp32"), (2, "bf16"), (3, "bf16"))),
]


@pytest.mark.parametrize(("world_size", "stage", "dtype", "teacher_name"), CASES)
def test_memory(
    own_pools,
    tiny_data: Path,
    tmp_path: Path,
    teacher: Path,
    world_size: int,
    stage: int,
    dtype: str,
    teacher_name: str,
) -> None:
    words = "--task rte --num_hidden_layers 2 --no_ptp --stages distill --layer_map 1:1,2:2 --micro_batch_size 4"
    words += f" --global_batch_size {4 * ACCUM * world_size} --teacher_ds_config {teacher_name}"
    paths = ["--teacher", str(teacher), "--data_dir", str(tiny_data)]
    teacher_held, teacher_planned = check_memory(
        own_pools(world_size), [*words.split(), *paths], stage, dtype, tmp_path / "run"
    )
    assert teacher_planned["buffers"] <= 2 * teacher_held["buffers"] + SLACK


# -- Activations -------------------------------------------------------------------------------------------------------


def settings(**others: Any) -> RunConfig:
    return RunConfig(**(dict(task="rte", teacher="t", run_dir="r", num_hidden_layers=3) | others))


def kept_for_backward(module: nn.Module, lengths: Sequence[int]) -> int:
    """Bytes that a forward pass over packed rows of these lengths keeps for its backward pass, beyond the weights."""
    rows = [np.arange(5, 5 + length) for length in lengths]
    weights, kept = bytes_of(module.parameters()), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(**pack(rows, [row * 0 for row in rows]))
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("hidden_loss", "sharing"), [("cls", "sps"), ("cls", "none"), ("tokens", "sps")])
def test_activations_are_bounded(single_rank: None, dtype: str, hidden_loss: str, sharing: str) -> None:
    encoder = BertConfig(**ENCODER)
    config = settings(hidden_loss=hidden_loss, sharing=sharing)
    _, matched = planner.build_on_meta(config, encoder, encoder)
    module = matched.to_empty(device="cpu").to(DTYPES[dtype]).train()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    measured = kept_for_backward(module, (64, 40, 50, 60))
    batch = Batch(4, 214, 64, DTYPES[dtype].itemsize, on_gpu=False)
    bound = planner.student_activations(module, 256, batch)
    print(f"{dtype} {hidden_loss} {sharing}: at most {bound:,}, kept {measured:,}, {bound / measured:.2f}")
    assert measured <= bound <= 1.1 * measured


def test_sharing_adds_activations_and_no_weights() -> None:
    encoder = BertConfig(**ENCODER)
    stored, shared = (planner.build_on_meta(settings(sharing=s), encoder, encoder)[1] for s in ("none", "sps"))
    stored_engine, shared_engine = (Engine.of(model, "zero1_bf16", "", "bf16", 2) for model in (stored, shared))
    assert stored_engine == shared_engine
    assert shared.student.config.num_effective_layers == 2 * stored.student.config.num_effective_layers


# -- The command -------------------------------------------------------------------------------------------------------

SHAPES = ["--teacher_layers", "4", "--teacher_hidden", "128", "--task", "rte"]


def test_json_and_table_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    planner.main(scripts.plan_options([*SHAPES, "--world_size", "2", "--json"]))
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["choices"]) == 2 * 4 * 3
    best = plan["choices"][plan["recommended"]["index"]]
    planner.main(scripts.plan_options([*SHAPES, "--world_size", "2"]))
    printed = capsys.readouterr().out
    words = f"--student_ds_config {best['student']} --teacher_ds_config {best['teacher']}"
    assert f"Take: {words}" in printed
    assert best["total"] <= 80 * 2**30


def test_stdout_holds_only_json(env: dict[str, str]) -> None:
    words = [str(Path(sys.executable).with_name("peakd-plan")), *SHAPES, "--json"]
    env = {name: value for name, value in env.items() if name != "DS_ACCELERATOR"}
    assert json.loads(subprocess.run(words, env=env, capture_output=True, check=True).stdout)["choices"]


def test_small_gpus_get_no_recommendation(capsys: pytest.CaptureFixture[str]) -> None:
    planner.main(scripts.plan_options([*SHAPES, "--gpu_memory_gib", "0.1"]))
    assert "Take: none\nWhy: nothing fits in 92.2 MiB" in capsys.readouterr().out


def test_a_folder_without_weights_can_be_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = BertConfig(**ENCODER)
    encoder.save_pretrained(tmp_path)
    planner.main(scripts.plan_options(["--teacher", str(tmp_path), "--task", "rte", "--json"]))
    counted = json.loads(capsys.readouterr().out)["teacher_parameters"]
    assert counted == sum(p.numel() for p in BertForSequenceClassification(encoder).parameters())


def test_embeddings_and_layers_are_counted_apart(capsys: pytest.CaptureFixture[str]) -> None:
    planner.main(scripts.plan_options(["--teacher_layers", "4", "--teacher_hidden", "128", "--json"]))
    plan = json.loads(capsys.readouterr().out)
    layer = 4 * (128 * 128 + 128) + 2 * 128 * 512 + 512 + 128 + 4 * 128
    for name, num_layers in (("teacher", 4), ("student", 3)):
        parts = plan[f"{name}_parameters_of"]
        assert (parts["embeddings"], parts["layers"]) == (30522 * 128, num_layers * layer)
        assert sum(parts.values()) == plan[f"{name}_parameters"]
    planner.main(scripts.plan_options(["--teacher_layers", "4", "--teacher_hidden", "128"]))
    assert f"teacher: {plan['teacher_parameters']:,} parameters (3.9 M embeddings, 0.8 M layers, " in (
        capsys.readouterr().out
    )


def test_own_rows_are_planned_by_their_number_of_labels(capsys: pytest.CaptureFixture[str]) -> None:
    def plan(*words: str) -> dict[str, Any]:
        planner.main(scripts.plan_options([*SHAPES[:4], *words, "--json"]))
        return json.loads(capsys.readouterr().out)

    assert plan("--num_labels", "3") == plan("--task", "mnli") == plan()
    assert plan("--num_labels", "1") == plan("--task", "stsb")
    more = plan("--num_labels", "1003")["teacher_parameters"] - plan()["teacher_parameters"]
    assert more == 1000 * (128 + 1)  # weights and a bias of each label


def test_shorter_rows_take_less_memory(capsys: pytest.CaptureFixture[str]) -> None:
    def activations(*words: str) -> int:
        planner.main(scripts.plan_options([*SHAPES, *words, "--json"]))
        return json.loads(capsys.readouterr().out)["choices"][0]["student_memory"]["activations"]

    assert activations("--tokens_per_row", "40") < activations() == activations("--tokens_per_row", "128")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SHAPES, "--world_size", "0"], "--world_size 0 is outside"),
        ([*SHAPES, "--world_size", "3"], "--global_batch_size 32 is not a multiple of the 3 ranks"),
        ([*SHAPES, "--gpu_memory_gib", "-1"], "--gpu_memory_gib -1.0 is outside"),
        ([*SHAPES, "--gpu_memory_gib", "nan"], "--gpu_memory_gib: 'nan' is not a finite number"),
        ([*SHAPES, "--micro_batch_size", "0"], "--micro_batch_size 0 is outside"),
        ([*SHAPES, "--max_seq_length", "1000"], "longer than the 512 positions"),
        ([*SHAPES, "--tokens_per_row", "200"], "--tokens_per_row 200.0 is outside"),
        ([*SHAPES, "--layer_map", "9:1"], "out of range"),
        (["--teacher_layers", "4"], "the teacher is not clear"),
        (["--teacher_layers", "0", "--teacher_hidden", "128"], "--teacher_layers 0 is outside"),
        (["--teacher_layers", "4", "--teacher_hidden", "100"], "not a multiple of 64"),
        (["--teacher", "no/such/folder"], "neither a folder with config.json"),
        ([*SHAPES, "--task", "nope"], "--task: unknown task 'nope'"),
        ([*SHAPES, "--num_labels", "3"], "--task rte has a number of labels, but --num_labels 3 is given too; leave"),
        ([*SHAPES[:4], "--num_labels", "0"], "--num_labels 0 is outside its range [1, 10000]"),
        ([*SHAPES, "--nonsense"], "unknown option --nonsense"),
        ([*SHAPES, "--world_size", "many"], "'many' is not a whole number"),
    ],
)
def test_wrong_input_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr("sys.argv", ["peakd-plan", *words])
    with pytest.raises(SystemExit) as stopped:
        scripts.plan()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert error.count("\n") == 1 and error.startswith("peakd-plan: error: ")
