"""Run by torchrun in two processes: the gradients of DDP and FSDP2 against those of one process with both halves."""

import copy
import gc

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import hsm_kernels as hsm


class Model(nn.Module):
    """Both cells, with a state and boundaries."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = hsm.LSTM(3, 8, 2, bidirectional=True)
        self.gru = hsm.GRU(16, 6)

    def forward(self, x: Tensor, h_0: Tensor, reset_mask: Tensor, lengths: Tensor) -> Tensor:
        output, _ = self.lstm(x, reset_mask=reset_mask, lengths=lengths)
        return self.gru(output, h_0, reset_mask=reset_mask)[0]


def main() -> None:
    """Print ``equal`` once for each way."""
    dist.init_process_group("gloo")
    rank, batch = dist.get_rank(), 4
    torch.manual_seed(0)
    model = Model().double()
    x, h_0 = torch.randn(5, 2 * batch, 3).double(), torch.randn(1, 2 * batch, 6).double()
    reset_mask, lengths = torch.rand(5, 2 * batch) < 0.3, torch.randint(0, 6, (2 * batch,))
    model(x, h_0, reset_mask, lengths).square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}

    mine = slice(rank * batch, (rank + 1) * batch)
    arguments = (x[:, mine], h_0[:, mine], reset_mask[:, mine], lengths[mine])
    fresh = copy.deepcopy(model)
    fresh.zero_grad()
    for wrap in (DistributedDataParallel, fully_shard):
        parallel = wrap(copy.deepcopy(fresh))
        parallel(*arguments).square().sum().backward()
        for name, parameter in parallel.named_parameters():
            grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            # Both average over the processes.
            torch.testing.assert_close(2 * grad, wanted[name.removeprefix("module.")])
        if rank == 0:
            print("equal", flush=True)
    del parallel, parameter, grad
    gc.collect()  # what holds a process group ends before it does
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
