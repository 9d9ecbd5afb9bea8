"""Layers by the CUDA kernels and their binding, on the simulator, against the reference in float64."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from build_helpers import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import BOUNDARIES, CELLS, DTYPES, SHAPES, assert_right
from operators import recurrence
from simulator import SANITIZED, Library, sanitized_environment
from test_ops import LOW_PRECISION, Case, assert_gradients_of_samples, cases

import hsm_kernels as hsm

pytestmark = [needs_compiler, pytest.mark.usefixtures("simulator")]


def test_the_kernels_run(simulator: Library) -> None:
    before = simulator.launches
    Case("GRU").forward()
    assert simulator.launches > before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", BOUNDARIES)
@pytest.mark.parametrize("cell, proj_size", CELLS)
def test_boundaries(cell: str, proj_size: int, kind: str, dtype: torch.dtype) -> None:
    case = Case(cell, steps=8, hidden=6, proj_size=proj_size, directions=2, dtype=dtype, **BOUNDARIES[kind])
    assert_right(case)
    assert_right(replace(case, recompute=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_shapes(cell: str, shape: tuple[int, ...]) -> None:
    *sizes, proj_size = shape
    for directions in (1, 2):
        options = {"directions": directions, "resets": True, "reset_state": True}
        assert_right(Case(cell, *sizes, proj_size=proj_size if cell == "LSTM" else 0, **options))


@pytest.mark.parametrize("dtypes", [[torch.float64], LOW_PRECISION], ids=["float64", "others"])
@settings(max_examples=100)
@given(data=st.data(), detach_every=st.integers(0, 4))
def test_any_case(dtypes: list[torch.dtype], data: st.DataObject, detach_every: int) -> None:
    assert_right(replace(data.draw(cases(st.sampled_from(dtypes))), detach_every=detach_every))


# In bfloat16 the product with an initial state would be rounded before others are added to it.
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["no state, no bias", "all of them"])
@pytest.mark.parametrize("cell, proj_size", CELLS)
def test_gradients_of_samples(cell: str, proj_size: int, kind: str, dtype: torch.dtype) -> None:
    """One of sequences each, or of several."""
    case = Case(cell, batch=10, proj_size=proj_size, directions=2, dtype=dtype, **BOUNDARIES[kind])
    for samples in (2, 10):
        assert_gradients_of_samples(case, samples)
        assert_gradients_of_samples(replace(case, steps=0), samples)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_many_samples(cell: str) -> None:
    """So many that what is summed at once for a bias are several rows of a sample, and parts of steps."""
    assert_gradients_of_samples(Case(cell, steps=15, batch=70, hidden=3), 35)


@pytest.mark.parametrize("cell, proj_size", CELLS)
def test_schedules_do_not_change_a_bit(simulator: Library, cell: str, proj_size: int) -> None:
    """Whichever block or thread goes first."""
    case = Case(
        cell, batch=5, hidden=40, proj_size=proj_size, directions=2, resets=True, reset_state=True, dtype=torch.float32
    )
    results = []
    for seed in range(3):
        simulator.set_seed(seed)
        outputs = case.forward()
        results.append((*outputs, *case.gradients(outputs)))
    torch.testing.assert_close(results[1:], [results[0]] * 2, rtol=0, atol=0)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_tf32_is_taken_where_it_is_allowed(cell: str) -> None:
    """In both passes; the stand-in for cuBLAS rounds as TF32 does."""
    case = Case(cell, hidden=20, dtype=torch.float32)
    results = []
    for allowed in (False, True):
        outputs = case.forward(allow_tf32=allowed)
        results.append((*outputs, *case.gradients(outputs)))
    for exact, rounded in zip(*results, strict=True):
        difference = (exact - rounded).abs().max() / exact.abs().max()
        assert 1e-6 < difference < 1e-2


@pytest.mark.parametrize("variant", ["cluster", "grid:4"])
def test_step_runs_what_the_others_cannot(
    operators: torch.library.Library, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    monkeypatch.setenv("HSM_KERNELS_CUDA_VARIANT", variant)
    for backward in (False, True):
        for case, reason in [
            (Case("GRU"), "only step runs float64"),
            (Case("LSTM", proj_size=3, dtype=torch.float32), "only step runs a projection"),
            (Case("LSTM", steps=0, dtype=torch.float32), "there are no steps to run"),
        ]:
            assert recurrence(operators, case, backward) == f"step: {reason}"
    assert_right(Case("GRU"))


def test_nothing_but_step_runs_unasked(operators: torch.library.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HSM_KERNELS_CUDA_VARIANT", raising=False)
    assert recurrence(operators, Case("GRU", dtype=torch.float32)) == "step: no other variant was asked for"
    monkeypatch.setenv("HSM_KERNELS_CUDA_VARIANT", "cluster:three")
    with pytest.raises(RuntimeError, match="HSM_KERNELS_CUDA_VARIANT must be step, cluster or grid"):
        Case("GRU").forward()


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_modules(cell: str) -> None:
    """Several layers, from the module's call to the kernels."""
    rnn = getattr(hsm, cell)(5, 9, num_layers=2, bidirectional=True).double()
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    mask = torch.rand(6, 3) < 0.3
    for options in ({}, {"reset_mask": mask}, {"truncated_bptt_steps": 2}, {"lengths": torch.tensor([6, 0, 3])}):
        found = []
        for backend in ("auto", "reference"):
            with hsm.use_backend(backend):
                output, _ = rnn(x, **options)
            found.append((output, *torch.autograd.grad(output.square().sum(), rnn.parameters())))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@pytest.mark.skipif(SANITIZED, reason="it is this run")
@pytest.mark.slow
def test_sanitizers_accept_the_kernels(request: pytest.FixtureRequest) -> None:
    """Some of these tests once more under AddressSanitizer and UndefinedBehaviorSanitizer, with the same library."""
    chosen = f"(shapes or modules) and {request.node.callspec.id.replace(' ', ' and ')}"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [*command, Path(__file__).name],
        env=sanitized_environment(),
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
