"""How other code gets boundaries from torch.nn: the recipes that stand in training libraries.

Each is a function of a torch.nn module (one layer, zero initial state), an input ``(L, N, I)`` and
the boundaries; it returns the output ``(L, N, H)``. What a library computes from the mask in each
call is computed in each call here too.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from cases import State
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


def plain(module: nn.RNNBase, sequence: Tensor) -> Tensor:
    """One call, without boundaries."""
    return module(sequence)[0]


def union_split(module: nn.RNNBase, sequence: Tensor, reset_mask: Tensor) -> Tensor:
    """One call for each piece between steps where any sequence is reset (rl_games, skrl)."""
    cuts = reset_mask[1:].any(1).nonzero().flatten() + 1
    state, outputs = None, []
    for begin, end in pairwise([0, *cuts.tolist(), len(sequence)]):
        output, state = module(sequence[begin:end], zeros_where(reset_mask[begin], state))
        outputs.append(output)
    return torch.cat(outputs)


def step_loop(module: nn.RNNBase, sequence: Tensor, reset_mask: Tensor) -> Tensor:
    """One call for each step (CleanRL)."""
    state, outputs = None, []
    for step, reset in zip(sequence.split(1), reset_mask, strict=True):
        output, state = module(step, zeros_where(reset, state))
        outputs.append(output)
    return torch.cat(outputs)


def split_and_pad(module: nn.RNNBase, sequence: Tensor, reset_mask: Tensor) -> Tensor:
    """One call for all episodes, each a padded sequence of its own (rsl_rl).

    Padded by indexing: the backward pass of ``pad_sequence`` takes several times as long.
    """
    padded, valid = pad_episodes(sequence, reset_mask)
    output, _ = module(padded.transpose(0, 1))
    return join_episodes(output.transpose(0, 1)[valid], reset_mask)


def split_and_pack(module: nn.RNNBase, sequence: Tensor, reset_mask: Tensor) -> Tensor:
    """One call for all episodes in a PackedSequence (sample-factory); right in both directions."""
    padded, valid = pad_episodes(sequence, reset_mask)
    output = packed(module, padded.transpose(0, 1), valid.sum(1))
    return join_episodes(output.transpose(0, 1)[valid], reset_mask)


def pad_episodes(sequence: Tensor, reset_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The pieces between the resets of each sequence, padded, and where they are: batch first."""
    starts = reset_mask.clone()
    starts[0] = True
    begin = starts.t().flatten().nonzero().flatten()
    lengths = begin.diff(append=begin.new_tensor([starts.numel()]))
    valid = torch.arange(int(lengths.max()), device=begin.device) < lengths[:, None]
    padded = sequence.new_zeros(*valid.shape, sequence.size(2))
    padded[valid] = sequence.transpose(0, 1).flatten(0, 1)
    return padded, valid


def join_episodes(steps: Tensor, reset_mask: Tensor) -> Tensor:
    """The steps of all episodes, one after the other, as ``(L, N, H)``."""
    return steps.unflatten(0, reset_mask.t().shape).transpose(0, 1)


def chunks(module: nn.RNNBase, sequence: Tensor, steps: int) -> Tensor:
    """One call for every ``steps`` steps, with the state detached in between."""
    state, outputs = None, []
    for chunk in sequence.split(steps):
        output, state = module(chunk, detached(state))
        outputs.append(output)
    return torch.cat(outputs)


def folded_chunks(module: nn.RNNBase, sequence: Tensor, steps: int) -> Tensor:
    """The states at the chunks' starts without gradients, then all chunks as one batch with them.

    A second forward pass buys a backward pass of ``steps`` steps. ``steps`` must divide the length.
    """
    state, states = zero_state(module, sequence), []
    with torch.no_grad():
        for chunk in sequence.split(steps)[:-1]:
            states.append(state)
            _, state = module(chunk, state)
    states.append(state)
    folded = sequence.unflatten(0, (-1, steps)).transpose(0, 1).flatten(1, 2)
    output, _ = module(folded, joined(states))
    return output.unflatten(1, (-1, sequence.size(1))).transpose(0, 1).flatten(0, 1)


def detaching_step_loop(module: nn.RNNBase, sequence: Tensor, detach_mask: Tensor) -> Tensor:
    """One call for each step; a sequence's state is detached where the mask says so."""
    state, outputs = None, []
    for step, detach in zip(sequence.split(1), detach_mask, strict=True):
        column = detach[:, None]
        kept = mapped(lambda part, at=column: torch.where(at, part.detach(), part), state)
        output, state = module(step, kept)
        outputs.append(output)
    return torch.cat(outputs)


def packed(module: nn.RNNBase, sequence: Tensor, lengths: Tensor) -> Tensor:
    """Lengths by a PackedSequence; zeros behind the end of each sequence."""
    given = pack_padded_sequence(sequence, lengths.cpu(), enforce_sorted=False)
    output, _ = pad_packed_sequence(module(given)[0], total_length=len(sequence))
    return output


def mapped(function: Callable[[Tensor], Tensor], state: State | None) -> State | None:
    """``function`` of each tensor of a state."""
    if isinstance(state, tuple):
        h, c = state
        return function(h), function(c)
    return None if state is None else function(state)


def zeros_where(reset: Tensor, state: State | None) -> State | None:
    """The state with zeros for the sequences that ``reset`` ``(N,)`` names."""
    return mapped(lambda part: torch.where(reset[:, None], 0.0, part), state)


def detached(state: State | None) -> State | None:
    """The state without its gradient."""
    return mapped(Tensor.detach, state)


def zero_state(module: nn.RNNBase, sequence: Tensor) -> State:
    """What None stands for as an initial state."""
    h = sequence.new_zeros(1, sequence.size(1), module.hidden_size)
    return (h, h) if module.mode == "LSTM" else h


def joined(states: list[State]) -> State:
    """Several states as the state of one batch."""
    if isinstance(states[0], tuple):
        h, c = zip(*states, strict=True)
        return torch.cat(h, 1), torch.cat(c, 1)
    return torch.cat(states, 1)
