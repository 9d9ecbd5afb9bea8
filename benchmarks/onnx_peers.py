"""ONNX Runtime and OpenVINO: one step and inference, by a model of one LSTM or GRU node.

Both get the same ONNX model, with fixed shapes and the weights of torch.nn inside. Inputs and outputs
lie in memory of theirs: a call copies neither.
"""

from collections.abc import Sequence
from typing import Any

import torch
from cases import GATES, Problem
from peers import Peer, Prepared
from torch import Tensor, nn

ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}  # ONNX: i o f c and z r h; torch: i f g o and r z n
OPSET, IR_VERSION = 14, 8


def onnx_model(problem: Problem) -> bytes:
    """The problem as an ONNX model; its inputs are those of :func:`inputs`."""
    from onnx import TensorProto, checker, helper, numpy_helper

    case, module = problem.case, problem.torch_nn
    states = state_names(problem)

    def declared(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    state_shape = (1, case.batch, case.hidden)
    node = helper.make_node(
        case.op,
        ["X", "W", "R", "B", *([""] if states else []), *states],  # no lengths
        ["Y", *(f"{name}_out" for name in states)],
        hidden_size=case.hidden,
        **({"linear_before_reset": 1} if case.op == "GRU" else {}),
    )
    graph = helper.make_graph(
        [node],
        case.op,
        [
            declared("X", case.length, case.batch, case.hidden),
            *(declared(name, *state_shape) for name in states),
        ],
        [
            declared("Y", case.length, 1, case.batch, case.hidden),
            *(declared(f"{name}_out", *state_shape) for name in states),
        ],
        [numpy_helper.from_array(w.numpy(), name) for name, w in onnx_weights(module).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = IR_VERSION
    checker.check_model(model)
    return bytes(model.SerializeToString())


def onnx_weights(module: nn.RNNBase) -> dict[str, Tensor]:
    """The weights in ONNX's order of gates, in float32, with a dimension for the direction."""

    def sorted_gates(weight: Tensor) -> Tensor:
        gates = weight.detach().float().chunk(GATES[module.mode])
        return torch.cat([gates[gate] for gate in ORDER[module.mode]])[None]

    w_ih, w_hh, b_ih, b_hh = map(sorted_gates, module.all_weights[0])
    return {"W": w_ih, "R": w_hh, "B": torch.cat([b_ih, b_hh], 1)}


def state_names(problem: Problem) -> list[str]:
    """The state's inputs; sequences begin with zeros, which is ONNX's default."""
    if problem.case.kind != "step":
        return []
    return ["h", "c"] if problem.case.op == "LSTM" else ["h"]


def inputs(problem: Problem) -> dict[str, Any]:
    """The model's inputs as float32 arrays."""
    state = problem.state if isinstance(problem.state, tuple) else (problem.state,)
    # Not zip(strict=True): a sequence has no state among its inputs.
    named = {"X": problem.input, **dict(zip(state_names(problem), state, strict=False))}
    return {name: tensor.float().numpy() for name, tensor in named.items()}


def read(arrays: list[Any]) -> tuple[Tensor, ...]:
    """The outputs as torch.nn's: Y has a dimension for the direction in the middle."""
    output, *state = (torch.from_numpy(array.copy()) for array in arrays)
    return (output[:, 0], *state)


def prepare_onnx_runtime(problem: Problem) -> Prepared | None:
    """A session with bound inputs and outputs; its CPU kernels know float32 only."""
    if problem.case.kind == "training" or problem.case.dtype != "float32":
        return None
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = problem.case.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    providers = ["CPUExecutionProvider"]
    session = ort.InferenceSession(onnx_model(problem), options, providers=providers)
    binding = session.io_binding()

    def allocate(shape: Sequence[int]) -> Any:
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cpu")

    for name, array in inputs(problem).items():
        value = allocate(array.shape)
        value.update_inplace(array)
        binding.bind_ortvalue_input(name, value)
    outputs = []
    for output in session.get_outputs():
        outputs.append(allocate(output.shape))
        binding.bind_ortvalue_output(output.name, outputs[-1])
    return Prepared(
        lambda: session.run_with_iobinding(binding),
        lambda _: read([value.numpy() for value in outputs]),
    )


def prepare_openvino(problem: Problem) -> Prepared | None:
    """A request with its inputs filled in; None where the CPU has no kernels for the type."""
    if problem.case.kind == "training":
        return None
    import openvino as ov

    precision = {"float32": ov.Type.f32, "bfloat16": ov.Type.bf16}[problem.case.dtype]
    core = ov.Core()
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": problem.case.threads,
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,
    }
    compiled = core.compile_model(core.read_model(onnx_model(problem)), "CPU", options)
    if compiled.get_property("INFERENCE_PRECISION_HINT") != precision:
        return None
    request = compiled.create_infer_request()
    for name, array in inputs(problem).items():
        request.get_tensor(name).data[...] = array
    return Prepared(
        request.infer, lambda _: read([tensor.data for tensor in request.output_tensors])
    )


ONNX_RUNTIME = Peer(
    "ONNX Runtime",
    prepare_onnx_runtime,
    packages=("onnxruntime", "onnx"),
    settings="float32; CPU execution provider, all graph optimizations; intra-op threads those of "
    "the row, spinning as it comes; inter-op 1; bound inputs and outputs (run_with_iobinding)",
)
OPENVINO = Peer(
    "OpenVINO",
    prepare_openvino,
    packages=("openvino", "onnx"),
    settings="LATENCY, 1 stream, INFERENCE_NUM_THREADS those of the row, "
    "INFERENCE_PRECISION_HINT f32 or bf16 (inputs and outputs float32), ENABLE_CPU_PINNING off; "
    "one InferRequest, inputs in its memory",
)
