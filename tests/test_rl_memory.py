"""The example of an agent that must remember: its task, its learning, and what it says when something is wrong."""

import dataclasses
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import hsm_kernels as hsm

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ["--hidden", "16", "--steps", "16", "--environments", "8", "--delay", "5", "--passes", "2"]
TINY = [*SMALL, "--updates", "6", "--target", "0"]


@pytest.fixture
def rl_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example as a module, on one thread as it runs by default; torch's count is put back afterwards."""
    monkeypatch.syspath_prepend(EXAMPLES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("rl_memory")
    torch.set_num_threads(threads)


def table_row(output: str, label: str) -> list[str]:
    line = next(line for line in output.splitlines() if line.startswith(label))
    return line.removeprefix(label).split()


def check_report(output: str, picture: Path, cell: str) -> None:
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert table_row(output, "recurrent net") == [f"hsm_kernels.{cell}", f"torch.nn.{cell}", f"torch.nn.{cell}"]
    *returns, nothing = table_row(output, "return at the end")
    assert nothing == "-"
    chances = map(float, table_row(output, "return / chance")[:2])
    for value, in_chances in zip(map(float, returns), chances, strict=True):
        assert 0 < value <= 1
        assert in_chances == pytest.approx(value / 0.25, abs=0.01)
    assert all(float(entry) > 0 for entry in table_row(output, "ms per learning pass, median"))
    assert table_row(output, "time of a pass / mask's")[0] == "1.00"
    assert all(float(entry) > 0 for entry in table_row(output, "ms per update, median")[:2])
    assert "best without memory (chance) 0.25" in output


def test_as_a_program(tmp_path: Path) -> None:
    picture = tmp_path / "folder" / "curves.png"
    done = subprocess.run(
        [sys.executable, EXAMPLES / "rl_memory.py", *TINY, "--out", picture],
        env=os.environ | {"PYTHONPATH": str(Path(hsm.__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    check_report(done.stdout, picture, "LSTM")
    assert "6/6" in done.stderr  # progress


def test_with_a_gru(rl_memory: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "curves.png"
    assert rl_memory.main([*TINY, "--cell", "gru", "--out", str(picture)]) == 0
    check_report(capsys.readouterr().out, picture, "GRU")


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_learns_a_short_task(
    rl_memory: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, cell: str
) -> None:
    arguments = ["--cell", cell, "--delay", "5", "--hidden", "32", "--steps", "64", "--updates", "60"]
    assert rl_memory.main([*arguments, "--out", str(tmp_path / "curves.png")]) == 0, capsys.readouterr().err


# What it finds


def reset_at_the_last_step(dones: Tensor, first: Tensor) -> Tensor:
    return dones.clone()


def reset_one_step_late(dones: Tensor, first: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(dones[:1]), first[None], dones[:-2]])[: len(dones)]


def first_step_forgotten(dones: Tensor, first: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(dones[:1]), dones[:-1]])


@pytest.mark.parametrize("wrong_mask", [reset_at_the_last_step, reset_one_step_late, first_step_forgotten])
def test_fails_on_a_wrong_mask(
    rl_memory: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    wrong_mask: Callable[[Tensor, Tensor], Tensor],
) -> None:
    monkeypatch.setattr(hsm, "reset_mask_from_dones", wrong_mask)
    assert rl_memory.main([*TINY, "--out", str(tmp_path / "curves.png")]) == 1
    errors = capsys.readouterr().err
    assert "rl_memory: the losses of mask and loop in the first 4 updates must agree within 0.0001" in errors
    assert "rl_memory: the gradient norms of mask and loop" in errors


def test_fails_where_learning_sees_what_acting_did_not(
    rl_memory: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(hsm, "reset_mask_from_dones", reset_at_the_last_step)  # right for the single steps of acting
    rl_memory.main([*TINY, "--out", str(tmp_path / "curves.png")])
    assert "the first learning pass must find the log-probabilities of acting" in capsys.readouterr().err


def test_fails_where_an_agent_has_not_learnt(
    rl_memory: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert rl_memory.main([*TINY, "--target", "1.5", "--out", str(tmp_path / "curves.png")]) == 1
    errors = capsys.readouterr().err
    assert "rl_memory: mask must reach a return of 1.5, got 0." in errors
    assert "rl_memory: loop must reach a return of 1.5, got 0." in errors


def test_nan_agrees_with_nothing(rl_memory: ModuleType) -> None:
    good, bad = [1.0, 2.0, 0.0], [1.0, float("nan"), 0.0]
    assert rl_memory.largest_difference(good, good) == 0
    assert rl_memory.largest_difference([1.0, 2.5, 0.0], good) == 0.25
    assert rl_memory.largest_difference(good, bad) == rl_memory.largest_difference(bad, good) == float("inf")


def test_an_update_without_an_episode_counts_for_nothing(rl_memory: ModuleType) -> None:
    assert rl_memory.smoothed([float("nan"), 1.0, float("nan"), 0.5])[1:] == [1.0, 1.0, 0.75]


# The task


def recorded_episodes(rl_memory: ModuleType, policy: Callable[[Any], Tensor]) -> list[list[tuple[list[float], float]]]:
    """Whole episodes of all environments: the observation and the reward of each step."""
    options = rl_memory.parse_options(["--environments", "32", "--delay", "6", "--cues", "3"])
    environments = rl_memory.Recall(options, torch.Generator().manual_seed(1))
    running: list[list[tuple[list[float], float]]] = [[] for _ in range(32)]
    episodes = []
    for _ in range(200):
        observations = environments.observe()
        rewards, dones = environments.step(policy(environments))
        for n in range(32):
            running[n].append((observations[n].tolist(), rewards[n].item()))
            if dones[n]:
                episodes.append(running[n])
                running[n] = []
    return episodes


def test_the_cue_is_seen_at_the_first_step_only_and_the_query_at_the_last(rl_memory: ModuleType) -> None:
    episodes = recorded_episodes(rl_memory, lambda environments: environments.cue)
    cues = set()
    for episode in episodes:
        (first, _), *between, (last, _) = episode
        assert sum(first[:3]) == 1
        assert first[3] == 0
        assert all(observation == [0, 0, 0, 0] for observation, _ in between)
        assert last == [0, 0, 0, 1]
        cues.add(first.index(1))
    assert cues == {0, 1, 2}
    assert {len(episode) - 1 for episode in episodes} == {1, 2, 3, 4, 5, 6}


def test_only_the_cue_is_rewarded_and_only_at_the_query(rl_memory: ModuleType) -> None:
    for episode in recorded_episodes(rl_memory, lambda environments: environments.cue):
        assert [reward for _, reward in episode] == [0.0] * (len(episode) - 1) + [1.0]
    for episode in recorded_episodes(rl_memory, lambda environments: (environments.cue + 1) % 3):
        assert not any(reward for _, reward in episode)


def test_one_answer_to_all_earns_chance(rl_memory: ModuleType) -> None:
    episodes = recorded_episodes(rl_memory, lambda environments: torch.zeros_like(environments.cue))
    earned = sum(episode[-1][1] for episode in episodes) / len(episodes)
    assert earned == pytest.approx(1 / 3, abs=0.05)  # about four standard deviations


# Learning


def losses_and_gradients(rl_memory: ModuleType, name: str, cell: str) -> list[Tensor]:
    """Of one rollout in float64 that does not depend on ``name``."""
    options = rl_memory.parse_options([*SMALL, "--cell", cell])
    trainer = rl_memory.Trainer(rl_memory.WAYS[name], options)
    trainer.agent.double()
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    h, c = draw(1, 8, 16), draw(1, 8, 16)
    rollout = rl_memory.Rollout(
        state=(h, c) if cell == "lstm" else h,
        first=draw(8) < 0.5,
        observations=draw(16, 8, 5),
        actions=(4 * draw(16, 8)).long(),
        log_probabilities=draw(16, 8).log(),
        rewards=draw(16, 8),
        dones=draw(16, 8) < 0.2,
        advantages=draw(16, 8) - 0.5,
        targets=draw(16, 8),
    )
    assert rollout.first.any() and not rollout.first.all()
    loss, chosen = trainer.replay(trainer.run, rollout)
    loss.backward()
    return [loss.detach(), chosen.detach(), *(weight.grad for weight in trainer.agent.parameters())]


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_all_ways_give_the_same_losses_and_gradients(rl_memory: ModuleType, cell: str) -> None:
    expected = losses_and_gradients(rl_memory, "loop", cell)
    for name in ("mask", "split"):
        for ours, theirs in zip(losses_and_gradients(rl_memory, name, cell), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_state_is_carried_from_rollout_to_rollout_without_history(rl_memory: ModuleType) -> None:
    trainer = rl_memory.Trainer(rl_memory.WAYS["mask"], rl_memory.parse_options(SMALL))
    before = trainer.update()
    carried, first = trainer.state, trainer.first
    after = trainer.update()  # would fail, had the graph of the first been kept
    assert not any(tensor.any() for tensor in before.state)
    assert before.first.all()
    for tensor, kept in zip(after.state, carried, strict=True):
        assert torch.equal(tensor, kept)
        assert tensor.any()
        assert not tensor.requires_grad
    assert torch.equal(after.first, first)
    assert torch.equal(first, before.dones[-1])


def test_equal_seeds_see_equal_episodes(rl_memory: ModuleType) -> None:
    options = rl_memory.parse_options(SMALL)
    rollouts = [rl_memory.Trainer(rl_memory.WAYS[name], options).collect() for name in ("mask", "loop")]
    for name in ("observations", "actions", "rewards", "dones"):
        assert torch.equal(*(getattr(rollout, name) for rollout in rollouts))


def test_advantages_stop_at_the_end_of_an_episode(rl_memory: ModuleType) -> None:
    rewards, values = torch.rand(5, 1), torch.rand(5, 1)
    dones = torch.tensor([False, False, True, False, False])[:, None]
    last_value = torch.rand(1)
    advantages = rl_memory.estimate_advantages(rewards, values, dones, last_value)
    following = torch.cat([values[1:], last_value[None]])
    following[2] = 0
    errors = (rewards + 0.99 * following - values).flatten()
    decay = 0.99 * 0.95
    expected = [
        errors[0] + decay * errors[1] + decay**2 * errors[2],
        errors[1] + decay * errors[2],
        errors[2],
        errors[3] + decay * errors[4],
        errors[4],
    ]
    torch.testing.assert_close(advantages.flatten(), torch.stack(expected))


def test_the_loss_is_clipped_as_in_ppo(rl_memory: ModuleType) -> None:
    """Where the ratio has left the clip range to the side that gains, it has no gradient left."""
    options = rl_memory.parse_options(SMALL)
    rollout = rl_memory.Trainer(rl_memory.WAYS["mask"], options).collect()
    advantages = torch.where(torch.arange(8) < 4, 1.0, -1.0).expand(16, 8)
    log_probabilities = torch.zeros(16, 8, 4).log_softmax(-1).requires_grad_()
    ratio = torch.tensor([1.5, 1.1, 0.5, 0.9]).repeat(2)
    rollout = dataclasses.replace(
        rollout,
        advantages=advantages,
        log_probabilities=rl_memory.choose(log_probabilities.detach(), rollout.actions) - ratio.log(),
        targets=torch.zeros(16, 8),
    )
    rl_memory.ppo_loss(log_probabilities, torch.zeros(16, 8), rollout).backward()
    entropy_gradient = 0.01 * (1 + log_probabilities.detach()[0, 0, 0]) * 0.25 / (16 * 8)
    gradient = rl_memory.choose(log_probabilities.grad, rollout.actions) - entropy_gradient
    expected = -advantages * ratio / (16 * 8)
    expected[:, 0] = 0  # gains, above the range
    expected[:, 6] = 0  # loses less, below the range
    torch.testing.assert_close(gradient, expected)
