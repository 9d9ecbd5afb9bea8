"""Who is measured: what a peer is, and those that need nothing but torch.

To add a peer (another runtime, say), write a function that takes a :class:`cases.Problem` and
returns what computes it, :class:`Prepared`, or None where the peer cannot do that case. Conversion
and compilation belong before the call. Then list the :class:`Peer` in ``bench_rnn.PEERS``.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from cases import Problem
from torch import Tensor, nn

Call = Callable[[], tuple[Tensor, ...]]

OURS = "hsm_kernels"
LIGHT = "hsm_kernels, bfloat16 weights"
TORCH = "torch.nn"
TORCH_WITHOUT_ONEDNN = "torch.nn, oneDNN off"


@dataclass(frozen=True)
class Prepared:
    """A call that is timed, and how to read what it returns as torch.nn's results."""

    run: Callable[[], Any]
    read: Callable[[Any], tuple[Tensor, ...]] = tuple


@dataclass(frozen=True)
class Peer:
    """A contender: its name, how it prepares a problem, and what surrounds its calls."""

    name: str
    prepare: Callable[[Problem], Prepared | None]
    context: Callable[[Problem], AbstractContextManager[object]] = lambda problem: nullcontext()
    packages: tuple[str, ...] = ()  # that it needs beside torch
    settings: str = ""

    def missing(self) -> list[str]:
        """The packages it needs that are not installed."""
        return [package for package in self.packages if find_spec(package) is None]

    def describe(self) -> dict[str, Any]:
        """Versions and settings, or what is missing."""
        if missing := self.missing():
            return {"missing": missing}
        versions = {package: version(package) for package in self.packages}
        return {"versions": versions, "settings": self.settings}


def torch_peer(problem: Problem) -> Prepared:
    """torch.nn's module."""
    return Prepared(module_call(problem.torch_nn, problem))


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
def without_onednn(_: Problem | None = None) -> Iterator[None]:
    """Let torch use its own kernels in place of oneDNN's."""
    set_flags = torch.backends.mkldnn.set_flags
    before, *_ = set_flags(_enabled=False, _fp32_precision=None)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        set_flags(_enabled=before, _fp32_precision=None)  # type: ignore[no-untyped-call]


def light_peer(problem: Problem) -> Prepared | None:
    """Our module with ``weight_dtype=torch.bfloat16``, where reading the weights is the limit."""
    case = problem.case
    if case.kind == "training" or case.batch != 1 or case.dtype != "float32":
        return None
    module = type(problem.ours)(case.hidden, case.hidden, weight_dtype=torch.bfloat16)
    module.load_state_dict(problem.ours.state_dict())
    return Prepared(module_call(module.eval(), problem))


TORCH_PEERS = (
    Peer(OURS, lambda problem: Prepared(module_call(problem.ours, problem))),
    Peer(TORCH, torch_peer, settings="as it comes: oneDNN on"),
    Peer(TORCH_WITHOUT_ONEDNN, torch_peer, without_onednn, settings="oneDNN off"),
    Peer(LIGHT, light_peer, settings="weight_dtype=torch.bfloat16; rows with N = 1"),
)
