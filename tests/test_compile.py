"""torch.compile with inductor, and programs in another process. What needs no C++ compiler is in test_drop_in.py."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from rnn_helpers import SEQUENCE_CELLS, random_state, tensors
from torch import Tensor, nn
from torch.autograd import forward_ad

import hsm_kernels as hsm

pytestmark = pytest.mark.slow
sequence_cells = pytest.mark.parametrize("cell", SEQUENCE_CELLS)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """A layer and a head, as a function of everything whose size changes from batch to batch."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        self.rnn = getattr(hsm, cell)(4, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, hx: Any = None, reset_mask: Any = None, lengths: Any = None) -> tuple[Tensor, Any]:
        output, hx_n = self.rnn(x, hx, reset_mask=reset_mask, lengths=lengths)
        return self.head(output), hx_n

    def arguments(self, steps: int, batch: int, boundaries: bool) -> tuple[Any, ...]:
        x = torch.randn(steps, batch, 4)
        if not boundaries:
            return (x,)
        return x, random_state(self.rnn, batch), torch.rand(steps, batch) < 0.3, torch.randint(0, steps + 1, (batch,))


def results(call: Any, model: Model, arguments: tuple[Any, ...]) -> list[Tensor]:
    """Outputs, and the gradients of every parameter."""
    outputs = tensors(call(*arguments))
    loss = sum(output.square().sum() for output in outputs)
    return [*(output.detach() for output in outputs), *torch.autograd.grad(loss, list(model.parameters()))]


@sequence_cells
def test_training_compiles_once_for_all_lengths(cell: str) -> None:
    """Forward and backward, by inductor: a graph with a state and boundaries and one without, whatever the sizes."""
    model = Model(cell)
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for graphs, boundaries in enumerate((True, False), start=1):
        for steps, batch in ((6, 3), (7, 2), (13, 5), (40, 4)):
            arguments = model.arguments(steps, batch, boundaries)
            found, wanted = results(compiled, model, arguments), results(model, model, arguments)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
            assert counter.frame_count == graphs


@sequence_cells
def test_a_whole_training_step_compiles(cell: str) -> None:
    """Forward, backward and optimizer in one function, as eager after several steps."""
    models = [Model(cell) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    batches = [(torch.randn(6, 3, 4), torch.randn(6, 3, 2)) for _ in range(4)]
    for model, wrap in zip(models, (lambda f: f, torch.compile), strict=True):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

        def step(x: Tensor, y: Tensor, model: Model = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x)[0] - y).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        run = wrap(step)
        for x, y in batches:
            run(x, y)
    for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


IN_ANOTHER_PROCESS = """
import sys
import torch
import hsm_kernels  # registers the operators
folder = sys.argv[1]
model = torch._inductor.aoti_load_package(folder + "/model.pt2")
for arguments, wanted in torch.load(folder + "/cases.pt"):
    found = torch.utils._pytree.tree_leaves(model(*arguments))
    torch.testing.assert_close(found, wanted)
print("equal")
"""


@sequence_cells
def test_a_package_runs_in_a_fresh_process(cell: str, tmp_path: Path) -> None:
    """AOTInductor with dynamic L and N, states, masks and lengths."""
    model = Model(cell).eval()
    both = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    state = {1: torch.export.Dim.DYNAMIC}
    shapes = (both, (state, state) if cell == "LSTM" else state, both, {0: torch.export.Dim.DYNAMIC})
    program = torch.export.export(model, model.arguments(6, 3, True), dynamic_shapes=shapes)
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    cases = [model.arguments(steps, batch, True) for steps, batch in ((6, 3), (9, 2), (1, 5))]
    with torch.no_grad():
        torch.save([(arguments, tensors(model(*arguments))) for arguments in cases], tmp_path / "cases.pt")
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("equal"), done.stderr[-2000:]


@sequence_cells
def test_vmap_inside_compile(cell: str) -> None:
    rnn = getattr(hsm, cell)(3, 8)
    x = torch.randn(2, 5, 1, 3)

    def mapped(x: Tensor) -> Tensor:
        return torch.func.vmap(lambda x: rnn(x)[0])(x)

    torch.testing.assert_close(torch.compile(mapped, backend="aot_eager", fullgraph=True)(x), mapped(x))


def with_dual_numbers(f: Any, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent


DERIVATIVES = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(5, 1, 8))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "vmap(grad)": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(torch.stack([x, -x])),
    "dual numbers": with_dual_numbers,
}


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
@pytest.mark.parametrize("name", DERIVATIVES)
@sequence_cells
def test_derivatives_inside_compile(cell: str, name: str) -> None:
    """Not compiled, but right; where all must be compiled, an error that says what to do."""
    rnn = getattr(hsm, cell)(3, 8)
    x = torch.randn(5, 1, 3)

    def derivative(x: Tensor) -> Any:
        return DERIVATIVES[name](lambda x: rnn(x)[0], x)

    with pytest.raises(RuntimeError, match="leave them outside"):
        torch.compile(derivative, backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(derivative, backend="aot_eager")(x), derivative(x))


@pytest.mark.parametrize("name", ["grad", "jvp"])
@sequence_cells
def test_export_of_a_derivative_says_what_to_do(cell: str, name: str) -> None:
    class Derivative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = getattr(hsm, cell)(3, 8)

        def forward(self, x: Tensor) -> Any:
            return DERIVATIVES[name](lambda x: self.rnn(x)[0], x)

    with pytest.raises(RuntimeError, match="leave them outside"):
        torch.export.export(Derivative(), (torch.randn(5, 1, 3),))


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap(grad)"])
@sequence_cells
def test_a_compiled_module_inside_a_transform(cell: str, transform: str) -> None:
    rnn = getattr(hsm, cell)(3, 8)
    compiled, x = torch.compile(rnn, backend="aot_eager"), torch.randn(5, 1, 3)
    compiled(x)  # what is compiled for plain calls is not for these
    found, wanted = (DERIVATIVES[transform](lambda x, run=run: run(x)[0], x) for run in (compiled, rnn))
    torch.testing.assert_close(found, wanted)
