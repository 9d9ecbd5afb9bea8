"""Train a character language model on several processes, and go on from a checkpoint in mid-epoch.

Each process has its own streams of text and carries its own hidden state from chunk to chunk. A checkpoint of
torch.distributed.checkpoint holds the model and the optimizer once and every process's state, so that training goes on
as if it had not stopped: the losses are the same.

    torchrun --standalone --nproc-per-node=2 examples/char_lm_distributed.py --steps 200 --save
    torchrun --standalone --nproc-per-node=2 examples/char_lm_distributed.py --steps 400 --resume
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoints
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import hsm_kernels as hsm

STREAMS, CHUNK, EMBEDDING = 8, 32, 32


class CharacterModel(nn.Module):
    """Embedding, LSTM and head; the caller keeps the state."""

    def __init__(self, characters: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDING)
        self.rnn = hsm.LSTM(EMBEDDING, hidden)
        self.head = nn.Linear(hidden, characters)

    def forward(self, text: Tensor, hx: Any) -> tuple[Tensor, Any]:
        """Character numbers ``(L, N)`` -> logits ``(L, N, characters)`` and the new state."""
        output, hx = self.rnn(self.embedding(text), hx)
        return self.head(output), hx


def streams_of(rank: int, processes: int) -> tuple[Tensor, int]:
    """One process's part of the help texts inside CPython, ``(steps, STREAMS)``, and how many characters there are."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    numbers = {character: k for k, character in enumerate(sorted(set(text)))}
    encoded = torch.tensor([numbers[character] for character in text])
    length = len(encoded) // (STREAMS * processes)
    by_stream = encoded[: length * STREAMS * processes].view(STREAMS * processes, length)
    return by_stream[rank * STREAMS : (rank + 1) * STREAMS].t().contiguous(), len(numbers)


def main() -> None:
    """Train, print the mean loss of every step, and save or resume where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="the step to stop before")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--checkpoint", type=Path, default=Path("out/char_lm_distributed"))
    parser.add_argument("--save", action="store_true", help="write the checkpoint at the end")
    parser.add_argument("--resume", action="store_true", help="start from the checkpoint")
    options = parser.parse_args()

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    text, characters = streams_of(rank, dist.get_world_size())
    text = text.to(device)

    torch.manual_seed(0)
    model = DistributedDataParallel(CharacterModel(characters, options.hidden).to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    hx, start = hsm.state.initial_state(model.module.rnn, STREAMS), 0

    def saved() -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        own = {"h": hx[0], "c": hx[1], "step": torch.tensor(start)}
        return {"model": weights, "optimizer": moments, f"process {rank}": own}

    if options.resume:
        state = saved()
        checkpoints.load(state, checkpoint_id=options.checkpoint)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        own = state[f"process {rank}"]
        hx, start = (own["h"], own["c"]), int(own["step"])

    epoch = (len(text) - 1) // CHUNK  # steps, after which the text and the state begin again
    for step in range(start, options.steps):
        begin = step % epoch * CHUNK
        if begin == 0:
            hx = hsm.state.initial_state(model.module.rnn, STREAMS)
        logits, hx = model(text[begin : begin + CHUNK], hx)
        hx = hsm.state.detach(hx)
        loss = F.cross_entropy(logits.flatten(0, 1), text[begin + 1 : begin + CHUNK + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step}: loss {mean.item() / dist.get_world_size():.6f}", flush=True)

    start = options.steps
    if options.save:
        checkpoints.save(saved(), checkpoint_id=options.checkpoint)
    # Meanwhile the threads of the group let go of tensors. One that still does when the group ends would wait for ever.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
