"""InitialState and Stateful: what is carried over calls, what starts afresh, and what an error leaves alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rnn_helpers import assert_same_bits, leaf, map_tensors, outcome, random_state, tensors
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import hsm_kernels as hsm
from hsm_kernels import state

FEATURES, HIDDEN, BATCH, STEPS = 3, 4, 3, 6
MODULES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "hsm.LSTM": (hsm, "LSTM", {}),
    "hsm.GRU": (hsm, "GRU", {}),
    "hsm.LSTM-projected": (hsm, "LSTM", {"proj_size": 2}),
    "torch.nn.LSTM": (nn, "LSTM", {}),
    "torch.nn.GRU": (nn, "GRU", {}),
}
NAN = torch.nan
MASK = torch.tensor([True, False, True])


def build(name: str, **options: Any) -> nn.Module:
    namespace, cell, more = MODULES[name]
    return getattr(namespace, cell)(FEATURES, HIDDEN, 2, **more, **options)


@pytest.fixture(params=MODULES)
def rnn(request: pytest.FixtureRequest) -> nn.Module:
    """Two layers, one direction."""
    return build(request.param)


@pytest.fixture(params=["hsm.LSTM", "hsm.GRU"])
def ours(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


def steps(length: int = STEPS, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(length, batch, FEATURES, dtype=dtype)


def learned(rnn: nn.Module) -> hsm.InitialState:
    """An initial state that is not zero."""
    initial = hsm.InitialState(rnn)
    for parameter in initial.parameters():
        nn.init.normal_(parameter)
    return initial


def assert_close(ours: Any, wanted: Any) -> None:
    for one, other in zip(tensors(ours), tensors(wanted), strict=True):
        torch.testing.assert_close(one, other)


# InitialState.


@pytest.mark.parametrize("is_learned", [True, False])
def test_initial_state_is_zeros_of_the_module(rnn: nn.Module, is_learned: bool) -> None:
    keys = list(rnn.state_dict())
    rnn = rnn.double()
    initial = hsm.InitialState(rnn, is_learned)
    for batch in (2, 1, 0, None):
        assert type(initial(batch)) is type(state.initial_state(rnn, batch))
        assert_same_bits(initial(batch), state.initial_state(rnn, batch))
    assert all(part.is_contiguous() for part in tensors(initial(5)))
    names = ["h_0", "c_0"] if isinstance(initial(1), tuple) else ["h_0"]
    assert [name for name, _ in initial.named_parameters()] == (names if is_learned else [])
    assert list(initial.state_dict()) == names
    assert list(rnn.state_dict()) == keys and not list(initial.children())
    assert hsm.InitialState(rnn.to("meta")).h_0.device.type == "meta"


def test_initial_state_gradient_is_the_sum_over_the_batch(rnn: nn.Module) -> None:
    initial = learned(rnn)
    hx = leaf(state.clone(initial(BATCH)))
    x = steps()
    rnn(x, initial(BATCH))[0].square().sum().backward()
    wanted = torch.autograd.grad(rnn(x, hx)[0].square().sum(), tensors(hx))
    for parameter, grad in zip(initial.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad.sum(1, keepdim=True))


def test_initial_state_serves_as_reset_hx(ours: nn.Module) -> None:
    """A reset at step 2 to the learned state is a sequence that starts there from it."""
    initial, x = learned(ours), steps()
    mask = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    mask[2] = True
    output, _ = ours(x, reset_mask=mask, reset_hx=initial(1))
    assert_close(output[2:], ours(x[2:], initial(BATCH))[0])


# Carrying over.


@pytest.mark.parametrize("sizes", [[6], [1, 1, 1, 1, 1, 1], [2, 4], [3, 0, 3]])
def test_calls_equal_one_long_call(rnn: nn.Module, sizes: list[int]) -> None:
    """The outputs, the last state, and the gradients to the parameters with a cut at each call."""
    if 0 in sizes and not rnn.__module__.startswith("hsm"):
        pytest.skip("torch.nn takes no empty sequence")
    stream, x = hsm.Stateful(rnn), steps()
    assert stream.state is None
    results = [stream(window) for window in x.split(sizes)]
    output, hx_n = rnn(x)
    assert_close(torch.cat([result[0] for result in results]), output)
    assert_close(stream.state, hx_n)
    assert_same_bits(stream.state, results[-1][1])
    grads = torch.autograd.grad(sum(result[0].square().sum() for result in results), list(rnn.parameters()))
    cut, hx = 0.0, None
    for window in x.split(sizes):
        output, hx = rnn(window, hx)
        hx = state.detach(hx)
        cut = cut + output.square().sum()
    assert_close(grads, torch.autograd.grad(cut, list(rnn.parameters())))


@pytest.mark.parametrize("name", MODULES)
def test_bidirectional_is_the_call_with_the_last_state(name: str) -> None:
    rnn = build(name, bidirectional=True)
    stream, x = hsm.Stateful(rnn), steps()
    first = stream(x[:4])
    assert_same_bits(stream(x[4:]), rnn(x[4:], state.detach(first[1])))


@pytest.mark.parametrize("name", MODULES)
def test_batch_first(name: str) -> None:
    rnn = build(name, batch_first=True)
    stream, x = hsm.Stateful(rnn), torch.randn(BATCH, STEPS, FEATURES)
    assert_close(torch.cat([stream(window)[0] for window in x.split(2, 1)], 1), rnn(x)[0])


@pytest.mark.parametrize("initial", [False, True])
def test_unbatched(rnn: nn.Module, initial: bool) -> None:
    """The state has the form of the last result; a batch of 1 goes on from it, and the other way round."""
    given = learned(rnn) if initial else None
    stream, x = hsm.Stateful(rnn, given), torch.randn(STEPS, FEATURES)
    output, hx_n = rnn(x, None if given is None else given(None))
    for batched in ((False, False, False), (True, False, True), (False, True, False)):
        stream.reset()
        results = [
            stream(window[:, None] if as_batch else window)
            for window, as_batch in zip(x.split(2), batched, strict=True)
        ]
        assert [result[0].dim() == 3 for result in results] == list(batched)
        assert_close(torch.cat([result[0].flatten(0, -2) for result in results]), output)
        assert [part.dim() for part in tensors(stream.state)] == [3 if batched[-1] else 2] * len(tensors(hx_n))
        assert_close(map_tensors(Tensor.flatten, stream.state), map_tensors(Tensor.flatten, hx_n))
    stream.reset()
    stream(x[:2])
    stream.reset(torch.tensor(True))
    assert_close(stream(x)[0], output)


def test_results_and_options_are_those_of_the_module(ours: nn.Module) -> None:
    """All keyword arguments, and all three results."""
    stream, x, hx = hsm.Stateful(ours), steps(), random_state(ours, BATCH)
    options = {
        "reset_mask": torch.rand(STEPS, BATCH) < 0.3,
        "reset_hx": random_state(ours, 1),
        "detach_mask": torch.rand(STEPS, BATCH) < 0.3,
        "truncated_bptt_steps": 4,
        "lengths": torch.tensor([6, 0, 2]),
        "return_states": True,
    }
    stream.set_state(hx)
    result = stream(x, **options)
    assert len(result) == 3
    assert_same_bits(result, ours(x, hx, **options))
    assert_same_bits(stream.state, result[1])


def test_packed_sequences(rnn: nn.Module) -> None:
    """Sequence n of one call goes on as sequence n of the next, whatever their lengths."""
    stream = hsm.Stateful(rnn)
    first, second = [[torch.randn(length, FEATURES) for length in lengths] for lengths in ((2, 4, 1), (3, 1, 2))]
    stream(pack_sequence(first, enforce_sorted=False))
    _, hx_n = stream(pack_sequence(second, enforce_sorted=False))
    for n, pair in enumerate(zip(first, second, strict=True)):
        assert_close(state.select(hx_n, [n]), rnn(torch.cat(pair)[:, None])[1])


def test_no_graph_is_kept(ours: nn.Module) -> None:
    """The value is that of the result, and the second call's backward does not reach the first's graph."""
    stream, x = hsm.Stateful(ours), steps().requires_grad_()
    stream(x)
    assert not any(part.requires_grad for part in tensors(stream.state))
    later = steps()
    assert torch.autograd.grad(stream(later)[0].sum(), x, allow_unused=True) == (None,)


# The initial state.


def test_initial_as_constant(rnn: nn.Module) -> None:
    """Batch 1, N or unbatched; a copy, and no part of the state_dict."""
    x = steps()
    for hx in (random_state(rnn, 1), random_state(rnn, BATCH), random_state(rnn, None)):
        wanted = map_tensors(lambda part: part.reshape(part.size(0), -1, part.size(-1)).repeat(1, BATCH, 1), hx)
        wanted = state.select(wanted, range(BATCH))
        stream = hsm.Stateful(rnn, leaf(hx))
        keys = [f"rnn.{name}" for name in rnn.state_dict()]
        map_tensors(lambda part: part.fill_(NAN), hx)
        assert_same_bits(stream(x), rnn(x, wanted))
        assert list(stream.state_dict()) == keys and len(list(stream.parameters())) == len(list(rnn.parameters()))


def test_learned_initial_gets_a_gradient_where_a_call_starts_from_it(rnn: nn.Module) -> None:
    """In the first call, not in the second, and for the rows that were reset in the third."""
    initial, x = learned(rnn), steps()
    stream = hsm.Stateful(rnn, initial)
    assert {"initial.h_0"} < set(stream.state_dict())

    def grads(output: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(output.square().sum(), list(initial.parameters()), allow_unused=True)

    assert_close(grads(stream(x)[0]), grads(rnn(x, initial(BATCH))[0]))
    assert set(grads(stream(x)[0])) == {None}
    stream.reset(MASK)
    assert_close(grads(stream(x)[0]), grads(rnn(x[:, MASK], initial(2))[0]))
    assert set(grads(stream(x)[0])) == {None}
    stream.reset()
    assert_close(grads(stream(x)[0]), grads(rnn(x, initial(BATCH))[0]))


def test_learned_initial_is_read_at_the_call(ours: nn.Module) -> None:
    """A step of the optimizer between reset and call counts."""
    initial, x = learned(ours), steps()
    stream = hsm.Stateful(ours, initial)
    stream(x)
    stream.reset(MASK)
    with torch.no_grad():
        for parameter in initial.parameters():
            parameter.add_(1.0)
    assert_close(stream(x)[0][:, MASK], ours(x[:, MASK], initial(2))[0])


@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("kind", ["learned", "constant", "zeros"])
def test_reset_mask_resets_to_the_initial_state(ours: nn.Module, kind: str, unbatched: bool) -> None:
    """Unless reset_hx says otherwise."""
    initial = {"learned": learned(ours), "constant": random_state(ours, 1), "zeros": None}[kind]
    stream, x = hsm.Stateful(ours, initial), steps(batch=1)
    mask = torch.zeros(STEPS, 1, dtype=torch.bool)
    mask[3] = True
    reset_hx = random_state(ours, 1)
    if unbatched:
        x, mask, reset_hx = x[:, 0], mask[:, 0], map_tensors(lambda part: part[:, 0], reset_hx)
    alone = hsm.Stateful(ours, initial)(x[3:])[0]
    assert_close(stream(x, reset_mask=mask)[0][3:], alone)
    assert_close(stream(x, reset_mask=mask, reset_hx=reset_hx)[0][3:], ours(x[3:], reset_hx)[0])


# Resets.


@pytest.mark.parametrize("has_initial", [False, True])
def test_reset_rows(rnn: nn.Module, has_initial: bool) -> None:
    """Marked rows start afresh, the others go on; a NaN in what is dropped is gone, in value and in gradient."""
    initial, x = (learned(rnn) if has_initial else None), steps()
    stream = hsm.Stateful(rnn, initial)
    hx = random_state(rnn, BATCH)
    stream.set_state(map_tensors(lambda part: torch.where(MASK[:, None], NAN, part), hx))
    mask = MASK.clone()
    stream.reset(mask)
    mask.fill_(False)  # an environment that reuses its array of dones
    start = initial(BATCH) if initial else state.initial_state(rnn, BATCH)
    assert_same_bits(stream.state, state.where(MASK, start, hx))
    assert not any(part.requires_grad for part in tensors(stream.state))
    output, _ = stream(x)
    assert_close(output, rnn(x, state.where(MASK, start, hx))[0])
    output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in stream.parameters())
    assert_close(stream(x)[0], rnn(x, state.detach(rnn(x, state.where(MASK, start, hx))[1]))[0])


def test_resets_add_up(ours: nn.Module) -> None:
    stream, x = hsm.Stateful(ours), steps()
    stream(x)
    kept = stream.state
    stream.reset(torch.tensor([True, False, False]))
    stream.reset(torch.tensor([False, False, True]))
    assert_same_bits(stream.state, state.reset(kept, MASK))
    stream.reset()
    assert stream.state is None
    stream.reset(MASK)
    assert stream.state is None
    assert_same_bits(stream(x), ours(x))


def test_set_state(rnn: nn.Module) -> None:
    """A copy, without a graph, of any batch; what was reset before is forgotten."""
    stream, x = hsm.Stateful(rnn), steps()
    stream(steps(batch=2))
    stream.reset(torch.tensor([True, False]))
    hx = random_state(rnn, BATCH)
    given = leaf(state.clone(hx))
    stream.set_state(given)
    with torch.no_grad():
        map_tensors(lambda part: part.fill_(NAN), given)
    assert_same_bits(stream.state, hx)
    assert_same_bits(stream(x), rnn(x, hx))
    stream.set_state(None)
    assert stream.state is None


# Another batch.


@pytest.mark.parametrize("kind", ["learned", "constant", "zeros"])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_keep_on_batch_change(rnn: nn.Module, kind: str, batch: int) -> None:
    """The first rows go on, but for those that were reset; new ones start afresh."""
    initial = {"learned": learned(rnn), "constant": random_state(rnn, 1), "zeros": None}[kind]
    hx, x = random_state(rnn, BATCH), steps(batch=batch)
    start = {"learned": initial, "constant": lambda n: state.expand_batch(initial, n)}.get(
        kind, lambda n: state.initial_state(rnn, n)
    )(5)
    for mask in (None, MASK):
        stream = hsm.Stateful(rnn, initial, on_batch_change="keep")
        stream.set_state(hx)
        kept = hx
        if mask is not None:
            stream.reset(mask)
            kept = state.where(mask, state.select(start, [0, 1, 2]), hx)
        rows = state.select(state.cat([kept, state.select(start, [3, 4])]), range(batch))
        output, _ = stream(x)
        assert_close(output, rnn(x, rows)[0])
        assert tensors(stream.state)[0].size(1) == batch


def test_reset_on_batch_change(rnn: nn.Module) -> None:
    initial = learned(rnn)
    stream = hsm.Stateful(rnn, initial, on_batch_change="reset")
    stream(steps())
    stream.reset(MASK)
    x = steps(batch=2)
    assert_same_bits(stream(x), rnn(x, initial(2)))


def test_error_on_batch_change(ours: nn.Module) -> None:
    stream = hsm.Stateful(ours)
    stream(steps())
    kept = stream.state
    message = (
        "Stateful: the kept state has a batch of 3, the input one of 2; call reset() where new sequences start, or "
        "choose by on_batch_change: 'error' (now), 'reset' (all rows start afresh) or 'keep' (the first rows are kept)"
    )
    assert outcome(lambda: stream(steps(batch=2))) == (ValueError, message)
    assert_same_bits(stream.state, kept)
    stream.reset()
    stream(steps(batch=2))


# What surrounds a module.


def test_error_leaves_the_state(rnn: nn.Module) -> None:
    """An error of the module, and the rows to reset are still to reset."""
    stream, x = hsm.Stateful(rnn), steps()
    stream(x)
    stream.reset(MASK)
    kept = state.clone(stream.state)
    with pytest.raises(RuntimeError):
        stream(torch.zeros(STEPS, BATCH, FEATURES + 1))
    with pytest.raises(TypeError):
        stream(x, no_such_option=1)
    assert_same_bits(stream.state, kept)
    assert_same_bits(stream(x), rnn(x, kept))


def test_inference_then_training(rnn: nn.Module) -> None:
    """What a call in inference mode kept, or was reset in it, is no obstacle to a backward."""
    for initial in (None, learned(rnn)):
        stream, x = hsm.Stateful(rnn, initial), steps()
        with torch.inference_mode():
            stream(x)
        kept = stream.state
        assert not any(part.is_inference() for part in tensors(kept))
        stream(x)[0].sum().backward()
        with torch.inference_mode():
            stream(x)
            stream.reset(MASK.clone())
        start = initial(BATCH) if initial else state.initial_state(rnn, BATCH)
        wanted = state.where(MASK, start, stream.state)
        output, _ = stream(x)
        assert_close(output, rnn(x, wanted)[0])
        output.sum().backward()


def test_initial_made_in_inference_mode(ours: nn.Module) -> None:
    x = steps()
    with torch.inference_mode():
        stream = hsm.Stateful(ours, random_state(ours, BATCH))
        other = hsm.Stateful(ours)
        other.set_state(random_state(ours, BATCH))
    stream(x)[0].sum().backward()
    other(x)[0].sum().backward()


def test_train_and_eval_share_the_state(ours: nn.Module) -> None:
    stream, x = hsm.Stateful(ours), steps()
    first = stream.eval()(x[:3])[0]
    assert not ours.training
    assert_close(torch.cat([first, stream.train()(x[3:])[0]]), ours(x)[0])


def test_copies_are_independent(rnn: nn.Module) -> None:
    """A deepcopy goes on from the same state, rows to reset included, and on its own."""
    for context in (torch.enable_grad(), torch.inference_mode()):
        stream, x = hsm.Stateful(rnn, learned(rnn)), steps()
        with context:
            stream(x)
        stream.reset(MASK)
        twin = copy.deepcopy(stream)
        wanted = stream(x)
        kept = state.clone(stream.state)
        assert_same_bits(twin(x), wanted)
        twin(x)
        assert_same_bits(stream.state, kept)


def test_dtype_and_device(rnn: nn.Module) -> None:
    """The kept state, a constant initial state and the rows to reset move with the module."""
    stream, x = hsm.Stateful(rnn, random_state(rnn, 1)), steps()
    stream(x)
    stream.reset(MASK)
    kept = stream.state
    assert stream.double() is stream
    assert_close(stream.state, state.to(kept, torch.float64))
    assert stream(x.double())[0].dtype == torch.float64
    stream.reset(MASK)
    stream.to("meta")
    assert {part.device.type for part in tensors(stream.state)} == {"meta"}


@pytest.mark.parametrize("name", ["hsm.LSTM", "hsm.GRU", "torch.nn.LSTM", "torch.nn.GRU"])
def test_autocast(name: str) -> None:
    """In and out of autocast, with inputs of either dtype, and back by set_state what a call returned."""
    rnn = build(name)
    initial, x = learned(rnn), steps()
    stream = hsm.Stateful(rnn, initial)
    with torch.autocast("cpu", torch.bfloat16):
        _, hx_n = stream(x)
        stream.reset(MASK)
        stream(x)
        if name.startswith("hsm"):
            stream(x.bfloat16())
            stream.reset(MASK)
            stream(x.bfloat16())
            stream.set_state(hx_n)
            assert_same_bits(stream.state, state.to(hx_n, torch.float32))
        stream(x)
    stream.reset(MASK)
    output, _ = stream(x)
    assert output.dtype == torch.float32
    assert_close(output[:, MASK], rnn(x[:, MASK], initial(2))[0])  # not rounded to what autocast left


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_whole(ours: nn.Module) -> None:
    """The container in one graph, around the module; and the container around a compiled module."""
    initial, x = learned(ours), steps()
    plain = hsm.Stateful(ours, initial)
    for stream in (
        torch.compile(hsm.Stateful(ours, initial), backend="eager", fullgraph=True),
        hsm.Stateful(torch.compile(ours, backend="eager", fullgraph=True), initial),
    ):
        plain.reset()
        for window in x.split(2):
            assert_close(stream(window), plain(window))
        stream.reset(MASK)
        plain.reset(MASK)
        assert_close(stream(x), plain(x))


# The state_dict.


def test_state_dict_has_no_state_by_default(rnn: nn.Module) -> None:
    stream = hsm.Stateful(rnn)
    stream(steps())
    assert list(stream.state_dict()) == [f"rnn.{name}" for name in rnn.state_dict()]


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("batch", [None, 1, 5])
def test_persistent_state(rnn: nn.Module, batch: int | None, pending: bool) -> None:
    """Into a fresh module of the same kind, inside another: it goes on as the saved one would have."""
    x = torch.randn(STEPS, FEATURES) if batch is None else steps(batch=batch)
    model = nn.ModuleDict({"stream": hsm.Stateful(rnn, learned(rnn), persistent=True)})
    stream = model["stream"]
    stream(x)
    if pending:
        stream.reset(torch.arange(batch or 1) % 2 == 0)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    twin = nn.ModuleDict({"stream": copy.deepcopy(stream)})
    twin["stream"].set_state(random_state(rnn, 2))
    twin["stream"].reset(torch.tensor([True, True]))
    assert str(twin.load_state_dict(saved)) == "<All keys matched successfully>"
    wanted = state.clone(stream.state)
    assert_same_bits(twin["stream"].state, wanted)
    for value in saved.values():
        value.fill_(True)
    assert_same_bits(twin["stream"].state, wanted)
    ours, theirs = twin["stream"](x)[0], stream(x)[0]
    assert_same_bits(ours, theirs)
    grads = [
        torch.autograd.grad(output.sum(), list(of["stream"].initial.parameters()), allow_unused=True)
        for output, of in ((ours, twin), (theirs, model))
    ]
    assert_same_bits(*grads)
    assert (grads[0][0] is None) != pending


def test_persistent_state_that_is_none(rnn: nn.Module) -> None:
    """Where there was no state, there is none after loading."""
    saved = hsm.Stateful(rnn, persistent=True).state_dict()
    stream = hsm.Stateful(copy.deepcopy(rnn), persistent=True)
    stream(steps())
    assert str(stream.load_state_dict(saved)) == "<All keys matched successfully>"
    assert stream.state is None


def test_persistent_state_of_another_module() -> None:
    """An error of load_state_dict, and the kept state is what it was; so is a state where none is expected."""
    small, large = hsm.Stateful(hsm.LSTM(3, 4), persistent=True), hsm.Stateful(hsm.LSTM(3, 5), persistent=True)
    for stream in (small, large):
        stream(steps())
    kept = small.state
    with pytest.raises(RuntimeError, match=r"the kept state\[0\] must have shape \(D \* K, N, X\) = \(1, N, 4\), got"):
        small.load_state_dict(large.state_dict())
    assert_same_bits(small.state, kept)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        hsm.Stateful(hsm.LSTM(3, 4)).load_state_dict(small.state_dict())


def test_persistent_state_takes_the_dtype_of_the_module() -> None:
    stream = hsm.Stateful(hsm.GRU(FEATURES, HIDDEN), persistent=True)
    stream(steps())
    twin = hsm.Stateful(hsm.GRU(FEATURES, HIDDEN, dtype=torch.float64), persistent=True)
    twin.load_state_dict(stream.state_dict())
    assert_same_bits(twin.state, stream.state.double())


# Errors.

GRU = hsm.GRU(FEATURES, HIDDEN)
LSTM = hsm.LSTM(FEATURES, HIDDEN)
H = torch.zeros(1, BATCH, HIDDEN)


def called() -> hsm.Stateful:
    stream = hsm.Stateful(GRU)
    stream(steps())
    return stream


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "InitialState of a cell": (
        lambda: hsm.InitialState(hsm.GRUCell(3, 4)),
        TypeError,
        "InitialState: rnn must be an LSTM or GRU, got GRUCell; one step is a sequence of length 1",
    ),
    "InitialState of another module": (
        lambda: hsm.InitialState(nn.Linear(3, 4)),
        TypeError,
        "InitialState: rnn must be an LSTM, GRU, LSTMCell or GRUCell of hsm_kernels or torch.nn, got Linear",
    ),
    "Stateful of a cell": (
        lambda: hsm.Stateful(nn.LSTMCell(3, 4)),
        TypeError,
        "Stateful: rnn must be an LSTM or GRU, got LSTMCell; one step is a sequence of length 1",
    ),
    "on_batch_change": (
        lambda: hsm.Stateful(GRU, on_batch_change="keep_first"),
        ValueError,
        "Stateful: on_batch_change must be one of 'error', 'reset', 'keep', got 'keep_first'",
    ),
    "initial of another kind": (
        lambda: hsm.Stateful(GRU, hsm.InitialState(LSTM)),
        TypeError,
        "Stateful: initial of this GRU must be one Tensor, got a tuple",
    ),
    "initial of another size": (
        lambda: hsm.Stateful(GRU, torch.zeros(2, 1, HIDDEN)),
        ValueError,
        "Stateful: initial must have shape (D * K, N, X) = (1, N, 4), got (2, 1, 4)",
    ),
    "initial of another dtype": (
        lambda: hsm.Stateful(GRU, H.double()),
        ValueError,
        "Stateful: initial must have the dtype of the module's weights, torch.float32, got torch.float64; "
        "use state.to(hx, torch.float32)",
    ),
    "initial of another batch": (
        lambda: hsm.Stateful(GRU, H)(steps(batch=2)),
        ValueError,
        "Stateful: initial has a batch of 3, the input one of 2; an initial of batch 1 fits all",
    ),
    "hx in the call": (
        lambda: called()(steps(), hx=H),
        TypeError,
        "Stateful: the module keeps hx itself; use set_state(hx) before the call",
    ),
    "a list as input": (
        lambda: called()([1.0]),
        TypeError,
        "Stateful: input must be a Tensor or a PackedSequence, got list",
    ),
    "1-D input": (
        lambda: called()(torch.zeros(3)),
        ValueError,
        "Stateful: Expected input to be 2D or 3D, got 1D instead",
    ),
    "a mask of ints": (
        lambda: called().reset(MASK.int()),
        TypeError,
        "Stateful.reset: mask must be a torch.bool tensor, got torch.int32; use mask.bool()",
    ),
    "a mask of another batch": (
        lambda: called().reset(MASK[:2]),
        ValueError,
        "Stateful.reset: mask must have shape (N,) = (3,), got (2,)",
    ),
}


@pytest.mark.parametrize("row", ERRORS)
def test_errors(row: str) -> None:
    call, kind, message = ERRORS[row]
    assert outcome(call) == (kind, message)


BAD_STATES: dict[str, tuple[Any, type[Exception], str]] = {
    "a list": (
        [H],
        TypeError,
        "Stateful.set_state: hx must be a Tensor or a tuple (h, c) of two, got a list of 1; "
        "make one of a list with an entry per layer by state.stack, of [h, c] by tuple",
    ),
    "a pair": ((H, H), TypeError, "Stateful.set_state: hx of this GRU must be one Tensor, got a tuple"),
    "another width": (
        H[:, :, :2],
        ValueError,
        "Stateful.set_state: hx must have shape (D * K, N, X) = (1, N, 4), got (1, 3, 2)",
    ),
    "another dtype": (
        H.bfloat16(),
        ValueError,
        "Stateful.set_state: hx must have the dtype of the module's weights, torch.float32, got torch.bfloat16; "
        "use state.to(hx, torch.float32)",
    ),
    "elsewhere": (
        H.to("meta"),
        ValueError,
        "Stateful.set_state: hx must be on the module's device cpu, got meta; use state.to",
    ),
}


@pytest.mark.parametrize("row", BAD_STATES)
def test_set_state_errors(row: str) -> None:
    """Nothing has changed, rows to reset included."""
    hx, kind, message = BAD_STATES[row]
    stream = called()
    stream.reset(MASK)
    kept = state.clone(stream.state)
    assert outcome(lambda: stream.set_state(hx)) == (kind, message)
    assert_same_bits(stream.state, kept)
