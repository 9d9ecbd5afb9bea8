"""Faults planted in each CUDA kernel of the layers, and in what launches them: the simulator must find every one."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from build_helpers import needs_compiler
from layer_cases import BOUNDARIES, CELLS, assert_right
from operators import BUILD, IN_PIECES, register, simulated
from test_ops import Case

pytestmark = [needs_compiler, pytest.mark.slow]

FORWARD, BACKWARD, LAYER = (f"csrc/cuda/{name}" for name in ("forward.cu", "backward.cu", "layer.cuh"))
FORWARD_UNIT, BACKWARD_UNIT = (f"csrc/cuda/{name}" for name in ("forward.cuh", "backward.cuh"))
PRODUCT = (
    "      queue.multiply(through_transposed(weight_hh_, columns_, z_.hidden_out, "
    "round_.state_h, round_.state_product));\n"
)
CELL = "      queue.run(forward_cell<T, kind>, units, round_);\n"

# The kernel, the file, what stands there, what is put in its place.
FAULTS = [
    ("begin_forward", FORWARD, "place.direction == 0 && sequences.resets(0", "sequences.resets(0"),
    ("forward_cell", FORWARD, "+ row * gate_columns(z)", "+ visit.sequence * gate_columns(z)"),
    ("forward_cell, resets", FORWARD, "visit.reset ? load<T>(p.boundaries.reset_c, state) : A{0}", "out.c"),
    ("forward_projected", FORWARD, "(s.projected)[at]", "(s.projected)[place.row * z.hidden_out + place.unit]"),
    ("order of the forward pass", FORWARD, PRODUCT + CELL, CELL + PRODUCT),
    ("pieces of the forward pass", FORWARD, "d ? z_.steps - end : begin, end - begin", "begin, end - begin"),
    ("begin_backward", BACKWARD, "empty ? load<T>(p.grad_h_n, at) : 0", "0"),
    ("backward_projected", BACKWARD, "store<T>(s.grad_h, at, grad)", "store<T>(s.grad_h, at, 0)"),
    ("backward_unit", BACKWARD_UNIT, "is_lstm ? incoming : incoming + carried", "incoming"),
    ("backward visit, detaches", BACKWARD_UNIT, "!visit.to_reset && !sequences.detaches(edge, n)", "!visit.to_reset"),
    ("sum_lanes", BACKWARD, "lane < s.lanes; lane += s.batch", "lane < s.batch; lane += s.batch"),
    ("activate_gates", BACKWARD, "place.row * 4 * s.hidden", "place.row * 3 * s.hidden"),
    ("sum_slabs", BACKWARD, "load<T>(s.matrix, row * s", "load<T>(s.matrix, begin * s"),
    ("sum_of_slabs", BACKWARD, "s.add ? *total : A{0}", "A{0}"),
    ("round_all", BACKWARD, "place.row * s.columns + place.unit;\n  store", "place.unit;\n  store"),
    ("weights of both directions", LAYER, "+ bytes_, reverse, bytes_)", "+ bytes_, forward, bytes_)"),
    ("grid", LAYER, "(rows + down - 1) / down", "rows / down"),
    ("threads of a row", LAYER, "unit < units}", "unit <= units}"),
]


# Chunks of the backward pass are so small there that no sum is over several rows.
WHOLE = ("sum_slabs",)


@pytest.fixture(params=FAULTS, ids=[name for name, *_ in FAULTS])
def faulty(request: pytest.FixtureRequest, poisoned_memory: None) -> Iterator[None]:
    kernel, name, old, new = request.param
    build = BUILD if kernel in WHOLE else IN_PIECES
    with simulated(register(build.patched(name, old, new).load())):
        yield


def witnesses() -> Iterator[Case]:
    """Cases that go through everything."""
    for options in BOUNDARIES.values():
        for cell, proj_size in CELLS:
            case = Case(cell, steps=8, hidden=6, proj_size=proj_size, directions=2, **options)
            for found in (case, replace(case, recompute=True), replace(case, dtype=torch.bfloat16)):
                if found.length is not None:
                    found.length[0] = 0
                yield found
    yield Case("GRU", steps=9, batch=70, hidden=3)


def test_is_found(faulty: None) -> None:
    torch.set_num_threads(1)
    for case in witnesses():
        try:
            assert_right(case)
        except (AssertionError, RuntimeError):
            return
    pytest.fail("the fault was not found")


# --------------------------------------------------------------------------------------------------- persistent kernels

CLUSTER_FORWARD, CLUSTER_BACKWARD = (f"csrc/cuda/cluster_{name}.cu" for name in ("forward", "backward"))

# Each is found by cases of bfloat16, so nothing else is compiled. Pieces of the backward pass have several rounds.
ONE_PRECISION = IN_PIECES.patched("csrc/cuda/passes.h", "gate_gradient_bytes = 1024", "gate_gradient_bytes = 12000")
for _line in (
    "    case Arithmetic::float16: return function(std::integral_constant<Arithmetic, Arithmetic::float16>{});\n",
    "    case Arithmetic::tf32: return function(std::integral_constant<Arithmetic, Arithmetic::tf32>{});\n",
):
    ONE_PRECISION = ONE_PRECISION.patched("csrc/cuda/cluster_passes.cuh", _line, "")
ONE_PRECISION = ONE_PRECISION.patched(
    "csrc/cuda/cluster_passes.cuh",
    "return function(std::integral_constant<Arithmetic, Arithmetic::float32>{})",
    "return cudaErrorInvalidValue",
)

VARIANT_FAULTS = [
    ("forward, no wait", CLUSTER_FORWARD, "    mbarrier_wait(barrier, static_cast<unsigned>(i - 1) / 2 % 2);\n", ""),
    ("forward, parity", CLUSTER_FORWARD, "static_cast<unsigned>(i - 1) / 2 % 2", "static_cast<unsigned>(i) / 2 % 2"),
    ("forward, sent to the wrong buffer", CLUSTER_FORWARD, "(h_of(i + 1))", "(h_of(i))"),
    ("forward, expected once only", CLUSTER_FORWARD, "i + 2 < rounds", "i + 2 < 0"),
    ("forward, one outbox", CLUSTER_FORWARD, "0.0f);\n    sync_warp();\n", "0.0f);\n"),
    ("forward, sums not shared yet", CLUSTER_FORWARD, "    sync_threads();\n", ""),
    ("forward, not started", CLUSTER_FORWARD, "init();\n    cluster_arrive();\n    cluster_wait();\n", "init();"),
    ("forward, states of a piece", CLUSTER_FORWARD, "    leave_states();\n", ""),
    ("forward, zeros behind the units", CLUSTER_FORWARD, "      h_of(1)[i] = 0;\n", ""),
    ("backward, no wait", CLUSTER_BACKWARD, "mbarrier_wait(barrier, static_cast<unsigned>(exchange) / 2 % 2);", ""),
    ("backward, parity", CLUSTER_BACKWARD, "(exchange) / 2 % 2", "(exchange + 1) / 2 % 2"),
    ("backward, one buffer of slots", CLUSTER_BACKWARD, "shape_.slots() + exchange % 2", "shape_.slots() + 0"),
    ("backward, one buffer of gates", CLUSTER_BACKWARD, "+ (round & 1) *", "+ 0 *"),
    ("backward, gates not there yet", CLUSTER_BACKWARD, "      sync_threads();\n    }\n", "    }\n"),
    ("backward, slot of the sender", CLUSTER_BACKWARD, "slots_of(exchange) + rank_ *", "slots_of(exchange) + 0 *"),
    ("backward, gates of a piece", CLUSTER_BACKWARD, "        if (last) store<T>", "        if (false) store<T>"),
]


@pytest.fixture(params=VARIANT_FAULTS, ids=[name for name, *_ in VARIANT_FAULTS])
def faulty_variant(
    request: pytest.FixtureRequest, poisoned_memory: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    _, name, old, new = request.param
    library = ONE_PRECISION.patched(name, old, new).load()
    library.set_seed(0)
    monkeypatch.setenv("HSM_KERNELS_CUDA_VARIANT", "cluster")
    with simulated(register(library)):
        yield


def variant_witnesses() -> Iterator[Case]:
    for hidden, batch in [(44, 3), (70, 9), (60, 20)]:
        for cell in ("LSTM", "GRU"):
            yield Case(cell, 6, batch, hidden=hidden, directions=2, dtype=torch.bfloat16, **BOUNDARIES["all of them"])


def test_is_found_in_a_variant(faulty_variant: None) -> None:
    torch.set_num_threads(1)
    for case in variant_witnesses():
        try:
            assert_right(case)
        except (AssertionError, RuntimeError):
            return
    pytest.fail("the fault was not found")


def test_without_a_fault(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    """What finds the faults of the variants finds none where there is none."""
    monkeypatch.setenv("HSM_KERNELS_CUDA_VARIANT", "cluster")
    with simulated(register(ONE_PRECISION.load())):
        for case in variant_witnesses():
            assert_right(case)
