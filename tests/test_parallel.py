"""Training on several processes, and in mixed precision."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rnn_helpers import SEQUENCE_CELLS, random_state
from torch import nn

import hsm_kernels as hsm

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "char_lm_distributed.py"
sequence_cells = pytest.mark.parametrize("cell", SEQUENCE_CELLS)


def torchrun(script: Path, *arguments: str) -> str:
    """The output of ``script`` in two processes on this machine."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*run, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=HERE)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_gradients_of_two_processes_equal_those_of_one() -> None:
    """DDP and FSDP2, by gloo: see distributed_worker.py."""
    assert torchrun(HERE / "distributed_worker.py").count("equal") == 2


@pytest.mark.slow
def test_the_example_resumes_in_mid_epoch(tmp_path: Path) -> None:
    """Each rank's own state comes back from the checkpoint: the losses go on where they would have been."""

    def losses(*arguments: str) -> list[str]:
        output = torchrun(EXAMPLE, "--checkpoint", str(tmp_path / "state"), "--hidden", "16", *arguments)
        return [line for line in output.splitlines() if line.startswith("step")]

    whole = losses("--steps", "6")
    first = losses("--steps", "3", "--save")
    second = losses("--steps", "6", "--resume")
    assert len(whole) == 6
    assert first + second == whole


@sequence_cells
def test_a_state_scattered_by_data_parallel_is_a_clear_error(cell: str) -> None:
    """What a replica gets of a state on two devices: half of the layers."""
    rnn = getattr(hsm, cell)(3, 4, 2)
    replica = rnn._replicate_for_data_parallel()
    hx = random_state(rnn, 6)
    half = tuple(part[:1] for part in hx) if cell == "LSTM" else hx[:1]
    with pytest.raises(RuntimeError, match=r"2 rows.*got 1.*DataParallel.*DistributedDataParallel"):
        replica(torch.randn(5, 3, 3), half)
    with torch.no_grad(), pytest.raises(RuntimeError, match="DataParallel"):
        replica(torch.randn(5, 3, 3), half)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@sequence_cells
def test_grad_scaler(cell: str, dtype: torch.dtype) -> None:
    """Steps of a scaled optimizer under autocast follow those in float32; an overflow leaves the weights alone."""
    models = [nn.ModuleDict({"rnn": getattr(hsm, cell)(3, 8), "head": nn.Linear(8, 1)}) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    batches = [(torch.randn(6, 4, 3), torch.randn(6, 4, 1)) for _ in range(3)]

    def step(model: nn.ModuleDict, optimizer: Any, scaler: Any, x: Any, y: Any, factor: float = 1.0) -> Any:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=scaler.is_enabled()):
            output, hx = model["rnn"](x)
            loss = (model["head"](output).float() - y).square().mean() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return hx if cell == "GRU" else hx[0]

    for model, enabled in zip(models, (False, True), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0**8)
        for x, y in batches:
            h_n = step(model, optimizer, scaler, x, y)
            assert h_n.dtype == (dtype if enabled else torch.float32)
    for low, full in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, full, rtol=0, atol=4 * torch.finfo(dtype).eps)

    before = [parameter.detach().clone() for parameter in models[1].parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    step(models[1], torch.optim.SGD(models[1].parameters(), lr=0.05), scaler, *batches[0], factor=float("inf"))
    assert scaler.get_scale() < 2.0**8
    torch.testing.assert_close(before, [parameter.detach() for parameter in models[1].parameters()], rtol=0, atol=0)
