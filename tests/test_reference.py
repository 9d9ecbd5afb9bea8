"""The reference against torch.nn, and its boundaries against plain slicing and detaching."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hsm_kernels import reference
from hsm_kernels.reference import Boundaries, Weights

STEPS, BATCH, INPUTS, HIDDEN = 6, 3, 4, 5
DOUBLE = torch.float64


def run(cell: str, x: Tensor, state: tuple[Tensor, ...], weights: Weights, *rest: Any) -> tuple[Tensor, ...]:
    """The hidden state of every step, then the final state."""
    if cell == "LSTM":
        h, _, h_n, c_n = reference.lstm(x, *state, weights, *rest)
        return h, h_n, c_n
    return reference.gru(x, *state, weights, *rest)


def make(cell: str, proj_size: int = 0, steps: int = STEPS) -> tuple[nn.RNNBase, Weights, Tensor, tuple[Tensor, ...]]:
    """A module of torch.nn in float64, its weights, an input and a state, all requiring gradients."""
    options = {"proj_size": proj_size} if proj_size else {}
    rnn = getattr(nn, cell)(INPUTS, HIDDEN, dtype=DOUBLE, **options)
    flat = dict(zip(rnn._flat_weights_names, rnn._flat_weights, strict=True))
    weights = Weights(*(flat.get(f"{name}_l0") for name in Weights._fields))
    x = torch.randn(steps, BATCH, INPUTS, dtype=DOUBLE, requires_grad=True)
    sizes = (proj_size or HIDDEN, HIDDEN) if cell == "LSTM" else (HIDDEN,)
    return rnn, weights, x, tuple(torch.randn(BATCH, size, dtype=DOUBLE, requires_grad=True) for size in sizes)


def torch_nn(rnn: nn.RNNBase, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    hx = tuple(part[None] for part in state)
    output, hx_n = rnn(x, hx if len(hx) == 2 else hx[0])
    return output, *(part[0] for part in (hx_n if isinstance(hx_n, tuple) else (hx_n,)))


cells = pytest.mark.parametrize("cell, proj_size", [("LSTM", 0), ("LSTM", 3), ("GRU", 0)])


@cells
def test_equals_torch_nn(cell: str, proj_size: int) -> None:
    rnn, weights, x, state = make(cell, proj_size)
    torch.testing.assert_close(run(cell, x, state, weights), torch_nn(rnn, x, state))


@cells
def test_reverse_is_the_flipped_sequence(cell: str, proj_size: int) -> None:
    _, weights, x, state = make(cell, proj_size)
    h, *final = run(cell, x.flip(0), state, weights)
    torch.testing.assert_close(run(cell, x, state, weights, Boundaries(), True), (h.flip(0), *final))


@cells
@pytest.mark.parametrize("reverse", [False, True])
def test_reset_starts_a_new_sequence(cell: str, proj_size: int, reverse: bool) -> None:
    """Steps 0-1 and 2-5 are two sequences; the second to run starts from the reset state."""
    _, weights, x, state = make(cell, proj_size)
    reset_state = tuple(torch.randn_like(part) for part in state)
    mask = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    mask[2] = True
    whole, *_ = run(cell, x, state, weights, Boundaries(mask, reset_state), reverse)
    first, second = (reset_state, state) if reverse else (state, reset_state)
    parts = [run(cell, x[:2], first, weights, Boundaries(), reverse)[0]]
    parts.append(run(cell, x[2:], second, weights, Boundaries(), reverse)[0])
    torch.testing.assert_close(whole, torch.cat(parts))


@cells
def test_detach_keeps_values_and_cuts_gradients(cell: str, proj_size: int) -> None:
    _, weights, x, state = make(cell, proj_size)
    mask = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    mask[3] = True
    cut = run(cell, x, state, weights, Boundaries(detach_mask=mask))
    torch.testing.assert_close(cut, run(cell, x, state, weights))
    h, *middle = run(cell, x[:3], state, weights)
    chunked = torch.cat([h, run(cell, x[3:], tuple(part.detach() for part in middle), weights)[0]])
    upstream = torch.randn_like(chunked)
    inputs = (x, *state, *(w for w in weights if w is not None))
    grads = [torch.autograd.grad(out, inputs, upstream) for out in (cut[0], chunked)]
    torch.testing.assert_close(*grads)


@cells
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_end_sequences_and_ignore_what_follows(cell: str, proj_size: int, reverse: bool) -> None:
    _, weights, x, state = make(cell, proj_size)
    lengths = torch.tensor([STEPS, 0, 4])
    noise = torch.full_like(x, float("nan"))
    valid = torch.arange(STEPS)[:, None] < lengths
    everywhere = torch.ones(STEPS, BATCH, dtype=torch.bool)
    dirty = torch.where(valid[..., None], x, noise)
    h, *final = run(cell, dirty, state, weights, Boundaries(lengths=lengths), reverse)
    for n, length in enumerate(lengths.tolist()):
        alone = tuple(part[n : n + 1] for part in state)
        h_alone, *final_alone = run(cell, x[:length, n : n + 1], alone, weights, Boundaries(), reverse)
        torch.testing.assert_close(h[:length, n : n + 1], h_alone)
        assert not h[length:, n].any()
        torch.testing.assert_close([part[n : n + 1] for part in final], final_alone)
    grads = torch.autograd.grad(h.sum(), (x, *state, *(w for w in weights if w is not None)))
    assert all(grad.isfinite().all() for grad in grads)
    masked = run(cell, x, state, weights, Boundaries(everywhere & ~valid, None, everywhere & ~valid, lengths), reverse)
    torch.testing.assert_close(masked, (h, *final))


@cells
def test_no_steps(cell: str, proj_size: int) -> None:
    _, weights, x, state = make(cell, proj_size, steps=0)
    h, *final = run(cell, x, state, weights)
    assert h.shape == (0, BATCH, proj_size or HIDDEN)
    torch.testing.assert_close(tuple(final), state)


@cells
def test_differentiable_twice(cell: str, proj_size: int) -> None:
    _, weights, x, state = make(cell, proj_size)
    mask = torch.rand(STEPS, BATCH) < 0.3
    boundaries = Boundaries(mask, tuple(torch.randn_like(part) for part in state), None, torch.tensor([STEPS, 2, 4]))
    tensors = (x, *state, *(w.detach().requires_grad_() for w in weights if w is not None))

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        parts = len(state)
        return run(cell, x, rest[:parts], Weights(*rest[parts:]), boundaries)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)
