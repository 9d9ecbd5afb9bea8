"""What torch.nn does under transforms on the CPU: the first column of docs/transforms.md, so that it stays true."""

import pytest
import torch
from rnn_helpers import SEQUENCE_CELLS
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

sequence_cells = pytest.mark.parametrize("cell", SEQUENCE_CELLS)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@sequence_cells
def test_double_backward(cell: str) -> None:
    rnn, x = getattr(nn, cell)(2, 3, dtype=torch.float64), torch.randn(4, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: rnn(x)[0], x.requires_grad_(), fast_mode=True)


def test_forward_mode() -> None:
    rnn, x = nn.LSTM(2, 3), torch.randn(4, 2, 2)
    with pytest.raises((NotImplementedError, RuntimeError)):
        jvp(lambda x: rnn(x)[0], (x,), (x,))


@sequence_cells
def test_vmap(cell: str) -> None:
    models = [getattr(nn, cell)(2, 3) for _ in range(2)]
    x, (stacked, _) = torch.randn(5, 4, 2, 2), stack_module_state(models)
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            vmap(lambda x: models[0](x)[0])(x)
        with pytest.raises(RuntimeError):
            vmap(lambda weights: functional_call(models[0], weights, (x[0],))[0])(stacked)


@sequence_cells
def test_per_sample_gradients(cell: str) -> None:
    rnn, x = getattr(nn, cell)(2, 3), torch.randn(5, 4, 1, 2)
    weights = {name: weight.detach() for name, weight in rnn.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(rnn, weights, (x,))[0].square().sum()

    if cell == "LSTM":
        with pytest.warns(UserWarning, match="performance drop"):
            vmap(grad(loss), (None, 0))(weights, x)
    else:
        with pytest.raises(RuntimeError):
            vmap(grad(loss), (None, 0))(weights, x)


@sequence_cells
def test_compile(cell: str) -> None:
    rnn = getattr(nn, cell)(2, 3)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="RNN, GRU, or LSTM"):
        torch.compile(rnn, backend="eager", fullgraph=True)(torch.randn(4, 2, 2))
    torch._dynamo.reset()


@sequence_cells
def test_export(cell: str) -> None:
    for switch in (torch.backends.cudnn.conv, torch.backends.cudnn.rnn):  # torch refuses to export where they differ
        switch.fp32_precision = "tf32"  # the value that torch begins with
    rnn, dynamic = getattr(nn, cell)(2, 3), {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with pytest.raises(Exception, match=r"Constraints violated|specialized"):
        torch.export.export(rnn, (torch.randn(6, 5, 2),), dynamic_shapes={"input": dynamic})
