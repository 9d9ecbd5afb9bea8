"""convert() and back, on small models and on models of other libraries.

The latter need what no other test needs, and are left out where it is missing::

    pip install torch-geometric stanza sb3-contrib
    cd tests && python -m pytest -s -m third_party test_conversion.py     # -s shows the times, side by side
"""

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rnn_helpers import tensors
from torch import Tensor, nn

import hsm_kernels as hsm


class Model(nn.Module):
    """Every kind of module, one of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)
        self.blocks = nn.ModuleList([nn.GRU(8, 8), nn.LSTMCell(8, 8), nn.GRUCell(8, 8)])
        self.again = self.blocks[0]
        self.left = nn.RNN(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.encoder(x)[0])[0]
        x = self.left(self.again(x)[0])[0].flatten(0, 1)
        return self.blocks[2](x, self.blocks[1](x)[0])


def test_there_and_back() -> None:
    model, x = Model(), torch.randn(2, 5, 3)
    wanted, parameters = model(x), list(model.parameters())
    report = hsm.convert(model)
    assert report.converted == ("encoder", "again", "blocks.0", "blocks.1", "blocks.2")
    assert model.again is model.blocks[0]
    torch.testing.assert_close(model(x), wanted)
    with torch.no_grad():
        model.encoder.weight_hh_l0.mul_(0.5)
    trained = model(x)
    report.undo()
    kinds = [type(module) for module in (model.encoder, *model.blocks, model.again)]
    assert kinds == [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.GRU]
    assert model.again is model.blocks[0]
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model(x), trained)


def test_undo_keeps_what_came_later() -> None:
    model = Model()
    report = hsm.convert(model)
    model.encoder.weight_hh_l0 = nn.Parameter(torch.zeros(16, 4))
    model.blocks[1] = replacement = nn.LSTMCell(8, 8)
    report.undo()
    assert model.encoder.weight_hh_l0.abs().sum() == 0
    assert model.blocks[1] is replacement


def test_undo_swaps_all_or_nothing() -> None:
    model = Model()
    report = hsm.convert(model)
    model.blocks[2].register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="hooks"):
        report.undo()
    assert type(model.encoder) is hsm.LSTM


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell"])
def test_a_result_may_be_edited_in_place(cell: str) -> None:
    """As graph networks do with the state of their cells."""
    theirs, x = getattr(nn, cell)(3, 4), torch.randn(2, 3)
    grads = []
    for rnn in (hsm.from_torch(theirs), theirs):
        tensors(rnn(x))[0].relu_().square().sum().backward()
        grads.append(theirs.weight_ih.grad)
        theirs.zero_grad()
    torch.testing.assert_close(*grads)


# ------------------------------------------------------------------------------------------------ other people's models


def attentive_fingerprint() -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    """A graph network whose messages go through GRU cells (torch_geometric)."""
    models = pytest.importorskip("torch_geometric.nn.models")
    model = models.AttentiveFP(8, 32, 4, edge_dim=3, num_layers=3, num_timesteps=3)
    nodes, edges = torch.randn(64, 8), torch.randint(0, 64, (2, 256))
    features, graphs = torch.randn(256, 3), torch.arange(64) // 8
    return model, lambda model: model(nodes, edges, features, graphs)


def set_to_set() -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    """A pooling of sets by attention that an LSTM drives (torch_geometric)."""
    aggregations = pytest.importorskip("torch_geometric.nn.aggr")
    elements, sets = torch.randn(64, 16), torch.arange(64) // 8
    return nn.Sequential(aggregations.Set2Set(16, processing_steps=4)), lambda model: model[0](elements, sets)


def packed_tagger() -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    """An LSTM over packed sentences (stanza)."""
    packed = pytest.importorskip("stanza.models.common.packed_lstm")
    lengths = [20, 17, 9, 3]
    words = torch.randn(4, 20, 16)
    return packed.PackedLSTM(16, 24, 2, batch_first=True, bidirectional=True), lambda model: model(words, lengths)[0]


def recurrent_policy() -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    """Actor and critic with an LSTM each, over episodes that end in mid-rollout (sb3-contrib)."""
    recurrent = pytest.importorskip("sb3_contrib.common.recurrent")
    spaces = pytest.importorskip("gymnasium.spaces")
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

    box = spaces.Box(-1, 1, (6,))
    model = RecurrentActorCriticPolicy(box, spaces.Discrete(3), lambda _: 1e-3, lstm_hidden_size=32)
    state = (torch.randn(1, 4, 32), torch.randn(1, 4, 32))
    states = recurrent.type_aliases.RNNStates(state, state)
    observations, actions = torch.randn(32, 6), torch.randint(0, 3, (32,))
    starts = (torch.rand(32) < 0.2).float()
    return model, lambda model: model.evaluate_actions(observations, actions, states, starts)


def fastest(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


@pytest.mark.third_party
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [attentive_fingerprint, set_to_set, packed_tagger, recurrent_policy])
def test_models_of_other_libraries(make: Any) -> None:
    """The same results and gradients before and after, and after the way back."""
    model, call = make()
    model.eval()

    def results() -> list[Tensor]:
        outputs = [tensor for tensor in tensors(call(model)) if tensor.requires_grad]
        weights = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(
            sum(output.square().sum() for output in outputs), weights, allow_unused=True, materialize_grads=True
        )
        return [*(output.detach() for output in outputs), *grads]

    wanted, names = results(), copy.copy([name for name, _ in model.named_parameters()])
    before = fastest(results)
    report = hsm.convert(model)
    assert report.converted, report.left
    torch.testing.assert_close(results(), wanted, rtol=1e-4, atol=1e-5)
    after = fastest(results)
    assert [name for name, _ in model.named_parameters()] == names
    report.undo()
    torch.testing.assert_close(results(), wanted)
    print(f"\n{make.__name__}: {', '.join(report.converted)}: {before * 1e3:.2f} ms, then {after * 1e3:.2f} ms")
