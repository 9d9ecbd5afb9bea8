"""Seeds, hypothesis profiles, markers and the `backend` fixture of every test."""

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, settings

# Read by the native library when it is loaded.
os.environ["HSM_KERNELS_POISON"] = "1"
# A backward graph that torch.compile kept from another version of this package has that version's operators.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
# Without it torch refuses its own products on a GPU while it is asked for deterministic ones.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import hsm_kernels as hsm

settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    # The `backend` fixture spans all examples of a test on purpose.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("explore", settings.get_profile("repeatable"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

torch.set_num_threads(2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tensors are, like cuda:1; for tests for `any_device`")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") != "cpu":
        torch.set_default_device(config.getoption("--device"))
        torch.backends.cudnn.rnn.fp32_precision = "ieee"  # else RNNs take TF32, for which the tolerances are not meant


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what is marked `requires_library` where none is loaded, and what is for the CPU on another device."""
    no_library = pytest.mark.skip(reason="no native library is loaded")
    not_here = pytest.mark.skip(reason="only on the CPU")
    on_cpu = config.getoption("--device") == "cpu"
    for item in items:
        if item.get_closest_marker("requires_library") and not hsm.build_info().loaded:
            item.add_marker(no_library)
        if not on_cpu and (item.get_closest_marker("cpu") or not item.get_closest_marker("any_device")):
            item.add_marker(not_here)


@pytest.fixture
def device() -> torch.device:
    """Where tensors are by default in this run."""
    return torch.get_default_device()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(20240229)


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test through the ops (native kernels or their fallback), and by the reference."""
    with hsm.use_backend(request.param):
        yield request.param


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of the benchmarks by name."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    return importlib.import_module


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills what torch's own operations leave uninitialised with NaN; the library does so in all tests."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
