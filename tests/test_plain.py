"""Plain calls, which go straight to the operator: they give what the long way gives, and no other call goes there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from rnn_helpers import STEP_CELLS, tensors
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import prune

import hsm_kernels as hsm
from hsm_kernels import functional

pytestmark = pytest.mark.requires_library

OPTIONS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"bidirectional": True},
    {"proj_size": 3},
    {"bias": False, "proj_size": 3, "bidirectional": True, "batch_first": True},
]


@contextmanager
def closed_long_way() -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the long way was taken")

    with pytest.MonkeyPatch.context() as patch:
        for cell in (hsm.LSTM, hsm.GRU):
            patch.setattr(cell, "_function", staticmethod(refuse))
        for name in ("lstm_cell", "gru_cell"):
            patch.setattr(functional, name, refuse)
        yield


@pytest.fixture
def long_way_is_closed() -> Iterator[None]:
    with closed_long_way():
        yield


def by_the_long_way(module: Any, input: Tensor, hx: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(module), "_run_plain", lambda *_: None)
        return module(input, hx)


def by_the_short_way(module: nn.Module, input: Tensor, hx: Any) -> Any:
    with closed_long_way():
        return module(input, hx)


def results_and_gradients(call: Callable[..., Any], module: nn.Module, input: Tensor, hx: Any) -> list[Tensor]:
    """What ``call(module, input, hx)`` returns, and the gradients of the input, the state and all parameters."""
    input, *state = (part.clone().requires_grad_() for part in tensors([input, hx]))
    results = tensors(call(module, input, None if hx is None else tuple(state) if isinstance(hx, tuple) else state[0]))
    given = [torch.arange(result.numel()).view_as(result).cos() for result in results]
    return [*results, *torch.autograd.grad(results, [input, *state, *module.parameters()], given)]


def make(cell: str, options: dict[str, Any]) -> tuple[nn.Module, Tensor, Any]:
    """A module, an input, and a state that fits."""
    if cell == "GRU" and "proj_size" in options:
        options = {name: value for name, value in options.items() if name != "proj_size"}
    module = getattr(hsm, cell)(4, 6, **options)
    input = torch.randn(5, 5, 4)
    state = tuple(torch.randn_like(part) for part in as_tuple(module(input)[1]))
    return module, input, state if cell == "LSTM" else state[0]


def as_tuple(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_same_bits_as_the_long_way(cell: str, options: dict[str, Any]) -> None:
    module, input, state = make(cell, options)
    for hx in (None, state):
        wanted = by_the_long_way(module, input, hx)
        with torch.no_grad():
            found = by_the_short_way(module, input, hx)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert [t.stride() for t in (found[0], *as_tuple(found[1]))] == [
            t.stride() for t in (wanted[0], *as_tuple(wanted[1]))
        ]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_same_gradients_as_the_long_way(cell: str, options: dict[str, Any]) -> None:
    module, input, state = make(cell, options)
    for hx in (None, state):
        found, wanted = (results_and_gradients(way, module, input, hx) for way in (by_the_short_way, by_the_long_way))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def make_cell(cell: str, **options: Any) -> tuple[nn.Module, Tensor, Any]:
    """A cell, an input, and a state that fits."""
    state = tuple(torch.randn(3, 6) for _ in range(2 if cell == "LSTMCell" else 1))
    return getattr(hsm, cell)(4, 6, **options), torch.randn(3, 4), state if cell == "LSTMCell" else state[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", STEP_CELLS)
def test_cells(cell: str, bias: bool) -> None:
    module, input, state = make_cell(cell, bias=bias)
    for hx in (None, state):
        found, wanted = (results_and_gradients(way, module, input, hx) for way in (by_the_short_way, by_the_long_way))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        with torch.no_grad():
            results = tensors(by_the_short_way(module, input, hx))
        torch.testing.assert_close(results, found[: len(results)], rtol=0, atol=0)


@pytest.mark.parametrize("cell", STEP_CELLS)
def test_a_step_is_one_node_of_the_graph(cell: str) -> None:
    """Each node, and each view below it, takes as long as a tenth of the step."""
    module, input, hx = make_cell(cell)
    leaves = [part.requires_grad_() for part in (input, *as_tuple(hx))]
    for result in tensors(module(input, hx)):
        assert result._base is None
        below = [node for node, _ in result.grad_fn.next_functions if node is not None]  # type: ignore[union-attr]
        assert {node.variable for node in below} == {*leaves, *module.parameters()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("cell", STEP_CELLS)
def test_gradients_of_only_some(cell: str) -> None:
    """Those of a state alone, of a result alone, and of a frozen module."""
    module, input, state = make_cell(cell)
    module.requires_grad_(False)
    for k in range(len(as_tuple(state))):
        grads = []
        for way in (by_the_short_way, by_the_long_way):
            parts = [part.clone().requires_grad_(j == k) for j, part in enumerate(as_tuple(state))]
            hx = tuple(parts) if cell == "LSTMCell" else parts[0]
            result = tensors(way(module, input, hx))[-1]
            assert result.requires_grad
            grads += torch.autograd.grad(result.sum(), parts[k])
        torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert not any(result.requires_grad for result in tensors(by_the_short_way(module, input, state)))


@pytest.mark.parametrize("cell", STEP_CELLS)
def test_cells_have_second_gradients(cell: str) -> None:
    module, input, state = make_cell(cell, dtype=torch.float64)
    state = tuple(part.double().requires_grad_() for part in as_tuple(state))

    def step(input: Tensor, *state: Tensor) -> Any:
        return by_the_short_way(module, input, state if cell == "LSTMCell" else state[0])

    torch.autograd.gradgradcheck(step, (input.double().requires_grad_(), *state))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("cell", STEP_CELLS)
def test_transforms_of_the_backward_pass_of_cells(cell: str, frozen: bool) -> None:
    """The step itself was called outside of them."""
    module, input, state = make_cell(cell)
    module.requires_grad_(not frozen)
    leaves = [input.requires_grad_(), *(weight for weight in module.parameters() if not frozen)]
    result = tensors(by_the_short_way(module, input, state))[0]

    def backward(grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(result, leaves, grad, retain_graph=True)

    given = torch.randn(5, *result.shape)
    wanted = [torch.stack(grads) for grads in zip(*map(backward, given), strict=True)]
    torch.testing.assert_close([*torch.func.vmap(backward)(given)], wanted)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(backward(forward_ad.make_dual(given[0], given[1]))[0])
    torch.testing.assert_close([*dual], [wanted[0][0], wanted[0][1]])


class Labelled(Tensor):
    """What a library makes of its tensors."""


UNUSUAL = {
    "several layers": lambda: hsm.GRU(4, 6, num_layers=2)(torch.randn(5, 2, 4)),
    "unbatched": lambda: hsm.GRU(4, 6)(torch.randn(5, 4)),
    "an option": lambda: hsm.GRU(4, 6)(torch.randn(5, 2, 4), truncated_bptt_steps=2),
    "all states": lambda: hsm.GRU(4, 6)(torch.randn(5, 2, 4), return_states=True),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16)(hsm.GRU(4, 6))(torch.randn(5, 2, 4)),
    "pruned": lambda: prune.random_unstructured(hsm.GRU(4, 6), "weight_hh_l0", 0.5)(torch.randn(5, 2, 4)),
    "a state for any batch": lambda: hsm.GRU(4, 6)(torch.randn(5, 2, 4), torch.randn(1, 1, 6)),
    "states by layer": lambda: hsm.LSTM(4, 6)(torch.randn(5, 2, 4), [(torch.randn(1, 2, 6), torch.randn(1, 2, 6))]),
    "the reference": lambda: hsm.use_backend("reference")(hsm.GRU(4, 6))(torch.randn(5, 2, 4)),
    "a state of a class": lambda: hsm.GRUCell(4, 6)(torch.randn(2, 4), torch.randn(2, 6).as_subclass(Labelled)),
    "vmap": lambda: torch.vmap(lambda x: hsm.GRU(4, 6)(x)[0], randomness="same")(torch.randn(3, 5, 2, 4)),
}


@pytest.mark.parametrize("cell", ["LSTM", *STEP_CELLS])
def test_weights_to_be_widened_are_not_tried_with_gradients(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator would refuse them, which takes time."""
    module = getattr(hsm, cell)(4, 6, weight_dtype=torch.bfloat16)
    input = torch.randn(2, 4) if cell in STEP_CELLS else torch.randn(5, 2, 4)
    with torch.no_grad():
        by_the_short_way(module, input, None)
    monkeypatch.delattr(type(module), "_plain")
    module(input)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("what", UNUSUAL)
def test_other_calls_go_the_long_way(what: str, context: Any, long_way_is_closed: None) -> None:
    with context(), pytest.raises(AssertionError, match="long way"):
        UNUSUAL[what]()


def test_a_wrong_call_has_its_message() -> None:
    module, input = hsm.LSTM(4, 6), torch.randn(5, 2, 4)
    state = (torch.randn(1, 2, 6), torch.randn(1, 2, 6))
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"hidden\[1\] size"):
            module(input, (state[0], torch.randn(1, 2, 5)))
        with pytest.raises(ValueError, match="dtype"):
            module(input.double())
        with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
            module(torch.randn(5, 2, 3))


def test_weights_are_read_at_each_call() -> None:
    module, input = hsm.GRU(4, 6), torch.randn(5, 2, 4)
    with torch.no_grad():
        module(input)
        module.weight_hh_l0.data.zero_()
        edited = module(input)[0]
    torch.testing.assert_close(edited, module(input)[0], rtol=0, atol=0)
