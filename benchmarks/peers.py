"""Who is measured: a function for each contender that prepares a call for a problem.

To add a peer (another runtime, say), write a function that takes a :class:`cases.Problem` and
returns a call that computes it, or None where the peer is not installed or cannot do that case.
Conversion and compilation belong before the call. Then list it in ``PEERS``.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from cases import Problem
from torch import Tensor, nn

Call = Callable[[], tuple[Tensor, ...]]

OURS = "hsm_kernels"
TORCH = "torch.nn"
TORCH_WITHOUT_ONEDNN = "torch.nn, oneDNN off"


@dataclass(frozen=True)
class Peer:
    """A contender: its name, how it prepares a problem, and what surrounds its calls."""

    name: str
    prepare: Callable[[Problem], Call | None]
    context: Callable[[], AbstractContextManager[object]] = nullcontext


def module_call(module: nn.RNNBase, problem: Problem) -> Call:
    """A call of a module that behaves as torch.nn's do.

    It returns the output (one step: the new state too), in training followed by the gradients of
    the input and of all weights.
    """
    if problem.case.kind == "training":
        return training_call(lambda sequence: module(sequence)[0], module, problem)
    if problem.case.kind == "step":
        return _step_call(module, problem)
    return lambda: (module(problem.input)[0],)


def _step_call(module: nn.RNNBase, problem: Problem) -> Call:
    def call() -> tuple[Tensor, ...]:
        output, state = module(problem.input, problem.state)
        return (output, *state) if isinstance(state, tuple) else (output, state)

    return call


def training_call(
    forward: Callable[[Tensor], Tensor], module: nn.RNNBase, problem: Problem
) -> Call:
    """A call of ``forward``, input -> output, and the gradients of the input and of ``module``."""
    sequence = problem.input.clone().requires_grad_()
    wanted = (sequence, *module.parameters())

    def call() -> tuple[Tensor, ...]:
        output = forward(sequence)
        return output.detach(), *torch.autograd.grad(output, wanted, problem.output_gradient)

    return call


@contextmanager
def without_onednn() -> Iterator[None]:
    """Let torch use its own kernels in place of oneDNN's."""
    set_flags = torch.backends.mkldnn.set_flags
    before, *_ = set_flags(_enabled=False, _fp32_precision=None)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        set_flags(_enabled=before, _fp32_precision=None)  # type: ignore[no-untyped-call]


PEERS = (
    Peer(OURS, lambda problem: module_call(problem.ours, problem)),
    Peer(TORCH, lambda problem: module_call(problem.torch_nn, problem)),
    Peer(
        TORCH_WITHOUT_ONEDNN,
        lambda problem: module_call(problem.torch_nn, problem),
        without_onednn,
    ),
)
