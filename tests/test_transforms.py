"""torch.func around modules with every boundary argument: as the reference, which is plain PyTorch, and without it."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rnn_helpers import SEQUENCE_CELLS, STEP_CELLS, random_state, tensors
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_leaves, tree_map

import hsm_kernels as hsm
from hsm_kernels import _backend

sequence_cells = pytest.mark.parametrize("cell", SEQUENCE_CELLS)
FLOAT = torch.float64
LENGTH, BATCH = 5, 3


class Problem:
    """A module, its arguments, and its results as a function of them."""

    def __init__(self, cell: str) -> None:
        options: dict[str, Any] = {"proj_size": 2} if cell == "LSTM" else {"num_layers": 2}
        self.rnn = getattr(hsm, cell)(3, 4, bidirectional=True, dtype=FLOAT, **options)
        self.weights = {name: weight.detach() for name, weight in self.rnn.named_parameters()}
        self.x = torch.randn(LENGTH, BATCH, 3, dtype=FLOAT)
        self.hx, self.reset_hx = random_state(self.rnn, BATCH, FLOAT), random_state(self.rnn, 1, FLOAT)
        self.extras = {
            "reset_mask": torch.rand(LENGTH, BATCH) < 0.3,
            "detach_mask": torch.rand(LENGTH, BATCH) < 0.3,
            "lengths": torch.tensor([LENGTH, 2, 0]),
            "return_states": True,
        }
        self.arguments = (self.weights, self.x, self.hx, self.reset_hx)
        self.tangents = tree_map(torch.randn_like, self.arguments)

    def __call__(self, weights: Any, x: Any, hx: Any, reset_hx: Any) -> Any:
        return functional_call(self.rnn, weights, (x, hx), {**self.extras, "reset_hx": reset_hx})

    def loss(self, *arguments: Any) -> Tensor:
        return total(self(*arguments))

    def of_input(self, x: Tensor) -> Any:
        return self(self.weights, x, self.hx, self.reset_hx)


def total(tree: Any) -> Tensor:
    return sum(tensor.square().sum() for tensor in tree_leaves(tree))


def two(tree: Any) -> Any:
    """Every tensor, and another one, along a new first dimension."""
    return tree_map(lambda tensor: torch.stack([tensor, 1 - tensor.flip(0)]), tree)


EVERY = (0, 1, 2, 3)
OF_X = (None, 0, None, None)
OF_WEIGHTS = (0, None, None, None)

PROGRAMS: dict[str, Callable[[Problem], Any]] = {
    "jvp": lambda f: jvp(f, f.arguments, f.tangents),
    "vjp": lambda f: vjp(f.loss, *f.arguments)[1](torch.ones((), dtype=FLOAT)),
    "vjp without gradients": lambda f: torch.no_grad()(lambda: vjp(f.loss, *f.arguments)[0])(),
    "jvp(grad)": lambda f: jvp(grad(f.loss, EVERY), f.arguments, f.tangents),
    "grad(jvp)": lambda f: grad(lambda *a: total(jvp(f, a, f.tangents)[1]), EVERY)(*f.arguments),
    "grad(grad)": lambda f: grad(lambda *a: total(grad(f.loss, EVERY)(*a)), EVERY)(*f.arguments),
    "jacrev": lambda f: jacrev(lambda x: f.of_input(x)[0])(f.x),
    "jacfwd": lambda f: jacfwd(lambda x: f.of_input(x)[0])(f.x),
    "hessian": lambda f: hessian(lambda hx: f.loss(f.weights, f.x, hx, f.reset_hx))(f.hx),
    "jacrev(jacrev)": lambda f: jacrev(jacrev(lambda hx: f.loss(f.weights, f.x, hx, f.reset_hx)))(f.hx),
    "vmap over inputs": lambda f: vmap(f, OF_X)(f.weights, two(f.x), f.hx, f.reset_hx),
    "vmap over the last dimension": lambda f: vmap(f, (None, 3, None, None), out_dims=1)(
        f.weights, two(f.x).movedim(0, 3), f.hx, f.reset_hx
    ),
    "vmap over states": lambda f: vmap(f, (None, None, 0, 0))(f.weights, f.x, two(f.hx), two(f.reset_hx)),
    "vmap over weights": lambda f: vmap(f, OF_WEIGHTS)(two(f.weights), f.x, f.hx, f.reset_hx),
    "vmap over everything": lambda f: vmap(f)(*two(f.arguments)),
    "vmap(vmap)": lambda f: vmap(vmap(f, OF_X), OF_WEIGHTS)(two(f.weights), two(f.x), f.hx, f.reset_hx),
    "vmap(jvp)": lambda f: vmap(
        lambda x, dx: jvp(f.of_input, (x,), (dx,))
    )(two(f.x), two(f.x).cos()),
    "vmap(grad) of samples": lambda f: vmap(grad(f.loss, EVERY), OF_X)(f.weights, two(f.x), f.hx, f.reset_hx),
    "vmap(vmap(grad)) of samples": lambda f: vmap(vmap(grad(f.loss, EVERY), OF_X), OF_X)(
        f.weights, two(two(f.x)), f.hx, f.reset_hx
    ),
    "vmap(vmap(grad)) of samples and models": lambda f: vmap(vmap(grad(f.loss, EVERY), OF_X), OF_WEIGHTS)(
        two(f.weights), two(f.x), f.hx, f.reset_hx
    ),
    "vmap(grad) of models": lambda f: vmap(grad(f.loss, EVERY), OF_WEIGHTS)(two(f.weights), f.x, f.hx, f.reset_hx),
    "vmap(jvp(grad))": lambda f: vmap(
        lambda x: jvp(grad(f.loss, EVERY), (f.weights, x, f.hx, f.reset_hx), f.tangents)
    )(two(f.x)),
    "grad(vmap)": lambda f: grad(lambda w: total(vmap(f, OF_X)(w, two(f.x), f.hx, f.reset_hx)))(f.weights),
    "grad(vmap(grad)) of samples": lambda f: grad(
        lambda w: total(vmap(grad(f.loss, EVERY), OF_X)(w, two(f.x), f.hx, f.reset_hx))
    )(f.weights),
    "grad(vmap(grad)) of models": lambda f: grad(
        lambda w: total(vmap(grad(f.loss, EVERY), OF_WEIGHTS)(w, f.x, f.hx, f.reset_hx))
    )(two(f.weights)),
}  # fmt: skip


def assert_as_the_reference(program: Callable[[Problem], Any], problem: Problem, tolerance: float = 1e-10) -> None:
    found = program(problem)
    with hsm.use_backend("reference"):
        wanted = program(problem)
    torch.testing.assert_close(tree_leaves(found), tree_leaves(wanted), rtol=tolerance, atol=tolerance)


@pytest.fixture
def no_reference_by_itself() -> Iterator[None]:
    """Where the reference would run by itself, it says so."""
    _backend._warned.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="hsm_kernels runs the plain PyTorch reference")
        yield


@pytest.mark.parametrize("program", PROGRAMS)
@sequence_cells
def test_programs(no_reference_by_itself: None, cell: str, program: str) -> None:
    assert_as_the_reference(PROGRAMS[program], Problem(cell))


@sequence_cells
def test_vmap_over_masks_and_lengths(no_reference_by_itself: None, cell: str) -> None:
    problem = Problem(cell)
    masks = torch.rand(2, 2, LENGTH, BATCH) < 0.4
    lengths = torch.tensor([[5, 0, 3], [1, 4, 5]])

    def call(reset_mask: Tensor, detach_mask: Tensor, lengths: Tensor) -> Any:
        extras = {"reset_mask": reset_mask, "detach_mask": detach_mask, "lengths": lengths, "return_states": True}

        def loss(weights: Any) -> Tensor:
            return total(functional_call(problem.rnn, weights, (problem.x, problem.hx), extras))

        return grad(loss)(problem.weights)

    assert_as_the_reference(lambda _: vmap(call)(masks[0], masks[1], lengths), problem)


@pytest.mark.filterwarnings("ignore:hsm_kernels runs the plain PyTorch reference:RuntimeWarning")
@pytest.mark.parametrize("outer, inner", [(jacfwd, jacfwd), (hessian, jacfwd)])
@sequence_cells
def test_forward_mode_inside_forward_mode_is_the_reference(cell: str, outer: Any, inner: Any) -> None:
    """PyTorch gives a custom function no second tangent: unseen, it would be zero."""
    problem = Problem(cell)

    def program(f: Problem) -> Any:
        return outer(inner(lambda to: f.loss(f.weights, f.x, f.hx, to)))(f.reset_hx)

    assert_as_the_reference(program, problem)
    _backend._warned.clear()
    with pytest.warns(RuntimeWarning, match="forward-mode differentiation inside"):
        program(problem)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@sequence_cells
def test_linearize(cell: str) -> None:
    f = Problem(cell)
    output, push = linearize(f.of_input, f.x)
    found, wanted = (output, push(f.tangents[1])), jvp(f.of_input, (f.x,), (f.tangents[1],))
    torch.testing.assert_close(tree_leaves(found), tree_leaves(wanted))


@pytest.mark.parametrize("grads", [True, False])
@sequence_cells
def test_dual_numbers(cell: str, grads: bool) -> None:
    """torch.autograd.forward_ad, and the gradient of a tangent."""
    f = Problem(cell)
    x = f.x.clone().requires_grad_(grads)
    with torch.set_grad_enabled(grads), forward_ad.dual_level():
        output = f(f.weights, forward_ad.make_dual(x, f.tangents[1]), f.hx, f.reset_hx)[0]
        tangent = forward_ad.unpack_dual(output).tangent

    def push(x: Tensor) -> Tensor:
        return jvp(lambda x: f.of_input(x)[0], (x,), (f.tangents[1],))[1]

    torch.testing.assert_close(tangent, push(f.x))
    if grads:
        (found,) = torch.autograd.grad(total(tangent), x)
        torch.testing.assert_close(found, grad(lambda x: total(push(x)))(f.x))


@sequence_cells
def test_tangents_do_not_cross_detached_edges(cell: str) -> None:
    rnn, x = getattr(hsm, cell)(3, 4, dtype=FLOAT), torch.randn(6, 2, 3, dtype=FLOAT)
    moved = torch.zeros_like(x)
    moved[:3] = 1
    _, tangent = jvp(lambda x: rnn(x, truncated_bptt_steps=3)[0], (x,), (moved,))
    assert tangent[:3].abs().min() > 0
    assert tangent[3:].abs().max() == 0


@sequence_cells
def test_ensembles(no_reference_by_itself: None, cell: str) -> None:
    """Trained by a plain backward pass through vmap."""
    models = [getattr(hsm, cell)(3, 4, dtype=FLOAT) for _ in range(3)]
    stacked, _ = stack_module_state(models)
    x = torch.randn(5, 2, 3, dtype=FLOAT, requires_grad=True)
    together = vmap(lambda weights: functional_call(models[0], weights, (x,))[0])(stacked)
    found = torch.autograd.grad(total(together), [x, *stacked.values()])
    apart = torch.stack([model(x)[0] for model in models])
    torch.testing.assert_close(together, apart)
    x_grad, *grads = torch.autograd.grad(total(apart), [x, *(p for model in models for p in model.parameters())])
    torch.testing.assert_close(found[0], x_grad)
    for k, grad_of_all in enumerate(found[1:]):
        torch.testing.assert_close(grad_of_all, torch.stack(grads[k :: len(stacked)]))


@sequence_cells
def test_batched_gradients_of_one_graph(no_reference_by_itself: None, cell: str) -> None:
    """A Jacobian by torch.autograd.grad(is_grads_batched=True), and its second derivative."""
    rnn = getattr(hsm, cell)(3, 4, 2, dtype=FLOAT)
    x = torch.randn(3, 2, 3, dtype=FLOAT, requires_grad=True)
    output = rnn(x)[0]
    rows = torch.eye(output.numel(), dtype=FLOAT).view(-1, *output.shape)
    (jacobian,) = torch.autograd.grad(output, x, rows, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(jacobian.view(*output.shape, *x.shape), jacrev(lambda x: rnn(x)[0])(x))
    per_row = [torch.autograd.grad(output, list(rnn.parameters()), row, retain_graph=True) for row in rows[:4]]
    found = torch.autograd.grad(output, list(rnn.parameters()), rows[:4], is_grads_batched=True)
    for k, batched in enumerate(found):
        torch.testing.assert_close(batched, torch.stack([row[k] for row in per_row]))


@sequence_cells
@pytest.mark.parametrize("sizes", [(2, 3, 5, 2), (3, 72, 96, 1), (1, 4, 5, 1)], ids=["small", "large", "one sample"])
def test_per_sample_gradients(no_reference_by_itself: None, cell: str, sizes: tuple[int, ...]) -> None:
    samples, length, hidden, batch = sizes
    rnn = getattr(hsm, cell)(hidden, hidden, dtype=FLOAT)
    weights = {name: weight.detach() for name, weight in rnn.named_parameters()}
    x = torch.randn(samples, length, batch, hidden, dtype=FLOAT)

    def loss(weights: Any, x: Tensor) -> Tensor:
        return functional_call(rnn, weights, (x,))[0].square().sum()

    found = vmap(grad(loss), (None, 0))(weights, x)
    for k in range(samples):
        wanted = torch.autograd.grad(loss(dict(rnn.named_parameters()), x[k]), list(rnn.parameters()))
        for name, gradient in zip(weights, wanted, strict=True):
            torch.testing.assert_close(found[name][k], gradient)


@pytest.mark.parametrize("cell", STEP_CELLS)
def test_cells(no_reference_by_itself: None, cell: str) -> None:
    rnn, x = getattr(hsm, cell)(3, 4, dtype=FLOAT), torch.randn(5, 2, 3, dtype=FLOAT)

    def programs() -> list[Any]:
        return [
            vmap(lambda x: tensors(rnn(x)))(x),
            vmap(grad(lambda x: total(rnn(x))))(x),
            jvp(lambda x: tensors(rnn(x)), (x[0],), (x[1],)),
            hessian(lambda x: total(rnn(x)))(x[0]),
        ]

    found = programs()
    with hsm.use_backend("reference"):
        torch.testing.assert_close(tree_leaves(found), tree_leaves(programs()))
