"""One test or more per line of the drop-in checklist; the letter and number in a name are its line.

Wherever torch.nn does the same, both run and are compared.
"""

import copy
import gc
import io
import itertools
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
import torch.nn.utils.prune as prune
import torch.utils.checkpoint
from rnn_helpers import (
    DTYPES,
    SEQUENCE_CELLS,
    STEP_CELLS,
    assert_same,
    assert_same_bits,
    gradients,
    leaf,
    make_pair,
    map_tensors,
    outcome,
    random_state,
    run,
    tensors,
    weightings,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import rnn as rnn_utils

import hsm_kernels as hsm

ALL_CELLS = SEQUENCE_CELLS + STEP_CELLS
every_cell = pytest.mark.parametrize("cell", ALL_CELLS)
sequence_cells = pytest.mark.parametrize("cell", SEQUENCE_CELLS)
step_cells = pytest.mark.parametrize("cell", STEP_CELLS)


def is_step(cell: str) -> bool:
    return cell in STEP_CELLS


def make_input(cell: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """An input of 4 features for a sequence module (5 steps, 3 sequences) or a step module."""
    return torch.randn(*((3, 4) if is_step(cell) else (5, 3, 4)), dtype=dtype)


def assert_same_on(ours: nn.Module, theirs: nn.Module, input: Tensor) -> None:
    """Both modules give the same outputs and gradients."""
    assert_same(run(ours, input), run(theirs, input))


# A. Construction


@pytest.mark.parametrize(
    ("cell", "arguments"),
    [
        ("LSTM", (4, 5, 2, False, True, 0.1, True, 3)),
        ("GRU", (4, 5, 2, False, True, 0.1, True)),
        ("LSTMCell", (4, 5, False)),
        ("GRUCell", (4, 5, False)),
    ],
)
def test_A1_positional_arguments(cell: str, arguments: tuple) -> None:
    ours, theirs = make_pair(cell, *arguments)
    public = [name for name in vars(theirs) if not name.startswith("_")]
    assert {name: getattr(ours, name) for name in public} == {name: getattr(theirs, name) for name in public}


@every_cell
def test_A1_device_and_dtype(cell: str) -> None:
    module = getattr(hsm, cell)(4, 5, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.float16)}


@pytest.mark.parametrize("cell", STEP_CELLS)
def test_A1_cells_take_device_and_dtype_by_position(cell: str) -> None:
    module = getattr(hsm, cell)(4, 5, True, "cpu", torch.float64)
    assert module.weight_ih.dtype == torch.float64


@sequence_cells
@pytest.mark.parametrize(
    "wrong",
    [
        {"dropout": "half"},
        {"dropout": True},
        {"dropout": -0.1},
        {"dropout": 1.1},
        {"bias": 1},
        {"bias": None},
        {"batch_first": 0},
        {"input_size": 4.0},
        {"input_size": 0},
        {"input_size": -1},
        {"hidden_size": "5"},
        {"hidden_size": 0},
        {"num_layers": 0},
        {"num_layers": -1},
        {"proj_size": -1},
        {"proj_size": 5},
        {"unknown": 1},
    ],
    ids=str,
)
def test_A2_constructor_errors(cell: str, wrong: dict[str, Any]) -> None:
    arguments = {"input_size": 4, "hidden_size": 5, **wrong}
    ours = outcome(lambda: getattr(hsm, cell)(**arguments))
    assert ours is not None
    assert ours == outcome(lambda: getattr(nn, cell)(**arguments))


def test_A2_gru_has_no_projection() -> None:
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
        hsm.GRU(4, 5, proj_size=2)


@step_cells
def test_A2_cells_check_nothing(cell: str) -> None:
    assert getattr(hsm, cell)(4, 0).weight_hh.shape == getattr(nn, cell)(4, 0).weight_hh.shape


@sequence_cells
def test_A3_dropout_with_one_layer_warns(cell: str) -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        module = getattr(hsm, cell)(4, 5, dropout=1)
    assert type(module.dropout) is float
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(hsm, cell)(4, 5, 2, dropout=0.5)


@every_cell
@pytest.mark.parametrize("bias", [True, False])
def test_A4_equal_seeds_give_equal_weights_and_generator(cell: str, bias: bool) -> None:
    options = {} if is_step(cell) else {"num_layers": 2, "bidirectional": True}
    if cell == "LSTM":
        options["proj_size"] = 3
    states = []
    for namespace in (hsm, nn):
        torch.manual_seed(3)
        module = getattr(namespace, cell)(4, 5, bias=bias, **options)
        states.append((list(module.state_dict().items()), torch.get_rng_state()))
    (ours, our_generator), (theirs, their_generator) = states
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert all(torch.equal(mine, yours) for (_, mine), (_, yours) in zip(ours, theirs, strict=True))
    assert torch.equal(our_generator, their_generator)


@every_cell
def test_A4_reset_parameters_can_be_overridden(cell: str) -> None:
    class Ones(getattr(hsm, cell)):
        def reset_parameters(self) -> None:
            for parameter in self.parameters():
                nn.init.ones_(parameter)

    assert all(bool((parameter == 1).all()) for parameter in Ones(4, 5).parameters())


@every_cell
def test_A4_reset_parameters_draws_again(cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5)
    for module in (ours, theirs):
        torch.manual_seed(11)
        module.reset_parameters()
    assert_same_bits(list(ours.parameters()), list(theirs.parameters()))


@every_cell
def test_A5_meta_device_and_to_empty(cell: str) -> None:
    source = getattr(nn, cell)(4, 5)
    module = getattr(hsm, cell)(4, 5, device="meta").to_empty(device="cpu")
    module.load_state_dict(source.state_dict())
    assert_same_on(module, source, make_input(cell))


@every_cell
def test_A5_forward_on_meta_gives_the_eager_shapes(cell: str) -> None:
    eager = getattr(hsm, cell)(4, 5)
    input = make_input(cell)
    meta = copy.deepcopy(eager).to("meta")(input.to("meta"))
    assert [out.shape for out in tensors(meta)] == [out.shape for out in tensors(eager(input))]


# B. Attributes, parameters, state_dict


@sequence_cells
def test_B1_attributes(cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5, 2, False, True, dropout=0.25, bidirectional=True)
    for name in [*nn.RNNBase.__constants__, "training"]:
        assert getattr(ours, name) == getattr(theirs, name), name
        assert type(getattr(ours, name)) is type(getattr(theirs, name)), name
    assert ours.__constants__ == theirs.__constants__
    assert len(ours.all_weights) == len(theirs.all_weights) == 4
    assert_same_bits(ours.all_weights, theirs.all_weights)


@every_cell
@pytest.mark.parametrize("bias", [True, False])
def test_B2_parameter_names_order_and_shapes(cell: str, bias: bool) -> None:
    options = {} if is_step(cell) else {"num_layers": 2, "bidirectional": True}
    if cell == "LSTM":
        options["proj_size"] = 3
    ours, theirs = make_pair(cell, 4, 5, bias=bias, **options)
    assert [(name, p.shape) for name, p in ours.named_parameters()] == [
        (name, p.shape) for name, p in theirs.named_parameters()
    ]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata


@sequence_cells
def test_B2_gate_order_and_both_biases(cell: str) -> None:
    """Each gate's bias alone moves the output as it does in torch.nn."""
    ours, theirs = make_pair(cell, 4, 5)
    input = make_input(cell)
    for name, gate in itertools.product(("bias_ih_l0", "bias_hh_l0"), range(3)):
        for module in (ours, theirs):
            with torch.no_grad():
                getattr(module, name)[5 * gate : 5 * gate + 5] += 1 + gate
        assert_same_on(ours, theirs, input)


@sequence_cells
def test_B3_private_names_that_others_use(cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5, 2)
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert ours._all_weights == theirs._all_weights
    assert_same_bits(ours._flat_weights, theirs._flat_weights)
    assert [ref() for ref in ours._flat_weight_refs] == list(ours.parameters())
    assert not ours._weights_have_changed()
    replacement = torch.zeros(ours.weight_hh_l0.shape)
    del ours.weight_hh_l0
    ours.weight_hh_l0 = replacement
    assert ours._weights_have_changed()
    ours._update_flat_weights()
    assert ours._flat_weights[1] is replacement
    ours._init_flat_weights()
    assert not ours._weights_have_changed()


@every_cell
def test_B4_a_new_parameter_is_used(cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5)
    name = "weight_hh" if is_step(cell) else "weight_hh_l0"
    value = torch.randn_like(getattr(ours, name))
    for module in (ours, theirs):
        setattr(module, name, nn.Parameter(value.clone()))
    assert_same_on(ours, theirs, make_input(cell))


@every_cell
def test_B4_a_plain_tensor_in_place_of_a_parameter_is_used(cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5)
    name = "weight_hh" if is_step(cell) else "weight_hh_l0"
    source = torch.randn_like(getattr(ours, name), requires_grad=True)
    results = []
    for module in (ours, theirs):
        delattr(module, name)
        setattr(module, name, source * 2)
        results.append(gradients(module(make_input_once(cell)), source))
    assert_same_values(*results)


def make_input_once(cell: str) -> Tensor:
    """The same input at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return make_input(cell)


def assert_same_values(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(tensors(ours), tensors(theirs))


@sequence_cells
def test_B4_weights_tied_between_layers(cell: str) -> None:
    ours, theirs = make_pair(cell, 5, 5, 2)
    for module in (ours, theirs):
        module.weight_ih_l1 = module.weight_ih_l0
        module.weight_hh_l1 = module.weight_hh_l0
    assert len(list(ours.parameters())) == len(list(theirs.parameters())) == 6
    assert_same_on(ours, theirs, torch.randn(5, 3, 5))


def test_B4_weights_tied_to_another_module() -> None:
    ours, theirs = (nn.ModuleDict({"rnn": namespace.LSTM(4, 4), "head": nn.Linear(4, 16)}) for namespace in (hsm, nn))
    ours.load_state_dict(theirs.state_dict())
    input, results = torch.randn(5, 3, 4), []
    for model in (ours, theirs):
        model["head"].weight = model["rnn"].weight_ih_l0
        loss = model["head"](model["rnn"](input)[0])
        results.append([loss, gradients(loss, model["head"].weight)])
    assert_same_values(*results)


@every_cell
def test_B4_one_frozen_parameter(cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5)
    frozen, *rest = dict(ours.named_parameters())
    input, results = make_input(cell), []
    for module in (ours, theirs):
        module.get_parameter(frozen).requires_grad_(False)
        leaf_input = leaf(input)
        result = module(leaf_input)
        wanted = [leaf_input, [module.get_parameter(name) for name in rest]]
        results.append(gradients(result, wanted))
    assert_same_values(*results)
    ours(input)[0].sum().backward()
    assert ours.get_parameter(frozen).grad is None


@every_cell
def test_B4_load_state_dict_by_assignment(cell: str) -> None:
    ours, theirs = getattr(hsm, cell)(4, 5, device="meta"), getattr(nn, cell)(4, 5)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    for name, value in theirs.state_dict().items():
        assert getattr(ours, name).data_ptr() == value.data_ptr()
    assert_same_on(ours, theirs, make_input(cell))


@every_cell
def test_B4_functional_call(cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5)
    weights = {name: torch.randn_like(p) for name, p in ours.named_parameters()}
    input, before = make_input(cell), copy.deepcopy(ours.state_dict())
    plain = ours(input)
    assert_same_values(functional_call(ours, weights, (input,)), functional_call(theirs, weights, (input,)))
    assert_same_bits(list(ours.state_dict().values()), list(before.values()))
    assert_same_bits(ours(input), plain)


@every_cell
@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "float", "to", "apply"])
def test_B4_dtype_changes(cell: str, move: str) -> None:
    ours, theirs = make_pair(cell, 4, 5)
    moves: dict[str, Callable[[nn.Module], nn.Module]] = {
        "to": lambda module: module.to(torch.float64),
        "apply": lambda module: module._apply(lambda tensor: tensor.double() * 2),
    }
    change = moves.get(move) or (lambda module: getattr(module, move)())
    ours, theirs = change(ours), change(theirs)
    dtype = next(theirs.parameters()).dtype
    assert {p.dtype for p in ours.parameters()} == {dtype}
    input = make_input(cell, dtype)
    results = [[out.float() for out in tensors(module(input))] for module in (ours, theirs)]
    loose = dtype in (torch.float16, torch.bfloat16)
    torch.testing.assert_close(*results, rtol=0, atol=2e-2 if loose else 1e-5)


@every_cell
def test_B4_in_place_updates_are_seen(cell: str) -> None:
    """An optimiser edits weights in place, between calls."""
    ours, theirs = make_pair(cell, 4, 5)
    input = make_input(cell)
    optimisers = [torch.optim.SGD(module.parameters(), lr=0.5) for module in (ours, theirs)]
    for _ in range(3):
        for module, optimiser in zip((ours, theirs), optimisers, strict=True):
            optimiser.zero_grad()
            tensors(module(input))[0].square().sum().backward()
            optimiser.step()
        assert_same_on(ours, theirs, input)


@step_cells
@pytest.mark.parametrize("bias", [True, False])
def test_B5_cell_parameters(cell: str, bias: bool) -> None:
    module = getattr(hsm, cell)(4, 5, bias=bias)
    names = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * bias
    assert list(module.state_dict()) == names
    assert list(module._parameters) == ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    assert (module.bias_ih is None) == (not bias)


# C. Methods


@sequence_cells
def test_C1_methods_of_torch_nn_are_there(cell: str) -> None:
    """Every public method that torch.nn's class has, and the private ones of RNNBase."""
    names = [name for name in dir(getattr(nn, cell)) if callable(getattr(getattr(nn, cell), name))]
    missing = [name for name in names if not hasattr(getattr(hsm, cell), name)]
    assert missing == []


@sequence_cells
def test_C1_flatten_parameters_may_be_called_in_forward(cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5, 2)

    class Flattening(nn.Module):
        def __init__(self, rnn: nn.Module) -> None:
            super().__init__()
            self.rnn = rnn

        def forward(self, input: Tensor, hx: Any = None) -> Any:
            assert self.rnn.flatten_parameters() is None
            return self.rnn(input, hx)

    assert_same_on(Flattening(ours), Flattening(theirs), make_input(cell))


@pytest.mark.parametrize("batch_first", [False, True])
def test_C1_checks_and_expected_sizes(batch_first: bool) -> None:
    ours, theirs = make_pair("LSTM", 4, 5, 2, proj_size=3, bidirectional=True, batch_first=batch_first)
    input = torch.randn(7, 3, 4)
    for method in ("get_expected_hidden_size", "get_expected_cell_size"):
        expected = getattr(theirs, method)(input, None)
        assert getattr(ours, method)(input, None) == expected
        sizes = torch.tensor([2, 1])
        assert getattr(ours, method)(input, sizes) == getattr(theirs, method)(input, sizes)
    state = tuple(torch.zeros(getattr(theirs, f"get_expected_{part}_size")(input, None)) for part in ("hidden", "cell"))
    assert ours.check_forward_args(input, state, None) is None
    assert ours.check_input(input, None) is None
    wrong = (state[0], state[1][:1])
    assert outcome(lambda: ours.check_forward_args(input, wrong, None)) == outcome(
        lambda: theirs.check_forward_args(input, wrong, None)
    )


@sequence_cells
def test_C1_check_hidden_size(cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5)
    arguments = (torch.zeros(1, 2, 5), (1, 3, 5))
    expected = outcome(lambda: theirs.check_hidden_size(*arguments))
    assert outcome(lambda: ours.check_hidden_size(*arguments)) == expected
    assert ours.check_hidden_size(torch.zeros(1, 3, 5), (1, 3, 5)) is None


@sequence_cells
def test_C1_permute_hidden(cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5)
    state, order = random_state(ours, 3), torch.tensor([2, 0, 1])
    assert_same_bits(ours.permute_hidden(state, order), theirs.permute_hidden(state, order))
    assert ours.permute_hidden(state, None) is state


@sequence_cells
def test_C1_getstate_drops_weak_references(cell: str) -> None:
    module = getattr(hsm, cell)(4, 5)
    assert "_flat_weight_refs" not in module.__getstate__()
    assert "_flat_weight_refs" in vars(module)


@sequence_cells
@pytest.mark.parametrize("bias", [True, False])
def test_C1_setstate_of_old_pickles(cell: str, bias: bool) -> None:
    """Before 1.8 there was no proj_size; long before, all_weights held the tensors."""
    source = getattr(hsm, cell)(4, 5, 2, bias=bias, bidirectional=True)
    old = source.__getstate__()
    old["all_weights"] = [[getattr(source, name) for name in names] for names in old.pop("_all_weights")]
    for name in ("proj_size", "_flat_weights", "_flat_weights_names"):
        del old[name]
    restored = getattr(hsm, cell).__new__(getattr(hsm, cell))
    restored.__setstate__(old)
    assert restored.proj_size == 0
    assert restored._flat_weights_names == source._flat_weights_names
    assert_same_bits(restored(torch.ones(5, 3, 4)), source(torch.ones(5, 3, 4)))


@sequence_cells
def test_C1_replicas_have_their_own_flat_weights(cell: str) -> None:
    module = getattr(hsm, cell)(4, 5)
    replica = module._replicate_for_data_parallel()
    assert replica._flat_weights is not module._flat_weights
    assert replica._flat_weights_names is not module._flat_weights_names
    replica.weight_hh_l0 = torch.zeros(module.weight_hh_l0.shape)
    assert module._flat_weights[1] is module.weight_hh_l0


REPRS = [
    ("LSTM", (4, 5), {}),
    ("LSTM", (4, 5, 2, False, True, 0.1, True, 3), {}),
    ("GRU", (4, 5), {"num_layers": 2, "bidirectional": True}),
    ("GRU", (4, 5), {"batch_first": True, "bias": False}),
    ("LSTMCell", (4, 5), {}),
    ("GRUCell", (4, 5, False), {}),
]


@pytest.mark.parametrize(("cell", "arguments", "options"), REPRS)
def test_C2_repr(cell: str, arguments: tuple, options: dict[str, Any]) -> None:
    ours, theirs = make_pair(cell, *arguments, **options)
    assert repr(ours) == repr(theirs)


def test_C2_repr_in_full() -> None:
    assert repr(hsm.LSTM(4, 5, 2, False, True, 0.1, True, 3)) == (
        "LSTM(4, 5, proj_size=3, num_layers=2, bias=False, batch_first=True, dropout=0.1, bidirectional=True)"
    )


# D. Forward behaviour


@sequence_cells
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_D1_batched_and_unbatched(cell: str, batch_first: bool, with_state: bool) -> None:
    ours, theirs = make_pair(cell, 4, 5, 2, batch_first=batch_first, bidirectional=True)
    for lead, batch in (((6, 3), 6 if batch_first else 3), ((6,), None)):
        hx = random_state(ours, batch) if with_state else None
        input = torch.randn(*lead, 4)
        assert_same(run(ours, input, hx), run(theirs, input, hx))


@sequence_cells
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_D1_packed_sequence(cell: str, enforce_sorted: bool) -> None:
    ours, theirs = make_pair(cell, 4, 5, 2, bidirectional=True)
    lengths = torch.tensor([5, 3, 2] if enforce_sorted else [2, 5, 3])
    packed = rnn_utils.pack_padded_sequence(torch.randn(5, 3, 4), lengths, enforce_sorted=enforce_sorted)
    for hx in (None, random_state(ours, 3)):
        (output, state), (wanted, wanted_state) = ours(packed, hx), theirs(packed, hx)
        assert type(output) is rnn_utils.PackedSequence
        assert_same_values([output, state], [wanted, wanted_state])
        assert_same_bits(output[1:], wanted[1:])


@every_cell
def test_D2_returns_plain_tuples(cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5)
    result, wanted = ours(make_input_once(cell)), theirs(make_input_once(cell))
    assert structure(result) == structure(wanted)


def structure(value: Any) -> Any:
    """Types and shapes of a result, without its numbers."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape
    return type(value), [structure(item) for item in value]


@pytest.mark.parametrize("cell", ["LSTM", "LSTMCell"])
def test_D2_state_may_be_a_list(cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5)
    state = [torch.randn(*(() if is_step(cell) else (1,)), 3, 5) for _ in range(2)]
    input = make_input(cell)
    assert_same_values(ours(input, state), theirs(input, state))
    assert_same_bits(ours(input, state), ours(input, tuple(state)))


@sequence_cells
def test_D2_state_is_never_batch_first(cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5, 2, batch_first=True)
    input, state = torch.randn(3, 6, 4), random_state(ours, 3)
    assert_same(run(ours, input, state), run(theirs, input, state))
    assert tensors(ours(input, state)[1])[0].shape == (2, 3, 5)


def test_D2_widths_with_projection() -> None:
    output, (h, c) = hsm.LSTM(4, 5, proj_size=3, bidirectional=True)(torch.randn(6, 2, 4))
    assert output.shape == (6, 2, 6)
    assert h.shape == (2, 2, 3)
    assert c.shape == (2, 2, 5)


@sequence_cells
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("grad", [True, False])
def test_D2_last_state_does_not_alias_output_or_input(cell: str, length: int, grad: bool) -> None:
    module = getattr(hsm, cell)(4, 5)
    hx = random_state(module, 3)
    with torch.set_grad_enabled(grad):
        output, state = module(torch.randn(length, 3, 4), hx)
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors([output, state, hx])]
    assert len(set(storages)) == len(storages)


@every_cell
@pytest.mark.parametrize("dtype", DTYPES)
def test_D3_no_state_means_zeros(cell: str, dtype: torch.dtype) -> None:
    module = getattr(hsm, cell)(4, 5, dtype=dtype)
    input = make_input(cell, dtype)
    result = module(input)
    last = result if is_step(cell) else result[1]
    zeros = map_tensors(torch.zeros_like, last)
    assert {tensor.dtype for tensor in tensors(result)} == {dtype}
    assert_same_bits(result, module(input, zeros))


@every_cell
def test_D3_gradients_reach_input_state_and_every_parameter(cell: str) -> None:
    options = {} if is_step(cell) else {"num_layers": 2, "bidirectional": True}
    ours, theirs = make_pair(cell, 4, 5, **options)
    hx = state_for(ours, cell)
    got, wanted = (run(module, make_input_once(cell), hx) for module in (ours, theirs))
    assert_same(got, wanted)
    assert all(value.any() for name, value in got.items() if name.startswith("grad"))


def state_for(module: nn.Module, cell: str) -> Any:
    """A state for a batch of three."""
    if not is_step(cell):
        return random_state(module, 3)
    state = tuple(torch.randn(3, 5) for _ in range(2))
    return state if cell == "LSTMCell" else state[0]


@every_cell
def test_D3_state_gets_gradients_from_a_frozen_module(cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5)
    hx = leaf(state_for(ours, cell))
    for module in (ours, theirs):
        module.requires_grad_(False)
    input = make_input(cell)
    assert_same_values(gradients(ours(input, hx), hx), gradients(theirs(input, hx), hx))


def transparent(cell: str, p: float) -> nn.Module:
    """Two layers that only squash their input: the mask between them shows as zeros in the output.

    Biases hold the gates open or shut, so no state is carried and no other unit is read.
    """
    module = getattr(hsm, cell)(20, 20, 2, dropout=p)
    gates = {"LSTM": (50.0, -50.0, 0.0, 50.0), "GRU": (0.0, -50.0, 0.0)}[cell]
    candidate = 2
    with torch.no_grad():
        for layer in range(2):
            for name in ("weight_ih", "weight_hh", "bias_hh"):
                module.get_parameter(f"{name}_l{layer}").zero_()
            weight = module.get_parameter(f"weight_ih_l{layer}").view(len(gates), 20, 20)
            weight[candidate] = torch.eye(20)
            module.get_parameter(f"bias_ih_l{layer}").view(len(gates), 20).copy_(torch.tensor(gates)[:, None])
    return module


@sequence_cells
def test_D4_dropout_is_elementwise_and_only_between_layers(cell: str) -> None:
    module = transparent(cell, 0.5)
    output, state = module(torch.ones(20, 20, 20))
    kept = output.abs() > 1e-6
    assert 0.48 < kept.float().mean() < 0.52
    for dim in range(3):
        assert kept.float().mean(dim).std() < 0.2, "the mask is tied along a dimension"
    first_layer = tensors(state)[0][0]
    assert first_layer.all(), "the state of the lower layer is not dropped"
    values = output[kept]
    torch.testing.assert_close(values, values[0].expand_as(values))


@sequence_cells
def test_D4_dropout_scales_what_it_keeps(cell: str) -> None:
    """What is kept is divided by 1 - p before the next layer squashes it."""
    output, state = transparent(cell, 0.75)(torch.full((10, 10, 20), 0.1))
    lower = tensors(state)[0][0, 0, 0]
    squash = (lambda x: x.tanh().tanh()) if cell == "LSTM" else torch.tanh
    torch.testing.assert_close(output.max(), squash(lower * 4))


@sequence_cells
def test_D4_no_dropout_in_eval_mode(cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5, 3, dropout=0.5, bidirectional=True)
    assert_same_on(ours.eval(), theirs.eval(), make_input(cell))


# D5, the messages, is in test_errors.py.


@sequence_cells
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batch", [0, 3, None])
def test_D6_no_steps_return_an_empty_output_and_the_state(
    backend: str, cell: str, batch_first: bool, batch: int | None
) -> None:
    module = getattr(hsm, cell)(4, 5, 2, batch_first=batch_first, bidirectional=True)
    lead = (0,) if batch is None else (batch, 0) if batch_first else (0, batch)
    hx = leaf(random_state(module, batch))
    output, state = module(torch.zeros(*lead, 4), hx)
    assert output.shape == (*lead, 10)
    assert_same_bits(state, hx)
    for grad in gradients(map_tensors(lambda part: part.sum(), state), hx):
        assert grad.shape == tensors(hx)[0].shape
    assert not any(part.any() for part in tensors(module(torch.zeros(*lead, 4))[1]))


@sequence_cells
def test_D6_lengths_of_zero(backend: str, cell: str) -> None:
    module = getattr(hsm, cell)(4, 5)
    hx = random_state(module, 3)
    output, state = module(torch.randn(6, 3, 4), hx, lengths=torch.zeros(3, dtype=torch.long))
    assert not output.any()
    assert_same_bits(state, hx)


def assert_same_in_any_layout(backend: str, ours: Any, theirs: Any) -> None:
    """The kernels give the same bits; the reference need not: MKL on AMD rounds by the layout of its operands."""
    native = backend == "auto" and hsm.build_info().loaded
    (assert_same_bits if native else assert_same_values)(ours, theirs)


@sequence_cells
def test_D6_state_of_one_sequence_is_broadcast(backend: str, cell: str) -> None:
    module = getattr(hsm, cell)(4, 5, 2, bidirectional=True)
    input, one = torch.randn(6, 3, 4), leaf(random_state(module, 1))
    full = leaf(map_tensors(lambda part: part.repeat(1, 3, 1), one))
    result, wanted = module(input, one), module(input, full)
    assert_same_in_any_layout(backend, result, wanted)
    sums = [grad.sum(1, keepdim=True) for grad in gradients(wanted, full)]
    assert_same_values(gradients(result, one), sums)


@sequence_cells
def test_D6_state_of_one_sequence_is_broadcast_over_a_packed_batch(backend: str, cell: str) -> None:
    module = getattr(hsm, cell)(4, 5)
    packed = rnn_utils.pack_sequence([torch.randn(n, 4) for n in (2, 4, 1)], enforce_sorted=False)
    one = random_state(module, 1)
    full = map_tensors(lambda part: part.repeat(1, 3, 1), one)
    assert_same_bits(module(packed, one), module(packed, full))


@sequence_cells
def test_D6_state_with_any_strides(backend: str, cell: str) -> None:
    module = getattr(hsm, cell)(4, 5, 2)
    input, hx = torch.randn(6, 3, 4), random_state(module, 3)
    wanted = module(input, hx)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda part: part.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        lambda part: torch.stack([part, part], dim=1)[:, 0],
        lambda part: torch.cat([part, part], dim=2)[..., : part.size(2)],
        lambda part: part.flip(1).flip(1),
    ]
    for lay_out in layouts:
        assert_same_in_any_layout(backend, module(input, map_tensors(lay_out, hx)), wanted)


# The clear errors of D6 are in test_errors.py.


@every_cell
def test_D7_empty_batch(cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5)
    input = torch.zeros(0, 4) if is_step(cell) else torch.zeros(5, 0, 4)
    assert_same_on(ours, theirs, input)


@every_cell
@pytest.mark.parametrize("dtype", DTYPES)
def test_D8_every_dtype_runs(cell: str, dtype: torch.dtype) -> None:
    module = getattr(hsm, cell)(4, 5, dtype=dtype)
    result = run(module, make_input(cell, dtype))
    assert {value.dtype for value in result.values()} == {dtype}
    assert all(value.isfinite().all() for value in result.values())


@pytest.fixture(params=["ieee", "none"])
def full_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch's own switch, set so that float32 means float32."""
    knob = torch.backends.mkldnn.rnn
    before = knob.fp32_precision
    knob.fp32_precision = request.param
    yield
    knob.fp32_precision = before


@pytest.mark.usefixtures("full_precision")
@sequence_cells
def test_D8_float32_is_float32_unless_less_was_asked_for(cell: str) -> None:
    module = getattr(hsm, cell)(64, 64)
    input = torch.randn(20, 8, 64)
    exact = copy.deepcopy(module).double()(input.double())[0]
    assert (module(input)[0].double() - exact).abs().max() < 1e-6


@every_cell
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_D9_autocast_casts_input_weights_and_state(backend: str, cell: str, dtype: torch.dtype) -> None:
    """One rule for all four: as if everything had been cast by hand, in and out."""
    module = getattr(hsm, cell)(4, 5)
    input, hx = leaf(make_input(cell)), leaf(state_for(module, cell))
    with torch.autocast("cpu", dtype):
        result = module(input, hx)
    assert {tensor.dtype for tensor in tensors(result)} == {dtype}
    by_hand = copy.deepcopy(module).to(dtype)
    hand_input, hand_hx = leaf(input.to(dtype)), leaf(map_tensors(lambda t: t.to(dtype), hx))
    wanted = by_hand(hand_input, hand_hx)
    assert_same_bits(result, wanted)
    got = gradients(result, [input, hx, list(module.parameters())])
    expected = gradients(wanted, [hand_input, hand_hx, list(by_hand.parameters())])
    assert {grad.dtype for grad in got} == {torch.float32}
    assert_same_bits(got, [grad.float() for grad in expected])


@every_cell
def test_D9_autocast_lets_mixed_dtypes_through(backend: str, cell: str) -> None:
    """Under autocast an input that another layer has cast already is no error."""
    module = getattr(hsm, cell)(4, 5)
    input = make_input(cell)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(module(input.bfloat16()), module(input))


@every_cell
def test_D9_autocast_takes_the_state_it_returned(backend: str, cell: str) -> None:
    """The state of the call before is in the autocast dtype, the next input is not; a fresh state may be either."""
    module = getattr(hsm, cell)(4, 5)
    input = make_input(cell)
    with torch.autocast("cpu", torch.bfloat16):
        result = module(input)
        state = result if is_step(cell) else result[1]
        again = module(input, state)
        assert_same_bits(module(input, map_tensors(Tensor.float, state)), again)
        if not is_step(cell):
            reset_mask = torch.ones(5, 3, dtype=torch.bool)
            assert_same_bits(
                module(input, reset_mask=reset_mask, reset_hx=state),
                module(input, reset_mask=reset_mask, reset_hx=map_tensors(Tensor.float, state)),
            )


@every_cell
def test_D9_disabled_autocast_changes_nothing(cell: str) -> None:
    module = getattr(hsm, cell)(4, 5)
    input = make_input(cell)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert_same_bits(module(input), module(input))
        assert tensors(module(input))[0].dtype == torch.float32


@every_cell
def test_D10_forward_hooks(cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5)
    seen: list[Any] = []

    def halve(_: nn.Module, arguments: tuple, options: dict[str, Any]) -> Any:
        return (arguments[0] / 2, *arguments[1:]), options

    def record(_: nn.Module, arguments: tuple, result: Any) -> None:
        seen.append([arguments[0], result])

    for module in (ours, theirs):
        module.register_forward_pre_hook(halve, with_kwargs=True)
        module.register_forward_hook(record)
        module(make_input_once(cell))
    assert_same_values(*seen)


@every_cell
def test_D10_full_backward_hooks(cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5)
    seen: list[Any] = []
    for module in (ours, theirs):
        module.register_full_backward_pre_hook(lambda _, grads: seen.append(grads))
        module.register_full_backward_hook(lambda _, grads, __: seen.append(grads))
        input = make_input_once(cell).requires_grad_()
        tensors(module(input))[0].sum().backward()
    assert_same_values(seen[:2], seen[2:])


@every_cell
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_D10_without_gradients(backend: str, cell: str, mode: Any) -> None:
    module = getattr(hsm, cell)(4, 5)
    input = make_input(cell)
    with mode():
        result = module(input)
    assert not any(tensor.requires_grad for tensor in tensors(result))
    assert_same_values(result, [tensor.detach() for tensor in tensors(module(input))])


@every_cell
def test_D10_backward_in_eval_mode(backend: str, cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5)
    assert_same_on(ours.eval(), theirs.eval(), make_input(cell))


# E. Ecosystem


@every_cell
def test_E1_types(cell: str) -> None:
    module = getattr(hsm, cell)(4, 5)
    assert isinstance(module, nn.RNNCellBase if is_step(cell) else nn.RNNBase)
    assert not isinstance(module, getattr(nn, cell))


class Tagger(nn.Module):
    """A small model around torch.nn's modules, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 5, 2, bidirectional=True))
        self.decoder = nn.LSTM(10, 6, proj_size=3, batch_first=True)
        self.again = self.decoder
        self.cells = nn.ModuleList([nn.LSTMCell(6, 6), nn.GRUCell(6, 6)])

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        encoded, _ = self.encoder(input)
        _, (_, c) = self.again(encoded, hx)
        h, _ = self.cells[0](c[0])
        return self.cells[1](h)


@pytest.mark.parametrize("training", [True, False])
def test_E1_convert_swaps_modules_and_shares_parameters(training: bool) -> None:
    theirs = Tagger().train(training)
    ours = copy.deepcopy(theirs)
    parameters = dict(ours.named_parameters())
    names = {"encoder.1", "decoder", "again", "cells.0", "cells.1"}
    conversion = hsm.convert(ours)
    assert set(conversion.converted) == names
    assert not conversion.left
    assert ours.again is ours.decoder
    for name in names:
        swapped, original = ours.get_submodule(name), theirs.get_submodule(name)
        assert type(swapped) is getattr(hsm, type(original).__name__)
        assert repr(swapped) == repr(original)
        assert swapped.training == training
    assert all(parameter is parameters[name] for name, parameter in ours.named_parameters())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same_on(ours, theirs, torch.randn(7, 3, 4))


def test_E1_convert_says_what_it_left() -> None:
    class Custom(nn.LSTM):
        pass

    model = nn.ModuleDict({"custom": Custom(4, 5), "hooked": nn.GRU(4, 5), "plain": nn.GRU(4, 5)})
    model["hooked"].register_forward_hook(lambda *_: None)
    custom, hooked = model["custom"], model["hooked"]
    conversion = hsm.convert(model)
    assert conversion.converted == ("plain",)
    assert set(conversion.left) == {"custom", "hooked"}
    assert "subclass" in conversion.left["custom"]
    assert "hooks" in conversion.left["hooked"]
    assert model["custom"] is custom
    assert model["hooked"] is hooked


@every_cell
def test_E1_dynamic_quantization_leaves_it_and_takes_to_torch(cell: str) -> None:
    """As with any subclass of torch.nn's: the exact type decides."""
    model = nn.ModuleDict({"rnn": getattr(hsm, cell)(4, 5)})
    kinds = {getattr(nn, cell)}
    quantize = torch.ao.quantization.quantize_dynamic
    assert type(quantize(model, kinds)["rnn"]) is getattr(hsm, cell)
    model["rnn"] = model["rnn"].to_torch()
    assert type(quantize(model, kinds)["rnn"]) is getattr(torch.ao.nn.quantized.dynamic, cell)


def recurrent_weight(cell: str) -> str:
    return "weight_hh" if is_step(cell) else "weight_hh_l0"


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def weight_drop(module: nn.Module, name: str) -> None:
    """As AWD-LSTM does it: the raw weight is the parameter, the module gets a dropped tensor."""
    raw = module._parameters.pop(name)
    module.register_parameter(name + "_raw", nn.Parameter(raw.detach().clone()))

    def drop(module: nn.Module, _: Any) -> None:
        torch.manual_seed(17)
        setattr(module, name, nn.functional.dropout(getattr(module, name + "_raw"), 0.5))

    drop(module, None)
    module.register_forward_pre_hook(drop)


RECIPES: dict[str, Callable[[nn.Module, str], object]] = {
    "old weight_norm": nn.utils.weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrize": lambda module, name: nn.utils.parametrize.register_parametrization(module, name, Halved()),
    "prune": lambda module, name: prune.l1_unstructured(module, name, 0.5),
    "weight drop": weight_drop,
}


@every_cell
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_E2_weight_recipes(cell: str, recipe: str) -> None:
    ours, theirs = make_pair(cell, 4, 5, dtype=torch.float64)
    for module in (ours, theirs):
        torch.manual_seed(13)
        RECIPES[recipe](module, recurrent_weight(cell))
    input = make_input(cell, torch.float64)
    optimisers = [torch.optim.SGD(module.parameters(), lr=0.5) for module in (ours, theirs)]
    for _ in range(2):
        assert_same_on(ours, theirs, input)
        for module, optimiser in zip((ours, theirs), optimisers, strict=True):
            optimiser.zero_grad()
            tensors(module(input))[0].square().sum().backward()
            optimiser.step()
    assert_same_on(ours.eval(), theirs.eval(), input)


@every_cell
def test_E2_recipes_can_be_undone(cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5)
    name = recurrent_weight(cell)
    for module in (ours, theirs):
        RECIPES["prune"](module, name)
        prune.remove(module, name)
        RECIPES["parametrize"](module, name)
        nn.utils.parametrize.remove_parametrizations(module, name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same_on(ours, theirs, make_input(cell))


@every_cell
def test_E2_a_copy_of_a_parametrized_module_is_its_own(cell: str) -> None:
    module = getattr(hsm, cell)(4, 5)
    RECIPES["parametrize"](module, recurrent_weight(cell))
    clone, input = copy.deepcopy(module), make_input(cell)
    before = clone(input)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert_same_bits(clone(input), before)
    assert not any(tensor.any() for tensor in tensors(module(input)))


def by_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def by_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_cell
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, by_pickle, by_torch_save])
def test_E2_copies(cell: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    options = {} if is_step(cell) else {"num_layers": 2, "bidirectional": True}
    module = getattr(hsm, cell)(4, 5, **options).eval()
    clone, input = copied(module), make_input(cell)
    assert type(clone) is type(module)
    assert repr(clone) == repr(module)
    assert not clone.training
    assert_same_bits(clone(input), module(input))
    if copied is not copy.copy:
        assert not {p.data_ptr() for p in clone.parameters()} & {p.data_ptr() for p in module.parameters()}
    run(clone, input)


@every_cell
def test_E2_state_dicts_go_both_ways_through_files(cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5)
    for source, target in ((ours, getattr(nn, cell)(4, 5)), (theirs, getattr(hsm, cell)(4, 5))):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
        assert_same_on(target, source, make_input_once(cell))


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Compiles from nothing, and leaves nothing behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def everything(module: nn.Module, length: int, batch: int) -> dict[str, Any]:
    """Every boundary argument for an input (L, N, I)."""
    return {
        "reset_mask": torch.rand(length, batch) < 0.3,
        "reset_hx": random_state(module, 1),
        "detach_mask": torch.rand(length, batch) < 0.3,
        "lengths": torch.randint(0, length + 1, (batch,)),
        "return_states": True,
    }


COMPILED = [
    ("LSTM", {"num_layers": 2, "bidirectional": True}),
    ("GRU", {}),
    ("LSTMCell", {}),
    ("GRUCell", {}),
]


# Compiled through the ops only: the reference is a Python loop, which can only be unrolled.


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("cell", "options"), COMPILED)
def test_E3_compile_full_graph(cell: str, options: dict[str, Any]) -> None:
    module = getattr(hsm, cell)(4, 5, **options)
    input, hx = make_input(cell), state_for(module, cell)
    wanted = run(module, input, hx)
    module.compile(backend="aot_eager", fullgraph=True)
    assert_same(run(module, input, hx), wanted)
    with torch.no_grad():
        result = tensors(module(input, hx))
    assert_same_values(result, [wanted[f"out[{i}]"] for i in range(len(result))])


@pytest.mark.usefixtures("fresh_dynamo")
@sequence_cells
def test_E3_compile_with_boundaries(cell: str) -> None:
    module = getattr(hsm, cell)(4, 5, 2, bidirectional=True)
    input, hx, extras = make_input(cell), random_state(module, 3), everything(module, 5, 3)
    wanted = run(module, input, hx, **extras)
    module.compile(backend="aot_eager", fullgraph=True)
    assert_same(run(module, input, hx, **extras), wanted)


@pytest.mark.usefixtures("fresh_dynamo")
@sequence_cells
def test_E3_compile_once_for_every_length_and_batch(cell: str) -> None:
    module = getattr(hsm, cell)(4, 5)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for length, batch in ((5, 3), (7, 2), (11, 6), (300, 4)):
        input = torch.randn(length, batch, 4)
        assert_same_values(compiled(input), module(input))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
@sequence_cells
def test_E3_compile_with_a_dynamic_batch_and_a_static_state(cell: str) -> None:
    """As where the state is held by a module, and only the input's batch has changed between calls."""
    module, input = getattr(hsm, cell)(4, 5), torch.randn(6, 3, 4)
    hx = random_state(module, 3)
    for part in tensors(hx):
        torch._dynamo.mark_static(part)
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    assert_same_values(compiled(input, hx), module(input, hx))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@sequence_cells
def test_E3_compile_with_inductor(cell: str) -> None:
    module = getattr(hsm, cell)(4, 5, 2)
    input, hx = make_input(cell), random_state(module, 3)
    wanted = run(module, input, hx)
    module.compile(fullgraph=True)
    assert_same(run(module, input, hx), wanted)


@sequence_cells
@pytest.mark.parametrize("batch_first", [False, True])
def test_E3_export_with_dynamic_length_and_batch(cell: str, batch_first: bool) -> None:
    module = getattr(hsm, cell)(4, 5, 2, bidirectional=True, batch_first=batch_first)
    dynamic = {"input": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(module, (torch.randn(6, 3, 4),), dynamic_shapes=dynamic)
    for lead in ((6, 3), (2, 9), (15, 4)):
        input = torch.randn(*lead, 4)
        assert_same_bits(program.module()(input), module(input))


@sequence_cells
def test_E3_export_with_state_and_boundaries(cell: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = getattr(hsm, cell)(4, 5)

        def forward(self, input: Tensor, hx: Any, reset_mask: Tensor, lengths: Tensor) -> Any:
            return self.rnn(input, hx, reset_mask=reset_mask, lengths=lengths)

    model = Model()

    def arguments(length: int, batch: int) -> tuple[Any, ...]:
        extras = everything(model.rnn, length, batch)
        hx = random_state(model.rnn, batch)
        return torch.randn(length, batch, 4), hx, extras["reset_mask"], extras["lengths"]

    both = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    state = {1: torch.export.Dim.DYNAMIC}
    shapes = (
        both,
        (state, state) if cell == "LSTM" else state,
        both,
        {0: torch.export.Dim.DYNAMIC},
    )
    program = torch.export.export(model, arguments(6, 3), dynamic_shapes=shapes)
    for length, batch in ((6, 3), (9, 2)):
        values = arguments(length, batch)
        assert_same_bits(program.module()(*values), model(*values))


@pytest.mark.slow
def test_E3_ahead_of_time_inductor(tmp_path: Any) -> None:
    module = hsm.LSTM(4, 5).eval()
    dynamic = {"input": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(module, (torch.randn(6, 3, 4),), dynamic_shapes=dynamic)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for lead in ((6, 3), (9, 2)):
        input = torch.randn(*lead, 4)
        assert_same_values(loaded(input), [out.detach() for out in tensors(module(input))])


@every_cell
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_E3_make_fx(cell: str, tracing_mode: str) -> None:
    module = getattr(hsm, cell)(4, 5)
    weights = dict(module.named_parameters())
    input = make_input(cell)

    def call(weights: dict[str, Tensor], input: Tensor) -> Any:
        return functional_call(module, weights, (input,))

    make_fx = torch.fx.experimental.proxy_tensor.make_fx
    graph = make_fx(call, tracing_mode=tracing_mode)(weights, input)
    other = make_input(cell)
    assert_same_values(graph(weights, other), call(weights, other))


@every_cell
def test_E3_fx_with_the_module_as_a_leaf(cell: str) -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            is_rnn = isinstance(module, (nn.RNNBase, nn.RNNCellBase))
            return is_rnn or super().is_leaf_module(module, name)

    model = nn.Sequential(nn.Linear(4, 4), getattr(hsm, cell)(4, 5))
    graph = torch.fx.GraphModule(model, Tracer().trace(model))
    input = make_input(cell)
    assert_same_bits(graph(input), model(input))
    assert [node.op for node in graph.graph.nodes].count("call_module") == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@every_cell
def test_E4_torchscript_is_refused_and_works_through_to_torch(cell: str) -> None:
    module = getattr(hsm, cell)(4, 5)
    with pytest.raises((RuntimeError, torch.jit.frontend.NotSupportedError)):
        torch.jit.script(nn.Sequential(module))

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = module.to_torch()

        def forward(self, input: Tensor) -> Tensor:
            return self.rnn(input)[0]

    input = make_input(cell)
    assert_same_values(torch.jit.script(Parent())(input), Parent()(input))


@pytest.fixture
def one_process_group() -> Iterator[None]:
    """A gloo process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
@sequence_cells
def test_E5_distributed_data_parallel(cell: str) -> None:
    module = getattr(hsm, cell)(4, 5, 2)
    wanted = run(module, make_input_once(cell))
    parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(module))
    tensors(weighted_sum(parallel(make_input_once(cell))))[0].backward()
    for name, parameter in parallel.module.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[f"grad {name}"])


def weighted_sum(result: Any) -> Tensor:
    """The scalar whose gradients `run` gives."""
    outputs = tensors(result)
    weights = weightings(outputs, outputs[0].dtype)
    return sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))


@pytest.mark.usefixtures("one_process_group")
@sequence_cells
def test_E5_fully_sharded_data_parallel(cell: str) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    module = getattr(hsm, cell)(4, 5, 2)
    wanted = run(module, make_input_once(cell))
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    sharded = fsdp.fully_shard(copy.deepcopy(module), mesh=mesh)
    weighted_sum(sharded(make_input_once(cell))).backward()
    for name, parameter in sharded.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), wanted[f"grad {name}"])


@every_cell
def test_E5_several_threads(cell: str) -> None:
    """One module, and one module per thread, forward and backward at once."""
    shared = getattr(hsm, cell)(16, 16)
    inputs = [torch.randn(*((3, 16) if is_step(cell) else (20, 3, 16))) for _ in range(4)]
    wanted = [run(shared, input) for input in inputs]
    results: dict[int, list[dict[str, Tensor]]] = {}

    def work(index: int) -> None:
        own = copy.deepcopy(shared)
        results[index] = [run(m, inputs[index]) for m in (shared, own) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 1, 2, 3]
    for index, runs in results.items():
        for result in runs:
            assert_same(result, wanted[index])


@sequence_cells
@pytest.mark.parametrize("batch_first", [False, True])
def test_E6_packing_utilities(cell: str, batch_first: bool) -> None:
    """Every way in and out of a PackedSequence, with the module between them."""
    ours, theirs = make_pair(cell, 4, 5, 2, batch_first=batch_first, bidirectional=True)
    sequences = [torch.randn(length, 4) for length in (2, 5, 1)]
    lengths = torch.tensor([2, 5, 1])
    padded = rnn_utils.pad_sequence(sequences, batch_first=batch_first)
    packs = [
        rnn_utils.pack_sequence(sequences, enforce_sorted=False),
        rnn_utils.pack_padded_sequence(padded, lengths, batch_first, enforce_sorted=False),
    ]
    for packed in packs:
        (output, state), (wanted, wanted_state) = ours(packed), theirs(packed)
        assert_same_values(state, wanted_state)
        assert_same_values(
            rnn_utils.pad_packed_sequence(output, batch_first, total_length=6)[0],
            rnn_utils.pad_packed_sequence(wanted, batch_first, total_length=6)[0],
        )
        alone = [theirs(sequence)[0] for sequence in sequences]
        assert_same_values(rnn_utils.unpack_sequence(output), alone)
        dense, dense_lengths = rnn_utils.pad_packed_sequence(output, batch_first)
        assert_same_values(rnn_utils.unpad_sequence(dense, dense_lengths, batch_first), alone)
        inverse = rnn_utils.invert_permutation(output.sorted_indices)
        assert torch.equal(inverse, output.unsorted_indices)


@every_cell
@pytest.mark.parametrize("training", [True, False])
def test_E7_to_torch_shares_parameters(cell: str, training: bool) -> None:
    options = {} if is_step(cell) else {"num_layers": 2, "bidirectional": True, "dropout": 0.0}
    ours = getattr(hsm, cell)(4, 5, **options).train(training)
    theirs = ours.to_torch()
    assert type(theirs) is getattr(nn, cell)
    assert theirs.training == training
    assert all(a is b for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert_same_on(ours, theirs, make_input(cell))
    back = hsm.from_torch(theirs)
    assert type(back) is type(ours)
    assert repr(back) == repr(ours)
    assert all(a is b for a, b in zip(ours.parameters(), back.parameters(), strict=True))


@every_cell
def test_E7_to_torch_is_independent_otherwise(cell: str) -> None:
    """A twin shares parameters, not the registries that hold them."""
    ours = getattr(hsm, cell)(4, 5)
    theirs, input = ours.to_torch(), make_input(cell)
    before = ours(input)
    setattr(theirs, recurrent_weight(cell), nn.Parameter(torch.zeros(20, 5)[: before_rows(ours)]))
    theirs.register_buffer("extra", torch.zeros(1))
    theirs.eval()
    assert_same_bits(ours(input), before)
    assert ours.training
    assert "extra" not in ours.state_dict()


def before_rows(module: nn.Module) -> int:
    return next(module.parameters()).size(0)


@sequence_cells
def test_E7_onnx_through_to_torch(cell: str) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(getattr(hsm, cell)(4, 5).eval().to_torch(), (torch.randn(6, 3, 4),), dynamo=True)
    assert cell in {node.op_type for node in program.model.graph}


# F. Learned by swapping classes into torch's own test suite


@sequence_cells
def test_F1_forward_computes_with_flat_weights(cell: str) -> None:
    """What sits in `_flat_weights` after `_update_flat_weights()` is what counts."""
    ours, theirs = make_pair(cell, 4, 5)
    for module in (ours, theirs):
        module._flat_weights[1] = torch.ones_like(module._flat_weights[1])
    assert_same_values(ours(torch.ones(5, 3, 4)), theirs(torch.ones(5, 3, 4)))


@sequence_cells
def test_F1_flat_weights_follow_pruning(cell: str) -> None:
    module = getattr(hsm, cell)(4, 5)
    prune.l1_unstructured(module, "weight_hh_l0", 0.5)
    module(torch.ones(5, 3, 4))
    assert module._flat_weights[1] is module.weight_hh_l0


# F2, the messages of the cells, is in test_errors.py.


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Objects live on in reference cycles, as the garbage collector does not run."""
    gc.disable()
    yield
    gc.enable()


@every_cell
@pytest.mark.usefixtures("without_collector")
def test_F3_load_state_dict_leaves_no_reference_cycle(cell: str) -> None:
    module = getattr(hsm, cell)(4, 5)
    state = copy.deepcopy(module.state_dict())
    module.load_state_dict(state)
    held = [weakref.ref(module), *map(weakref.ref, state.values())]
    del module, state
    assert [reference() for reference in held] == [None] * len(held)


@sequence_cells
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lead", [(6, 3), (6,)], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_F3_fake_tensors_have_eager_strides(
    cell: str, batch_first: bool, lead: tuple[int, ...], options: dict[str, Any]
) -> None:
    module = getattr(hsm, cell)(4, 5, batch_first=batch_first, **options)
    input = torch.randn(*lead, 4)
    eager = module(input)
    with torch._subclasses.FakeTensorMode() as mode:
        weights = {name: mode.from_tensor(p) for name, p in module.named_parameters()}
        fake = functional_call(module, weights, (mode.from_tensor(input),))
    assert [(out.shape, out.stride()) for out in tensors(fake)] == [(out.shape, out.stride()) for out in tensors(eager)]


@every_cell
def test_F4_cond(cell: str) -> None:
    module = getattr(hsm, cell)(4, 5)

    def both(input: Tensor) -> Tensor:
        return torch.cond(
            input.sum() > 0,
            lambda x: tensors(module(x))[0],
            lambda x: tensors(module(2 * x))[0],
            (input,),
        )

    for sign, factor in ((1, 1), (-1, 2)):
        input = sign * make_input(cell).abs()
        assert_same_values(both(input), tensors(module(factor * input))[0])


@every_cell
@pytest.mark.parametrize("reentrant", [False, True])
def test_F4_checkpoint(backend: str, cell: str, reentrant: bool) -> None:
    module = getattr(hsm, cell)(4, 5)

    class Checkpointed(nn.Module):
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            run = torch.utils.checkpoint.checkpoint
            return tuple(tensors(run(flat, input, use_reentrant=reentrant)))

    def flat(input: Tensor) -> Any:
        return tuple(tensors(module(input)))

    input = leaf(make_input(cell))
    loss = weighted_sum(Checkpointed()(input))
    loss.backward()
    wanted = run(module, input)
    torch.testing.assert_close(input.grad, wanted["grad input"])
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[f"grad {name}"])


def test_F4_checkpoint_repeats_dropout() -> None:
    module = hsm.LSTM(4, 5, 3, dropout=0.5)
    input, results = torch.randn(6, 3, 4), []
    for checkpointed in (False, True):
        torch.manual_seed(23)
        leaf_input = leaf(input)
        call = torch.utils.checkpoint.checkpoint if checkpointed else lambda f, x, **_: f(x)
        output = call(lambda x: module(x)[0], leaf_input, use_reentrant=False)
        (grad,) = torch.autograd.grad(output.square().sum(), leaf_input)
        results.append([output, grad])
    assert_same_values(*results)


@every_cell
@pytest.mark.parametrize("what", ["input", "weight"])
def test_F4_editing_what_backward_needs_raises(cell: str, what: str) -> None:
    module = getattr(hsm, cell)(4, 5)
    input, hx = leaf(make_input(cell)), leaf(state_for(module, cell))
    result = module(input, hx)
    with torch.no_grad():
        (input if what == "input" else getattr(module, recurrent_weight(cell))).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        tensors(result)[0].sum().backward()


@sequence_cells
@pytest.mark.parametrize("what", ["input", "output", "state", "hx", "reset_mask", "detach_mask", "lengths", "reset_hx"])
def test_F4_editing_anything_else_is_harmless_or_raises(backend: str, cell: str, what: str) -> None:
    """Whatever is edited between forward and backward, gradients are never silently wrong."""
    module = getattr(hsm, cell)(4, 5, 2)
    input, extras = leaf(make_input(cell)), everything(module, 5, 3)
    extras["hx"] = random_state(module, 3)
    wanted_of = [input, list(module.parameters())]
    wanted = gradients(module(input, **extras), wanted_of)
    output, state, states = module(input, **extras)
    results = {"input": input, "output": output, "state": tensors(state)[-1]}
    target = results.get(what, tensors(extras.get(what))[:1])
    with torch.no_grad():
        for tensor in tensors(target):
            tensor.zero_()
    try:
        got = gradients([output, state, states], wanted_of)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    else:
        assert_same_values(got, wanted)


@sequence_cells
def test_F5_dropout_of_one_and_of_zero(backend: str, cell: str) -> None:
    ours, theirs = make_pair(cell, 4, 5, 3, dropout=1.0, bidirectional=True)
    input = make_input(cell)
    assert_same_on(ours, theirs, input)
    ours.dropout = 0.0
    training = run(ours.train(), input)
    assert_same(training, run(ours.eval(), input), rtol=0, atol=0)


@sequence_cells
def test_F5_equal_seeds_give_equal_bits(backend: str, cell: str) -> None:
    module = getattr(hsm, cell)(4, 5, 3, dropout=0.5, bidirectional=True)
    input, results = make_input(cell), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(run(module, input))
    assert_same(results[0], results[1], rtol=0, atol=0)
    assert not torch.equal(results[0]["out[0]"], results[2]["out[0]"])


@sequence_cells
def test_F5_dropout_draws_from_the_normal_generator(cell: str) -> None:
    module = getattr(hsm, cell)(4, 5, 2, dropout=0.5)
    before = torch.get_rng_state()
    module(make_input(cell))
    assert not torch.equal(torch.get_rng_state(), before)
    before = torch.get_rng_state()
    module.eval()(torch.ones(5, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)


@sequence_cells
def test_F5_gradients_through_a_fixed_mask(backend: str, cell: str) -> None:
    module = getattr(hsm, cell)(2, 3, 2, dropout=0.5, dtype=torch.float64)

    def call(input: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(29)
        return tuple(tensors(functional_call(module, {"weight_ih_l0": weight}, (input,))))

    arguments = leaf([torch.randn(3, 2, 2, dtype=torch.float64), module.weight_ih_l0])
    assert torch.autograd.gradcheck(call, tuple(arguments))
