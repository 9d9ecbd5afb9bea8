"""Wrong arguments: the error says what was wanted and what was given, and nothing has changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rnn_helpers import (
    SEQUENCE_CELLS,
    gradients,
    leaf,
    map_tensors,
    outcome,
    random_state,
    tensors,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import hsm_kernels as hsm

STEPS, BATCH, FEATURES, HIDDEN, LAYERS = 5, 3, 4, 6, 2


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def mask(*shape: int, dtype: torch.dtype = torch.bool, device: str = "cpu") -> Tensor:
    return torch.zeros(shape or (STEPS, BATCH), dtype=dtype, device=device)


def state(cell: str, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
    """A state whose parts all have this shape."""
    parts = tuple(zeros(*(shape or (LAYERS, BATCH, HIDDEN)), dtype=dtype) for _ in range(2))
    return parts if cell.startswith("LSTM") else parts[0]


def build(namespace: Any, cell: str) -> nn.Module:
    """A module with gradients in place, so that a change of anything shows."""
    torch.manual_seed(1)
    if cell.endswith("Cell"):
        module = getattr(namespace, cell)(FEATURES, HIDDEN)
    else:
        module = getattr(namespace, cell)(FEATURES, HIDDEN, LAYERS)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    return module


def snapshot(module: nn.Module) -> tuple[Any, ...]:
    """Everything about a module that a failed call must leave alone."""
    return (
        {name: value.clone() for name, value in module.state_dict().items()},
        {name: parameter.grad.clone() for name, parameter in module.named_parameters()},
        {name: parameter._version for name, parameter in module.named_parameters()},
        {name: id(parameter) for name, parameter in module.named_parameters()},
        module.training,
        repr(module),
    )


def assert_unchanged(module: nn.Module, before: tuple[Any, ...], generator: Tensor) -> None:
    after = snapshot(module)
    for ours, theirs in zip(after[:2], before[:2], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert after[2:] == before[2:]
    assert torch.equal(torch.get_rng_state(), generator)


def error_of(module: nn.Module, call: Callable[[nn.Module], Any]) -> tuple[type, str]:
    """The error of a call, which must have changed nothing about the module."""
    module.train()
    before, generator = snapshot(module), torch.get_rng_state()
    result = outcome(lambda: call(module))
    assert result is not None, "the call did not fail"
    assert_unchanged(module, before, generator)
    return result


# What torch.nn refuses: the same type and the same first line.

Call = Callable[[nn.Module, str], Any]

D5_SEQUENCE: dict[str, Call] = {
    "1-D input": lambda m, cell: m(zeros(FEATURES)),
    "4-D input": lambda m, cell: m(zeros(1, 1, 1, FEATURES)),
    "0-D input": lambda m, cell: m(torch.tensor(1.0)),
    "wider input": lambda m, cell: m(zeros(STEPS, BATCH, FEATURES + 1)),
    "narrower unbatched input": lambda m, cell: m(zeros(STEPS, FEATURES - 1)),
    "double input": lambda m, cell: m(zeros(STEPS, BATCH, FEATURES, dtype=torch.float64)),
    "half input": lambda m, cell: m(zeros(STEPS, BATCH, FEATURES, dtype=torch.float16)),
    "integer input": lambda m, cell: m(zeros(STEPS, BATCH, FEATURES, dtype=torch.int64)),
    "state of another batch": lambda m, cell: m(zeros(STEPS, BATCH, FEATURES), state(cell, LAYERS, BATCH - 1, HIDDEN)),
    "state of another width": lambda m, cell: m(zeros(STEPS, BATCH, FEATURES), state(cell, LAYERS, BATCH, HIDDEN + 1)),
    "state of more layers": lambda m, cell: m(zeros(STEPS, BATCH, FEATURES), state(cell, LAYERS + 1, BATCH, HIDDEN)),
    "2-D state, batched": lambda m, cell: m(zeros(STEPS, BATCH, FEATURES), state(cell, LAYERS, HIDDEN)),
    "3-D state, unbatched": lambda m, cell: m(zeros(STEPS, FEATURES), state(cell, LAYERS, BATCH, HIDDEN)),
    "unbatched state of another width": lambda m, cell: m(zeros(STEPS, FEATURES), state(cell, LAYERS, HIDDEN - 1)),
}


def packed(width: int = FEATURES, dtype: torch.dtype = torch.float32) -> PackedSequence:
    return pack_padded_sequence(zeros(STEPS, BATCH, width, dtype=dtype), torch.tensor([5, 3, 2]))


@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
@pytest.mark.parametrize("row", D5_SEQUENCE)
def test_D5_errors_of_torch_nn(backend: str, cell: str, row: str) -> None:
    call = D5_SEQUENCE[row]
    ours = error_of(build(hsm, cell), lambda module: call(module, cell))
    assert ours == outcome(lambda: call(build(nn, cell), cell))


def test_D5_errors_of_the_cell_state() -> None:
    """h right and c wrong, c right and h wrong, with a projection in between."""
    for shapes in (((2, 3, 4), (2, 3, 5)), ((2, 3, 6), (2, 3, 6)), ((2, 1, 4), (2, 2, 6))):
        ours, theirs = (
            outcome(
                lambda n=namespace, s=shapes: n.LSTM(4, 6, 2, proj_size=4)(zeros(5, 3, 4), (zeros(*s[0]), zeros(*s[1])))
            )
            for namespace in (hsm, nn)
        )
        if shapes[0][1] == 3:
            assert ours == theirs
        else:  # a batch dimension of 1 is welcome in h, so c is what is wrong
            assert ours == (RuntimeError, "Expected hidden[1] size (2, 3, 6), got [2, 2, 6]")


@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
def test_D5_packed_input_of_another_dtype(cell: str) -> None:
    """torch.nn.LSTM forgets to check here; ours says what torch.nn says elsewhere."""
    kind, message = error_of(build(hsm, cell), lambda module: module(packed(dtype=torch.float64)))
    assert kind is ValueError
    assert message.startswith("RNN input dtype (torch.float64) does not match weight dtype (torch.float32).")


@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
def test_D5_packed_input_of_another_width(cell: str) -> None:
    """torch.nn fails in a matrix product here; ours says what it says elsewhere."""
    assert error_of(build(hsm, cell), lambda module: module(packed(FEATURES + 1))) == (
        RuntimeError,
        "input.size(-1) must be equal to input_size. Expected 4, got 5",
    )


@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
def test_D5_packed_input_with_state_of_another_batch(cell: str) -> None:
    kind, message = error_of(build(hsm, cell), lambda module: module(packed(), state(cell, LAYERS, BATCH + 1, HIDDEN)))
    name = "hidden[0]" if cell == "LSTM" else "hidden"
    assert kind is RuntimeError
    assert message == f"Expected {name} size (2, 3, 6), got [2, 4, 6]"


F2_STEP: dict[str, Call] = {
    "3-D input": lambda m, cell: m(zeros(1, BATCH, FEATURES)),
    "0-D input": lambda m, cell: m(torch.tensor(1.0)),
    "wider input": lambda m, cell: m(zeros(BATCH, FEATURES + 1)),
    "state of another width": lambda m, cell: m(zeros(BATCH, FEATURES), state(cell, BATCH, HIDDEN + 1)),
    "state of another batch": lambda m, cell: m(zeros(BATCH, FEATURES), state(cell, BATCH + 1, HIDDEN)),
    "3-D state": lambda m, cell: m(zeros(BATCH, FEATURES), state(cell, 1, BATCH, HIDDEN)),
    "1-D state, batched": lambda m, cell: m(zeros(BATCH, FEATURES), state(cell, HIDDEN)),
    "2-D state, unbatched": lambda m, cell: m(zeros(FEATURES), state(cell, BATCH, HIDDEN)),
    "unbatched input of another width": lambda m, cell: m(zeros(FEATURES + 1)),
}


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell"])
@pytest.mark.parametrize("row", F2_STEP)
def test_F2_errors_of_torch_nn_cells(backend: str, cell: str, row: str) -> None:
    call = F2_STEP[row]
    ours = error_of(build(hsm, cell), lambda module: call(module, cell))
    assert ours == outcome(lambda: call(build(nn, cell), cell))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 6), (3, 7)), "hidden1 has inconsistent hidden_size: got 7, expected 6"),
        (((3, 7), (3, 6)), "hidden0 has inconsistent hidden_size: got 7, expected 6"),
        (((3, 6), (2, 6)), "Input batch size 3 doesn't match hidden1 batch size 2"),
        (((3, 6), (1, 3, 6)), "LSTMCell: Expected hx[1] to be 1D or 2D, got 3D instead"),
    ],
)
def test_F2_one_part_of_the_cell_state(shapes: Any, message: str) -> None:
    hx = tuple(zeros(*shape) for shape in shapes)
    ours = error_of(build(hsm, "LSTMCell"), lambda module: module(zeros(BATCH, FEATURES), hx))
    assert ours[1] == message
    assert ours == outcome(lambda: build(nn, "LSTMCell")(zeros(BATCH, FEATURES), hx))


# What torch.nn says badly or not at all: an error that names what was wanted and what was given.

SequenceRow = tuple[type[Exception], list[str], Call]


def given(**arguments: Any) -> Call:
    """A call with a good input and these keyword arguments; a callable is given the cell's name."""

    def call(module: nn.Module, cell: str) -> Any:
        values = {name: v(cell) if callable(v) else v for name, v in arguments.items()}
        return module(zeros(STEPS, BATCH, FEATURES), **values)

    return call


def everywhere() -> Tensor:
    return torch.ones(STEPS, BATCH, dtype=torch.bool)


ROWS: dict[str, SequenceRow] = {
    # hx
    "hx of another dtype": (
        ValueError,
        ["hx", "torch.float32", "torch.float64"],
        given(hx=lambda cell: state(cell, dtype=torch.float64)),
    ),
    "hx on another device": (
        ValueError,
        ["hx", "cpu", "meta"],
        given(hx=lambda cell: map_tensors(lambda part: part.to("meta"), state(cell))),
    ),
    "hx of another type": (TypeError, ["hx", "str"], given(hx="zeros")),
    "hx per layer, one too many": (
        ValueError,
        ["hx", "2", "3"],
        given(hx=lambda cell: [state(cell, 1, BATCH, HIDDEN)] * 3),
    ),
    "hx per layer, none": ((TypeError, ValueError), ["hx", "0"], given(hx=[])),
    "hx per layer, wrong entry": (
        RuntimeError,
        ["hx[1]", "(1, 3, 6)", "[1, 2, 6]"],
        given(hx=lambda cell: [state(cell, 1, n, HIDDEN) for n in (BATCH, BATCH - 1)]),
    ),
    # masks
    **{
        f"{name} {row}": (kind, [name, *words], given(**{name: value, **others}))
        for name, others in (("reset_mask", {}), ("detach_mask", {}))
        for row, kind, words, value in (
            ("of floats", TypeError, ["torch.bool", "torch.float32"], mask(dtype=torch.float32)),
            ("of bytes", TypeError, ["torch.bool", "torch.uint8"], mask(dtype=torch.uint8)),
            ("as a list", TypeError, ["torch.bool", "list"], [[False] * BATCH] * STEPS),
            ("transposed", ValueError, ["(5, 3)", "(3, 5)"], mask(BATCH, STEPS)),
            ("of one sequence", ValueError, ["(5, 3)", "(5, 1)"], mask(STEPS, 1)),
            ("without batch", ValueError, ["(5, 3)", "(5,)"], mask(STEPS)),
            ("one step longer", ValueError, ["(5, 3)", "(6, 3)"], mask(STEPS + 1, BATCH)),
            ("on another device", ValueError, ["cpu", "meta"], mask(device="meta")),
        )
    },
    # reset_hx
    "reset_hx without reset_mask": (
        ValueError,
        ["reset_hx", "reset_mask"],
        given(reset_hx=state),
    ),
    "reset_hx of another shape": (
        ValueError,
        ["reset_hx", "(2, 3, 6)", "(2, 2, 6)"],
        given(reset_mask=everywhere(), reset_hx=lambda c: state(c, LAYERS, BATCH - 1, HIDDEN)),
    ),
    "reset_hx without batch": (
        ValueError,
        ["reset_hx", "(2, 3, 6)", "(2, 6)"],
        given(reset_mask=everywhere(), reset_hx=lambda cell: state(cell, LAYERS, HIDDEN)),
    ),
    "reset_hx of another dtype": (
        (TypeError, ValueError),
        ["reset_hx", "torch.float32", "torch.float64"],
        given(reset_mask=everywhere(), reset_hx=lambda cell: state(cell, dtype=torch.float64)),
    ),
    "reset_hx on another device": (
        ValueError,
        ["reset_hx", "cpu", "meta"],
        given(
            reset_mask=everywhere(),
            reset_hx=lambda cell: map_tensors(lambda part: part.to("meta"), state(cell)),
        ),
    ),
    "reset_hx of another type": (
        TypeError,
        ["reset_hx", "float"],
        given(reset_mask=everywhere(), reset_hx=0.0),
    ),
    "reset_hx of the other cell type": (
        TypeError,
        ["reset_hx", "Tensor"],
        given(
            reset_mask=everywhere(),
            reset_hx=lambda cell: state("GRU" if cell == "LSTM" else "LSTM"),
        ),
    ),
    "reset_hx per layer, one too few": (
        ValueError,
        ["reset_hx", "2", "1"],
        given(reset_mask=everywhere(), reset_hx=lambda c: [state(c, 1, BATCH, HIDDEN)]),
    ),
    # truncated_bptt_steps
    "truncated_bptt_steps of 0": (
        ValueError,
        ["truncated_bptt_steps", "1", "0"],
        given(truncated_bptt_steps=0),
    ),
    "negative truncated_bptt_steps": (
        ValueError,
        ["truncated_bptt_steps", "1", "-2"],
        given(truncated_bptt_steps=-2),
    ),
    "truncated_bptt_steps as a bool": (
        TypeError,
        ["truncated_bptt_steps", "int", "bool"],
        given(truncated_bptt_steps=True),
    ),
    "truncated_bptt_steps as a float": (
        TypeError,
        ["truncated_bptt_steps", "int", "float"],
        given(truncated_bptt_steps=2.0),
    ),
    # lengths
    "negative length": (
        ValueError,
        ["lengths", "0", "5", "-1"],
        given(lengths=torch.tensor([1, -1, 2])),
    ),
    "length beyond the end": (
        ValueError,
        ["lengths", "0", "5", "6"],
        given(lengths=torch.tensor([6, 0, 2])),
    ),
    "lengths of floats": (
        TypeError,
        ["lengths", "integer", "torch.float32"],
        given(lengths=torch.tensor([1.0, 2.0, 3.0])),
    ),
    "lengths of bools": (
        TypeError,
        ["lengths", "integer", "torch.bool"],
        given(lengths=torch.ones(BATCH, dtype=torch.bool)),
    ),
    "lengths as a list": (TypeError, ["lengths", "list"], given(lengths=[1, 2, 3])),
    "too few lengths": (
        ValueError,
        ["lengths", "(3,)", "(2,)"],
        given(lengths=torch.tensor([1, 2])),
    ),
    "lengths of two dimensions": (
        ValueError,
        ["lengths", "(3,)", "(1, 3)"],
        given(lengths=torch.tensor([[1, 2, 3]])),
    ),
    "lengths as one number": (ValueError, ["lengths", "(3,)", "()"], given(lengths=torch.tensor(2))),
    # PackedSequence
    "lengths with a PackedSequence": (
        ValueError,
        ["lengths", "PackedSequence"],
        lambda module, _: module(packed(), lengths=torch.tensor([5, 3, 2])),
    ),
    "reset_mask with a PackedSequence": (
        ValueError,
        ["reset_mask", "PackedSequence", "lengths"],
        lambda module, _: module(packed(), reset_mask=everywhere()),
    ),
    "detach_mask with a PackedSequence": (
        ValueError,
        ["detach_mask", "PackedSequence", "lengths"],
        lambda module, _: module(packed(), detach_mask=everywhere()),
    ),
    # what is no argument at all
    "a positional third argument": (
        TypeError,
        ["positional"],
        lambda module, _: module(zeros(STEPS, BATCH, FEATURES), None, everywhere()),
    ),
    "an unknown argument": (TypeError, ["resets"], given(resets=everywhere())),
}


@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
@pytest.mark.parametrize("row", ROWS)
def test_errors_of_our_own(backend: str, cell: str, row: str) -> None:
    wanted, words, call = ROWS[row]
    kind, message = error_of(build(hsm, cell), lambda module: call(module, cell))
    assert issubclass(kind, wanted), f"{kind.__name__}: {message}"
    assert all(word in message for word in words), message


@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith(("reset_", "lengths"))])
def test_messages_begin_with_who_complains(cell: str, row: str) -> None:
    _, message = error_of(build(hsm, cell), lambda module: ROWS[row][2](module, cell))
    assert message.startswith(f"{cell}: ")


@pytest.mark.parametrize("batch_first", [False, True])
def test_mask_shape_follows_the_layout(batch_first: bool) -> None:
    module = hsm.GRU(FEATURES, HIDDEN, batch_first=batch_first)
    wanted = (7, 2) if batch_first else (2, 7)
    lead = (7, 2) if batch_first else (2, 7)
    with pytest.raises(ValueError, match=r"reset_mask must have shape") as caught:
        module(zeros(*lead, FEATURES), reset_mask=mask(*wanted[::-1]))
    assert str(wanted) in str(caught.value)
    assert ("(N, L)" if batch_first else "(L, N)") in str(caught.value)
    with pytest.raises(ValueError, match=r"reset_mask must have shape \(L,\) = \(7,\)"):
        module(zeros(7, FEATURES), reset_mask=mask(7, 1))


@pytest.mark.parametrize(
    ("cell", "wrong"),
    [
        ("GRU", (zeros(1, 3, 6), zeros(1, 3, 6))),
        ("LSTM", zeros(2, 3, 6)),
        ("LSTM", (zeros(1, 3, 6),)),
        ("LSTM", (zeros(1, 3, 6),) * 3),
        ("LSTM", (zeros(1, 3, 6), None)),
        ("GRUCell", (zeros(3, 6), zeros(3, 6))),
        ("LSTMCell", zeros(2, 3, 6)),
        ("LSTMCell", (zeros(3, 6),) * 3),
    ],
)
def test_D6_a_state_of_the_other_kind(cell: str, wrong: Any) -> None:
    kind = getattr(hsm, cell)
    input = zeros(3, 4) if cell.endswith("Cell") else zeros(5, 3, 4)
    with pytest.raises(TypeError, match=f"^{cell}: hx must be a") as caught:
        kind(4, 6)(input, wrong)
    assert "got" in str(caught.value)


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell"])
def test_D6_cells_name_a_wrong_dtype(cell: str) -> None:
    """torch.nn leaves it to the matrix product."""
    double = zeros(BATCH, FEATURES, dtype=torch.float64)
    calls: list[Callable[[nn.Module], Any]] = [
        lambda module: module(double),
        lambda module: module(zeros(BATCH, FEATURES), state(cell, 3, 6, dtype=torch.float64)),
    ]
    for call in calls:
        kind, message = error_of(build(hsm, cell), call)
        assert issubclass(kind, RuntimeError | ValueError)
        assert "torch.float64" in message
        assert "torch.float32" in message


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(ValueError, match="auto, cuda, cpu, reference, got 'gpu'"):
        hsm.set_backend("gpu")
    with pytest.raises(ValueError, match="got 'gpu'"), hsm.use_backend("gpu"):
        pass


@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
def test_a_backend_that_cannot_run_the_call_says_so(cell: str) -> None:
    """Asked for by name it never falls back."""
    with hsm.use_backend("cuda"):
        kind, message = error_of(build(hsm, cell), lambda module: module(zeros(STEPS, BATCH, FEATURES)))
    assert kind is RuntimeError
    assert "'cuda'" in message


def test_the_backend_is_restored_after_an_error() -> None:
    before = hsm.get_backend()
    with pytest.raises(RuntimeError), hsm.use_backend("reference"):
        hsm.GRU(4, 6)(zeros(5, 3, 3))
    assert hsm.get_backend() == before


@pytest.mark.parametrize("function", ["from_torch", "to_torch", "explain"])
def test_conversions_refuse_other_modules(function: str) -> None:
    arguments = (zeros(1, 1, 4),) if function == "explain" else ()
    with pytest.raises(TypeError, match="Linear"):
        getattr(hsm, function)(nn.Linear(4, 4), *arguments)


# NaN behind the end of a sequence is padding, not data.


@pytest.mark.parametrize("filler", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masks", [False, True])
def test_what_stands_in_the_padding_reaches_nothing(
    backend: str, cell: str, dtype: torch.dtype, filler: float, masks: bool
) -> None:
    rnn = getattr(hsm, cell)(FEATURES, HIDDEN, 2, bidirectional=True, dtype=dtype)
    lengths = torch.tensor([3, 0, STEPS])
    padding = torch.arange(STEPS)[:, None] >= lengths
    clean = torch.randn(STEPS, BATCH, FEATURES, dtype=dtype).masked_fill(padding[..., None], 0)
    hx, extras = leaf(random_state(rnn, BATCH, dtype)), {"lengths": lengths}
    if masks:
        extras["reset_mask"] = torch.rand(STEPS, BATCH) < 0.4
        extras["detach_mask"] = torch.rand(STEPS, BATCH) < 0.4
    outcomes = []
    for input in (clean, clean.masked_fill(padding[..., None], filler)):
        input = leaf(input)
        result = rnn(input, hx, **extras)
        outcomes.append(tensors(result) + gradients(result, [input, hx, list(rnn.parameters())]))
    for poisoned, wanted in zip(*outcomes, strict=True):
        assert poisoned.isfinite().all()
        assert torch.equal(poisoned, wanted)


@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
def test_nan_in_the_data_is_not_hidden(backend: str, cell: str) -> None:
    """It spreads forward in its own sequence, and to no other."""
    rnn = getattr(hsm, cell)(FEATURES, HIDDEN)
    input = torch.randn(STEPS, BATCH, FEATURES)
    input[2, 1, 0] = torch.nan
    nan = rnn(input)[0].isnan()
    assert nan[2:, 1].all()
    assert not nan[:2].any()
    assert not nan[:, [0, 2]].any()
