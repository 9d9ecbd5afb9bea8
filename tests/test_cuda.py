"""CUDA without a GPU: which backend is chosen and why, what the operators are given, and tensors without memory."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from build_helpers import PACKAGE
from rnn_helpers import DTYPES, SEQUENCE_CELLS, tensors
from test_ops import Case, backward_arguments
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

import hsm_kernels as hsm
from hsm_kernels import _arguments, _backend, _library, _ops, functional
from hsm_kernels._build import cuda, toolchain
from hsm_kernels._build.description import covers
from hsm_kernels._derivatives import Layer
from hsm_kernels._gradients import lstm_gates
from hsm_kernels.reference import Weights

CUDA = torch.device("cuda", 0)

# --------------------------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize(
    "text, archs",
    [
        ("80", ("80",)),
        ("8.0 9.0a", ("80", "90a")),
        ("sm_80,sm_100+PTX", ("80", "100+PTX")),
        ("7.0;12.1+PTX;7.0", ("70", "121+PTX")),
    ],
)
def test_architectures_as_users_write_them(text: str, archs: tuple[str, ...]) -> None:
    assert cuda.parse_archs(text) == archs


@pytest.mark.parametrize("text", ["", "hopper", "9", "80 9.0x", "sm_60", "6.1"])
def test_wrong_architectures(text: str) -> None:
    with pytest.raises(ValueError, match="HSM_KERNELS_CUDA_ARCHS"):
        cuda.parse_archs(text)


@pytest.mark.parametrize(
    "archs, runs_on, does_not",
    [
        ("80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        ("90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("86", [(8, 6), (8, 9)], [(8, 0)]),
        ("90a+PTX 100a", [(9, 0), (10, 0)], [(10, 3), (12, 0)]),  # the letter binds code and PTX to the one generation
        ("80+PTX", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        ("80 90a 100+PTX", [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 1)], [(7, 0), (7, 5)]),
    ],
)
def test_where_code_runs(archs: str, runs_on: list[tuple[int, int]], does_not: list[tuple[int, int]]) -> None:
    parsed = cuda.parse_archs(archs)
    assert [gpu for gpu in runs_on + does_not if covers(parsed, gpu)] == runs_on


def test_architectures_of_the_gpus_in_a_machine() -> None:
    assert cuda.archs_of([(9, 0), (8, 6), (9, 0), (6, 1)]) == ("86", "90a")
    assert cuda.archs_of([]) == ()


class Machine:
    """Stands in for NVML and for CUDA's driver, as ctypes calls them."""

    gpus = ((9, 0), (8, 6))

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: 0  # success

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self.gpus)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        handle._obj.value = index + 1
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = self.gpus[handle.value - 1]
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        return self.nvmlDeviceGetCount_v2(count)

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = self.gpus[device.value][(75, 76).index(attribute)]
        return 0


@pytest.mark.parametrize("missing", [(), ("libnvidia-ml.so.1",), ("libnvidia-ml.so.1", "libcuda.so.1")], ids=str)
def test_gpus_are_seen_with_and_without_nvml(monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]) -> None:
    """A container may have the driver alone."""
    opened = []

    def library(name: str) -> Machine:
        opened.append(name)
        if name in missing:
            raise OSError(name)
        return Machine()

    monkeypatch.setattr(cuda.ctypes, "CDLL", library)
    assert cuda.visible_gpus() == ([] if len(missing) == 2 else list(Machine.gpus))
    assert opened == ["libnvidia-ml.so.1", "libcuda.so.1"][: len(missing) + 1]


# --------------------------------------------------------------------------------------------------- what is built


def fake_torch(root: Path, version: str | None) -> Path:
    root.mkdir()
    (root / "version.py").write_text(f"from typing import Optional\ncuda: Optional[str] = {version!r}\nhip = '6.0'\n")
    return root


def fake_toolkit(root: Path, codes: str = "sm_80 sm_90 sm_100") -> Path:
    for name in ("bin", "include", "lib64"):
        (root / name).mkdir(parents=True)
    (root / "include" / "cuda_runtime.h").touch()
    (root / "lib64" / "libcudart_static.a").touch()
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\ncase $1 in --list-gpu-code) echo {codes};; *) echo release 12.9, V12.9.1;; esac\n")
    nvcc.chmod(0o755)
    return root


def chosen(tmp_path: Path, ahead: bool = True, version: str | None = "13.0", **environ: str) -> cuda.Choice:
    kit = fake_toolkit(tmp_path / "toolkit")
    named = {"PATH": "/usr/bin:/bin", "CUDA_HOME": str(kit), **environ}
    return cuda.choose(named, fake_torch(tmp_path / "torch", version), ahead=ahead)


def test_default_architectures(tmp_path: Path) -> None:
    assert chosen(tmp_path).archs == ("80", "90a", "100+PTX")
    old = cuda.find_toolkit({"CUDA_HOME": str(fake_toolkit(tmp_path / "old", "sm_70 sm_80 sm_90"))}, tmp_path)
    assert old.default_archs() == ("80+PTX", "90a")


def test_architectures_that_were_asked_for(tmp_path: Path) -> None:
    choice = chosen(tmp_path, HSM_KERNELS_CUDA_ARCHS="8.6")
    assert choice.archs == ("86",)
    assert choice.toolkit is not None and choice.toolkit.version() == "12.9.1"


def test_architectures_of_the_visible_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "visible_gpus", lambda: [(9, 0)])
    assert chosen(tmp_path, ahead=False).archs == ("90a",)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"HSM_KERNELS_BUILD": "cpu"}, "HSM_KERNELS_BUILD=cpu"),
        ({"version": None}, "torch has no CUDA"),
        ({"CUDA_HOME": "/nonexistent"}, "CUDA_HOME names /nonexistent"),
        ({"HSM_KERNELS_CUDA_ARCHS": "hopper"}, "'hopper'"),
        ({"ahead": False}, "no NVIDIA GPU"),
    ],
    ids=str,
)
def test_why_there_are_no_cuda_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(cuda, "visible_gpus", list)
    choice = chosen(tmp_path, **options)
    assert choice.toolkit is None and choice.archs == ()
    assert reason in choice.reason


def test_cuda_or_nothing(tmp_path: Path) -> None:
    """A torch without CUDA and a machine without a GPU do not matter; a missing toolkit does."""
    assert chosen(tmp_path, version=None, ahead=False, HSM_KERNELS_BUILD="cuda").archs == ("80", "90a", "100+PTX")
    with pytest.raises(toolchain.Unavailable, match="HSM_KERNELS_BUILD=cuda is set, but CUDA_HOME names"):
        cuda.choose({"HSM_KERNELS_BUILD": "cuda", "CUDA_HOME": "/nonexistent"}, tmp_path, ahead=True)


def test_a_toolkit_behind_a_script(tmp_path: Path) -> None:
    """nvcc on PATH may be a script beside no toolkit."""
    kit = fake_toolkit(tmp_path / "toolkit")
    nvcc = kit / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ _HERE_={nvcc.parent}' >&2\n")
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "nvcc"
    script.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    script.chmod(0o755)
    found = cuda.find_toolkit({"PATH": f"{script.parent}:/usr/bin:/bin"}, tmp_path)
    assert (found.nvcc, found.lib) == (nvcc, kit / "lib64")


def test_cuda_headers_and_nvml_are_not_needed_to_import() -> None:
    """Where a library was built ahead, and on machines without NVIDIA's driver."""
    code = "import sys, hsm_kernels; print('hsm_kernels._build.cuda' in sys.modules, 'torch.cuda.nvtx' in sys.modules)"
    environ = {**os.environ, "HSM_KERNELS_BUILD": "none", "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environ, capture_output=True, text=True)
    assert done.stdout.split()[0] == "False", done.stderr


# --------------------------------------------------------------------------------------------------- what is chosen


@pytest.fixture
def library_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Pretends that the loaded library has CUDA kernels, and that the machine has a GPU."""

    def pretend(archs: tuple[str, ...], capability: tuple[int, int] | None = None, loaded: bool = True) -> None:
        info = replace(_library.build_info(), library=Path("_C.so") if loaded else None, cuda_archs=archs)
        monkeypatch.setattr(_library, "build_info", lambda: info)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
        _backend._unsupported_gpu.cache_clear()

    yield pretend
    _backend._unsupported_gpu.cache_clear()


@pytest.mark.parametrize("requested", ["auto", "cuda"])
@pytest.mark.parametrize("capability", [(8, 6), (9, 0), None])
def test_the_step_variant_runs(library_for: Any, requested: str, capability: tuple[int, int] | None) -> None:
    library_for(("80", "90a"), capability)
    plan = _backend.plan(requested, CUDA, torch.float32)
    assert plan[:2] == ("cuda", "step") and not plan.fallback
    assert not _backend.chooses_reference(requested, CUDA, torch.float32)


@pytest.mark.parametrize(
    "archs, capability, loaded, reason",
    [
        ((), (9, 0), False, "no native library is loaded"),
        ((), (9, 0), True, "built without CUDA kernels"),
        (("80",), (6, 1), True, "Some GPU has compute capability 6.1, the kernels need 7.0 or later"),
        (("80", "90a"), (10, 0), True, "built for sm_80, sm_90a, .* capability 10.0; .*HSM_KERNELS_CUDA_ARCHS=10.0"),
    ],
)
def test_why_the_reference_runs(
    library_for: Any, archs: tuple[str, ...], capability: tuple[int, int], loaded: bool, reason: str
) -> None:
    library_for(archs, capability, loaded)
    with pytest.raises(RuntimeError, match=f"backend 'cuda' was asked for and cannot run this call: .*{reason}"):
        _backend.plan("cuda", CUDA, torch.float32)
    plan = _backend.plan("auto", CUDA, torch.float32)
    assert plan[:2] == ("reference", "python") and plan.fallback


@pytest.mark.filterwarnings("ignore:hsm_kernels runs the plain PyTorch reference")
@pytest.mark.parametrize("archs, chosen", [((), False), (("80",), True)], ids=["no kernels", "kernels for others"])
def test_operators_are_left_alone_where_their_kernels_cannot_run(
    library_for: Any, archs: tuple[str, ...], chosen: bool
) -> None:
    """They would find the kernels, and fall back to nothing."""
    library_for(archs, (6, 1))
    assert _backend.chooses_reference(None, CUDA, torch.float32) is chosen


@pytest.mark.parametrize("text", ["", "step", "cluster", "cluster:16", "grid", "grid:132"])
def test_variants_that_can_be_asked_for(text: str) -> None:
    _backend.check_cuda_variant(text)


@pytest.mark.parametrize("text", ["fast", "cluster:3", "cluster:", "step:1", "grid:0", "grid:x", "Cluster"])
def test_a_wrong_variant_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"HSM_KERNELS_CUDA_VARIANT must be step, cluster or grid.* got {text!r}"):
        _backend.check_cuda_variant(text)


def test_a_wrong_variant_is_refused_at_import() -> None:
    environ = {**os.environ, "HSM_KERNELS_CUDA_VARIANT": "fast", "HSM_KERNELS_BUILD": "none"}
    command = [sys.executable, "-W", "ignore", "-c", "import hsm_kernels"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert "ValueError: hsm_kernels: HSM_KERNELS_CUDA_VARIANT must be step" in done.stderr


def test_another_backend_than_the_device(library_for: Any) -> None:
    library_for(("80",), (8, 0))
    with pytest.raises(RuntimeError, match=r"backend 'cpu' .*: the input is on cuda:0"):
        _backend.plan("cpu", CUDA, torch.float32)


def test_an_unsupported_gpu_is_warned_of_once(library_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_warned", set())
    library_for(("80",), (6, 1))
    with pytest.warns(RuntimeWarning, match=r"compute capability 6\.1"):
        _backend.chooses_reference(None, CUDA, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _backend.chooses_reference(None, CUDA, torch.float32)


@pytest.mark.filterwarnings("ignore:hsm_kernels runs the plain PyTorch reference")
@pytest.mark.parametrize("capability", [(8, 0), (6, 1)])
def test_the_choice_can_be_compiled(library_for: Any, capability: tuple[int, int]) -> None:
    torch.compiler.reset()
    library_for(("80",), capability)

    def function(x: torch.Tensor) -> torch.Tensor:
        return x + (2 if _backend.chooses_reference(None, CUDA, torch.float32) else 1)

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == (1 if capability == (8, 0) else 2)


@pytest.mark.any_device
@pytest.mark.requires_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_device_has_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """The other tests of a run with --device cuda would pass with the reference, too."""
    plan = _backend.plan(device.type, device, dtype)
    assert plan.backend == device.type


@pytest.mark.skipif(not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="old torch")
@pytest.mark.slow
def test_tests_for_any_device_put_every_tensor_on_it() -> None:
    """On a device that is as strict as a GPU; a choice of the tests that run with --device cuda on a real one."""
    chosen = "(reset_mask or reset_state or lengths or packed or strides or per_sample or many_steps or one_step)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "fake_device"]
    command += ["--device", "fake", "-k", f"{chosen} and not reference and not stacked"]
    done = subprocess.run(
        [*command, "test_boundaries.py", "test_equivalence.py", "test_ops.py"],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), str(Path(__file__).parent)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


# --------------------------------------------------------------------------------------------- what operators are given


class Calls(TorchDispatchMode):
    """Notes the arguments of our operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, dict[str, Any]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "hsm_kernels":
            names = [argument.name for argument in function._schema.arguments]
            self.seen[function._schema.name.split("::")[1]] = dict(zip(names, args, strict=False))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
def test_what_the_host_knows_reaches_both_operators(cell: str, allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "allows_tf32", lambda input: allowed)
    for every in (None, 2):
        with Calls() as calls:
            rnn = getattr(hsm, cell)(3, 4)
            function = getattr(hsm.functional, cell.lower())  # the module's short way is for the CPU, which has no TF32
            function(torch.zeros(5, 2, 3), None, rnn.all_weights, truncated_bptt_steps=every)[0].sum().backward()
        assert calls.seen.keys() >= {f"{cell.lower()}_forward", f"{cell.lower()}_backward"}
        for name in (f"{cell.lower()}_forward", f"{cell.lower()}_backward"):
            assert calls.seen[name]["detach_every"] == (every or 0)
            assert calls.seen[name]["allow_tf32"] is allowed


@pytest.fixture
def fake_cuda(library_for: Any) -> Iterator[FakeTensorMode]:
    """Tensors on "cuda" that have no memory. Without a GPU they have no gradients either, and cannot be drawn."""
    library_for(("80",))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        yield mode


def module(cell: str, device: str = "cuda", **options: Any) -> torch.nn.Module:
    rnn = getattr(hsm, cell)(3, 4, device="meta", **options)
    for name, parameter in rnn.named_parameters():
        setattr(rnn, name, torch.nn.Parameter(torch.empty_like(parameter, device=device)))
    return rnn


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_precision_of_float32(
    fake_cuda: FakeTensorMode, dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's setting for its own RNNs."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", precision)
    allowed = _backend.allows_tf32(torch.empty(1, device="cuda", dtype=dtype))
    assert allowed == (precision == "tf32" and dtype == torch.float32)
    assert not _backend.allows_tf32(torch.empty(1, dtype=dtype))


def test_the_older_switch_for_tf32_counts_too() -> None:
    before = torch.backends.cudnn.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cudnn.allow_tf32 = allowed
            assert (_backend._rnn_precision() == "tf32") is allowed
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"bias": False}], ids=str)
@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
def test_shapes_and_devices(fake_cuda: FakeTensorMode, cell: str, options: dict[str, Any]) -> None:
    x = torch.empty(5, 2, 3, device="cuda")
    mask = torch.empty(5, 2, dtype=torch.bool, device="cuda")
    lengths = torch.empty(2, dtype=torch.int64, device="cuda")
    output, hx_n, states = module(cell, **options)(
        x, reset_mask=mask, detach_mask=mask, lengths=lengths, return_states=True
    )
    assert {tensor.device for tensor in tensors((output, hx_n, states))} == {CUDA}
    assert output.shape == (5, 2, 8 if options.get("bidirectional") else 4)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cell, proj_size", [("LSTM", 0), ("LSTM", 3), ("GRU", 0)])
def test_backward_operators(fake_cuda: FakeTensorMode, cell: str, proj_size: int, recompute: bool) -> None:
    case = Case(cell, proj_size=proj_size, directions=2, resets=True, reset_state=True, recompute=recompute)
    arguments = [
        torch.empty(value.shape, dtype=value.dtype, device="cuda") if isinstance(value, torch.Tensor) else value
        for value in backward_arguments(case)
    ]
    found = getattr(torch.ops.hsm_kernels, f"{cell.lower()}_backward")(*arguments)
    assert {tensor.device for tensor in found} == {CUDA}


@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(fake_cuda: FakeTensorMode, cell: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own autocast needs a GPU, so it is only said to be on."""
    for place in (functional, _arguments):
        monkeypatch.setattr(place, "autocast_dtype", lambda device: dtype)
    with Calls() as calls:
        output, _ = module(cell)(torch.empty(5, 2, 3, device="cuda"))
    assert output.dtype == dtype
    (arguments,) = calls.seen.values()
    assert {value.dtype for value in arguments.values() if isinstance(value, torch.Tensor)} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_memory_mode_leaves_the_gates_to_the_operator(fake_cuda: FakeTensorMode, dtype: torch.dtype) -> None:
    """Also in 16 bits, where the operator on the CPU must be given them."""
    rnn = module("LSTM", dtype=dtype)
    input, output = (torch.empty(5, 2, size, device="cuda", dtype=dtype) for size in (3, 4))
    states = (output.unsqueeze(2), output.unsqueeze(2))
    layer = Layer(input, (None, None), [Weights(*rnn.parameters())], None, (None, None), None, None, states, None)
    gates, _, _ = _ops._backward_operands(layer, output, lstm_gates)
    assert gates is None


@pytest.mark.parametrize("cell", SEQUENCE_CELLS)
@pytest.mark.parametrize("where", ["weights", "hx", "reset_hx", "mask"])
def test_mixed_devices(fake_cuda: FakeTensorMode, cell: str, where: str) -> None:
    rnn = module(cell, "cpu" if where == "weights" else "cuda")
    h = torch.empty(1, 2, 4)
    state = (h, h) if cell == "LSTM" else h
    options: dict[str, Any] = {"hx": state} if where == "hx" else {}
    if where in ("mask", "reset_hx"):
        options["reset_mask"] = torch.empty(5, 2, dtype=torch.bool, device="cpu" if where == "mask" else "cuda")
    if where == "reset_hx":
        options["reset_hx"] = state
    with pytest.raises((ValueError, RuntimeError), match="must be on the input's device cuda:0, got cpu"):
        rnn(torch.empty(5, 2, 3, device="cuda"), **options)
