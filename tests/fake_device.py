"""A device named "fake" for ``pytest -p fake_device --device fake``: as strict as a GPU, computed on the CPU.

Its tensors have a CPU tensor inside. Operations that mix them with tensors of the CPU fail as they would with tensors
of a GPU, so that a run on it shows whether tests and package put every tensor where it belongs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("fake")
# What is inside does not follow `parameter.data = ...`.
torch.__future__.set_overwrite_module_params_on_conversion(True)

FAKE = torch.device("fake", 0)

#: Operations whose second argument or result is on the CPU.
PACKING = {"_pack_padded_sequence", "_pad_packed_sequence"}
#: Operations that a GPU's tensors share with the CPU's: copies, and where indices or lengths may be on the CPU.
MIXES = {"copy_", "_to_copy", "index", "index_put_", "index_put", "_index_put_impl_", "set_"} | PACKING


class FakeTensor(Tensor):
    """A tensor on the fake device."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> "FakeTensor":
        found = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inside.size(), inside.stride(), inside.storage_offset(), dtype=inside.dtype, device=FAKE
        )
        found.inside = inside
        return found

    def __repr__(self) -> str:  # type: ignore[override]
        return f"fake {self.inside!r}"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        given = [value for value in tree_leaves((arguments, options)) if isinstance(value, Tensor)]
        elsewhere = [value for value in given if not isinstance(value, FakeTensor) and value.dim() > 0]
        name = function.overloadpacket.__name__
        if elsewhere and name not in MIXES:
            raise RuntimeError(f"{function}: Expected all tensors to be on the same device, fake:0 and cpu were given")
        wrappers = {id(value.inside): value for value in given if isinstance(value, FakeTensor)}
        on_cpu = options.get("device") is not None and torch.device(options["device"]).type == "cpu"

        def unwrapped(value: Any) -> Any:
            if isinstance(value, torch.device) and value.type == "fake":
                return torch.device("cpu")
            return value.inside if isinstance(value, FakeTensor) else value

        def wrapped(value: Any) -> Any:
            if not isinstance(value, Tensor) or on_cpu:
                return value
            return wrappers[id(value)] if id(value) in wrappers else FakeTensor(value)

        result = function(*tree_map(unwrapped, arguments), **tree_map(unwrapped, options))
        if name in PACKING:
            return wrapped(result[0]), result[1]
        return tree_map(wrapped, result)


@torch.library.impl("aten::empty.memory_format", "privateuseone")
def _empty(size: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return FakeTensor(torch.empty(size, dtype=dtype, device="cpu"))


@torch.library.impl("aten::empty_strided", "privateuseone")
def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return FakeTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


@torch.library.impl("aten::_efficientzerotensor", "privateuseone")
def _zeros(size: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return FakeTensor(torch.zeros(size, dtype=dtype, device="cpu"))


@torch.library.impl("aten::_copy_from", "privateuseone")
def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """For copies inside torch that pass the subclass by, like that of torch.tensor."""
    from_inside, to_inside = (value.inside if isinstance(value, FakeTensor) else value for value in (source, target))
    to_inside.copy_(from_inside)
    return target
