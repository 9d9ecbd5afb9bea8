"""Modules in float32 whose weight matrices are kept in bfloat16."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rnn_helpers import tensors
from torch import Tensor, nn

import hsm_kernels as hsm

CELLS = {"LSTM": hsm.LSTM, "GRU": hsm.GRU}
SINGLE = {"LSTMCell": hsm.LSTMCell, "GRUCell": hsm.GRUCell}


def pair(cell: str, *args: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A module with bfloat16 weights, and one in float32 with the same, rounded weights."""
    kind = {**CELLS, **SINGLE}[cell]
    torch.manual_seed(0)
    ours = kind(*args, weight_dtype=torch.bfloat16, **options)
    plain = kind(*args, **options)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def test_equal_seeds_give_the_same_weights_rounded() -> None:
    ours, plain = pair("LSTM", 3, 4, 2, bidirectional=True)
    torch.manual_seed(0)
    unrounded = hsm.LSTM(3, 4, 2, bidirectional=True)
    for (name, weight), whole in zip(ours.named_parameters(), unrounded.parameters(), strict=True):
        rounded = whole.detach().bfloat16() if "weight" in name else whole.detach()
        torch.testing.assert_close(weight.detach(), rounded, rtol=0, atol=0)
    assert {weight.dtype for weight in plain.parameters()} == {torch.float32}


# (steps, batch, inputs, hidden): single, few, many rows with packed weights; sizes with and without remainders.
SHAPES = [(1, 1, 5, 64), (1, 3, 80, 75), (7, 1, 33, 200), (40, 1, 8, 193), (2, 30, 17, 35), (70, 20, 4, 21)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"bias": False}])
@pytest.mark.parametrize("cell", [*CELLS, "projected"])
def test_results_are_those_of_the_rounded_weights(
    poisoned_memory: None, cell: str, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    steps, batch, inputs, hidden = shape
    if cell == "projected":
        cell, options = "LSTM", {**options, "proj_size": 19}
    ours, plain = pair(cell, inputs, hidden, **options)
    x = torch.randn(steps, batch, inputs)
    resets = torch.rand(steps, batch) < 0.2
    with torch.no_grad():
        for arguments in ({}, {"reset_mask": resets, "lengths": torch.arange(batch) % (steps + 1)}):
            found = ours(x, **arguments)
            assert {part.dtype for part in tensors(found)} == {torch.float32}
            torch.testing.assert_close(found, plain(x, **arguments), rtol=1e-5, atol=2e-6)


@given(st.sampled_from(list(CELLS)), st.integers(1, 5), st.integers(1, 7), st.integers(1, 40), st.integers(1, 40))
def test_any_size(poisoned_memory: None, cell: str, steps: int, batch: int, inputs: int, hidden: int) -> None:
    ours, plain = pair(cell, inputs, hidden)
    x = torch.randn(steps, batch, inputs)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("cell", SINGLE)
def test_cells(cell: str) -> None:
    ours, plain = pair(cell, 70, 90)
    with torch.no_grad():
        for x in (torch.randn(70), torch.randn(3, 70)):
            torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_reach_the_weights(cell: str) -> None:
    ours, plain = pair(cell, 5, 6, 2)
    x = torch.randn(4, 3, 5, requires_grad=True)
    for module in (ours, plain):
        module(x)[0].square().sum().backward()
    for found, wanted in zip(ours.parameters(), plain.parameters(), strict=True):
        assert found.grad is not None and found.grad.dtype == found.dtype
        torch.testing.assert_close(found.grad.float(), wanted.grad.to(found.dtype).float(), rtol=1e-2, atol=1e-6)


def test_the_reference_computes_the_same() -> None:
    for cell in CELLS:
        ours, plain = pair(cell, 5, 6)
        x = torch.randn(4, 3, 5)
        with hsm.use_backend("reference"):
            torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_states_are_in_float32(bias: bool) -> None:
    rnn = hsm.LSTM(3, 4, bias=bias, weight_dtype=torch.bfloat16)
    hx = hsm.state.initial_state(rnn, 2)
    assert {part.dtype for part in hx} == {torch.float32}
    stateful = hsm.Stateful(rnn)
    with torch.no_grad():
        stateful(torch.randn(5, 2, 3))
        assert {part.dtype for part in stateful(torch.randn(5, 2, 3))[1]} == {torch.float32}
    assert hsm.InitialState(rnn)(2)[0].dtype == torch.float32


def test_a_float32_checkpoint_is_rounded_and_back() -> None:
    whole = hsm.GRU(3, 4)
    rounded = hsm.GRU(3, 4, weight_dtype=torch.bfloat16)
    rounded.load_state_dict(whole.state_dict())
    assert rounded.weight_hh_l0.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.weight_hh_l0.detach(), whole.weight_hh_l0.detach().bfloat16(), rtol=0, atol=0)
    again = copy.deepcopy(rounded)
    assert again.weight_hh_l0.dtype == torch.bfloat16
    again.float()
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(again(x), rounded(x))
        torch.testing.assert_close(again.to_torch()(x), rounded(x))


def test_no_twin_in_torch() -> None:
    with pytest.raises(TypeError, match=r"call \.float\(\) first"):
        hsm.LSTM(3, 4, weight_dtype=torch.bfloat16).to_torch()


@pytest.mark.parametrize("kind", [hsm.LSTM, hsm.GRU, hsm.LSTMCell, hsm.GRUCell])
def test_what_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"weight_dtype must be torch.bfloat16 or None, got torch.float16"):
        kind(3, 4, weight_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"a float32 module, got dtype=torch.float64"):
        kind(3, 4, weight_dtype=torch.bfloat16, dtype=torch.float64)


def test_matrices_must_agree_with_each_other() -> None:
    rnn = hsm.LSTM(3, 4, weight_dtype=torch.bfloat16)
    weights: list[Tensor] = list(rnn.parameters())
    weights[0] = weights[0].float()
    with pytest.raises(ValueError, match="weight_ih must have"):
        hsm.functional.lstm(torch.randn(5, 2, 3), None, [weights])
    with pytest.raises(ValueError, match="dtype"):
        rnn(torch.randn(5, 2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="dtype"), torch.no_grad():
        rnn(torch.randn(5, 2, 3, dtype=torch.bfloat16))


def test_compiled() -> None:
    rnn = hsm.GRU(3, 4, weight_dtype=torch.bfloat16)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), rnn(x))
    torch.testing.assert_close(compiled(x), rnn(x))


@pytest.mark.requires_library
def test_explained() -> None:
    rnn = hsm.LSTM(256, 256, weight_dtype=torch.bfloat16)
    with torch.no_grad():
        assert "W_hh read as it lies" in hsm.explain(rnn, torch.zeros(300, 1, 256)).reason
    assert "packed once for all steps" in hsm.explain(rnn, torch.zeros(300, 1, 256)).reason
