"""What only a GPU can show. Where a test can run on a CPU, it does so too, which shows that the test is right."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_cases import BOUNDARIES, CELLS, DTYPES, SHAPES, assert_right, on, results
from rnn_helpers import SEQUENCE_CELLS, assert_same_bits, make_pair
from test_ops import LOW_PRECISION, Case, cases
from torch import Tensor, nn

import hsm_kernels as hsm

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CUDA = pytest.param("cuda", marks=[pytest.mark.cuda, needs_gpu])
every_device = pytest.mark.parametrize("device", ["cpu", CUDA])
on_cuda = pytest.mark.parametrize("device", [CUDA])
every_cell = pytest.mark.parametrize("cell", SEQUENCE_CELLS)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Without TF32, which torch takes in RNNs unless told otherwise."""
    with rnn_precision("ieee"):
        yield


@contextmanager
def rnn_precision(name: str) -> Iterator[None]:
    switch = torch.backends.cudnn.rnn
    before, switch.fp32_precision = switch.fp32_precision, name
    try:
        yield
    finally:
        switch.fp32_precision = before


def gradients(rnn: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    """The output, and the gradients of input and weights."""
    x = x.detach().requires_grad_()
    output, _ = rnn(x, **options)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), (x, *rnn.parameters()))]


def everything(device: str) -> dict[str, Any]:
    """Options of a call on 6 steps of 4 sequences that bring masks and lengths with them."""
    mask = torch.zeros(6, 4, dtype=torch.bool)
    mask[2, 1] = mask[5, 3] = True
    lengths = torch.tensor([6, 5, 0, 6])
    return {"reset_mask": mask.to(device), "detach_mask": mask.roll(1, 0).to(device), "lengths": lengths.to(device)}


# ----------------------------------------------------------------------------------------------------- right everywhere


@on_cuda
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("variant", ["cluster", *(f"cluster:{blocks}" for blocks in (1, 2, 4, 8, 16)), "grid"])
@every_cell
def test_variants(device: str, cell: str, variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that run the recurrence only where they are asked for; sizes that none of their tiles divides."""
    monkeypatch.setenv("HSM_KERNELS_CUDA_VARIANT", variant)
    for batch, hidden in [(3, 61), (21, 125), (70, 250)]:
        sizes = {"batch": batch, "hidden": hidden, "dtype": dtype}
        assert_right(Case(cell, 40, directions=2, **sizes, **BOUNDARIES["all of them"]), device)
        assert_right(Case(cell, 70, recompute=True, detach_every=16, **sizes), device)


@on_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", BOUNDARIES)
@pytest.mark.parametrize("cell, proj_size", CELLS)
def test_boundaries(cell: str, proj_size: int, kind: str, dtype: torch.dtype, device: str) -> None:
    for recompute in (False, True):
        options = {"directions": 2, "dtype": dtype, "recompute": recompute, **BOUNDARIES[kind]}
        assert_right(Case(cell, steps=8, proj_size=proj_size, **options), device)


@on_cuda
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_cell
def test_shapes(cell: str, shape: tuple[int, ...], device: str) -> None:
    *sizes, proj_size = shape
    options = {"directions": 2, "resets": True, "reset_state": True}
    assert_right(Case(cell, *sizes, proj_size=proj_size if cell == "LSTM" else 0, **options), device)


@on_cuda
@pytest.mark.parametrize("dtypes", [[torch.float64], LOW_PRECISION], ids=["float64", "others"])
@given(data=st.data())
def test_any_case(dtypes: list[torch.dtype], device: str, data: st.DataObject) -> None:
    assert_right(data.draw(cases(st.sampled_from(dtypes))), device)


@every_device
@every_cell
def test_sizes_of_real_models(cell: str, device: str) -> None:
    """Against torch.nn in float64."""
    theirs = getattr(nn, cell)(96, 200, num_layers=2, bidirectional=True).double()
    ours = getattr(hsm, cell)(96, 200, num_layers=2, bidirectional=True).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(30, 20, 96, dtype=torch.float64)
    found, wanted = gradients(ours.to(device), x.to(device)), gradients(theirs, x)
    torch.testing.assert_close([tensor.cpu() for tensor in found], wanted, rtol=1e-9, atol=1e-9)


@every_device
@every_cell
def test_very_many_steps(cell: str, device: str) -> None:
    ours, theirs = make_pair(cell, 2, 3)
    steps = 70_000 if device == "cuda" else 2_000
    ours, theirs, x = ours.double().to(device), theirs.double(), torch.randn(steps, 1, 2, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x.to(device))[0].cpu(), theirs(x)[0], rtol=1e-9, atol=1e-9)
    found = gradients(ours, x.to(device), truncated_bptt_steps=1000)
    assert all(tensor.isfinite().all() for tensor in found)


@every_device
@every_cell
def test_equal_calls_give_equal_bits(cell: str, device: str) -> None:
    rnn, x = getattr(hsm, cell)(30, 50, bidirectional=True).to(device), torch.randn(6, 4, 30, device=device)
    first = gradients(rnn, x, **everything(device))
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            assert_same_bits(gradients(rnn, x, **everything(device)), first)
        finally:
            torch.use_deterministic_algorithms(False)


@every_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_cell
def test_autocast(cell: str, dtype: torch.dtype, device: str) -> None:
    rnn, x = getattr(hsm, cell)(5, 7).to(device), torch.randn(6, 4, 5, device=device)
    with torch.autocast(device, dtype):
        output, _ = rnn(x)
    assert output.dtype == dtype
    wanted = copy.deepcopy(rnn).to(dtype)(x.to(dtype))[0]
    torch.testing.assert_close(output, wanted, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------- as a GPU wants it


@on_cuda
def test_the_kernels_run(device: str) -> None:
    rnn = hsm.LSTM(3, 4).to(device)
    assert hsm.explain(rnn, torch.zeros(2, 1, 3, device=device)).backend == "cuda", hsm.build_info()


@on_cuda
@every_cell
def test_tf32_where_torch_allows_it(cell: str, device: str) -> None:
    """Products large enough for tensor cores: cuBLAS may compute small ones in float32 all the same."""
    rnn, x = getattr(hsm, cell)(256, 256).to(device), torch.randn(8, 64, 256, device=device)
    exact = gradients(copy.deepcopy(rnn).double(), x.double())
    errors = {}
    for precision in ("ieee", "tf32"):
        with rnn_precision(precision):
            found = gradients(rnn, x)
        errors[precision] = max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
    assert errors["ieee"] < 1e-5 < errors["tf32"] < 1e-2


@on_cuda
@every_cell
def test_nothing_waits_for_the_gpu(cell: str, device: str) -> None:
    rnn, x, options = getattr(hsm, cell)(5, 7).to(device), torch.randn(6, 4, 5, device=device), everything(device)
    gradients(rnn, x, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(rnn, x, truncated_bptt_steps=2, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_cuda
@every_cell
def test_cuda_graphs(cell: str, device: str) -> None:
    """A captured training step, replayed on other numbers, masks and lengths."""
    rnn, x, options = getattr(hsm, cell)(5, 7).to(device), torch.randn(6, 4, 5, device=device), everything(device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradients(rnn, x, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(rnn, x, **options)
    x.copy_(torch.randn_like(x))
    options["reset_mask"].copy_(options["reset_mask"].roll(1, 1))
    options["lengths"].copy_(options["lengths"].flip(0))
    graph.replay()
    assert_same_bits(captured, gradients(rnn, x, **options))


@on_cuda
@every_cell
def test_streams_do_not_disturb_each_other(cell: str, device: str) -> None:
    rnn = getattr(hsm, cell)(64, 128).to(device)
    inputs = [torch.randn(50, 8, 64, device=device) for _ in range(4)]
    wanted = [gradients(rnn, x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found = []
    for stream, x in zip(streams, inputs, strict=True):
        with torch.cuda.stream(stream):
            found.append(gradients(rnn, x))
    torch.cuda.synchronize()
    assert_same_bits(found, wanted)


@on_cuda
@every_cell
def test_another_device_than_the_current_one(cell: str, device: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    case = Case(cell, resets=True, lengths=True)
    wanted = results(first := on(case, "cuda:0"), first.forward())
    assert torch.cuda.current_device() == 0
    assert_same_bits(results(other := on(case, "cuda:1"), other.forward()), wanted)


@on_cuda
@every_cell
def test_mixed_devices_are_an_error(cell: str, device: str) -> None:
    rnn, x = getattr(hsm, cell)(5, 7).to(device), torch.randn(6, 4, 5, device=device)
    with pytest.raises((RuntimeError, ValueError, TypeError), match="cuda"):
        rnn(x.cpu())
    with pytest.raises((RuntimeError, ValueError, TypeError), match="cpu"):
        rnn(x, reset_mask=torch.zeros(6, 4, dtype=torch.bool))
    assert rnn(x)[0].isfinite().all()


@on_cuda
@pytest.mark.parametrize("failing", ["copy", "result"])
@every_cell
def test_a_call_after_one_without_memory(cell: str, failing: str, device: str) -> None:
    """Memory for 80 to 140 MB more: for the input that is a few rows repeated no copy, for the other one no results."""
    rnn, x = getattr(hsm, cell)(64, 256).to(device), torch.randn(10, 8, 64, device=device)
    before = gradients(rnn, x)
    large = torch.randn(4, 20_000, 64, device=device)
    if failing == "copy":
        large = large[:, :1].expand(4, 500_000, 64)
    torch.cuda.empty_cache()
    taken = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, taken + 0.001))
    try:
        what = "contiguous copy of input" if failing == "copy" else "tensor of shape"
        with pytest.raises(torch.OutOfMemoryError, match=f"out of memory.*: no room for {what}"):
            gradients(rnn, large)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert_same_bits(gradients(rnn, x), before)
