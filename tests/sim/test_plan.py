"""Which variant of the recurrence a call gets on a GPU like an H200, where it is asked for."""

from collections.abc import Callable

import pytest
import torch
from build_helpers import needs_compiler
from operators import BUILD, register

import hsm_kernels as hsm
from hsm_kernels import _backend, _ops

pytestmark = needs_compiler

# H, N and dtype of a call of one direction; the blocks and the sequences of a cluster in the forward pass and in the
# backward pass, or None where only step runs it.
PLANS = {
    (64, 1, "bfloat16"): ((8, 8), (8, 8)),
    (128, 256, "bfloat16"): ((4, 8), (4, 8)),
    (256, 64, "bfloat16"): ((8, 8), (8, 8)),
    (256, 64, "float32"): ((16, 8), (16, 8)),  # with fewer blocks too many weights are in shared memory
    (512, 64, "bfloat16"): ((16, 8), (16, 8)),
    (512, 256, "bfloat16"): ((8, 16), (16, 16)),
    (768, 16, "float16"): ((16, 8), None),
    (768, 256, "float16"): (None, None),
    (1024, 16, "bfloat16"): (None, None),
}


@pytest.fixture(scope="module")
def operators() -> torch.library.Library:
    return register(BUILD.load())


@pytest.fixture
def explained(operators: torch.library.Library, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("HSM_KERNELS_CUDA_VARIANT", "cluster")

    def explain(cell: str, sizes: tuple[int, int, str], backward: bool, cuts: bool = False) -> str:
        hidden, batch, dtype = sizes
        like = torch.empty((), dtype=getattr(torch, dtype))
        weight = like.expand(hidden * (4 if cell == "LSTM" else 3), hidden)
        op = getattr(torch.ops, operators.ns).explain_recurrence
        words = op(like.expand(900, batch, 5), weight, cell == "LSTM", False, False, backward, cuts, False)
        return bytes(words.tolist()).decode()

    return explain


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("sizes", PLANS, ids=str)
def test_lstm_by_clusters(explained: Callable[..., str], sizes: tuple[int, int, str], backward: bool) -> None:
    """As many blocks as there is room for share a few sequences, few share many."""
    wanted = PLANS[sizes][backward]
    words = explained("LSTM", sizes, backward)
    if wanted is None:
        assert words == "step: the recurrent weights do not fit into such a cluster"
    else:
        assert words.startswith("cluster: as was asked for; {} blocks share {} sequences".format(*wanted))


def test_a_gru_has_fewer_weights(explained: Callable[..., str]) -> None:
    assert "16 blocks share 8 sequences" in explained("GRU", (768, 16, "float16"), True)


#: The blocks and slots of a cluster, and all slots of a direction, where segments are dealt: the chip has 132
#: multiprocessors.
DEALT = {(64, 1, "bfloat16"): (8, 8, 128), (256, 16, "bfloat16"): (8, 8, 128), (512, 256, "bfloat16"): (8, 16, 256)}


@pytest.mark.parametrize("sizes", DEALT, ids=str)
def test_segments_are_dealt_to_all_of_the_chip(explained: Callable[..., str], sizes: tuple[int, int, str]) -> None:
    words = explained("LSTM", sizes, backward=False, cuts=True)
    assert "{} blocks share {} of {} slots for segments, each has".format(*DEALT[sizes]) in words


def test_a_grid_has_a_column_for_each_slot(explained: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A product takes eight, and there may be up to four groups."""
    monkeypatch.setenv("HSM_KERNELS_CUDA_VARIANT", "grid")
    assert "32 blocks share 8 of 32 slots for segments" in explained("GRU", (256, 1, "bfloat16"), True, cuts=True)
    assert "128 blocks share 8 of 8 slots for segments" in explained("GRU", (1024, 1, "bfloat16"), True, cuts=True)


def test_explain(operators: torch.library.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells what cuts in which pass."""
    monkeypatch.setenv("HSM_KERNELS_CUDA_VARIANT", "cluster")
    monkeypatch.setattr(_backend, "plan", lambda *_: _backend.Plan("cuda", "", ""))
    on_cpu = torch.library.Library(_ops.NAMESPACE, "IMPL")
    on_cpu.impl("explain_recurrence", getattr(torch.ops, operators.ns).explain_recurrence.default, "CPU")
    rnn, x, mask = hsm.GRU(8, 64), torch.zeros(900, 16, 8), torch.zeros(900, 16, dtype=torch.bool)
    dealt = {}
    for name, option in {"reset_mask": mask, "detach_mask": mask, "truncated_bptt_steps": 7, "lengths": None}.items():
        forward, backward = hsm.explain(rnn, x, **{name: option}).reason.split("; backward ")
        dealt[name] = ["128 slots" in words for words in (forward, backward)]
    on_cpu._destroy()
    assert dealt == {
        "reset_mask": [True, True],
        "detach_mask": [False, True],
        "truncated_bptt_steps": [False, True],
        "lengths": [False, False],
    }
