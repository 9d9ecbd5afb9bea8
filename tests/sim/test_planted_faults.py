"""Faults planted in each CUDA kernel of the layers, and in what launches them: the simulator must find every one."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from build_helpers import needs_compiler
from layer_cases import BOUNDARIES, CELLS, assert_right
from operators import BUILD, IN_PIECES, register, simulated
from simulator import Build, Library
from test_ops import Case

pytestmark = [needs_compiler, pytest.mark.slow]

FORWARD, BACKWARD, LAYER = (f"csrc/cuda/{name}" for name in ("forward.cu", "backward.cu", "layer.cuh"))
FORWARD_UNIT, BACKWARD_UNIT, VISITS = (f"csrc/cuda/{name}.cuh" for name in ("forward", "backward", "visits"))
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
    ("backward visit, detaches", BACKWARD_UNIT, "(edge, n) && !sequences.detaches(edge, n); };", "(edge, n); };"),
    ("backward visit, handed on", BACKWARD_UNIT, "visit.carries = visit.runs", "visit.carries = false"),
    ("add_resets", BACKWARD, "s.first_step[d] + step + d, n)", "s.first_step[d] + step, n)"),
    ("add_resets, pieces", BACKWARD, "place.exists && s.add ?", "false ?"),
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


def in_one_precision(build: Build) -> Build:
    """Each fault is found by cases of bfloat16, so nothing else is compiled."""
    for line in (
        "    case Arithmetic::float16: return with_cell(std::integral_constant<Arithmetic, Arithmetic::float16>{});\n",
        "    case Arithmetic::tf32: return with_cell(std::integral_constant<Arithmetic, Arithmetic::tf32>{});\n",
    ):
        build = build.patched("csrc/cuda/tiles.cuh", line, "")
    return build.patched(
        "csrc/cuda/tiles.cuh",
        "return with_cell(std::integral_constant<Arithmetic, Arithmetic::float32>{})",
        "return cudaErrorInvalidValue",
    )


# Pieces of the backward pass have several rounds.
ONE_PRECISION = in_one_precision(
    IN_PIECES.patched("csrc/cuda/passes.h", "gate_gradient_bytes = 1024", "gate_gradient_bytes = 12000")
)
ONE_PRECISION_WHOLE = in_one_precision(BUILD)

VARIANT_FAULTS = [
    ("forward, no wait", CLUSTER_FORWARD, "    mbarrier_wait(barrier, static_cast<unsigned>(i - 1) / 2 % 2);\n", ""),
    ("forward, parity", CLUSTER_FORWARD, "static_cast<unsigned>(i - 1) / 2 % 2", "static_cast<unsigned>(i) / 2 % 2"),
    ("forward, sent to the wrong buffer", CLUSTER_FORWARD, "(h_of(i + 1))", "(h_of(i))"),
    ("forward, expected once only", CLUSTER_FORWARD, "i + 2 < rounds", "i + 2 < 0"),
    ("forward, one outbox", CLUSTER_FORWARD, "0.0f);\n    sync_warp();\n", "0.0f);\n"),
    ("forward, sums not shared yet", CLUSTER_FORWARD, "    sync_threads();\n", ""),
    ("forward, not started", CLUSTER_FORWARD, "init();\n    cluster_arrive();\n    cluster_wait();\n", "init();"),
    ("forward, states of a piece", FORWARD_UNIT, "  store<T>(s.next_h, at, out.h);\n", ""),
    ("forward, begins behind a piece", FORWARD_UNIT, "visit.has(Visit::initial) ? p.h_0 : s.state_h", "s.state_h"),
    ("forward, where a segment begins", CLUSTER_FORWARD, "h = begins ? next.h[n][column] : out.h", "h = out.h"),
    ("forward, visit of the round before", CLUSTER_FORWARD, "slot(n, column), i + 1);", "slot(n, column), i);"),
    ("forward, rounds", VISITS, "if (rounds > most) most = rounds;", "most = rounds;"),
    ("forward, behind a length", FORWARD, "clear_results(queue);", ";"),
    ("forward, zeros behind the units", CLUSTER_FORWARD, "      h_of(1)[i] = 0;\n", ""),
    ("backward, no wait", CLUSTER_BACKWARD, "mbarrier_wait(barrier, static_cast<unsigned>(exchange) / 2 % 2);", ""),
    ("backward, parity", CLUSTER_BACKWARD, "(exchange) / 2 % 2", "(exchange + 1) / 2 % 2"),
    ("backward, one buffer of parts", CLUSTER_BACKWARD, "shape_.inboxes() + exchange % 2", "shape_.inboxes() + 0"),
    ("backward, one buffer of gates", CLUSTER_BACKWARD, "+ (round & 1) *", "+ 0 *"),
    ("backward, gates not there yet", CLUSTER_BACKWARD, "1);\n      sync_threads();\n", "1);\n"),
    ("backward, inbox of the sender", CLUSTER_BACKWARD, "inbox_of(exchange) + rank_ *", "inbox_of(exchange) + 0 *"),
    ("backward, gradients of a piece", BACKWARD_UNIT, "if (visit.to_chunk)", "if (false)"),
    ("backward, into the segment before", BACKWARD_UNIT, "has(Visit::is_step) && !ends", "has(Visit::is_step)"),
    ("backward, whose initial state", BACKWARD_UNIT, "visit.from_sequence) * size", "visit.sequence) * size"),
    ("backward, behind a length", BACKWARD, "queue.fill(p_.grad_gates", "if (false) queue.fill(p_.grad_gates"),
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
    yield Case("GRU", 6, 40, hidden=44, dtype=torch.bfloat16, resets=True)  # several segments for each slot


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


GRID, GRID_FORWARD, GRID_BACKWARD = (f"csrc/cuda/grid{name}" for name in (".cuh", "_forward.cu", "_backward.cu"))
SEND = "  store_relaxed(exchange_buffer(shape, exchange, group, pass, round + 1) + at, word);\n"
RESET = "  store_relaxed(exchange_buffer(shape, exchange, group, pass, round - 1 + grid_buffers) + at, nothing);\n"

GRID_FAULTS = [
    ("no wait", GRID, "if (!any_lane(missing)) return;", "return;"),
    ("swapped buffer", GRID, SEND, SEND.replace("round + 1", "round + 2")),
    ("nothing reset", GRID, RESET, ""),
    ("reset too early", GRID, RESET, RESET.replace("round - 1", "round")),
    ("slots of a group", GRID, "first_slot = group % shape.groups * shape.slots", "first_slot = 0"),
    ("forward, one buffer of sums", GRID_FORWARD, "partials + turn * shape.partial_floats()", "partials"),
    ("forward, state of a slot", GRID_FORWARD, "      *slot_state = kind == CellKind::lstm ? out.c : out.h;\n", ""),
    ("forward, states of a piece", FORWARD_UNIT, "  store<T>(s.next_h, at, out.h);\n", ""),
    ("backward, sums not there yet", GRID_BACKWARD, "slots, partial);\n      sync_threads();", "slots, partial);"),
    ("backward, gradients of a piece", BACKWARD_UNIT, "if (visit.to_chunk)", "if (false)"),
    ("backward, one round too few", GRID_BACKWARD, "place.slots) + 1", "place.slots)"),
]


@pytest.fixture
def grid_of_three(poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSM_KERNELS_CUDA_VARIANT", "grid:3")
    torch.set_num_threads(1)


def is_right_in_a_grid(library: Library) -> bool:
    """With one launch for each piece of some rounds, and with one for all."""
    library.set_seed(0)
    with simulated(register(library)):
        for cell in ("LSTM", "GRU"):
            for steps, batch, directions in [(12, 3, 2), (3, 34, 1), (7, 34, 2)]:
                case = Case(cell, steps, batch, hidden=21, directions=directions, dtype=torch.bfloat16)
                try:
                    assert_right(case)
                except (AssertionError, RuntimeError):
                    return False
    return True


#: In pieces, what is handed from one to the next counts; in one piece, buffers are used again.
GRID_BUILDS = {"whole": ONE_PRECISION_WHOLE, "in pieces": ONE_PRECISION}


@pytest.mark.parametrize("fault", GRID_FAULTS, ids=[name for name, *_ in GRID_FAULTS])
def test_is_found_in_a_grid(grid_of_three: None, fault: tuple[str, str, str, str]) -> None:
    kind, *change = fault
    build = GRID_BUILDS["in pieces" if "piece" in kind else "whole"]
    assert not is_right_in_a_grid(build.patched(*change).load())


def test_without_a_fault_in_a_grid(grid_of_three: None) -> None:
    for build in GRID_BUILDS.values():
        assert is_right_in_a_grid(build.load())


def test_a_lost_block_is_an_error(grid_of_three: None) -> None:
    """Where a block sends nothing the others end, and say why."""
    library = ONE_PRECISION_WHOLE.patched(GRID, SEND, f"  if (block_x() != 1)\n  {SEND}").load()
    with simulated(register(library)), pytest.raises(RuntimeError, match="a block waited too long for others"):
        Case("GRU", hidden=21, dtype=torch.bfloat16).forward()
