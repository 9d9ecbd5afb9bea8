"""Plain calls, which go straight to the operator: they give what the long way gives, and no other call goes there."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
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


@pytest.fixture
def long_way_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the long way was taken")

    for cell in (hsm.LSTM, hsm.GRU):
        monkeypatch.setattr(cell, "_function", staticmethod(refuse))
    for name in ("lstm_cell", "gru_cell"):
        monkeypatch.setattr(functional, name, refuse)


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
        wanted = module(input, hx)  # with gradients
        with torch.no_grad():
            found = module(input, hx)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert [t.stride() for t in (found[0], *as_tuple(found[1]))] == [
            t.stride() for t in (wanted[0], *as_tuple(wanted[1]))
        ]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_plain_calls_are_short(cell: str, options: dict[str, Any], long_way_is_closed: None) -> None:
    with torch.inference_mode():
        module, input, state = make(cell, options)
        module(input, state)


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell"])
def test_cells(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, input = getattr(hsm, cell)(4, 6), torch.randn(3, 4)
    state = tuple(torch.randn(3, 6) for _ in range(2 if cell == "LSTMCell" else 1))
    for hx in (None, state if cell == "LSTMCell" else state[0]):
        wanted = module(input, hx)
        for name in ("lstm_cell", "gru_cell"):
            monkeypatch.setattr(functional, name, None)
        with torch.no_grad():
            torch.testing.assert_close(module(input, hx), wanted, rtol=0, atol=0)
        monkeypatch.undo()


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
    "vmap": lambda: torch.vmap(lambda x: hsm.GRU(4, 6)(x)[0], randomness="same")(torch.randn(3, 5, 2, 4)),
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_other_calls_go_the_long_way(what: str, long_way_is_closed: None) -> None:
    with torch.no_grad(), pytest.raises(AssertionError, match="long way"):
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
