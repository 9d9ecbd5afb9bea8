"""The mask builders, against their definition in plain Python, and as arguments of the modules."""

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rnn_helpers import outcome
from torch import Tensor

import hsm_kernels as hsm

LAYOUTS = ("steps first", "batch first", "unbatched")
layouts = st.sampled_from(LAYOUTS)
sizes = st.integers(0, 6)


def rows(draw: st.DrawFn, layout: str, elements: st.SearchStrategy[int], steps: int) -> list[list[int]]:
    """One list per sequence."""
    row = st.lists(elements, min_size=steps, max_size=steps)
    batch = 1 if layout == "unbatched" else draw(st.integers(0, 3))
    return [draw(row) for _ in range(batch)]


def laid_out(values: list[list[Any]], steps: int, layout: str, dtype: torch.dtype) -> Tensor:
    """One list per sequence, as a tensor in this layout."""
    tensor = torch.tensor(values, dtype=dtype).reshape(len(values), steps)
    return {"steps first": tensor.t(), "batch first": tensor, "unbatched": tensor.flatten()}[layout]


def one_step(values: list[Any], layout: str, dtype: torch.dtype) -> Tensor:
    tensor = torch.tensor(values, dtype=dtype)
    return tensor[0] if layout == "unbatched" else tensor


def assert_mask(mask: Tensor, wanted: list[list[bool]], steps: int, layout: str) -> None:
    assert mask.dtype == torch.bool
    assert mask.shape == laid_out(wanted, steps, layout, torch.bool).shape
    assert mask.tolist() == laid_out(wanted, steps, layout, torch.bool).tolist()


@given(st.data(), layouts, sizes, st.sampled_from([torch.bool, torch.uint8, torch.int64, torch.bfloat16]))
def test_dones(data: st.DataObject, layout: str, steps: int, dtype: torch.dtype) -> None:
    flags = st.integers(0, 1 if dtype == torch.bool else 2)
    dones = data.draw(st.composite(rows)(layout, flags, steps))
    before = data.draw(st.none() | st.booleans() | st.lists(flags, min_size=len(dones), max_size=len(dones)))
    firsts = before if isinstance(before, list) else [bool(before)] * len(dones)
    wanted = [[bool(d) for d in (first, *row)][:steps] for first, row in zip(firsts, dones, strict=True)]
    given_dones = laid_out(dones, steps, layout, dtype)
    kept = given_dones.clone()
    first = one_step(before, layout, dtype) if isinstance(before, list) else before
    mask = hsm.reset_mask_from_dones(given_dones, first, batch_first=layout == "batch first")
    assert_mask(mask, wanted, steps, layout)
    assert torch.equal(given_dones, kept)


def starts_of(lengths: list[int], steps: int, first: bool) -> list[bool]:
    """A slow definition: walk over the segments."""
    mask, start = [False] * steps, 0
    for length in lengths:
        if length > 0:
            mask[start] = first or start > 0
        start += length
    return mask


@given(st.data(), layouts, st.integers(0, 5), st.none() | st.integers(0, 3), st.booleans())
def test_lengths(data: st.DataObject, layout: str, segments: int, rest: int | None, first: bool) -> None:
    lengths = data.draw(st.composite(rows)(layout, st.integers(0, 4), segments))
    longest = max((sum(row) for row in lengths), default=0)
    steps = longest + (rest or 0)
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64, torch.uint8]))
    mask = hsm.reset_mask_from_lengths(
        laid_out(lengths, segments, layout, dtype),
        None if rest is None else steps,
        first=first,
        batch_first=layout == "batch first",
    )
    assert_mask(mask, [starts_of(row, steps, first) for row in lengths], steps, layout)


@given(st.lists(st.integers(0, 4), max_size=5), st.none() | st.integers(0, 3), st.booleans())
def test_cu_seqlens(lengths: list[int], rest: int | None, first: bool) -> None:
    cumulative = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    steps = sum(lengths) + (rest or 0)
    mask = hsm.reset_mask_from_cu_seqlens(cumulative, None if rest is None else steps, first=first)
    assert_mask(mask, [starts_of(lengths, steps, first)], steps, "unbatched")


@given(st.data(), layouts, sizes, st.booleans())
def test_segment_ids(data: st.DataObject, layout: str, steps: int, first: bool) -> None:
    ids = data.draw(st.composite(rows)(layout, st.integers(-1, 1), steps))
    before = data.draw(st.none() | st.lists(st.integers(-1, 1), min_size=len(ids), max_size=len(ids)))
    wanted = []
    for n, row in enumerate(ids):
        start = first if before is None else row[:1] != [before[n]]
        wanted.append([start, *(a != b for a, b in pairwise(row))][:steps])
    mask = hsm.reset_mask_from_segment_ids(
        laid_out(ids, steps, layout, torch.int64),
        None if before is None else one_step(before, layout, torch.int32),
        first=first,
        batch_first=layout == "batch first",
    )
    assert_mask(mask, wanted, steps, layout)


@given(layouts, st.integers(1, 5), sizes, st.integers(0, 3), st.integers(0, 11))
def test_detach_every(layout: str, k: int, steps: int, batch: int, offset: int) -> None:
    batch = 1 if layout == "unbatched" else batch
    wanted = [[(t + offset) % k == 0 and t + offset > 0 for t in range(steps)]] * batch
    mask = hsm.detach_mask_every(
        k, steps, None if layout == "unbatched" else batch, offset, batch_first=layout == "batch first"
    )
    assert_mask(mask, wanted, steps, layout)


def test_narrow_integers() -> None:
    """The largest value of the dtype of cu_seqlens is no bound for L."""
    cumulative = torch.tensor([0, 100, 127], dtype=torch.int8)
    mask = hsm.reset_mask_from_cu_seqlens(cumulative, 300)
    assert mask.shape == (300,) and mask.nonzero().flatten().tolist() == [0, 100]


def test_masks_are_fresh() -> None:
    """Editing one entry edits no other, and not the argument."""
    ids = torch.zeros(4, 3, dtype=torch.int64)
    for mask in (
        hsm.reset_mask_from_dones(ids.bool()),
        hsm.reset_mask_from_lengths(torch.full((2, 3), 2), first=False),
        hsm.reset_mask_from_lengths(torch.full((3, 2), 2), batch_first=True),
        hsm.reset_mask_from_segment_ids(ids),
        hsm.detach_mask_every(5, 4, 3),
        hsm.detach_mask_every(5, 3, 4, batch_first=True),
    ):
        before = int(mask.sum())
        mask[1, 1] = ~mask[1, 1]
        assert abs(int(mask.sum()) - before) == 1
    assert not ids.any()


def test_device() -> None:
    """No value is read where there is none to read, and the mask is where its argument is."""
    meta = {"device": "meta", "dtype": torch.int64}
    for mask in (
        hsm.reset_mask_from_dones(torch.empty(4, 3, **meta), torch.empty(3, **meta)),
        hsm.reset_mask_from_lengths(torch.empty(2, 3, **meta), L=4),
        hsm.reset_mask_from_segment_ids(torch.empty(4, 3, **meta), torch.empty(3, **meta)),
        hsm.detach_mask_every(2, 4, 3, device="meta"),
    ):
        assert mask.device.type == "meta" and mask.shape == (4, 3)
    assert hsm.reset_mask_from_cu_seqlens(torch.empty(3, **meta), L=4).shape == (4,)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_whole() -> None:
    """In one graph, without a break for a value that is read."""

    def masks(ids: Tensor, lengths: Tensor) -> list[Tensor]:
        return [
            hsm.reset_mask_from_dones(ids, ids[0]),
            hsm.reset_mask_from_lengths(lengths, L=4),
            hsm.reset_mask_from_cu_seqlens(torch.nn.functional.pad(lengths[:, 0].cumsum(0), (1, 0)), L=4),
            hsm.reset_mask_from_segment_ids(ids, ids[0], batch_first=True),
            hsm.detach_mask_every(2, 4, 3, 2),
        ]

    ids, lengths = torch.randint(3, (4, 4)), torch.tensor([[1, 4], [3, 0]])
    compiled = torch.compile(masks, backend="eager", fullgraph=True)
    for ours, wanted in zip(compiled(ids, lengths), masks(ids, lengths), strict=True):
        assert torch.equal(ours, wanted)


# What the masks mean to a module.


def test_dones_separate_episodes() -> None:
    """A rollout in two windows equals each episode by itself; the last step of an episode is part of it."""
    rnn, x = hsm.GRU(3, 4, dtype=torch.float64), torch.randn(6, 1, 3, dtype=torch.float64)
    dones = torch.tensor([0, 1, 0, 1, 0, 0])[:, None]
    first, hx = rnn(x[:4], reset_mask=hsm.reset_mask_from_dones(dones[:4]))
    second, _ = rnn(x[4:], hx, reset_mask=hsm.reset_mask_from_dones(dones[4:], dones[3]))
    alone = torch.cat([rnn(episode)[0] for episode in x.split([2, 2, 2])])
    torch.testing.assert_close(torch.cat([first, second]), alone)


def test_lengths_separate_segments() -> None:
    """Packed rows, forward and backward, with the first segment going on from hx."""
    rnn = hsm.LSTM(3, 4, bidirectional=True, batch_first=True, dtype=torch.float64)
    x, lengths = torch.randn(2, 5, 3, dtype=torch.float64), torch.tensor([[2, 3, 0], [1, 1, 3]])
    output, _ = rnn(x, reset_mask=hsm.reset_mask_from_lengths(lengths, batch_first=True))
    for n, parts in enumerate([[2, 3], [1, 1, 3]]):
        alone = torch.cat([rnn(segment[None])[0][0] for segment in x[n].split(parts)])
        torch.testing.assert_close(output[n], alone)
    hx = (torch.randn(2, 1, 4, dtype=torch.float64), torch.randn(2, 1, 4, dtype=torch.float64))
    mask = hsm.reset_mask_from_lengths(lengths[:1], first=False, batch_first=True)
    forward = rnn(x[:1], hx, reset_mask=mask)[0][:, :2, :4]
    torch.testing.assert_close(forward, rnn(x[:1, :2], hx)[0][:, :, :4])


def test_detach_every_is_truncated_bptt() -> None:
    """Two windows with an offset give the gradients of one, and no offset those of truncated_bptt_steps."""
    rnn = hsm.GRU(3, 4, dtype=torch.float64)
    x = torch.randn(8, 2, 3, dtype=torch.float64)
    weighting = torch.randn(8, 2, 4, dtype=torch.float64)

    def grads(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((output * weighting).sum(), list(rnn.parameters()))

    wanted = grads(rnn(x, truncated_bptt_steps=3)[0])
    torch.testing.assert_close(grads(rnn(x, detach_mask=hsm.detach_mask_every(3, 8, 2))[0]), wanted, rtol=0, atol=0)
    first, hx = rnn(x[:5], detach_mask=hsm.detach_mask_every(3, 5, 2))
    second, _ = rnn(x[5:], hx, detach_mask=hsm.detach_mask_every(3, 3, 2, offset=5))
    torch.testing.assert_close(grads(torch.cat([first, second])), wanted)


# Errors.

BAD_IDS = torch.zeros(4, 3)
IDS = BAD_IDS.long()
Call = Callable[[], Any]
ERRORS: dict[str, tuple[Call, type[Exception], str]] = {
    "dones as list": (
        lambda: hsm.reset_mask_from_dones([0, 1]),  # type: ignore[arg-type]
        TypeError,
        "reset_mask_from_dones: dones must be a Tensor, got list; use torch.as_tensor(dones)",
    ),
    "3-D dones": (
        lambda: hsm.reset_mask_from_dones(torch.zeros(4, 3, 1)),
        ValueError,
        "reset_mask_from_dones: dones must have shape (L,) or (L, N), got (4, 3, 1)",
    ),
    "0-D dones, batch first": (
        lambda: hsm.reset_mask_from_dones(torch.tensor(1), batch_first=True),
        ValueError,
        "reset_mask_from_dones: dones must have shape (L,) or (N, L), got ()",
    ),
    "first of another batch": (
        lambda: hsm.reset_mask_from_dones(IDS, torch.zeros(4)),
        ValueError,
        "reset_mask_from_dones: first must have shape (N,) = (3,), got (4,)",
    ),
    "first for one sequence": (
        lambda: hsm.reset_mask_from_dones(IDS[:, 0], torch.zeros(1)),
        ValueError,
        "reset_mask_from_dones: first must have shape () = (), got (1,)",
    ),
    "first as int": (
        lambda: hsm.reset_mask_from_dones(IDS, 1),  # type: ignore[arg-type]
        TypeError,
        "reset_mask_from_dones: first must be a Tensor, a bool or None, got int",
    ),
    "first elsewhere": (
        lambda: hsm.reset_mask_from_dones(IDS, torch.zeros(3, device="meta")),
        ValueError,
        "reset_mask_from_dones: first must be on cpu, got meta; use first.to(cpu)",
    ),
    "lengths as list": (
        lambda: hsm.reset_mask_from_lengths([2, 3]),  # type: ignore[arg-type]
        TypeError,
        "reset_mask_from_lengths: lengths must be a Tensor, got list; use torch.as_tensor(lengths)",
    ),
    "float lengths": (
        lambda: hsm.reset_mask_from_lengths(torch.ones(3)),
        TypeError,
        "reset_mask_from_lengths: lengths must be an integer tensor, got torch.float32; use lengths.long()",
    ),
    "a mask as lengths": (
        lambda: hsm.reset_mask_from_lengths(torch.ones(3, dtype=torch.bool)),
        TypeError,
        "reset_mask_from_lengths: lengths must be an integer tensor, got torch.bool; use lengths.long()",
    ),
    "negative length": (
        lambda: hsm.reset_mask_from_lengths(torch.tensor([3, -1]), 9),
        ValueError,
        "reset_mask_from_lengths: lengths must be at least 0, got -1",
    ),
    "L below the sum": (
        lambda: hsm.reset_mask_from_lengths(torch.tensor([[3, 1], [2, 1]]), 4),
        ValueError,
        "reset_mask_from_lengths: L must be at least the sum of lengths, 5, got 4",
    ),
    "L as float": (
        lambda: hsm.reset_mask_from_lengths(torch.tensor([3]), 4.0),  # type: ignore[arg-type]
        TypeError,
        "reset_mask_from_lengths: L must be an int, got float",
    ),
    "first as tensor": (
        lambda: hsm.reset_mask_from_lengths(torch.tensor([3]), first=torch.tensor(True)),  # type: ignore[arg-type]
        TypeError,
        "reset_mask_from_lengths: first must be a bool, got Tensor",
    ),
    "2-D cu_seqlens": (
        lambda: hsm.reset_mask_from_cu_seqlens(IDS),
        ValueError,
        "reset_mask_from_cu_seqlens: cu_seqlens must have shape (S + 1,), got (4, 3)",
    ),
    "empty cu_seqlens": (
        lambda: hsm.reset_mask_from_cu_seqlens(IDS[:0, 0]),
        ValueError,
        "reset_mask_from_cu_seqlens: cu_seqlens must have shape (S + 1,) and start with 0, got no entry",
    ),
    "lengths as cu_seqlens": (
        lambda: hsm.reset_mask_from_cu_seqlens(torch.tensor([3, 4])),
        ValueError,
        "reset_mask_from_cu_seqlens: cu_seqlens must start with 0, got 3; for lengths use reset_mask_from_lengths",
    ),
    "cu_seqlens that decrease": (
        lambda: hsm.reset_mask_from_cu_seqlens(torch.tensor([0, 4, 2])),
        ValueError,
        "reset_mask_from_cu_seqlens: cu_seqlens must not decrease, got 2 after 4",
    ),
    "L below the last": (
        lambda: hsm.reset_mask_from_cu_seqlens(torch.tensor([0, 4]), 3),
        ValueError,
        "reset_mask_from_cu_seqlens: L must be at least the last entry of cu_seqlens, 4, got 3",
    ),
    "float ids": (
        lambda: hsm.reset_mask_from_segment_ids(BAD_IDS),
        TypeError,
        "reset_mask_from_segment_ids: ids must be an integer tensor, got torch.float32; use ids.long()",
    ),
    "previous of another batch": (
        lambda: hsm.reset_mask_from_segment_ids(IDS, IDS[:, 0]),
        ValueError,
        "reset_mask_from_segment_ids: previous must have shape (N,) = (3,), got (4,)",
    ),
    "float previous": (
        lambda: hsm.reset_mask_from_segment_ids(IDS, BAD_IDS[0]),
        TypeError,
        "reset_mask_from_segment_ids: previous must be an integer tensor, got torch.float32; use previous.long()",
    ),
    "k of 0": (
        lambda: hsm.detach_mask_every(0, 4, 3),
        ValueError,
        "detach_mask_every: k must be at least 1, got 0",
    ),
    "k as bool": (
        lambda: hsm.detach_mask_every(True, 4, 3),
        TypeError,
        "detach_mask_every: k must be an int, got bool",
    ),
    "negative offset": (
        lambda: hsm.detach_mask_every(2, 4, 3, -1),
        ValueError,
        "detach_mask_every: offset must be at least 0, got -1",
    ),
    "N as float": (
        lambda: hsm.detach_mask_every(2, 4, 3.0),  # type: ignore[arg-type]
        TypeError,
        "detach_mask_every: N must be an int, got float",
    ),
}


@pytest.mark.parametrize("row", ERRORS)
def test_errors(row: str) -> None:
    call, kind, message = ERRORS[row]
    assert outcome(call) == (kind, message)
