"""The fused loss as an autograd function: upstream gradients, hooks, checkpointing, and choice of backend.

Runs on the torch backend, and through tests/interpreted on Triton's.
"""

import logging
import os

import pytest
import torch
from loss_checks import SETTINGS, Batch, assert_matches_reference, make_batch
from torch.utils.checkpoint import checkpoint

from peakd_ds import kernels
from peakd_ds.kernels import DistillationLossModule, check_backend, choose_backend, distillation_loss

BACKEND = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "torch"


def pop_gradients(batch: Batch) -> list[torch.Tensor]:
    """Gradients of the leaves, which are then cleared."""
    gradients = [leaf.grad.clone() for leaf in batch.leaves]
    for leaf in batch.leaves:
        leaf.grad = None
    return gradients


def plain_gradients(batch: Batch, factor: float = 1.0) -> list[torch.Tensor]:
    (batch.loss(**SETTINGS, backend=BACKEND).total * factor).backward()
    return pop_gradients(batch)


@pytest.fixture
def batch() -> Batch:
    return make_batch(6, 3, num_pairs=2, hidden=(4, 32), ignored=0.3)


@pytest.mark.parametrize("num_classes", [1, 3, 300])
@pytest.mark.parametrize("hidden", [(32,), (4, 32)], ids=["cls", "tokens"])
@pytest.mark.parametrize("upstream", [1.0, 0.37, 65536.0])
@pytest.mark.parametrize("grad_scale", [None, 65536.0, torch.tensor(65536.0)], ids=["none", "number", "tensor"])
def test_any_upstream_gradient(num_classes, hidden, upstream, grad_scale):
    batch = make_batch(6, num_classes, num_pairs=2, hidden=hidden, ignored=0.3)
    assert_matches_reference(batch, upstream=upstream, grad_scale=grad_scale, backend=BACKEND)


def test_scaling_the_loss_in_place(batch):
    expected = plain_gradients(batch, 0.25)
    total = batch.loss(**SETTINGS, backend=BACKEND).total
    total /= 4
    total.backward()
    for ours, theirs in zip(pop_gradients(batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_terms_can_be_written_to(batch):
    loss = batch.loss(**SETTINGS, backend=BACKEND)
    before = loss.hard.item()
    for term in loss[1:]:
        term /= 2
    assert loss.hard.item() == pytest.approx(before / 2)


def test_second_backward_raises(batch):
    loss = batch.loss(**SETTINGS, backend=BACKEND)
    loss.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward through distillation_loss.*call distillation_loss again"):
        loss.total.backward()


def test_gradients_are_freed_after_backward(batch):
    loss = batch.loss(**SETTINGS, backend=BACKEND)
    loss.total.backward()
    with pytest.raises(RuntimeError, match="backward through"):
        loss.total.backward()


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "no leaf"])
def test_gradients_are_computed_only_if_needed(batch, how, monkeypatch):
    needs = []
    backend = kernels._backend_module(BACKEND)
    compute = backend.compute
    monkeypatch.setattr(backend, "compute", lambda inputs, *flags: needs.append(flags) or compute(inputs, *flags))
    expected = [term.item() for term in batch.loss(**SETTINGS, backend=BACKEND)]
    if how == "no leaf":
        for leaf in batch.leaves:
            leaf.requires_grad_(False)
        loss = batch.loss(**SETTINGS, backend=BACKEND)
    else:
        with getattr(torch, how)():
            loss = batch.loss(**SETTINGS, backend=BACKEND)
    assert needs == [(True, True), (False, False)]
    assert not loss.total.requires_grad
    assert [term.item() for term in loss] == expected


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_activation_checkpointing(batch, use_reentrant):
    expected = plain_gradients(batch)

    def run(logits, *states):
        part = Batch(
            logits, batch.teacher_logits, batch.labels, list(states), batch.teacher_hidden, batch.attention_mask
        )
        return part.loss(**SETTINGS, backend=BACKEND).total

    checkpoint(run, *batch.leaves, use_reentrant=use_reentrant).backward()
    for ours, theirs in zip(pop_gradients(batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_accumulate_over_micro_batches(batch):
    expected = plain_gradients(batch)
    rows = [slice(0, 1), slice(1, 4), slice(4, 6)]
    counts = {"num_items": int((batch.labels != -100).sum()), "num_tokens": int(batch.attention_mask.sum())}
    for part in rows:
        states = [[state[part] for state in states] for states in (batch.student_hidden, batch.teacher_hidden)]
        piece = Batch(
            batch.student_logits[part],
            batch.teacher_logits[part],
            batch.labels[part],
            *states,
            batch.attention_mask[part],
        )
        piece.loss(**SETTINGS, **counts, backend=BACKEND).total.backward()
    for ours, theirs in zip(pop_gradients(batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_saved_tensor_hooks_see_the_gradients(batch):
    expected = plain_gradients(batch)
    packed = []

    def pack(tensor: torch.Tensor) -> int:
        packed.append(tensor.clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda number: packed[number]):
        total = batch.loss(**SETTINGS, backend=BACKEND).total
    assert len(packed) >= 2
    total.backward()
    for ours, theirs in zip(pop_gradients(batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_module_matches_the_function(batch):
    module = DistillationLossModule(**SETTINGS, reduction="mean", backend=BACKEND)
    arguments = (batch.student_logits, batch.teacher_logits, batch.labels, batch.student_hidden, batch.teacher_hidden)
    ours = module(*arguments, attention_mask=batch.attention_mask, num_items=9)
    theirs = distillation_loss(
        *arguments, **SETTINGS, reduction="mean", attention_mask=batch.attention_mask, num_items=9, backend=BACKEND
    )
    assert [term.item() for term in ours] == [term.item() for term in theirs]
    assert "temperature=10.0" in repr(module)
    with pytest.raises(ValueError, match="temperature 0 is not a finite number above 0"):
        DistillationLossModule(temperature=0, alpha=0.5, beta=1.0)
    with pytest.raises(ValueError, match="backend 'gpu' is unknown"):
        DistillationLossModule(**SETTINGS, backend="gpu")


def test_auto_logs_its_choice_once(caplog):
    choose_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="peakd_ds.kernels"):
        assert choose_backend("cpu") == ("torch", "tensors are on cpu")
        choose_backend("cpu")
    assert [record.getMessage() for record in caplog.records] == [
        "distillation loss: backend torch, since tensors are on cpu"
    ]
    assert choose_backend("cuda")[0] == "triton"


def test_triton_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "_is_triton_interpreted", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU, and the tensors are on cpu; use backend 'torch'"):
        check_backend("triton", torch.device("cpu"))
    check_backend("torch", torch.device("cpu"))


if BACKEND == "torch":

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_compiled_chunks(dtype, monkeypatch):
        """Compiled chunks, several of them and the last one shorter."""
        from peakd_ds.kernels import torch_backend

        if not torch_backend._has_compiler():
            pytest.skip("no C++ compiler")
        monkeypatch.setattr(torch_backend, "COMPILED_FROM", 0)
        monkeypatch.setattr(torch_backend, "CHUNK_ELEMENTS", 4096)
        for arguments in ({"num_classes": 1500}, {"num_classes": 3}, {"num_classes": 1}):
            batch = make_batch(7, dtype=dtype, num_pairs=2, hidden=(5, 600), ignored=0.3, **arguments)
            assert_matches_reference(batch, backend="torch")
            assert_matches_reference(batch, backend="torch", normalize=False)
        assert_matches_reference(make_batch(7, 1500, dtype=dtype), backend="torch", temperature=25.0)  # precise KL
        batch = make_batch(7, 1500, dtype=dtype)
        assert_matches_reference(batch, backend="torch", label_weights=torch.arange(7.0))
        batch.labels = torch.randint(2, (7, 1500))
        assert_matches_reference(batch, backend="torch", label_weights=torch.arange(7.0), multi_label=True)
