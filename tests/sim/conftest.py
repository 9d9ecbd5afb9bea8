"""What tests of layers on the simulator share."""

from collections.abc import Iterator

import pytest
import torch
from operators import BUILD, IN_PIECES, register, simulated
from simulator import Library


@pytest.fixture(scope="module", params=[BUILD, IN_PIECES], ids=["whole", "in pieces"])
def library(request: pytest.FixtureRequest) -> Library:
    return request.param.load()


@pytest.fixture(scope="module")
def operators(library: Library) -> torch.library.Library:
    return register(library)


@pytest.fixture
def simulator(library: Library, operators: torch.library.Library, poisoned_memory: None) -> Iterator[Library]:
    """Calls on CPU tensors run the CUDA kernels on the simulator."""
    library.set_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of so little work they would only wait
    with simulated(operators):
        yield library
    torch.set_num_threads(threads)
