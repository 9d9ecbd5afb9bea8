"""Train an agent that must remember, by PPO, with episodes that end in the middle of a rollout.

A cue is shown at the first step of an episode only; a random number of steps later a query comes,
and the agent is rewarded if its action is the cue. Without memory the best return is chance.

Two agents start from the same weights and see the same episodes. They differ only in how the
recurrent net runs over a rollout of L steps of N environments, in which an episode that ends
empties the state of its environment:

    mask    one call of hsm_kernels.LSTM, rnn(x, hx, reset_mask=mask)
    loop    L calls of torch.nn.LSTM, one for each step, the state times (1 - done) in between
    split   (only timed) a call of torch.nn.LSTM for each piece between steps at which any episode starts

So both must compute the same losses and gradients, and both must learn; the program fails if not.

    python examples/rl_memory.py
    python examples/rl_memory.py --cell gru --delay 30 --updates 200
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import matplotlib
import torch
from torch import Tensor, nn
from tqdm import tqdm

import hsm_kernels as hsm

matplotlib.use("Agg")  # write a file; no display is needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLORS = {"mask": "tab:orange", "loop": "tab:blue", "split": "tab:green"}
# Later, rounding errors may have made an agent choose another action, and the losses part.
COMPARED_UPDATES = 4
LARGEST_DIFFERENCE = 1e-4  # of the losses and gradient norms of these updates, relative
LARGEST_CHANGE = 1e-3  # of a log-probability from acting to learning, with the same weights

BEST_RETURN = 1.0
DISCOUNT = 0.99
TRACE_DECAY = 0.95  # lambda of the generalized advantage estimate
CLIP = 0.2  # of PPO's ratio of probabilities
VALUE_WEIGHT = 0.5
ENTROPY_WEIGHT = 0.01
LARGEST_GRADIENT_NORM = 0.5

State = Tensor | tuple[Tensor, Tensor]  # h for a GRU, (h, c) for an LSTM
# (rnn, input, state, dones, first) -> (output, state); see below
Run = Callable[[nn.Module, Tensor, State, Tensor, Tensor], tuple[Tensor, State]]


@dataclass(frozen=True)
class Options:
    """The command line; see ``parse_options`` for the meaning of each."""

    cell: str
    updates: int
    steps: int
    environments: int
    delay: int
    cues: int
    hidden: int
    passes: int
    learning_rate: float
    target: float
    seed: int
    device: str
    threads: int
    out: Path

    @property
    def chance(self) -> float:
        """The best mean return that can be had without memory."""
        return BEST_RETURN / self.cues


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_options(arguments: list[str] | None = None) -> Options:
    """Read the command line (``sys.argv`` if ``arguments`` is None)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cell", choices=("lstm", "gru"), default="lstm")
    add("--updates", type=positive, default=100, help="rollouts to learn from (default: 100)")
    add("--steps", type=positive, default=128, help="steps L of a rollout (default: 128)")
    add("--environments", type=positive, default=16, help="environments N side by side (default: 16)")
    add("--delay", type=positive, default=20, help="most steps from the cue to the query (default: 20)")
    add("--cues", type=positive, default=4, help="different cues, chance is 1 / cues (default: 4)")
    add("--hidden", type=positive, default=128, help="hidden size (default: 128)")
    add("--passes", type=positive, default=4, help="learning passes over each rollout (default: 4)")
    add("--learning-rate", type=float, default=3e-3, help="Adam's step size (default: 0.003)")
    add("--target", type=float, default=0.9, help="return that both must reach at the end (default: 0.9)")
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    # Two threads that wait for each other lose far more than they win when a core is taken.
    add("--threads", type=positive, default=1, help="CPU threads (default: 1, steady on any load)")
    add("--out", type=Path, default=Path("out/rl_memory.png"), help="the picture")
    return Options(**vars(parser.parse_args(arguments)))


# The task


class Recall:
    """N environments side by side; in each, an episode asks for the cue that it began with.

    An observation is the cue, one-hot, at the first step (zeros later), and a 1 at the last step,
    the query. The delay from cue to query is drawn anew, from 1 to ``options.delay`` steps.
    Actions before the query change nothing. A new episode begins at the step after the query.
    """

    def __init__(self, options: Options, generator: torch.Generator) -> None:
        self.options = options
        self.generator = generator
        self.started = torch.ones(options.environments, dtype=torch.bool, device=options.device)
        self.cue, self.remaining = self.draw()

    def draw(self) -> tuple[Tensor, Tensor]:
        """A cue and a delay for a new episode in every environment."""
        shape, device = (self.options.environments,), self.options.device
        cue = torch.randint(self.options.cues, shape, generator=self.generator, device=device)
        delay = torch.randint(1, self.options.delay + 1, shape, generator=self.generator, device=device)
        return cue, delay

    def observe(self) -> Tensor:
        """What the agents see now, (N, cues + 1)."""
        cue = nn.functional.one_hot(self.cue, self.options.cues) * self.started[:, None]
        query = self.remaining == 0
        return torch.cat([cue, query[:, None]], dim=1).float()

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards (N,) of ``actions`` (N,), and dones (N,): whether that step was its episode's last."""
        dones = self.remaining == 0
        rewards = (dones & (actions == self.cue)).float() * BEST_RETURN
        cue, delay = self.draw()
        self.cue = torch.where(dones, cue, self.cue)
        self.remaining = torch.where(dones, delay, self.remaining - 1)
        self.started = dones
        return rewards, dones


# Three ways to run a recurrent net over a rollout. dones (L, N) marks the last steps of episodes,
# first (N,) the environments in which step 0 of the rollout is the first of an episode.


def run_with_mask(rnn: nn.Module, x: Tensor, state: State, dones: Tensor, first: Tensor) -> tuple[Tensor, State]:
    """The whole rollout in one call."""
    output, state = rnn(x, state, reset_mask=hsm.reset_mask_from_dones(dones, first))
    return output, state


def run_step_by_step(rnn: nn.Module, x: Tensor, state: State, dones: Tensor, first: Tensor) -> tuple[Tensor, State]:
    """One call for each step."""
    kept = kept_states(dones, first)
    outputs = []
    for t in range(len(x)):
        output, state = rnn(x[t : t + 1], times(state, kept[t]))
        outputs.append(output)
    return torch.cat(outputs), state


def run_in_pieces(rnn: nn.Module, x: Tensor, state: State, dones: Tensor, first: Tensor) -> tuple[Tensor, State]:
    """One call for each piece between steps at which an episode starts in any environment."""
    kept = kept_states(dones, first)
    cuts = (dones[:-1].any(dim=1).nonzero().flatten() + 1).tolist()
    outputs = []
    for begin, end in zip([0, *cuts], [*cuts, len(x)], strict=True):
        output, state = rnn(x[begin:end], times(state, kept[begin]))
        outputs.append(output)
    return torch.cat(outputs), state


def kept_states(dones: Tensor, first: Tensor) -> Tensor:
    """(L, N, 1): 0 where an episode starts, so that the state before is not its own, else 1."""
    return 1 - torch.cat([first[None], dones[:-1]]).float()[..., None]


def times(state: State, factor: Tensor) -> State:
    """The state with h, and c if there is one, times ``factor``."""
    if isinstance(state, tuple):
        h, c = state
        return h * factor, c * factor
    return state * factor


@dataclass(frozen=True)
class Way:
    """How to run a recurrent net over a rollout, and whose net."""

    label: str
    library: ModuleType
    run: Run


WAYS = {
    "mask": Way("hsm_kernels, reset_mask", hsm, run_with_mask),
    "loop": Way("torch.nn, step by step", nn, run_step_by_step),
    "split": Way("torch.nn, in pieces", nn, run_in_pieces),
}
TRAINED = ("mask", "loop")


# The agent


class Agent(nn.Module):
    """Recurrent net, and two linear layers: logits of the actions, and the value."""

    def __init__(self, library: ModuleType, options: Options) -> None:
        super().__init__()
        recurrent = getattr(library, options.cell.upper())
        self.rnn = recurrent(options.cues + 1, options.hidden)
        self.policy = nn.Linear(options.hidden, options.cues)
        self.value = nn.Linear(options.hidden, 1)

    def forward(
        self, run: Run, observations: Tensor, state: State, dones: Tensor, first: Tensor
    ) -> tuple[Tensor, Tensor, State]:
        """Log-probabilities (L, N, cues), values (L, N) and the state after the last step."""
        output, state = run(self.rnn, observations, state, dones, first)
        return self.policy(output).log_softmax(dim=-1), self.value(output).squeeze(-1), state


@dataclass(frozen=True)
class Rollout:
    """L steps of N environments: tensors (L, N), but for the state and ``first``."""

    state: State  # before the first step
    first: Tensor
    observations: Tensor
    actions: Tensor
    log_probabilities: Tensor
    rewards: Tensor
    dones: Tensor
    advantages: Tensor
    targets: Tensor  # of the values


def estimate_advantages(rewards: Tensor, values: Tensor, dones: Tensor, last_value: Tensor) -> Tensor:
    """The generalized advantage estimate, (L, N); nothing crosses the end of an episode."""
    advantages = torch.empty_like(rewards)
    advantage, next_value = torch.zeros_like(last_value), last_value
    for t in reversed(range(len(rewards))):
        going_on = (~dones[t]).float()
        error = rewards[t] + DISCOUNT * going_on * next_value - values[t]
        advantage = error + DISCOUNT * TRACE_DECAY * going_on * advantage
        advantages[t] = advantage
        next_value = values[t]
    return advantages


def ppo_loss(log_probabilities: Tensor, values: Tensor, rollout: Rollout) -> Tensor:
    """PPO's clipped loss, the error of the values, and a bonus for the entropy."""
    chosen = choose(log_probabilities, rollout.actions)
    ratio = (chosen - rollout.log_probabilities).exp()
    advantages = (rollout.advantages - rollout.advantages.mean()) / (rollout.advantages.std(correction=0) + 1e-8)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
    error = nn.functional.mse_loss(values, rollout.targets)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()
    return VALUE_WEIGHT * error - gain - ENTROPY_WEIGHT * entropy


def choose(log_probabilities: Tensor, actions: Tensor) -> Tensor:
    """The log-probabilities of ``actions``."""
    return log_probabilities.gather(-1, actions[..., None]).squeeze(-1)


@dataclass
class Record:
    """What one agent did: entries for each update, or for each learning pass."""

    returns: list[float] = field(default_factory=list)  # mean over the episodes that ended; NaN if none
    update_seconds: list[float] = field(default_factory=list)
    pass_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of each pass
    gradient_norms: list[float] = field(default_factory=list)  # of each pass
    changes: list[float] = field(default_factory=list)  # largest, of a log-probability, acting to first pass


class Trainer:
    """An agent in training: its environments, its carried state and its record."""

    def __init__(self, way: Way, options: Options) -> None:
        torch.manual_seed(options.seed)  # equal weights for all
        self.options = options
        self.run = way.run
        self.agent = Agent(way.library, options).to(options.device)
        self.optimizer = torch.optim.Adam(self.agent.parameters(), lr=options.learning_rate)
        self.generator = torch.Generator(options.device).manual_seed(options.seed)
        self.environments = Recall(options, torch.Generator(options.device).manual_seed(options.seed + 1))
        self.first = self.environments.started
        h = torch.zeros(1, options.environments, options.hidden, device=options.device)
        self.state: State = (h, h) if options.cell == "lstm" else h
        self.record = Record()

    def act(self, observation: Tensor) -> tuple[Tensor, Tensor, State]:
        """Log-probabilities (N, cues), values (N,) and the next state; ``self`` stays as it is."""
        no_dones = torch.zeros_like(self.first)[None]  # the end of a rollout of one step comes after it
        log_probabilities, values, state = self.agent(self.run, observation[None], self.state, no_dones, self.first)
        return log_probabilities[0], values[0], state

    @torch.no_grad()
    def collect(self) -> Rollout:
        """Act for L steps. The state carries over from the rollout before, without its history."""
        state, first = self.state, self.first
        steps = []
        for _ in range(self.options.steps):
            observation = self.environments.observe()
            log_probabilities, values, self.state = self.act(observation)
            # By one uniform number each, so that equal probabilities give equal actions.
            uniform = torch.rand(len(values), 1, generator=self.generator, device=values.device)
            actions = (log_probabilities.exp().cumsum(dim=-1)[:, :-1] < uniform).sum(dim=-1)
            rewards, self.first = self.environments.step(actions)
            steps.append((observation, actions, choose(log_probabilities, actions), values, rewards, self.first))
        observations, actions, chosen, values, rewards, dones = map(torch.stack, zip(*steps, strict=True))
        _, last_value, _ = self.act(self.environments.observe())
        advantages = estimate_advantages(rewards, values, dones, last_value)
        return Rollout(state, first, observations, actions, chosen, rewards, dones, advantages, advantages + values)

    def replay(self, run: Run, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The loss of ``rollout``, and the log-probabilities (L, N) of its actions, by the present weights."""
        observations, state, dones, first = rollout.observations, rollout.state, rollout.dones, rollout.first
        log_probabilities, values, _ = self.agent(run, observations, state, dones, first)
        return ppo_loss(log_probabilities, values, rollout), choose(log_probabilities, rollout.actions)

    def timed_pass(self, run: Run, rollout: Rollout) -> tuple[float, float, Tensor]:
        """Loss and gradients of one pass: the seconds it took, the loss, and ``replay``'s log-probabilities."""
        self.optimizer.zero_grad()
        start = time.perf_counter()
        loss, chosen = self.replay(run, rollout)
        loss.backward()  # type: ignore[no-untyped-call]
        wait_for(self.options.device)
        return time.perf_counter() - start, loss.item(), chosen.detach()

    def update(self) -> Rollout:
        """Collect one rollout and learn from it."""
        start = time.perf_counter()
        rollout = self.collect()
        record = self.record
        for number in range(self.options.passes):
            seconds, loss, chosen = self.timed_pass(self.run, rollout)
            norm = nn.utils.clip_grad_norm_(self.agent.parameters(), LARGEST_GRADIENT_NORM)
            self.optimizer.step()
            record.pass_seconds.append(seconds)
            record.losses.append(loss)
            record.gradient_norms.append(norm.item())
            if number == 0:
                record.changes.append((chosen - rollout.log_probabilities).abs().max().item())
        wait_for(self.options.device)
        record.update_seconds.append(time.perf_counter() - start)
        record.returns.append(rollout.rewards[rollout.dones].mean().item())
        return rollout


def wait_for(device: str) -> None:
    """Wait until all work on a GPU is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def train(trainers: dict[str, Trainer], options: Options) -> list[float]:
    """Train all, taking turns at going first; the seconds of a pass by "split", once an update."""
    split_seconds = []
    progress = tqdm(range(options.updates), desc=f"training two {options.cell.upper()} agents", unit="update")
    for number in progress:
        for name in TRAINED if number % 2 == 0 else reversed(TRAINED):
            rollout = trainers[name].update()
        seconds, _, _ = trainers["loop"].timed_pass(WAYS["split"].run, rollout)
        split_seconds.append(seconds)
        returns = (smoothed(trainers[name].record.returns)[-1] for name in TRAINED)
        progress.set_postfix_str(f"return {' / '.join(f'{value:.2f}' for value in returns)}")
    return split_seconds


# The report


def smoothed(values: list[float]) -> list[float]:
    """The mean of the last ten values before each; NaN, of updates in which no episode ended, is left out."""
    windows = ([v for v in values[max(0, i - 9) : i + 1] if not math.isnan(v)] for i in range(len(values)))
    return [statistics.fmean(window) if window else math.nan for window in windows]


def after_warm_up(values: list[float]) -> list[float]:
    """The values without those of the first updates, which build caches."""
    return values[min(10, len(values) // 5) :]


def quartiles(values: list[float]) -> list[float]:
    """The three quartiles of ``values``."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def median_ratio(seconds: list[float], other: list[float]) -> float:
    """The median of ``seconds`` over ``other``, pair by pair."""
    pairs = zip(after_warm_up(seconds), after_warm_up(other), strict=True)
    return statistics.median(own / peer for own, peer in pairs)


def worst(values: Sequence[float]) -> float:
    """The largest of ``values``; infinity if one is NaN."""
    return math.inf if any(map(math.isnan, values)) else max(values)


def largest_difference(first: list[float], second: list[float]) -> float:
    """The largest distance of two series, in parts of the largest value of the second."""
    scale = worst([abs(value) for value in second])
    return worst([abs(a - b) / scale for a, b in zip(first, second, strict=True)])


@dataclass(frozen=True)
class Results:
    """The figures of the report. Passes by ``split`` are timed once an update, the others in every pass."""

    returns: dict[str, float]  # at the end
    loss_difference: float  # of the first updates
    norm_difference: float
    change: float
    pass_quartiles: dict[str, list[float]]  # ms
    pass_ratios: dict[str, float]  # to mask
    update_medians: dict[str, float]  # ms
    update_ratios: dict[str, float]


def summarize(records: dict[str, Record], split_seconds: list[float], options: Options) -> Results:
    """Collect the figures."""
    mask, loop = (records[name] for name in TRAINED)
    compared = COMPARED_UPDATES * options.passes
    pass_seconds = {name: record.pass_seconds for name, record in records.items()} | {"split": split_seconds}
    last_passes = mask.pass_seconds[options.passes - 1 :: options.passes]
    pass_ratios = {"mask": 1.0, "loop": median_ratio(loop.pass_seconds, mask.pass_seconds)}
    return Results(
        returns={name: smoothed(record.returns)[-1] for name, record in records.items()},
        loss_difference=largest_difference(mask.losses[:compared], loop.losses[:compared]),
        norm_difference=largest_difference(mask.gradient_norms[:compared], loop.gradient_norms[:compared]),
        change=worst([change for record in records.values() for change in record.changes]),
        pass_quartiles={name: milliseconds(seconds) for name, seconds in pass_seconds.items()},
        pass_ratios=pass_ratios | {"split": median_ratio(split_seconds, last_passes)},
        update_medians={name: milliseconds(record.update_seconds)[1] for name, record in records.items()},
        update_ratios={"mask": 1.0, "loop": median_ratio(loop.update_seconds, mask.update_seconds)},
    )


def milliseconds(seconds: list[float]) -> list[float]:
    """The quartiles in milliseconds."""
    return [1e3 * value for value in quartiles(after_warm_up(seconds))]


def format_table(results: Results, options: Options) -> str:
    """The results as text, one column for each way."""

    def column(name: str) -> tuple[str, ...]:
        library = WAYS[name].library.__name__
        low, middle, high = results.pass_quartiles[name]
        rows = [name, f"{library}.{options.cell.upper()}"]
        rows += entries(results.returns, name, ".3f")
        rows += entries({key: value / options.chance for key, value in results.returns.items()}, name, ".2f")
        rows += [f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{results.pass_ratios[name]:.2f}"]
        rows += entries(results.update_medians, name, ".1f") + entries(results.update_ratios, name, ".2f")
        return tuple(rows)

    labels = (
        "",
        "recurrent net",
        "return at the end",
        "return / chance",
        "ms per learning pass, median",
        "ms per learning pass, quartiles",
        "time of a pass / mask's",
        "ms per update, median",
        "time of an update / mask's",
    )
    rows = zip(labels, *map(column, WAYS), strict=True)
    return "\n".join(f"{row[0]:33}" + "".join(f"{entry:>20}" for entry in row[1:]) for row in rows)


def entries(values: dict[str, float], name: str, form: str) -> list[str]:
    """The one entry of a row; a dash where nothing was measured."""
    return [format(values[name], form) if name in values else "-"]


def failures(results: Results, options: Options) -> list[str]:
    """What does not hold of that which the program claims."""
    found = []
    for what, difference in (("losses", results.loss_difference), ("gradient norms", results.norm_difference)):
        if difference >= LARGEST_DIFFERENCE:
            found.append(
                f"the {what} of mask and loop in the first {COMPARED_UPDATES} updates must agree within "
                f"{LARGEST_DIFFERENCE}, but differ by {difference:.2g}"
            )
    if results.change >= LARGEST_CHANGE:
        found.append(
            f"the first learning pass must find the log-probabilities of acting within {LARGEST_CHANGE}, "
            f"but they differ by {results.change:.2g}"
        )
    for name, value in results.returns.items():
        if not value >= options.target:
            found.append(f"{name} must reach a return of {options.target}, got {value:.3f}; try more --updates")
    return found


def draw(records: dict[str, Record], results: Results, options: Options) -> None:
    """Save the picture: both learning curves, the difference of their losses, and the times."""
    figure, (curves, differences, times) = plt.subplots(1, 3, figsize=(16, 4.8))
    figure.suptitle(
        f"Recall of a cue after 1 to {options.delay} steps, PPO, {options.cell.upper()}({options.hidden}), rollouts of "
        f"{options.steps} steps in {options.environments} environments, float32 on {options.device}"
    )
    draw_curves(curves, records, options)
    draw_difference(differences, records, options)
    draw_times(times, results, options)
    figure.tight_layout()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=120)
    plt.close(figure)


def draw_curves(axes: Axes, records: dict[str, Record], options: Options) -> None:
    """Both learning curves between chance and the best; ours dashed, so that both are seen where they coincide."""
    for name, style in (("loop", "-"), ("mask", "--")):
        axes.plot(smoothed(records[name].returns), style, label=label(name), color=COLORS[name], linewidth=2)
    axes.axhline(options.chance, color="tab:red", linestyle=":", label="best without memory (chance)")
    axes.axhline(BEST_RETURN, color="gray", linestyle=":", label="best")
    axes.set(title="Return, smoothed", xlabel="update", ylabel="mean return of an episode")
    axes.set_ylim(0, 1.05 * BEST_RETURN)
    axes.legend(loc="center right")
    axes.grid(alpha=0.3)


def draw_difference(axes: Axes, records: dict[str, Record], options: Options) -> None:
    """The distance of the losses, pass by pass, against what is allowed at first."""
    mask, loop = (records[name].losses for name in TRAINED)
    updates = [(i + 1) / options.passes for i in range(len(mask))]
    scale = worst([abs(value) for value in loop])
    axes.semilogy(updates, [max(abs(a - b) / scale, 1e-9) for a, b in zip(mask, loop, strict=True)], color="tab:purple")
    axes.plot((0, COMPARED_UPDATES), [LARGEST_DIFFERENCE] * 2, color="tab:red", linewidth=3, label="largest allowed")
    axes.set(title="Difference of the losses", xlabel="update", ylabel="relative to the largest loss")
    axes.text(
        0.98, 0.02, "rounding errors grow; where one changes an action, the losses part",
        transform=axes.transAxes, ha="right", fontsize=8,
    )
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)


def draw_times(axes: Axes, results: Results, options: Options) -> None:
    """The median times of a learning pass and of a whole update."""
    passes = {name: middle for name, (_, middle, _) in results.pass_quartiles.items()}
    for group, medians in enumerate((passes, results.update_medians)):
        for place, (name, value) in enumerate(medians.items()):
            position = group + 0.27 * (place - (len(medians) - 1) / 2)
            bar = axes.bar(position, value, 0.25, color=COLORS[name], label=label(name) if group == 0 else None)
            axes.bar_label(bar, fmt="%.3g")
    whole = f"whole update\n(acting, {options.passes} passes)"
    axes.set_xticks((0, 1), ("one learning pass\n(forward and backward)", whole))
    axes.set(title="Time, medians", ylabel="ms")
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3, axis="y")


def label(name: str) -> str:
    """The name of a way with what it means."""
    return f"{name}: {WAYS[name].label}"


def main(arguments: list[str] | None = None) -> int:
    """Train and compare; 0 if all that the program claims holds, else 1."""
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    # Both compute in full float32 on a GPU too, or else the losses could not be compared.
    torch.backends.cudnn.rnn.fp32_precision = "ieee"  # type: ignore[attr-defined]
    trainers = {name: Trainer(WAYS[name], options) for name in TRAINED}
    split_seconds = train(trainers, options)
    records = {name: trainer.record for name, trainer in trainers.items()}
    results = summarize(records, split_seconds, options)
    draw(records, results, options)

    print(f"\n{format_table(results, options)}\n")
    print(f"best return {BEST_RETURN:.2f}, best without memory (chance) {options.chance:.2f}")
    print(
        f"mask and loop, first {COMPARED_UPDATES} updates: losses differ by {results.loss_difference:.2g}, "
        f"gradient norms by {results.norm_difference:.2g} (relative)"
    )
    print(f"log-probabilities, acting and first learning pass: at most {results.change:.2g} apart")
    print(f"picture: {options.out}")
    found = failures(results, options)
    for failure in found:
        print(f"rl_memory: {failure}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
