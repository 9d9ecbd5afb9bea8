"""Per-sample gradients for Opacus: ``import hsm_kernels.opacus`` makes its hooks work with LSTM and GRU.

Opacus tells a grad sampler the positional arguments of a module and the gradient of its first result, no more. What it
cannot see raises an error that says so; there, per-sample gradients come from ``torch.func.vmap(torch.func.grad(...))``
with Opacus's ``grad_sample_mode="no_op"``. Needs ``pip install hsm_kernels[opacus]``.
"""

from typing import Any

import torch
from opacus.grad_sample import register_grad_sampler  # type: ignore[import-untyped]
from torch import Tensor

from . import modules

__all__ = ["per_sample_gradients"]


@register_grad_sampler([modules.LSTM, modules.GRU])  # type: ignore[untyped-decorator]
def per_sample_gradients(rnn: Any, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    """The gradient of every parameter for every sample, ``(N, *parameter.shape)``: Opacus's grad sampler.

    ``activations`` is ``[input]``, ``(N, L, I)``, and ``backprops`` the gradient of the output, ``(N, L, D * Hout)``.
    The forward pass runs again, once for all samples, then the recurrence of the backward pass; the products that
    sum over samples elsewhere run for each of them.

    Raises: RuntimeError: the module was given a state or has dropout between its layers.
    """
    if len(activations) != 1:
        raise RuntimeError(_message(rnn.mode, "hx"))
    if rnn.dropout > 0 and rnn.num_layers > 1:
        raise RuntimeError(_message(rnn.mode, "dropout between layers"))
    parameters = [weight for weight in rnn._flat_weights if weight.requires_grad]

    def product(weights: list[Tensor], input: Tensor, grad_output: Tensor) -> Tensor:
        given = dict(zip(map(id, parameters), weights, strict=True))
        flat = [given.get(id(weight), weight.detach()) for weight in rnn._flat_weights]
        by_direction = rnn._by_direction(flat)
        output, _ = rnn._function(input.unsqueeze(1), None, by_direction, bidirectional=rnn.bidirectional)
        return torch.sum(output.squeeze(1) * grad_output)

    weights = [weight.detach() for weight in parameters]
    found = torch.func.vmap(torch.func.grad(product), (None, 0, 0))(weights, activations[0], backprops)
    return dict(zip(parameters, found, strict=True))


def _message(who: str, what: str) -> str:
    return (
        f"{who}: the hooks of Opacus do not see {what}, and would give wrong gradients; compute per-sample gradients "
        'with torch.func.vmap(torch.func.grad(...)) and grad_sample_mode="no_op"'
    )
