"""Layers by the grid variant's kernels, on the simulator, against the reference in float64."""

from dataclasses import replace

import pytest
import torch
from build_helpers import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import BOUNDARIES, assert_right
from operators import BUILD, recurrence
from simulator import Library
from test_ops import LOW_PRECISION, Case

pytestmark = [needs_compiler, pytest.mark.usefixtures("simulator")]

GRID = "csrc/cuda/grid.h"
#: Warps hold one chunk of their weights and wait for one or two at once, so that small weights go all ways.
FEW_REGISTERS = BUILD.patched(GRID, "PassKind::backward ? 8 : 3", "PassKind::backward ? 1 : 1").patched(
    GRID, "? 8 : 4", "? 2 : 1"
)
NAN = torch.tensor([-1], dtype=torch.int32).view(torch.float32)  # all bits are set, as in a word that has not come


WHOLE = pytest.mark.parametrize("library", [BUILD], ids=["whole"], indirect=True)


@pytest.fixture(autouse=True)
def three_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the units of a group; the last one has fewer."""
    monkeypatch.setenv("HSM_KERNELS_CUDA_VARIANT", "grid:3")


def assert_grid_runs(operators: torch.library.Library, case: Case) -> None:
    for backward in (False, True):
        assert recurrence(operators, case, backward).startswith("grid: ")
    assert_right(case)


@pytest.mark.parametrize("kind", BOUNDARIES)
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_boundaries(operators: torch.library.Library, cell: str, kind: str) -> None:
    case = Case(cell, steps=8, hidden=20, directions=2, dtype=torch.float32, **BOUNDARIES[kind])
    assert_grid_runs(operators, case)
    assert_right(replace(case, recompute=True))


# Units of a block that do and do not fill a word or a chunk; sequences of several groups and passes.
@WHOLE
@pytest.mark.parametrize("batch, hidden", [(1, 3), (9, 17), (37, 47)])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_shapes(operators: torch.library.Library, cell: str, dtype: torch.dtype, batch: int, hidden: int) -> None:
    # More rounds than there are buffers.
    case = Case(cell, 11, batch, 3, hidden, dtype=dtype, resets=True, reset_state=True, lengths=True)
    assert_grid_runs(operators, case)


@settings(max_examples=30)
@given(data=st.data(), detach_every=st.integers(0, 4))
def test_any_case(data: st.DataObject, detach_every: int) -> None:
    flags = ("bias", "initial", "resets", "reset_state", "detaches", "lengths", "recompute")
    case = Case(
        data.draw(st.sampled_from(["LSTM", "GRU"])),
        steps=data.draw(st.integers(1, 6)),
        batch=data.draw(st.integers(1, 19)),
        hidden=data.draw(st.integers(1, 48)),
        directions=data.draw(st.integers(1, 2)),
        dtype=data.draw(st.sampled_from(LOW_PRECISION)),
        seed=data.draw(st.integers(0, 2**20)),
        detach_every=detach_every,
        **{name: data.draw(st.booleans()) for name in flags},
    )
    assert_right(case)


@WHOLE
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_schedules_do_not_change_a_bit(simulator: Library, cell: str) -> None:
    """Whichever block or thread goes first."""
    case = Case(cell, 9, 11, hidden=40, directions=2, resets=True, reset_state=True, dtype=torch.bfloat16)
    results = []
    for seed in range(4):
        simulator.set_seed(seed)
        outputs = case.forward()
        results.append((*outputs, *case.gradients(outputs)))
    torch.testing.assert_close(results[1:], [results[0]] * 3, rtol=0, atol=0)


@WHOLE
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_tf32(operators: torch.library.Library, monkeypatch: pytest.MonkeyPatch, cell: str) -> None:
    """Operands are rounded to it where it is allowed, as the step variant's are."""
    case = Case(cell, batch=11, hidden=44, directions=2, resets=True, reset_state=True, dtype=torch.float32)
    assert recurrence(operators, case, allow_tf32=True).startswith("grid: ")
    results = []
    for variant, allowed in (("grid:3", True), ("step", True), ("grid:3", False)):
        monkeypatch.setenv("HSM_KERNELS_CUDA_VARIANT", variant)
        outputs = case.forward(allow_tf32=allowed)
        results.append((*outputs, *case.gradients(outputs)))
    for grid, step, exact in zip(*results, strict=True):
        size = exact.abs().max()
        assert (grid - step).abs().max() / size < 1e-4
        assert 1e-6 < (grid - exact).abs().max() / size < 1e-2


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_nan_goes_where_it_belongs(cell: str) -> None:
    """Also with the bits that mean "not there yet" between blocks."""
    case = Case(cell, 7, 9, hidden=20, dtype=torch.float32, resets=True, reset_state=True)
    with torch.no_grad():
        case.state[0][0, 2, 5] = NAN
        case.reset_to[0][0, 4, 3] = NAN
        case.input[3, 7, 1] = torch.nan
        ours, wanted = case.forward(), case.by_reference()
    assert wanted[0].isnan().any() and wanted[0].isfinite().any()
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)
    outputs = case.forward()
    for gradient, expected in zip(case.gradients(outputs), case.gradients(case.by_reference()), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("library", [FEW_REGISTERS], ids=["few registers"], indirect=True)
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_weights_in_shared_memory(monkeypatch: pytest.MonkeyPatch, cell: str) -> None:
    monkeypatch.setenv("HSM_KERNELS_CUDA_VARIANT", "grid")
    assert_right(Case(cell, 2, 2, 3, 260, dtype=torch.bfloat16))


# H, N, dtype and directions of a call; in both passes the blocks and the sequences of a group and the units of a block,
# or None where only step runs it.
PLANS = {
    (64, 1, "bfloat16", 1): (8, 1, 8),
    (512, 16, "bfloat16", 1): (64, 8, 8),
    (512, 16, "bfloat16", 2): (32, 8, 16),
    (1024, 8, "bfloat16", 1): (128, 8, 8),
    (1024, 16, "float16", 1): (64, 8, 16),
    (1024, 8, "bfloat16", 2): (64, 8, 16),
    (768, 8, "float32", 1): (96, 8, 8),
    (768, 8, "float32", 2): (64, 8, 12),
    (1536, 8, "bfloat16", 2): (128, 8, 12),  # one direction after the other
    (2048, 1, "bfloat16", 1): (128, 1, 16),
    (2048, 1, "float32", 1): None,
    (2304, 1, "bfloat16", 1): None,
}


@WHOLE
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("sizes", PLANS, ids=str)
def test_plans_for_an_h200(
    operators: torch.library.Library, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, str, int], cell: str
) -> None:
    monkeypatch.setenv("HSM_KERNELS_CUDA_VARIANT", "grid")
    hidden, batch, dtype, directions = sizes
    like = torch.empty((), dtype=getattr(torch, dtype))
    weight = like.expand(hidden * (4 if cell == "LSTM" else 3), hidden)
    explain = getattr(torch.ops, operators.ns).explain_recurrence
    wanted = PLANS[sizes]
    for backward in (False, True):
        kind = (cell == "LSTM", False, directions == 2)
        words = explain(like.expand(9, batch, 5), weight, *kind, backward, False, False)
        found = bytes(words.tolist()).decode()
        if wanted is None:
            assert found == "step: the multiprocessors have no room for the recurrent weights"
        else:
            assert found == "grid: as was asked for; {} blocks share {} sequences, each has {} units".format(*wanted)


@WHOLE
def test_too_few_blocks(operators: torch.library.Library) -> None:
    reason = "step: so few blocks of the grid variant have no room for the recurrent weights"
    assert recurrence(operators, Case("GRU", hidden=49, dtype=torch.float32)) == reason
