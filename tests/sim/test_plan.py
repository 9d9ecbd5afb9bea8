"""Which variant of the recurrence a call gets on a GPU like an H200, where it is asked for."""

import pytest
import torch
from build_helpers import needs_compiler
from operators import BUILD, register

pytestmark = needs_compiler

# H, N and dtype of a call of one direction; the blocks and the sequences of a cluster, or None where only step runs it.
PLANS = {
    (64, 1, "bfloat16"): (8, 8),
    (128, 256, "bfloat16"): (4, 8),
    (256, 64, "bfloat16"): (8, 8),
    (256, 64, "float32"): (8, 8),
    (384, 64, "float32"): (16, 8),
    (512, 64, "bfloat16"): (16, 8),  # all weights in registers
    (512, 256, "bfloat16"): (8, 16),
    (768, 16, "float16"): (16, 8),
    (768, 256, "float16"): None,
    (1024, 16, "bfloat16"): None,
}


@pytest.fixture(scope="module")
def operators() -> torch.library.Library:
    return register(BUILD.load())


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("sizes", PLANS, ids=str)
def test_cluster(
    operators: torch.library.Library, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, str], cell: str
) -> None:
    """As many blocks as there is room for share a few sequences, few share many."""
    monkeypatch.setenv("HSM_KERNELS_CUDA_VARIANT", "cluster")
    hidden, batch, dtype = sizes
    like = torch.empty((), dtype=getattr(torch, dtype))
    weight = like.expand(hidden * (4 if cell == "LSTM" else 3), hidden)
    explain = getattr(torch.ops, operators.ns).explain_recurrence
    words = explain(like.expand(9, batch, 5), weight, cell == "LSTM", False, False, False, False)
    wanted = PLANS[sizes]
    reason = (
        "step: the recurrent weights do not fit into such a cluster"
        if wanted is None
        else "cluster: as was asked for; {} blocks share {} sequences".format(*wanted)
    )
    assert bytes(words.tolist()).decode().startswith(reason)
