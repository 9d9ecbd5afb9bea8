"""The state helpers: against plain indexing, on our modules and torch.nn's, and the faults of save and load."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from rnn_helpers import assert_same_bits, leaf, map_tensors, outcome, random_state, tensors
from torch import Tensor, nn

import hsm_kernels as hsm
from hsm_kernels import state

ROWS, BATCH, HIDDEN = 4, 3, 5
MODULES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    f"{namespace.__name__}.{cell}{'-projected' if options else ''}": (namespace, cell, options)
    for namespace in (hsm, nn)
    for cell, options in (("LSTM", {}), ("LSTM", {"proj_size": 2}), ("GRU", {}))
}


@pytest.fixture(params=MODULES)
def rnn(request: pytest.FixtureRequest) -> nn.Module:
    """Two layers, two directions."""
    namespace, cell, options = MODULES[request.param]
    return getattr(namespace, cell)(3, HIDDEN, num_layers=2, bidirectional=True, **options)


def assert_each(result: Any, hx: Any, plain: Callable[[Tensor], Tensor]) -> None:
    """The result has the structure of `hx`, and of each part what `plain` makes of it, bit for bit, contiguous."""
    assert type(result) is type(hx)
    for ours, part in zip(tensors(result), tensors(hx), strict=True):
        wanted = plain(part)
        assert ours.shape == wanted.shape and ours.dtype == wanted.dtype
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0, equal_nan=True)


# Each helper against plain indexing. None edits its argument, and all let the gradient through.

MASK = torch.tensor([True, False, True])
ONE_TENSOR: dict[str, tuple[Callable[[Any], Any], Callable[[Tensor], Tensor]]] = {
    "clone": (state.clone, lambda part: part),
    "to": (lambda hx: state.to(hx, torch.float64), lambda part: part.double()),
    "select": (lambda hx: state.select(hx, [2, 0, 0, 1]), lambda part: part[:, [2, 0, 0, 1]]),
    "select by tensor": (lambda hx: state.select(hx, torch.tensor([1, 1])), lambda part: part[:, [1, 1]]),
    "select by int32": (
        lambda hx: state.select(hx, torch.tensor([1, 0], dtype=torch.int32)),
        lambda part: part[:, [1, 0]],
    ),
    "select nothing": (lambda hx: state.select(hx, []), lambda part: part[:, :0]),
    "select by mask": (lambda hx: state.select(hx, MASK), lambda part: part[:, [0, 2]]),
    "select by list of bools": (lambda hx: state.select(hx, [False, True, True]), lambda part: part[:, 1:]),
    "cat": (lambda hx: state.cat([hx, state.select(hx, [0])]), lambda part: part[:, [0, 1, 2, 0]]),
    "cat of an iterator": (lambda hx: state.cat(iter([hx, hx])), lambda part: part[:, [0, 1, 2, 0, 1, 2]]),
    "split": (lambda hx: state.split(hx, [1, 0, 2])[2], lambda part: part[:, 1:]),
    "split evenly": (lambda hx: state.split(hx, 2)[0], lambda part: part[:, :2]),
    "reset": (lambda hx: state.reset(hx, MASK), lambda part: part * torch.tensor([0.0, 1.0, 0.0])[:, None]),
    "repeat_interleave": (lambda hx: state.repeat_interleave(hx, 2), lambda part: part[:, [0, 0, 1, 1, 2, 2]]),
    "repeat_interleave by row": (
        lambda hx: state.repeat_interleave(hx, torch.tensor([0, 3, 1])),
        lambda part: part[:, [1, 1, 1, 2]],
    ),
    "expand_batch": (
        lambda hx: state.expand_batch(state.select(hx, [1]), 2),
        lambda part: part[:, [1, 1]],
    ),
    "to_batch_first": (state.to_batch_first, lambda part: part.permute(1, 0, 2)),
    "from_batch_first": (lambda hx: state.from_batch_first(state.to_batch_first(hx)), lambda part: part),
    "layer": (lambda hx: state.layer(hx, 1, bidirectional=True), lambda part: part[2]),
    "layer in reverse": (lambda hx: state.layer(hx, 0, 1, bidirectional=True), lambda part: part[1]),
    "layer from the end": (lambda hx: state.layer(hx, -2, bidirectional=True), lambda part: part[0]),
    "layer of one direction": (lambda hx: state.layer(hx, 2), lambda part: part[2]),
    "unstack": (lambda hx: state.unstack(hx, bidirectional=True)[1], lambda part: part[2:]),
    "unstack of one direction": (lambda hx: state.unstack(hx)[3], lambda part: part[3:]),
    "stack": (lambda hx: state.stack(state.unstack(hx, bidirectional=True)), lambda part: part),
}


@pytest.mark.parametrize("row", ONE_TENSOR)
def test_against_indexing(rnn: nn.Module, row: str) -> None:
    helper, plain = ONE_TENSOR[row]
    hx = random_state(rnn, BATCH)
    before = map_tensors(Tensor.clone, hx)
    assert_each(helper(hx), hx, plain)
    assert_same_bits(hx, before)


@pytest.mark.parametrize("row", ONE_TENSOR)
def test_gradients_flow(rnn: nn.Module, row: str) -> None:
    helper, plain = ONE_TENSOR[row]
    hx = leaf(random_state(rnn, BATCH))
    ours, wanted = (
        torch.autograd.grad([part.sum() for part in tensors(result)], tensors(hx))
        for result in (helper(hx), map_tensors(plain, hx))
    )
    assert_same_bits(ours, wanted)


def test_unstack_has_every_layer(rnn: nn.Module) -> None:
    hx = random_state(rnn, BATCH)
    entries = state.unstack(hx, bidirectional=True)
    assert len(entries) == 2
    assert_each(entries[0], hx, lambda part: part[:2])


def test_split_has_every_piece(rnn: nn.Module) -> None:
    hx = random_state(rnn, BATCH)
    assert [tensors(piece)[0].size(1) for piece in state.split(hx, 2)] == [2, 1]
    assert_same_bits(state.cat(state.split(hx, [1, 0, 2])), hx)


def test_detach_and_clone(rnn: nn.Module) -> None:
    """Any shape: unbatched and a cell's too."""
    for batch in (BATCH, None):
        hx = leaf(random_state(rnn, batch))
        assert not any(part.requires_grad for part in tensors(state.detach(hx)))
        assert_same_bits(state.detach(hx), hx)
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(tensors(state.clone(hx)), tensors(hx), strict=True))


def test_where(rnn: nn.Module) -> None:
    """Rows of both, with a batch of 1 on either side; the gradient goes to the rows that are taken."""
    a, b = leaf(random_state(rnn, BATCH)), leaf(random_state(rnn, BATCH))
    result = state.where(MASK, a, b)
    for ours, x, y in zip(tensors(result), tensors(a), tensors(b), strict=True):
        assert torch.equal(ours, torch.stack([x[:, 0], y[:, 1], x[:, 2]], 1))
    grads = torch.autograd.grad([part.sum() for part in tensors(result)], tensors(a))
    assert all(torch.equal(grad, MASK[:, None].float().expand_as(grad)) for grad in grads)
    one = random_state(rnn, 1)
    many = state.expand_batch(one, BATCH)
    assert_same_bits(state.where(MASK, one, b), state.where(MASK, many, b))
    assert_same_bits(state.where(MASK, a, one), state.where(MASK, a, many))
    assert_same_bits(state.where(MASK, one, one), many)


@pytest.mark.parametrize("to_state", [False, True])
def test_reset_drops_nan(rnn: nn.Module, to_state: bool) -> None:
    """Neither the value nor the gradient of a dropped row is left, whatever it holds."""
    hx = leaf(map_tensors(lambda part: part.index_fill(1, torch.tensor([0, 2]), torch.nan), random_state(rnn, BATCH)))
    fresh = leaf(random_state(rnn, 1)) if to_state else None
    result = state.reset(hx, MASK, fresh)
    for k, part in enumerate(tensors(result)):
        start = tensors(fresh)[k][:, 0].detach() if to_state else torch.zeros(())
        assert torch.equal(part[:, 0], start.expand_as(part[:, 0])) and torch.equal(part[:, 2], part[:, 0])
        assert torch.equal(part[:, 1], tensors(hx)[k][:, 1])
    wanted = tensors(hx) + tensors(fresh)
    grads = torch.autograd.grad([(part * 3).sum() for part in tensors(result)], wanted)
    for k, grad in enumerate(grads):
        kept = torch.tensor([[0.0], [3.0], [0.0]]) if k < len(tensors(hx)) else torch.tensor([[6.0]])
        assert torch.equal(grad, kept.expand_as(grad))


def test_reset_is_the_reset_of_a_call() -> None:
    """`state.reset` before a call is `reset_mask[0]` in it."""
    rnn, x = hsm.LSTM(3, HIDDEN, 2), torch.randn(4, BATCH, 3)
    hx, fresh = random_state(rnn, BATCH), random_state(rnn, 1)
    mask = torch.zeros(4, BATCH, dtype=torch.bool)
    mask[0] = MASK
    assert_same_bits(rnn(x, state.reset(hx, MASK, fresh)), rnn(x, hx, reset_mask=mask, reset_hx=fresh))


def test_rows_are_the_states_of_the_sequences(rnn: nn.Module) -> None:
    """Reordering the state and the input reorders the result: the batch is dimension 1 of what the modules take."""
    x, index = torch.randn(6, BATCH, 3), torch.tensor([2, 0, 0])
    _, hx = rnn(x[:3])
    wanted, hx_n = rnn(x[3:], hx)
    ours, ours_n = rnn(x[3:, index], state.select(hx, index))
    torch.testing.assert_close(ours, wanted[:, index])
    torch.testing.assert_close(ours_n, state.select(hx_n, index))


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_per_layer_form(cell: str, bidirectional: bool) -> None:
    """`unstack` makes the list that a call takes, `stack` undoes what it returns."""
    rnn, x = getattr(hsm, cell)(3, HIDDEN, 2, bidirectional=bidirectional), torch.randn(4, BATCH, 3)
    hx = random_state(rnn, BATCH)
    output, hx_n = rnn(x, hx)
    ours, per_layer = rnn(x, state.unstack(hx, bidirectional=bidirectional))
    assert isinstance(per_layer, list)
    assert_same_bits((ours, state.stack(per_layer)), (output, hx_n))


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("namespace", [hsm, nn])
def test_layer_is_what_a_cell_takes(namespace: Any, cell: str) -> None:
    rnn, step = getattr(namespace, cell)(3, HIDDEN), getattr(namespace, f"{cell}Cell")(3, HIDDEN)
    step.load_state_dict({name.removesuffix("_l0"): value for name, value in rnn.state_dict().items()})
    x, hx = torch.randn(BATCH, 3), random_state(rnn, BATCH)
    new = step(x, state.layer(hx, 0))
    torch.testing.assert_close(new, state.layer(rnn(x[None], hx)[1], -1))


# The first state.


def test_initial_state(rnn: nn.Module) -> None:
    """What no state means, in both forms; a module's dtype and device, or others."""
    rnn = rnn.double()
    for batch, x in ((BATCH, torch.randn(2, BATCH, 3)), (None, torch.randn(2, 3))):
        hx = state.initial_state(rnn, batch)
        assert_same_bits(rnn(x.double(), hx), rnn(x.double()))
        assert not any(part.any() for part in tensors(hx))
        assert not any(part.requires_grad for part in tensors(hx))
    other = state.initial_state(rnn, 2, dtype=torch.float16, device="meta")
    assert {(part.dtype, part.device.type) for part in tensors(other)} == {(torch.float16, "meta")}
    assert all(part.device.type == "meta" for part in tensors(state.initial_state(rnn.to("meta"), 2)))


@pytest.mark.parametrize("namespace", [hsm, nn])
def test_initial_state_of_cells(namespace: Any) -> None:
    h, c = state.initial_state(namespace.LSTMCell(3, HIDDEN), 2)
    assert h.shape == c.shape == (2, HIDDEN)
    assert state.initial_state(namespace.GRUCell(3, HIDDEN), None).shape == (HIDDEN,)


def test_initial_state_of_what_wraps_a_module() -> None:
    rnn = nn.utils.parametrizations.weight_norm(hsm.GRU(3, HIDDEN), "weight_hh_l0")
    assert state.initial_state(rnn, 2).shape == (1, 2, HIDDEN)
    assert state.initial_state(torch.compile(hsm.GRU(3, HIDDEN)), 2).shape == (1, 2, HIDDEN)


def test_structure_is_plain() -> None:
    """A subclass of tuple comes back as a tuple: the structure of a result never depends on who made the argument."""

    class Pair(tuple):  # type: ignore[type-arg]
        pass

    hx = Pair((torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)))
    assert type(state.detach(hx)) is tuple  # type: ignore[type-var]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_whole() -> None:
    def surgery(hx: Any, mask: Tensor, index: Tensor) -> Any:
        hx = state.reset(state.select(hx, index), mask)
        first, second = state.split(hx, [1, 2])
        return state.stack(state.unstack(state.cat([second, first])))

    hx = (torch.randn(2, BATCH, 4), torch.randn(2, BATCH, 4))
    arguments = (hx, MASK, torch.tensor([2, 1, 1]))
    assert_same_bits(torch.compile(surgery, backend="eager", fullgraph=True)(*arguments), surgery(*arguments))


# Errors.

H = torch.zeros(ROWS, BATCH, HIDDEN)
PAIR = (H, H)
SHAPE_FIX = (
    "give an unbatched state its batch with unsqueeze(1), the state (N, X) of a cell its layer with unsqueeze(0)"
)
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no state": (
        lambda: state.detach(None),  # type: ignore[type-var]
        TypeError,
        "state.detach: hx must be a Tensor or a tuple (h, c) of two, got NoneType; "
        "state.initial_state(rnn, batch_size) makes one of zeros",
    ),
    "a list": (
        lambda: state.select([H, H], [0]),  # type: ignore[type-var]
        TypeError,
        "state.select: hx must be a Tensor or a tuple (h, c) of two, got a list of 2; "
        "make one of a list with an entry per layer by state.stack, of [h, c] by tuple",
    ),
    "a tuple of three": (
        lambda: state.to((H, H, H), torch.float64),  # type: ignore[type-var]
        TypeError,
        "state.to: hx must be a Tensor or a tuple (h, c) of two, got a tuple of 3",
    ),
    "a cell's state": (
        lambda: state.select(H[0], [0]),
        ValueError,
        f"state.select: hx must have shape (D * K, N, X), got (3, 5); {SHAPE_FIX}",
    ),
    "a part that is unbatched": (
        lambda: state.to_batch_first((H, H[:, 0])),
        ValueError,
        f"state.to_batch_first: hx[1] must have shape (D * K, N, X), got (4, 5); {SHAPE_FIX}",
    ),
    "parts of two batches": (
        lambda: state.unstack((H, H[:, :2])),
        ValueError,
        "state.unstack: h and c of hx must agree in D * K and N, got (4, 3, 5) and (4, 2, 5)",
    ),
    "index as int": (
        lambda: state.select(H, 2),  # type: ignore[arg-type]
        TypeError,
        "state.select: index must be a Tensor or a list, got int; use [index]",
    ),
    "index of floats": (
        lambda: state.select(H, torch.zeros(2)),
        TypeError,
        "state.select: index must hold integers or bools, got torch.float32; use index.long()",
    ),
    "index of 2 dimensions": (
        lambda: state.select(H, [[0], [1]]),  # type: ignore[list-item]
        ValueError,
        "state.select: index must have one dimension, got shape (2, 1)",
    ),
    "index too large": (
        lambda: state.select(PAIR, [0, 3]),
        ValueError,
        "state.select: index must be between 0 and N - 1 = 2, got 3",
    ),
    "negative index": (
        lambda: state.select(PAIR, torch.tensor([0, -1])),
        ValueError,
        "state.select: index must be between 0 and N - 1 = 2, got -1",
    ),
    "mask of another batch as index": (
        lambda: state.select(H, [True, False]),
        ValueError,
        "state.select: index must have shape (N,) = (3,), got (2,)",
    ),
    "index elsewhere": (
        lambda: state.select(H, torch.zeros(2, dtype=torch.int64, device="meta")),
        ValueError,
        "state.select: index must be on the state's device cpu, got meta",
    ),
    "cat of a pair": (
        lambda: state.cat(PAIR),
        TypeError,
        "state.cat: states must be a list of states, got one state; use [a, b]",
    ),
    "cat of a tensor": (
        lambda: state.cat(H),
        TypeError,
        "state.cat: states must be a list of states, got one state; use [a, b]",
    ),
    "cat of nothing": (lambda: state.cat([]), ValueError, "state.cat: states must hold at least one state, got none"),
    "cat of both kinds": (
        lambda: state.cat([H, PAIR]),  # type: ignore[list-item]
        TypeError,
        "state.cat: states[1] and states[0] must both be a Tensor or both a tuple (h, c), got one of each",
    ),
    "cat of two widths": (
        lambda: state.cat([H, H[:, :, :2]]),
        ValueError,
        "state.cat: states[1] and states[0] must have the same shape but for dimension 1, got (4, 3, 2) and (4, 3, 5)",
    ),
    "cat of two dtypes": (
        lambda: state.cat([H, H.double()]),
        ValueError,
        "state.cat: states[1] and states[0] must have the same dtype and device, got torch.float64 on cpu and "
        "torch.float32 on cpu; use state.to",
    ),
    "stack of a pair": (
        lambda: state.stack(PAIR),
        TypeError,
        "state.stack: states must be a list of states, got one state; use [a, b]",
    ),
    "stack of cells' states": (
        lambda: state.stack([H[0], H[1]]),
        ValueError,
        f"state.stack: states[0] must have shape (D * K, N, X), got (3, 5); {SHAPE_FIX}",
    ),
    "stack of two batches": (
        lambda: state.stack([H, H[:, :2]]),
        ValueError,
        "state.stack: states[1] and states[0] must have the same shape but for dimension 0, "
        "got (4, 2, 5) and (4, 3, 5)",
    ),
    "sizes that do not add up": (
        lambda: state.split(H, [1, 1]),
        ValueError,
        "state.split: sizes must add up to the batch of 3, got [1, 1]",
    ),
    "negative size": (
        lambda: state.split(H, [4, -1]),
        ValueError,
        "state.split: each of sizes must be at least 0, got -1",
    ),
    "pieces of 0": (lambda: state.split(H, 0), ValueError, "state.split: sizes must be at least 1, got 0"),
    "mask of ints": (
        lambda: state.reset(H, MASK.int()),
        TypeError,
        "state.reset: mask must be a torch.bool tensor, got torch.int32; use mask.bool()",
    ),
    "mask as list": (
        lambda: state.where([True], H, H),  # type: ignore[arg-type]
        TypeError,
        "state.where: mask must be a torch.bool tensor, got list",
    ),
    "mask of another batch": (
        lambda: state.reset(PAIR, MASK[:2]),
        ValueError,
        "state.reset: mask must have shape (N,) = (3,), got (2,)",
    ),
    "mask with a trailing dimension": (
        lambda: state.reset(PAIR, MASK[:, None]),
        ValueError,
        "state.reset: mask must have shape (N,) = (3,), got (3, 1)",
    ),
    "mask elsewhere": (
        lambda: state.reset(H, MASK.to("meta")),
        ValueError,
        "state.reset: mask must be on the state's device cpu, got meta",
    ),
    "reset_hx of another batch": (
        lambda: state.reset(H, MASK, H[:, :2]),
        ValueError,
        "state.reset: reset_hx must have a batch of 1 or 3, as mask has, got 2",
    ),
    "where with a mask of another batch": (
        lambda: state.where(MASK[:2], H[:, :1], H),
        ValueError,
        "state.where: b must have a batch of 1 or 2, as mask has, got 3",
    ),
    "reset_hx of the other kind": (
        lambda: state.reset(H, MASK, PAIR),  # type: ignore[type-var]
        TypeError,
        "state.reset: reset_hx and hx must both be a Tensor or both a tuple (h, c), got one of each",
    ),
    "where of two dtypes": (
        lambda: state.where(MASK, H, H.half()),
        ValueError,
        "state.where: a and b must have the same dtype and device, got torch.float32 on cpu and torch.float16 on cpu; "
        "use state.to",
    ),
    "repeats as float": (
        lambda: state.repeat_interleave(H, 2.0),  # type: ignore[arg-type]
        TypeError,
        "state.repeat_interleave: repeats must be an int, got float",
    ),
    "repeats of another batch": (
        lambda: state.repeat_interleave(H, torch.tensor([1, 2])),
        ValueError,
        "state.repeat_interleave: repeats must have shape (N,) = (3,), got (2,)",
    ),
    "a mask as repeats": (
        lambda: state.repeat_interleave(H, MASK),
        TypeError,
        "state.repeat_interleave: repeats must be an int or an integer tensor, got torch.bool",
    ),
    "expand of more than one": (
        lambda: state.expand_batch(PAIR, 6),
        ValueError,
        "state.expand_batch: hx must have a batch of 1, got 3; use state.repeat_interleave or state.select",
    ),
    "layer too large": (
        lambda: state.layer(H, 2, bidirectional=True),
        ValueError,
        "state.layer: k must be between -2 and 1, as hx has 2 layers, got 2",
    ),
    "layer as slice": (
        lambda: state.layer(H, slice(1)),  # type: ignore[arg-type]
        TypeError,
        "state.layer: k must be an int, got slice",
    ),
    "reverse direction of one": (
        lambda: state.layer(H, 0, 1),
        ValueError,
        "state.layer: direction must be 0 without bidirectional=True, got 1",
    ),
    "direction 2": (
        lambda: state.layer(H, 0, 2, bidirectional=True),
        ValueError,
        "state.layer: direction must be 0 or 1, got 2",
    ),
    "odd rows": (
        lambda: state.unstack(H[:3], bidirectional=True),
        ValueError,
        "state.unstack: the state of a bidirectional module must have an even dimension 0, got 3",
    ),
    "a state of nn.Linear": (
        lambda: state.initial_state(nn.Linear(2, 2), 1),
        TypeError,
        "state.initial_state: rnn must be an LSTM, GRU, LSTMCell or GRUCell of hsm_kernels or torch.nn, got Linear",
    ),
    "a state of nn.RNN": (
        lambda: state.initial_state(nn.RNN(2, 2), 1),
        TypeError,
        "state.initial_state: rnn must be an LSTM, GRU, LSTMCell or GRUCell of hsm_kernels or torch.nn, got RNN",
    ),
    "batch size as float": (
        lambda: state.initial_state(nn.GRU(2, 2), 1.0),  # type: ignore[arg-type]
        TypeError,
        "state.initial_state: batch_size must be an int, got float",
    ),
}


@pytest.mark.parametrize("row", ERRORS)
def test_errors(row: str) -> None:
    call, kind, message = ERRORS[row]
    assert outcome(call) == (kind, message)


# Files.


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """A file in a folder in which nothing else may be left."""
    path = tmp_path / "state.safetensors"
    yield path
    assert [entry.name for entry in tmp_path.iterdir() if entry != path] == []


@pytest.mark.parametrize("batch", [BATCH, None, 0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_file_round_trip(path: Path, rnn: nn.Module, dtype: torch.dtype, batch: int | None) -> None:
    """The same bits, NaN and infinity included, in a file that others can read."""
    rnn = rnn.to(dtype)
    hx = map_tensors(lambda part: part.index_fill(-1, torch.tensor([0]), torch.nan), random_state(rnn, batch, dtype))
    state.save(path, leaf(hx), rnn)
    loaded = state.load(path, rnn)
    assert type(loaded) is type(hx)
    assert_same_bits(loaded, hx)
    assert not any(part.requires_grad for part in tensors(loaded))
    written = safetensors.torch.load_file(path)
    assert_same_bits([written[name] for name in sorted(written, reverse=True)], tensors(hx))


@pytest.mark.parametrize("namespace", [hsm, nn])
@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell"])
def test_file_of_a_cell(path: Path, namespace: Any, cell: str) -> None:
    rnn = getattr(namespace, cell)(3, HIDDEN)
    hx = rnn(torch.randn(2, 3))
    state.save(str(path), hx, rnn)
    assert_same_bits(state.load(str(path), rnn), hx)


def test_file_goes_from_torch_to_ours(path: Path) -> None:
    hx = random_state(nn.LSTM(3, HIDDEN, 2), BATCH)
    state.save(path, hx, nn.LSTM(3, HIDDEN, 2))
    assert_same_bits(state.load(path, hsm.LSTM(7, HIDDEN, 2, batch_first=True)), hx)


def test_parts_that_share_memory(path: Path) -> None:
    """Views of one tensor, not contiguous, and one tensor twice: the file has each by itself."""
    rnn = hsm.LSTM(3, HIDDEN)
    views = torch.randn(1, BATCH, HIDDEN, 2)
    for hx in ((views[..., 0], views[..., 1]), (views[..., 0],) * 2):
        state.save(path, hx, rnn)
        assert_same_bits(state.load(path, rnn), hx)


def test_loaded_state_outlives_its_file(path: Path) -> None:
    rnn, hx = hsm.GRU(3, HIDDEN), torch.randn(1, BATCH, HIDDEN)
    state.save(path, hx, rnn)
    loaded = state.load(path, rnn)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert_same_bits(loaded, hx)


def test_load_to_a_device(path: Path) -> None:
    rnn = hsm.LSTM(3, HIDDEN)
    state.save(path, state.initial_state(rnn, 2), rnn)
    assert {part.device.type for part in tensors(state.load(path, rnn, device="meta"))} == {"meta"}


def test_file_is_as_readable_as_others(path: Path) -> None:
    """The permissions of a file that open() makes, not those of a private temporary one; a link stays one."""
    rnn = hsm.GRU(3, HIDDEN)
    umask = os.umask(0o022)
    try:
        state.save(path, state.initial_state(rnn, 2), rnn)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    link = path.with_name("latest")
    link.symlink_to(path)
    state.save(link, torch.ones(1, 2, HIDDEN), rnn)
    assert link.is_symlink() and bool(state.load(path, rnn).all())
    link.unlink()


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_failure_keeps_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: BaseException
) -> None:
    """A full disk or an interrupt, before and at the rename."""
    rnn, hx = hsm.GRU(3, HIDDEN), torch.randn(1, BATCH, HIDDEN)
    state.save(path, hx, rnn)

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(type(error)):
            state.save(path, hx + 1, rnn)
    assert os.listdir(path.parent) == [path.name]
    assert_same_bits(state.load(path, rnn), hx)


def test_written_to_the_disk_before_the_rename(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loses power after the rename finds the content: fsync of all of it, in the same folder, then replace."""
    events: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        events.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def watched_replace(source: str, target: str) -> None:
        assert os.path.dirname(source) == os.path.dirname(target)
        events.append(("replace", os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    state.save(path, torch.zeros(1, BATCH, HIDDEN), hsm.GRU(3, HIDDEN))
    size = path.stat().st_size
    assert events == [("fsync", size), ("replace", size)]


def test_killed_process_keeps_the_old_file(tmp_path: Path) -> None:
    """A process that dies between writing and renaming leaves the old state."""
    path, rnn, hx = tmp_path / "state", hsm.GRU(3, HIDDEN), torch.randn(1, BATCH, HIDDEN)
    state.save(path, hx, rnn)
    script = f"""
import os, torch, hsm_kernels as hsm
os.replace = lambda *_: os._exit(9)
hsm.state.save({str(path)!r}, torch.zeros(1, {BATCH}, {HIDDEN}), hsm.GRU(3, {HIDDEN}))
"""
    environment = {**os.environ, "HSM_KERNELS_BUILD": "none"}
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=environment).returncode == 9
    assert_same_bits(state.load(path, rnn), hx)


def test_truncated_file(path: Path) -> None:
    """Every prefix is refused."""
    rnn = hsm.LSTM(3, HIDDEN)
    state.save(path, state.initial_state(rnn, 2), rnn)
    content = path.read_bytes()
    for size in (0, 4, 8, 60, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"state\.load: .* is damaged, or not a safetensors file"):
            state.load(path, rnn)


def test_pickle_is_refused(path: Path) -> None:
    torch.save(torch.zeros(1, 2, HIDDEN), path)
    with pytest.raises(ValueError, match="is damaged, or not a safetensors file"):
        state.load(path, hsm.GRU(3, HIDDEN))


def test_no_file(tmp_path: Path) -> None:
    rnn = hsm.GRU(3, HIDDEN)
    with pytest.raises(FileNotFoundError):
        state.load(tmp_path / "missing", rnn)
    with pytest.raises(FileNotFoundError):
        state.save(tmp_path / "missing" / "file", state.initial_state(rnn, 1), rnn)
    with pytest.raises(IsADirectoryError):
        state.save(tmp_path, state.initial_state(rnn, 1), rnn)
    assert not list(tmp_path.parent.glob(".*.tmp"))


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the header of a safetensors file."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


FOREIGN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "weights of a model": (lambda header: header.pop("__metadata__"), "is not a state that state.save wrote"),
    "another format": (
        lambda header: header["__metadata__"].update(format="pt"),
        "is not a state that state.save wrote",
    ),
    "another version": (
        lambda header: header["__metadata__"].update(version="2"),
        "must have version 1 of the format, got 2; read it with the version of hsm_kernels that wrote it",
    ),
    "other names": (lambda header: header.update(x=header.pop("c")), "is damaged, or not a safetensors file"),
    "other shapes": (
        lambda header: header["c"].update(shape=[1, HIDDEN, 2]),
        r"the state in .*\[1\] must have shape \(D \* K, N, X\) = \(1, N, 5\), got \(1, 5, 2\)",
    ),
}


@pytest.mark.parametrize("row", FOREIGN)
def test_foreign_file(path: Path, row: str) -> None:
    change, message = FOREIGN[row]
    rnn = hsm.LSTM(3, HIDDEN)
    state.save(path, state.initial_state(rnn, 2), rnn)
    rewritten(path, change)
    with pytest.raises(ValueError, match=f"state.load: .*{message}"):
        state.load(path, rnn)


OTHER_MODULES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "GRU": (lambda: hsm.GRU(3, 4, 2), "cell = GRU", "cell = LSTM"),
    "cell": (lambda: nn.LSTMCell(3, 4), "cell = LSTMCell, num_layers = 1", "cell = LSTM, num_layers = 2"),
    "layers": (lambda: nn.LSTM(3, 4, 3), "num_layers = 3", "num_layers = 2"),
    "directions": (lambda: hsm.LSTM(3, 4, 2, bidirectional=True), "bidirectional = True", "bidirectional = False"),
    "layers and directions with as many rows": (
        lambda: hsm.LSTM(3, 4, 1, bidirectional=True),
        "num_layers = 1, bidirectional = True",
        "num_layers = 2, bidirectional = False",
    ),
    "hidden size": (lambda: hsm.LSTM(3, 5, 2), "hidden_size = 5", "hidden_size = 4"),
    "projection": (lambda: hsm.LSTM(3, 4, 2, proj_size=2), "proj_size = 2", "proj_size = 0"),
    "dtype": (lambda: hsm.LSTM(3, 4, 2).double(), "dtype = float64", "dtype = float32"),
}


@pytest.mark.parametrize("row", OTHER_MODULES)
def test_state_of_another_module(path: Path, row: str) -> None:
    other, wanted, given = OTHER_MODULES[row]
    rnn = hsm.LSTM(3, 4, 2)
    state.save(path, state.initial_state(rnn, 2), rnn)
    message = f"state.load: the module wants a state with {wanted}, {path} has one with {given}"
    assert outcome(lambda: state.load(path, other())) == (ValueError, message)


UNSAVABLE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a list": (
        lambda: state.unstack(state.initial_state(hsm.LSTM(3, 4, 2), 3)),
        TypeError,
        "state.save: hx must be a Tensor or a tuple (h, c) of two, got a list of 2; "
        "make one of a list with an entry per layer by state.stack, of [h, c] by tuple",
    ),
    "a tensor for an LSTM": (
        lambda: torch.zeros(2, 3, 4),
        TypeError,
        "state.save: hx of this LSTM must be a tuple (h, c), got one Tensor",
    ),
    "another width": (
        lambda: (torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)),
        ValueError,
        "state.save: hx[1] must have shape (D * K, N, X) = (2, N, 4), got (2, 3, 5)",
    ),
    "two batches": (
        lambda: (torch.zeros(2, 3, 4), torch.zeros(2, 1, 4)),
        ValueError,
        "state.save: hx[1] must have shape (D * K, N, X) = (2, N, 4), got (2, 1, 4)",
    ),
    "states of every step": (
        lambda: (torch.zeros(2, 7, 3, 4), torch.zeros(2, 7, 3, 4)),
        ValueError,
        "state.save: hx[0] must have shape (D * K, N, X) = (2, N, 4), got (2, 7, 3, 4)",
    ),
    "another dtype": (
        lambda: (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).half()),
        ValueError,
        "state.save: hx[1] must have the dtype of the module's weights, torch.float32, got torch.float16; "
        "use state.to(hx, torch.float32)",
    ),
}


@pytest.mark.parametrize("row", UNSAVABLE)
def test_what_cannot_be_saved(path: Path, row: str) -> None:
    hx, kind, message = UNSAVABLE[row]
    assert outcome(lambda: state.save(path, hx(), hsm.LSTM(3, 4, 2))) == (kind, message)
    assert not path.exists()


@pytest.mark.parametrize("library", ["safetensors", "numpy"])
def test_without_the_libraries(path: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    rnn = hsm.GRU(3, 4)
    wanted = (ImportError, "state.save and state.load need safetensors and numpy: pip install hsm_kernels[state]")
    assert outcome(lambda: state.save(path, state.initial_state(rnn, 1), rnn)) == wanted
    assert outcome(lambda: state.load(path, rnn)) == wanted
