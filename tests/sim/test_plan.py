"""Which variant of the recurrence a call gets on a GPU like an H200, where it is asked for."""

from collections.abc import Callable

import pytest
import torch
from build_helpers import needs_compiler
from operators import BUILD, register

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

    def explain(cell: str, sizes: tuple[int, int, str], backward: bool) -> str:
        hidden, batch, dtype = sizes
        like = torch.empty((), dtype=getattr(torch, dtype))
        weight = like.expand(hidden * (4 if cell == "LSTM" else 3), hidden)
        op = getattr(torch.ops, operators.ns).explain_recurrence
        words = op(like.expand(9, batch, 5), weight, cell == "LSTM", False, False, backward, False)
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
