"""Opacus's hooks around our modules. Needs opacus, which the other tests do not."""

from typing import Any

import pytest
import torch
from rnn_helpers import SEQUENCE_CELLS
from torch import Tensor, nn

import hsm_kernels as hsm

pytest.importorskip("opacus")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Model(nn.Module):
    def __init__(self, cell: str, batch_first: bool, **options: Any) -> None:
        super().__init__()
        self.rnn = getattr(hsm, cell)(3, 4, batch_first=batch_first, dtype=torch.float64, **options)
        self.head = nn.Linear(self.rnn.hidden_size * (2 if self.rnn.bidirectional else 1), 2, dtype=torch.float64)
        self.extras: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x, **self.extras)[0])


def watched(model: nn.Module, batch_first: bool) -> nn.Module:
    from opacus import GradSampleModule

    import hsm_kernels.opacus  # noqa: F401

    return GradSampleModule(model, batch_first=batch_first, loss_reduction="sum")


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
def test_gradients_of_every_sample(cell: str, batch_first: bool, options: dict[str, Any]) -> None:
    model, dim = Model(cell, batch_first, **options), 0 if batch_first else 1
    x = torch.randn(*((5, 6) if batch_first else (6, 5)), 3, dtype=torch.float64)
    wanted = [
        torch.autograd.grad(model(sample).square().sum(), list(model.parameters())) for sample in x.split(1, dim)
    ]
    model.rnn.weight_hh_l0.requires_grad_(False)
    watched(model, batch_first)(x).square().sum().backward()
    for k, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad_sample, torch.stack([grads[k] for grads in wanted]))
    assert not hasattr(model.rnn.weight_hh_l0, "grad_sample")


def test_what_its_hooks_do_not_see() -> None:
    model, x = Model("LSTM", True), torch.randn(5, 6, 3, dtype=torch.float64)
    module = watched(model, True)
    model.extras = {"reset_mask": torch.zeros(5, 6, dtype=torch.bool)}
    with pytest.raises(RuntimeError, match=r"do not see reset_mask.*vmap"):
        module(x)
    model.extras = {}
    with pytest.raises(RuntimeError, match=r"gradient of the last state.*vmap"):
        model.rnn(x)[1][1].sum().backward()
    with pytest.raises(RuntimeError, match=r"do not see dropout between layers.*vmap"):
        watched(Model("GRU", True, num_layers=2, dropout=0.5), True)(x).sum().backward()


@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
def test_private_training(cell: str) -> None:
    """A step of DP-SGD, with the validator's blessing."""
    from opacus import PrivacyEngine

    import hsm_kernels.opacus  # noqa: F401

    model = Model(cell, True)
    data = torch.utils.data.TensorDataset(torch.randn(8, 6, 3, dtype=torch.float64))
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for (x,) in loader:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(bool((new != old).any()) for new, old in zip(model.parameters(), before, strict=True))
