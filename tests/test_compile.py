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
def test_transforms_inside_compile(cell: str) -> None:
    """vmap is compiled; torch.func.grad has to stay outside, and says so rather than giving a wrong number."""
    rnn = getattr(hsm, cell)(3, 8)
    weights = {name: weight.detach() for name, weight in rnn.named_parameters()}
    x = torch.randn(2, 5, 1, 3)

    def call(weights: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(rnn, weights, (x,))[0]

    def mapped(weights: Any, x: Tensor) -> Tensor:
        return torch.func.vmap(call, (None, 0))(weights, x)

    def graded(weights: Any, x: Tensor) -> Any:
        return torch.func.grad(lambda weights: call(weights, x).sum())(weights)

    torch.testing.assert_close(torch.compile(mapped, backend="aot_eager")(weights, x), mapped(weights, x))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.compile(graded, backend="aot_eager")(weights, x[0])
