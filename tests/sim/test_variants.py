"""Layers by the persistent kernels of the recurrence, on the simulator, against the reference in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from build_helpers import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import BOUNDARIES, assert_right
from operators import recurrence
from simulator import Library
from test_ops import Case

pytestmark = [needs_compiler, pytest.mark.usefixtures("simulator")]

#: What products are computed in, by the dtype and whether TF32 is allowed.
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: A number of hidden units for each number of blocks of a cluster, none a multiple of what a warp takes.
HIDDEN = {1: 35, 2: 44, 4: 53, 8: 61, 16: 125}


@pytest.fixture(params=HIDDEN, ids="{} blocks".format)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Clusters of so many blocks run the recurrence."""
    monkeypatch.setenv("HSM_KERNELS_CUDA_VARIANT", f"cluster:{request.param}")
    return request.param


@pytest.fixture
def some_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters run the recurrence."""
    monkeypatch.setenv("HSM_KERNELS_CUDA_VARIANT", "cluster")


def assert_cluster_runs(operators: torch.library.Library, case: Case) -> None:
    for backward in (False, True):
        assert recurrence(operators, case, backward).startswith("cluster: ")


@pytest.mark.parametrize("dtype", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_every_cluster(operators: torch.library.Library, blocks: int, cell: str, dtype: torch.dtype) -> None:
    case = Case(
        cell, 4, 9, hidden=HIDDEN[blocks], directions=1 + (blocks < 16), dtype=dtype, **BOUNDARIES["all of them"]
    )
    assert_cluster_runs(operators, case)
    assert_right(case)


@pytest.mark.parametrize("kind", BOUNDARIES)
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_boundaries(operators: torch.library.Library, some_cluster: None, cell: str, kind: str) -> None:
    case = Case(cell, steps=8, hidden=20, directions=2, dtype=torch.float32, **BOUNDARIES[kind])
    assert_cluster_runs(operators, case)
    assert_right(case)
    assert_right(replace(case, recompute=True))


@settings(max_examples=60)
@given(data=st.data())
def test_any_case(some_cluster: None, data: st.DataObject) -> None:
    options: dict[str, Any] = {name: data.draw(st.booleans()) for name in FLAGS}
    assert_right(
        Case(
            data.draw(st.sampled_from(["LSTM", "GRU"])),
            steps=data.draw(st.integers(1, 6)),
            batch=data.draw(st.integers(1, 19)),
            inputs=2,
            hidden=data.draw(st.integers(1, 70)),
            directions=data.draw(st.integers(1, 2)),
            dtype=data.draw(st.sampled_from(list(PRECISIONS.values()))),
            seed=data.draw(st.integers(0, 2**20)),
            detach_every=data.draw(st.integers(0, 4)),
            **options,
        )
    )


FLAGS = ("bias", "initial", "resets", "reset_state", "detaches", "lengths", "recompute")


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_schedules_do_not_change_a_bit(simulator: Library, some_cluster: None, cell: str) -> None:
    """Whichever block or thread goes first, and whenever stores arrive."""
    case = Case(cell, batch=5, hidden=60, directions=2, resets=True, reset_state=True, dtype=torch.float32)
    results = []
    for seed in range(4):
        simulator.set_seed(seed)
        outputs = case.forward()
        results.append((*outputs, *case.gradients(outputs)))
    torch.testing.assert_close(results[1:], [results[0]] * 3, rtol=0, atol=0)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_tf32(operators: torch.library.Library, some_cluster: None, cell: str) -> None:
    """Where it is allowed, results are those of operands that were rounded to it."""
    case = Case(cell, batch=5, hidden=44, directions=2, resets=True, reset_state=True, dtype=torch.float32)
    assert recurrence(operators, case, allow_tf32=True).startswith("cluster: ")
    results = []
    for allowed in (False, True):
        outputs = case.forward(allow_tf32=allowed)
        results.append((*outputs, *case.gradients(outputs)))
    for one, other in zip(*results, strict=True):
        difference = (one - other).abs().max() / one.abs().max()
        assert 1e-6 < difference < 1e-2
