"""Seeds, hypothesis profiles, markers and the `backend` fixture of every test."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Read by the native library when it is loaded.
os.environ["HSM_KERNELS_POISON"] = "1"
# A backward graph that torch.compile kept from another version of this package has that version's operators.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked `requires_library` where none is loaded."""
    if hsm.build_info().loaded:
        return
    skip = pytest.mark.skip(reason="no native library is loaded")
    for item in items:
        if item.get_closest_marker("requires_library"):
            item.add_marker(skip)


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
def poisoned_memory() -> Iterator[None]:
    """Fills what torch's own operations leave uninitialised with NaN; the library does so in all tests."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
