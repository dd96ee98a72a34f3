"""The Triton loss on a GPU: values, races, synchronisation, CUDA graphs and memory."""

import pytest
import torch
from loss_checks import SETTINGS, Batch, assert_matches_reference, make_batch

from peakd_ds.kernels import choose_backend

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = {1: 900, 2: 3301, 3: 700, 5: 70, 41: 1100, 256: 77, 257: 77, 1024: 30, 1025: 30, 30522: 64, 131072: 8}


def on_gpu(*args, **options) -> Batch:
    return make_batch(*args, **options).to("cuda")


def scaled(dtype: torch.dtype) -> dict:
    return {"upstream": 1024.0, "grad_scale": 1024.0} if dtype is torch.float16 else {}


def backward(batch: Batch, **settings) -> torch.Tensor:
    for leaf in batch.leaves:
        leaf.grad = None
    loss = batch.loss(**SETTINGS | settings, backend="triton")
    loss.total.backward()
    return loss.total.detach()


def test_auto_is_triton():
    assert choose_backend("cuda")[0] == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_classes", ROWS)
@pytest.mark.parametrize("temperature", [1.0, 3.3, 10.0])
def test_logits(dtype, num_classes, temperature):
    assert_matches_reference(
        on_gpu(ROWS[num_classes], num_classes, dtype, ignored=0.3), temperature=temperature, **scaled(dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_pairs", [1, 5, 24])
@pytest.mark.parametrize("hidden", [(768,), (17, 768), (5, 312), (3, 1024), (3, 2048)], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_hidden_states(dtype, num_pairs, hidden, normalize):
    batch = on_gpu(16, 2, dtype, num_pairs=num_pairs, hidden=hidden)
    assert_matches_reference(batch, normalize=normalize, **scaled(dtype))


@pytest.mark.parametrize("upstream", [0.37, 65536.0])
@pytest.mark.parametrize("num_classes", [1, 2, 30522])
def test_upstream_gradients(upstream, num_classes):
    batch = on_gpu(33, num_classes, num_pairs=3, hidden=(7, 128))
    assert_matches_reference(batch, upstream=upstream)
    assert_matches_reference(batch, upstream=upstream, grad_scale=torch.tensor(upstream, device="cuda"))


def test_rows_of_different_alignment():
    batch = on_gpu(64, 30522, torch.bfloat16)
    padded = torch.zeros(64, 30528, dtype=torch.bfloat16, device="cuda")
    padded[:, :30522] = batch.teacher_logits
    batch.teacher_logits = padded[:, :30522]
    assert_matches_reference(batch)


def test_each_row_of_a_large_batch():
    """Races need many programs: each row's gradient against the reference."""
    batch = on_gpu(4096, 30522, torch.bfloat16, ignored=0.1)
    backward(batch)
    fused = batch.student_logits.grad
    for start in range(0, 4096, 512):
        rows = slice(start, start + 512)
        part = Batch(
            batch.student_logits.detach()[rows].requires_grad_(), batch.teacher_logits[rows], batch.labels[rows]
        )
        count = int((batch.labels != -100).sum())
        part.loss(**SETTINGS, num_items=count, backend="reference").total.backward()
        torch.testing.assert_close(fused[rows], part.student_logits.grad, rtol=1.6e-2, atol=1e-7)


@pytest.mark.parametrize("num_classes", [2, 30522])
def test_is_bitwise_reproducible(num_classes):
    batch = on_gpu(512, num_classes, torch.bfloat16, num_pairs=12, hidden=(768,))
    first = backward(batch)
    gradients = [leaf.grad.clone() for leaf in batch.leaves]
    for _ in range(5):
        assert torch.equal(backward(batch), first)
        assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(batch.leaves, gradients, strict=True))


@pytest.mark.parametrize("num_classes", [2, 30522])
@pytest.mark.parametrize("counts", [{}, {"num_items": 32, "num_tokens": 400}], ids=["counted", "given"])
def test_never_synchronises(num_classes, counts):
    batch = on_gpu(32, num_classes, torch.bfloat16, num_pairs=3, hidden=(17, 768), ignored=0.3)
    backward(batch, **counts)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        backward(batch, **counts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("num_classes", [2, 30522])
def test_cuda_graph(num_classes):
    """A captured step can be replayed with other inputs and with another upstream gradient."""
    batch = on_gpu(32, num_classes, num_pairs=3, hidden=(768,), ignored=0.3)
    upstream = torch.ones((), device="cuda")

    def step() -> torch.Tensor:
        loss = batch.loss(**SETTINGS, backend="triton")
        loss.total.backward(upstream)
        return loss.total.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    for leaf in batch.leaves:
        leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = step()
    captured = [leaf.grad for leaf in batch.leaves]
    new = on_gpu(32, num_classes, num_pairs=3, hidden=(768,), ignored=0.5, seed=1)
    with torch.no_grad():
        for mine, theirs in zip((*batch.leaves, batch.labels), (*new.leaves, new.labels), strict=True):
            mine.copy_(theirs)
        batch.teacher_logits.copy_(new.teacher_logits)
        for mine, theirs in zip(batch.teacher_hidden, new.teacher_hidden, strict=True):
            mine.copy_(theirs)
    for factor in (1.0, 8.0):
        upstream.fill_(factor)
        graph.replay()
        expected = backward(new)
        assert torch.equal(total, expected)
        for mine, leaf in zip(captured, new.leaves, strict=True):
            torch.testing.assert_close(mine, leaf.grad * factor, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("rows", "num_classes", "num_pairs", "hidden"), [(2048, 30522, 0, (8,)), (32, 2, 12, (128, 768))], ids=str
)
def test_peak_memory_is_the_gradients(rows, num_classes, num_pairs, hidden):
    batch = on_gpu(rows, num_classes, torch.bfloat16, num_pairs=num_pairs, hidden=hidden)
    backward(batch)
    for leaf in batch.leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backward(batch)
    taken = torch.cuda.max_memory_allocated() - before
    gradients = sum(leaf.nbytes for leaf in batch.leaves)
    assert taken <= gradients * 1.01 + 2**20


def test_no_grad_computes_no_gradient():
    batch = on_gpu(2048, 30522, torch.bfloat16)
    with torch.no_grad():
        batch.loss(**SETTINGS, backend="triton")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        batch.loss(**SETTINGS, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 2**20
