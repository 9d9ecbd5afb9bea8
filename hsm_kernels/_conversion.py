"""To and from torch.nn, sharing parameters."""

from typing import Any, NamedTuple

from torch import nn

from . import modules

__all__ = ["Conversion", "convert", "from_torch", "to_torch"]


def _ours() -> dict[type[nn.Module], type[nn.Module]]:
    """Which of our modules stands for which of torch.nn's."""
    return {
        nn.LSTM: modules.LSTM,
        nn.GRU: modules.GRU,
        nn.LSTMCell: modules.LSTMCell,
        nn.GRUCell: modules.GRUCell,
    }


class Conversion(NamedTuple):
    """What :func:`convert` did: names of the modules it swapped, and of those it left with the reason."""

    converted: tuple[str, ...]
    left: dict[str, str]
    places: tuple[tuple[nn.Module, str], ...] = ()  #: parent and attribute of each module that was swapped

    def undo(self) -> None:
        """Put modules of torch.nn back, sharing the parameters as they are now.

        What has been replaced since then by something else is left. Raises TypeError, before anything is swapped, for
        a module that :func:`to_torch` refuses.

        >>> from torch import nn
        >>> model = nn.ModuleDict({"encoder": nn.LSTM(3, 4)})
        >>> convert(model).undo()
        >>> type(model["encoder"]) is nn.LSTM
        True
        """
        swapped = [(parent, name, parent._modules.get(name)) for parent, name in self.places]
        kinds = tuple(_ours().values())
        back = {module: to_torch(module) for _, _, module in swapped if module is not None and type(module) in kinds}
        for parent, name, module in swapped:
            if module in back:
                setattr(parent, name, back[module])


def from_torch(module: nn.Module) -> Any:
    """The hsm_kernels module that shares the parameters of ``module``, an nn.LSTM, nn.GRU, nn.LSTMCell or nn.GRUCell.

    Raises TypeError for any other type, subclasses included, whose overridden methods would be lost.

    >>> from torch import nn
    >>> theirs = nn.LSTM(3, 4)
    >>> ours = from_torch(theirs)
    >>> ours.weight_hh_l0 is theirs.weight_hh_l0
    True
    """
    return _shared(module, _ours(), "from_torch")


def to_torch(module: nn.Module) -> Any:
    """The torch.nn module that shares the parameters of ``module``, an LSTM, GRU, LSTMCell or GRUCell of hsm_kernels.

    Raises TypeError for any other type.

    >>> import hsm_kernels as hsm
    >>> ours = hsm.LSTM(3, 4)
    >>> type(to_torch(ours)).__module__
    'torch.nn.modules.rnn'
    """
    return _shared(module, {ours: theirs for theirs, ours in _ours().items()}, "to_torch")


def _shared(module: nn.Module, types: dict[type[nn.Module], type[nn.Module]], who: str) -> nn.Module:
    if type(module) not in types:
        names = ", ".join(f"{t.__module__.split('.')[0]} {t.__name__}" for t in types)
        raise TypeError(f"{who}: expected exactly one of {names}, got {type(module).__name__}")
    reason = _not_shareable(module)
    if reason:
        raise TypeError(f"{who}: {reason}")
    twin = types[type(module)].__new__(types[type(module)])
    # RNNBase.__getstate__ drops its weak references, which must not be shared.
    state: dict[str, Any] = module.__getstate__() if isinstance(module, nn.RNNBase) else module.__dict__  # type: ignore[no-untyped-call]
    copied = {key: value.copy() if isinstance(value, (dict, list, set)) else value for key, value in state.items()}
    twin.__setstate__(copied)  # type: ignore[no-untyped-call]
    if isinstance(twin, nn.RNNBase):
        twin._init_flat_weights()
    return twin


def _not_shareable(module: nn.Module) -> str | None:
    """Why another module cannot stand for this one."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "the module has hooks, which refer to the module itself; remove them first"
    dtype = getattr(module, "weight_dtype", None)
    if dtype is not None and next(module.parameters()).dtype == dtype:
        return f"torch.nn has no weights in {dtype} beside float32 states; call .float() first"
    return None


def convert(model: nn.Module) -> Conversion:
    """Swap every nn.LSTM, nn.GRU and cell inside ``model`` for ours, in place, sharing its parameters.

    Returns the names of what was converted and of what was left with the reason: subclasses, modules with hooks or
    parametrizations, and ``model`` itself, which cannot be swapped in place (use :func:`from_torch`). ``undo()`` of
    the result swaps back.

    >>> from torch import nn
    >>> model = nn.ModuleDict({"encoder": nn.LSTM(3, 4), "head": nn.Linear(4, 2)})
    >>> convert(model).converted
    ('encoder',)
    """
    converted: dict[nn.Module, nn.Module] = {}
    names: list[str] = []
    places: list[tuple[nn.Module, str]] = []
    left: dict[str, str] = {}
    kinds = tuple(_ours())
    if isinstance(model, kinds):
        left[""] = "the model itself cannot be swapped in place; use from_torch(model)"
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in list(parent._modules.items()):
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if child is None or not isinstance(child, kinds):
                continue
            if type(child) not in _ours():
                left[name] = f"{type(child).__name__} is a subclass of torch.nn's and may override what it does"
                continue
            reason = _not_shareable(child)
            if reason:
                left[name] = reason
                continue
            if child not in converted:
                converted[child] = from_torch(child)
            setattr(parent, child_name, converted[child])
            names.append(name)
            places.append((parent, child_name))
    return Conversion(tuple(names), left, tuple(places))
