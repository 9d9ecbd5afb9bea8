"""Builders and comparers shared by the user-level tests."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

import hsm_kernels as hsm

SEQUENCE_CELLS = ("LSTM", "GRU")
STEP_CELLS = ("LSTMCell", "GRUCell")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _ComputedOnTheCpu:
    """A module of torch.nn whose tensors may be on a GPU: cuDNN has no gradients in eval mode, and no second ones."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        device = tensors(input)[0].device
        if device.type == "cpu":
            return super().forward(input, hx)  # type: ignore[misc]
        weights = {name: parameter.cpu() for name, parameter in self.named_parameters()}  # type: ignore[attr-defined]
        result = functional_call(self, weights, (moved(input, "cpu"), moved(hx, "cpu")))  # type: ignore[arg-type]
        return moved(result, device)


def make_pair(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Our module and torch.nn's, with the same parameters; torch.nn's computes on the CPU."""
    module = getattr(nn, name)
    if torch.get_default_device().type != "cpu":
        module = type(name, (_ComputedOnTheCpu, module), {})
    theirs = module(*args, **kwargs)
    ours = getattr(hsm, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def random_state(rnn: nn.Module, batch: int | None, dtype: torch.dtype = torch.float32) -> Any:
    """A state for a sequence module; `batch` None is the unbatched form."""
    rows = rnn.num_layers * (2 if rnn.bidirectional else 1)
    width = rnn.proj_size or rnn.hidden_size
    lead = (rows,) if batch is None else (rows, batch)
    h = torch.randn(*lead, width, dtype=dtype)
    if rnn.mode == "GRU":
        return h
    return h, torch.randn(*lead, rnn.hidden_size, dtype=dtype)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a result, in order; a PackedSequence counts as its data."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, Tensor):
        return [value]
    if value is None:
        return []
    return [tensor for item in value for tensor in tensors(item)]


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Applies `function` to every tensor of a state, keeping its structure."""
    if isinstance(value, Tensor):
        return function(value)
    if value is None:
        return None
    return type(value)(map_tensors(function, item) for item in value)


def moved(value: Any, device: torch.device | str) -> Any:
    """The tensors of a result or an argument on another device; gradients flow back."""
    if value is None:
        return None
    if isinstance(value, (Tensor, PackedSequence)):
        return value.to(device)
    return type(value)(moved(item, device) for item in value)


def leaf(value: Any) -> Any:
    """The same values and strides as fresh leaves that require gradients."""
    return map_tensors(lambda tensor: tensor.detach().requires_grad_(), value)


def weightings(outputs: Sequence[Tensor], grain: torch.dtype) -> list[Tensor]:
    """Fixed random output gradients that are exact in the dtype `grain`."""
    generator = torch.Generator("cpu").manual_seed(7)
    drawn = (torch.randn(out.shape, generator=generator, dtype=torch.float64, device="cpu") for out in outputs)
    return [numbers.to(grain).to(out) for numbers, out in zip(drawn, outputs, strict=True)]


def gradients(result: Any, wanted: Any, grain: torch.dtype | None = None) -> list[Tensor]:
    """Gradients of a fixed random weighting of everything in `result`."""
    outputs = [out for out in tensors(result) if out.requires_grad]
    return list(
        torch.autograd.grad(
            outputs,
            tensors(wanted),
            weightings(outputs, grain or outputs[0].dtype),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def run(
    rnn: nn.Module, input: Tensor, hx: Any = None, grain: torch.dtype | None = None, **extras: Any
) -> dict[str, Tensor]:
    """Outputs of `rnn` and the gradients of input, hx and every parameter, by name."""
    input, hx = leaf(input), leaf(hx)
    result = rnn(input, hx, **extras)
    values = {f"out[{i}]": out.detach() for i, out in enumerate(tensors(result))}
    names = ["input"] + [f"hx[{i}]" for i in range(len(tensors(hx)))]
    names += [name for name, _ in rnn.named_parameters()]
    grads = gradients(result, [input, hx, list(rnn.parameters())], grain)
    return values | {f"grad {name}": grad for name, grad in zip(names, grads, strict=True)}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], **tolerance: float) -> None:
    """Asserts that two `run` results hold the same names and close values."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def assert_same_bits(ours: Any, theirs: Any) -> None:
    """Asserts that two results hold equal tensors, NaN included."""
    for ours_one, theirs_one in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(ours_one, theirs_one, rtol=0, atol=0, equal_nan=True)


def in_float64(rnn: nn.Module) -> nn.Module:
    """A float64 copy of a module."""
    return copy.deepcopy(rnn).double()


def outcome(call: Callable[[], object]) -> tuple[type[BaseException], str] | None:
    """The error type and the first line of the message of a call, or None."""
    try:
        call()
    except Exception as error:
        return type(error), str(error).partition("\n")[0]
    return None
