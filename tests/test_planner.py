"""peakd-plan: its figures against what DeepSpeed's engines hold and send, and what it says to wrong input.

Engines of a 4 x 256 student and teacher run on gloo ranks; live tensors are counted by storage, each once.
"""

import gc
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

from peakd_ds import dist, ds_engine, engine_state, planner
from peakd_ds.config import RunConfig

WITHIN = 0.1
BATCH, TOKENS = 4, 48
ENCODER = dict(
    num_hidden_layers=4,
    hidden_size=256,
    num_attention_heads=4,
    intermediate_size=1024,
    vocab_size=8000,
    max_position_embeddings=128,
)


def settings(world_size: int, accum: int = 1, **others: Any) -> RunConfig:
    values = dict(task="rte", teacher="t", run_dir="r", num_hidden_layers=2, micro_batch_size=BATCH)
    return RunConfig(**(values | dict(global_batch_size=BATCH * world_size * accum) | others))


def models(config: RunConfig) -> tuple[Any, Any]:
    """(teacher, matched student), with weights, from the planner's own builder."""
    frozen, matched = planner.build_on_meta(config, BertConfig(**ENCODER), BertConfig(**ENCODER), "fp32")
    for model in (frozen, matched):
        model.to_empty(device="cpu")
        for name, buffer in model.named_buffers():
            buffer.copy_(torch.arange(buffer.numel()).view_as(buffer) if name.endswith("position_ids") else buffer * 0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return frozen, matched


def inputs() -> dict[str, torch.Tensor]:
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[0, TOKENS // 2 :] = 0
    return dict(input_ids=torch.randint(5, 8000, (BATCH, TOKENS)), attention_mask=mask, token_type_ids=mask * 0)


class Wire:
    """Counts the whole tensor of each collective, in bytes; DeepSpeed keeps two of torch's functions by reference."""

    def __init__(self, on_large: Any = None):
        self.sizes: Counter[str] = Counter()
        self.on_large = on_large

    def __enter__(self) -> "Wire":
        import deepspeed.comm.comm

        backend = deepspeed.comm.comm.cdb
        self.patched = [(torch.distributed, "all_reduce", "all_reduce")]
        self.patched += [
            (backend, "all_gather_function", "all_gather"),
            (backend, "reduce_scatter_function", "reduce_scatter"),
        ]
        self.originals = [getattr(owner, name) for owner, name, _ in self.patched]
        argument = {"all_reduce": "tensor", "all_gather": "output_tensor", "reduce_scatter": "input_tensor"}
        position = {"all_reduce": 0, "all_gather": 0, "reduce_scatter": 1}
        for (owner, name, kind), original in zip(self.patched, self.originals, strict=True):

            def counted(*args: Any, _kind: str = kind, _original: Any = original, **kwargs: Any) -> Any:
                tensor = args[position[_kind]] if len(args) > position[_kind] else kwargs.get(argument[_kind])
                if tensor is None:
                    tensor = kwargs["input"]
                self.sizes[_kind] += tensor.nbytes
                if self.on_large is not None and tensor.nbytes > 1e5:
                    self.on_large()
                return _original(*args, **kwargs)

            setattr(owner, name, counted)
        return self

    def __exit__(self, *_: Any) -> None:
        for (owner, name, _), original in zip(self.patched, self.originals, strict=True):
            setattr(owner, name, original)


def storages() -> dict[int, int]:
    """Bytes of every live tensor's storage, by its address; gradients are reached through their parameters."""
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.layout == torch.strided and thing.device.type == "cpu":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


def bytes_of(tensors: Any) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


def measure_student(stage: int, dtype: str, accum: int) -> tuple[dict[str, int], dict[str, int]]:
    """Runs on every rank: what the engine holds in its second step, and what it sends."""
    config = settings(dist.world_size(), accum)
    torch.manual_seed(0)
    _, module = models(config)
    gc.collect()
    before = storages()
    ds_config = ds_engine.load_ds_config(f"zero{stage}_{dtype}", "student_ds_config")
    engine = ds_engine.training_engine(module, config, ds_config, 10, "distill")
    engine.train()
    data, buckets, gathered, at_backward, full = inputs(), [0], 0, {}, {}
    parameters = list(engine.module.parameters())

    def look_for_buckets() -> None:
        buckets.append(sum(size for size in storages().values() if size >= 10**9))

    if stage == 1 and dtype == "fp32":
        reduce_gradients = engine.optimizer.reduce_gradients

        def look_and_reduce(*args: Any, **kwargs: Any) -> None:
            at_backward.clear()
            at_backward.update(storages())
            reduce_gradients(*args, **kwargs)

        engine.optimizer.reduce_gradients = look_and_reduce

    for step in range(2):
        wire = Wire(look_for_buckets)
        with wire:
            for micro in range(accum):
                logits, hidden = engine(**data)
                loss = logits.float().mean() + sum(states.float().mean() for states in hidden)
                if stage == 3 and step == 1:
                    gathered = sum(p.data.nbytes for p in parameters if not p.ds_persist)
                engine.backward(loss)
                del logits, hidden, loss
                if micro == accum - 1 and not (stage == 1 and dtype == "fp32"):
                    gc.collect()
                    at_backward = storages()
                    full = bytes_of(p.data for p in parameters) if stage == 3 else {}
                engine.step()
    state = engine.basic_optimizer.state
    masters = bytes_of(engine_state._master_tensors(engine))
    moments = bytes_of(s[key] for s in state.values() for key in engine_state.MOMENTS)
    weights = bytes_of(parameters)
    if stage == 3:
        weights = bytes_of([p.ds_tensor for p in parameters] + [p.data for p in parameters if p.ds_persist])
    known = masters.keys() | moments.keys() | weights.keys() | before.keys()
    rest = {k: size for k, size in at_backward.items() if k not in known and k not in full and size < 10**9}
    held = {
        "weights": sum(weights.values()),
        "masters": sum(size for key, size in masters.items() if key not in weights),
        "moments": sum(moments.values()),
        "gradients": sum(rest.values()),
        "buffers": max(buckets) + gathered,
    }
    engine.destroy()
    return held, dict(wire.sizes)


def measure_teacher(name: str, dtype: str) -> tuple[dict[str, int], dict[str, int]]:
    """Runs on every rank: what the teacher's engine holds between forwards, and what its second forward sends."""
    frozen, _ = models(settings(dist.world_size()))
    ds_config = ds_engine.load_ds_config(name, "teacher_ds_config")
    if dtype != "fp32":
        ds_config[dtype] = {"enabled": True}
    engine = ds_engine.teacher_engine(frozen, ds_config)
    with torch.no_grad():
        engine(**inputs())
        with Wire() as wire:
            engine(**inputs())
    parameters = list(engine.module.parameters())
    if name == "teacher_zero0":
        weights, host = bytes_of(parameters), {}
    else:
        shards = bytes_of(p.ds_tensor for p in parameters)
        weights, host = bytes_of(p.data for p in parameters), {}
        if "offload" in name:
            host = shards
        else:
            weights |= shards
    held = {"weights": sum(weights.values()), "host": sum(host.values())}
    engine.destroy()
    return held, dict(wire.sizes)


def check(what: str, planned: int, held: int, slack: int) -> None:
    assert abs(planned - held) <= WITHIN * held + slack, f"{what}: planned {planned:,}, held {held:,}"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_student_memory_and_traffic(pools, world_size: int, stage: int, dtype: str) -> None:
    accum = 2
    answers = pools(world_size).run(measure_student, stage, dtype, accum)
    _, matched = planner.build_on_meta(settings(world_size), BertConfig(**ENCODER), BertConfig(**ENCODER), dtype)
    sizes = planner.count_parameters(matched)
    planned = vars(planner.student_memory(sizes, stage, dtype, world_size))
    for name, value in planned.items():
        check(f"{name} of {answers}", value, max(held[name] for held, _ in answers), slack=40_000)
    if world_size > 1:
        expected = planner.student_traffic(sizes, stage, dtype, world_size, accum)
        sent = answers[0][1]
        for kind in expected.keys() | sent.keys():
            check(f"{kind} of {sent}", expected.get(kind, 0), sent.get(kind, 0), slack=1000)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", planner.TEACHERS)
def test_teacher_memory_and_traffic(two_ranks, name: str, dtype: str) -> None:
    held, sent = two_ranks.run(measure_teacher, name, dtype)[0]
    frozen, _ = planner.build_on_meta(settings(2), BertConfig(**ENCODER), BertConfig(**ENCODER), dtype)
    sizes = planner.count_parameters(frozen.requires_grad_(True))
    planned = planner.teacher_memory(sizes, name, dtype, 2)
    check(f"weights of {held}", planned.weights, held["weights"], slack=40_000)
    check(f"host of {held}", planned.host, held["host"], slack=40_000)
    expected = planner.teacher_traffic(sizes, name, dtype, 1)
    for kind in expected.keys() | sent.keys():
        check(f"{kind} of {sent}", expected.get(kind, 0), sent.get(kind, 0), slack=1000)


@pytest.mark.parametrize(
    ("dtype", "dropout", "sharing"),
    [("fp32", 0.1, "sps"), ("fp32", 0.0, "none"), ("bf16", 0.1, "sps"), ("bf16", 0.0, "sps")],
)
def test_activations(dtype: str, dropout: float, sharing: str) -> None:
    config = settings(1, dropout=dropout, sharing=sharing)
    _, module = models(config)
    module.to(ds_engine.DTYPES[dtype]).train()
    weights = bytes_of(module.parameters())
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(**inputs())
    measured = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)
    _, matched = planner.build_on_meta(config, BertConfig(**ENCODER), BertConfig(**ENCODER), dtype)
    check("activations", planner.activation_bytes(matched, BATCH, TOKENS, "cpu"), measured, slack=0)


def test_sharing_doubles_activations_and_adds_no_weights() -> None:
    def of(sharing: str) -> tuple[int, int]:
        config = settings(1, sharing=sharing)
        _, matched = planner.build_on_meta(config, BertConfig(**ENCODER), BertConfig(**ENCODER), "bf16")
        return planner.count_parameters(matched).total, planner.activation_bytes(matched, BATCH, TOKENS, "gpu")

    (stored, once), (shared, twice) = of("none"), of("sps")
    assert stored == shared
    assert 1.8 < twice / once < 2


def test_a_cached_row() -> None:
    assert planner.cache_bytes_per_row(num_labels=2, num_pairs=5, teacher_hidden=1024, dtype="bf16") == 8 + 10 * 1024


SHAPES = ["--teacher_layers", "4", "--teacher_hidden", "128", "--task", "rte"]


def test_json_and_table_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    planner.main([*SHAPES, "--world_size", "2", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["choices"]) == 2 * 4 * 3
    best = plan["choices"][plan["recommended"]["index"]]
    planner.main([*SHAPES, "--world_size", "2"])
    printed = capsys.readouterr().out
    words = f"--student_ds_config zero{best['student_stage']}_{best['dtype']} --teacher_ds_config {best['teacher']}"
    assert f"Take: {words}" in printed
    assert best["total"] <= plan["gpu_memory"]


def test_small_gpus_get_no_recommendation(capsys: pytest.CaptureFixture[str]) -> None:
    planner.main([*SHAPES, "--gpu_memory_gib", "0.001"])
    assert "Take: none. Why: nothing fits in 0.9 MiB" in capsys.readouterr().out


def test_a_folder_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BertConfig(**ENCODER).save_pretrained(tmp_path)
    planner.main(["--teacher", str(tmp_path), "--task", "rte", "--json"])
    counted = json.loads(capsys.readouterr().out)["models"]["teacher_parameters"]
    assert counted == sum(p.numel() for p in models(settings(1))[0].parameters())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SHAPES, "--world_size", "0"], "--world_size 0 is outside"),
        ([*SHAPES, "--world_size", "3"], "--global_batch_size 32 is not a multiple of the 3 ranks"),
        ([*SHAPES, "--gpu_memory_gib", "-1"], "--gpu_memory_gib -1.0 is outside"),
        ([*SHAPES, "--gpu_memory_gib", "nan"], "--gpu_memory_gib nan is outside"),
        ([*SHAPES, "--micro_batch_size", "0"], "--micro_batch_size 0 is outside"),
        ([*SHAPES, "--max_seq_length", "1000"], "longer than the 512 positions"),
        ([*SHAPES, "--layer_map", "9:1"], "out of range"),
        (["--teacher_layers", "4"], "the teacher is not clear"),
        (["--teacher_layers", "0", "--teacher_hidden", "128"], "no sizes of a BERT"),
        (["--teacher_layers", "4", "--teacher_hidden", "100"], "not a multiple of 64"),
        (["--teacher", "no/such/folder"], "neither a folder with config.json"),
        ([*SHAPES, "--nonsense"], "unknown option --nonsense"),
        ([*SHAPES, "--world_size", "many"], "invalid int value"),
    ],
)
def test_wrong_input_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["peakd-plan", *words])
    with pytest.raises(SystemExit) as stopped:
        planner.cli()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert error.count("\n") == 1 and error.startswith("peakd-plan: error: ")
