"""Train a recurrent model of an audio effect twice, in one call per window and chunk by chunk.

The recipe is that of recurrent amplifier models: a learned initial state, a burn-in at the start of
every window that carries no loss, and truncated backpropagation through time, which cuts the
gradient of the state every k samples. hsm_kernels does a window in one call,

    rnn(x, initial(N), truncated_bptt_steps=k)

where torch.nn needs one call for every k samples, with the state detached in between. Both start
from equal weights and see equal windows of over ten minutes of synthetic audio. The program fails
if their losses do not coincide over the first updates, if either stays near the best linear model,
or if the model run in small blocks, as a plug-in does, differs from the model run in one call.

    python examples/audio_effect.py                     # LSTM
    python examples/audio_effect.py --cell gru --updates 300 --truncate 512
"""

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

import hsm_kernels as hsm

matplotlib.use("Agg")  # write a file; no display is needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

SAMPLE_RATE = 8000  # Hz, mono
LIBRARIES = {"chunks": "torch.nn", "hsm": "hsm_kernels"}
COLORS = {"chunks": "tab:blue", "hsm": "tab:orange"}
FIR_TAPS = 64  # the effect's linear parts have died away after that
EVALUATIONS = 20  # points of the ESR curves
CHECKED_UPDATES = 20  # later, training itself lets rounding errors grow
LARGEST_LOSS_DIFFERENCE = 1e-5  # between the losses of one update, which start near 1
LARGEST_STREAM_DIFFERENCE = 1e-5  # full scale is 1

State = Tensor | tuple[Tensor, Tensor]  # h for a GRU, (h, c) for an LSTM


@dataclass(frozen=True)
class Options:
    """The command line; see ``parse_options`` for the meaning of each."""

    cell: str
    updates: int
    batch: int
    window: int
    burn_in: int
    truncate: int
    hidden: int
    learning_rate: float
    streams: int
    seconds: float
    block: int
    bound: float
    seed: int
    threads: int
    out: Path


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
    add("--updates", type=positive, default=1000, help="updates of each model (default: 1000)")
    add("--batch", type=positive, default=16, help="windows per update (default: 16)")
    add("--window", type=positive, default=2048, help="samples per window (default: 2048)")
    add("--burn-in", type=int, default=128, help="samples at the start of a window without loss (default: 128)")
    add("--truncate", type=positive, default=256, help="cut the state's gradient every so many samples (default: 256)")
    add("--hidden", type=positive, default=16, help="hidden size (default: 16)")
    add("--learning-rate", type=float, default=0.03, help="Adam's first step size, decays to 0 (default: 0.03)")
    add("--streams", type=positive, default=64, help="recordings, 1 of 16 is held out (default: 64)")
    add("--seconds", type=float, default=10.0, help=f"length of each, at {SAMPLE_RATE} Hz (default: 10)")
    add("--block", type=positive, default=64, help="samples per call when streaming (default: 64)")
    add("--bound", type=float, default=0.1, help="largest ESR, in parts of the linear model's (default: 0.1)")
    add("--seed", type=int, default=0, help="of the weights, the audio and the windows (default: 0)")
    # Two threads that wait for each other lose far more than they win when a core is taken.
    add("--threads", type=positive, default=1, help="CPU threads (default: 1, steady on any load)")
    add("--out", type=Path, default=Path("out/audio_effect.png"), help="the picture")
    options = Options(**vars(parser.parse_args(arguments)))
    check(options, parser)
    return options


def check(options: Options, parser: argparse.ArgumentParser) -> None:
    """End the program with a message if sizes do not fit each other."""
    samples = samples_per_stream(options)
    if not 0 <= options.burn_in < min(options.truncate, options.window):
        # Else no loss would reach the initial state, and it would not be learned.
        parser.error(
            f"--burn-in must be at least 0 and less than --truncate {options.truncate} and --window {options.window}, "
            f"got {options.burn_in}"
        )
    if options.streams < 2:
        parser.error(f"--streams must be at least 2, one to learn from and one held out, got {options.streams}")
    if samples < options.window:
        parser.error(
            f"--seconds {options.seconds:g} are {samples} samples, less than --window {options.window}; "
            "give longer streams or a smaller window"
        )


# The audio: arrays of float64, (samples, streams)

Signal = NDArray[np.float64]


def samples_per_stream(options: Options) -> int:
    """The length of each stream."""
    return round(options.seconds * SAMPLE_RATE)


def synthesize(streams: int, samples: int, seed: int) -> Signal:
    """Plucked strings, chirps and noise bursts at random times and levels, over a little noise."""
    rng = np.random.default_rng(seed)
    signal = 1e-3 * rng.standard_normal((streams, samples))
    for stream in signal:
        start = 0
        while start < samples:
            duration = min(int(rng.uniform(0.1, 1.0) * SAMPLE_RATE), samples - start)
            sound = SOUNDS[rng.integers(len(SOUNDS))]
            level = 10 ** rng.uniform(-1, 0)
            stream[start : start + duration] += level * sound(np.arange(duration) / SAMPLE_RATE, rng)
            start += int(rng.uniform(0.05, 0.5) * SAMPLE_RATE)  # so that sounds overlap
    return np.ascontiguousarray(signal.T)


def pluck(t: Signal, rng: np.random.Generator) -> Signal:
    """Five harmonics, the higher ones weaker and sooner gone."""
    harmonic = np.arange(1, 6)[:, None]
    phase = rng.uniform(0, 2 * np.pi, harmonic.shape)
    waves = np.sin(2 * np.pi * rng.uniform(80, 800) * harmonic * t + phase) / harmonic
    return np.asarray((waves * np.exp(-rng.uniform(2, 8) * harmonic * t)).sum(0))


def chirp(t: Signal, rng: np.random.Generator) -> Signal:
    """A sine whose frequency moves linearly."""
    first, last = rng.uniform(50, 2000, 2)
    progress = np.linspace(0, 1, len(t))
    return np.asarray(np.sin(2 * np.pi * (first + (last - first) / 2 * progress) * t))


def burst(t: Signal, rng: np.random.Generator) -> Signal:
    """Noise that dies away."""
    return rng.standard_normal(len(t)) * np.exp(-rng.uniform(5, 30) * t)


SOUNDS = (pluck, chirp, burst)


def effect(x: Signal) -> Signal:
    """The filter to be learned: an overdriven stage whose gain and bias follow the loudness.

    ::

        u[t] = 0.5 u[t-1] + x[t] - 0.9 x[t-1]              pre-emphasis
        e[t] = e[t-1] + r (|u[t]| - e[t-1])                envelope, r = 0.02 rising, 0.003 falling
        v[t] = tanh(4 u[t] / (1 + 2 e[t]) - e[t])          drive
        y[t] = y[t-1] + 0.35 (v[t] - y[t-1])               low-pass
    """
    y = np.empty_like(x)
    previous = u = e = low = np.zeros_like(x[0])
    for t, now in enumerate(x):  # all streams at once
        u = 0.5 * u + now - 0.9 * previous
        rise = np.abs(u) - e
        e = e + np.where(rise > 0, 0.02, 0.003) * rise
        low = low + 0.35 * (np.tanh(4 * u / (1 + 2 * e) - e) - low)
        y[t], previous = low, now
    return y


@dataclass(frozen=True)
class Audio:
    """Input and target of the effect, (samples, streams) each."""

    x: Tensor
    y: Tensor


def make_audio(options: Options) -> tuple[Audio, Audio]:
    """What to learn from, and what is held out."""
    signal = synthesize(options.streams, samples_per_stream(options), options.seed)
    x, y = (torch.from_numpy(array).float() for array in (signal, effect(signal)))
    split = options.streams - max(1, options.streams // 16)
    training, held_out = ((x[:, part], y[:, part]) for part in (slice(split), slice(split, None)))
    return Audio(*training), Audio(*held_out)


def draw_windows(audio: Audio, options: Options, generator: torch.Generator) -> Audio:
    """A batch of windows from random streams and times: (window, batch) each."""
    streams = torch.randint(audio.x.size(1), (options.batch,), generator=generator)
    starts = torch.randint(len(audio.x) - options.window + 1, (options.batch,), generator=generator)
    times = starts + torch.arange(options.window)[:, None]
    return Audio(audio.x[times, streams], audio.y[times, streams])


def error_to_signal(prediction: Tensor, target: Tensor, burn_in: int) -> Tensor:
    """The energy of the error over that of the target (ESR), from sample ``burn_in`` on."""
    return (prediction - target)[burn_in:].square().sum() / target[burn_in:].square().sum()


def linear_esr(training: Audio, held_out: Audio, burn_in: int) -> float:
    """The held-out ESR of the best linear filter of ``FIR_TAPS`` taps and a constant (least squares)."""

    def rows(x: Tensor, stride: int) -> Tensor:
        history = nn.functional.pad(x.double().t(), (FIR_TAPS - 1, 0)).unfold(1, FIR_TAPS, stride)
        return nn.functional.pad(history, (0, 1), value=1.0)

    stride = 16  # every 16th equation is plenty for so few unknowns
    inputs, targets = rows(training.x, stride).flatten(0, 1), training.y.double().t()[:, ::stride].flatten()
    weights = torch.linalg.solve(inputs.t() @ inputs, inputs.t() @ targets)  # the noise keeps it regular
    prediction = (rows(held_out.x, 1) @ weights).t()
    return error_to_signal(prediction, held_out.y.double(), burn_in).item()


# The model


class EffectModel(nn.Module):
    """Recurrent net with a learned initial state, linear layer."""

    def __init__(self, cell: str, hidden: int) -> None:
        super().__init__()
        self.rnn = getattr(hsm, cell.upper())(1, hidden)
        self.initial = hsm.InitialState(self.rnn)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The output for ``x`` (samples, streams) and the last state; None starts from the learned one."""
        output, state = self.rnn(x[..., None], self.initial(x.size(1)) if state is None else state)
        return self.head(output)[..., 0], state


def torch_twin(model: EffectModel) -> EffectModel:
    """A model with equal weights of its own, and torch.nn's recurrent net."""
    twin = copy.deepcopy(model)
    twin.rnn = twin.rnn.to_torch()
    return twin


def one_call(model: EffectModel, x: Tensor, truncate: int) -> Tensor:
    """The output for windows ``x`` (window, batch), with the gradient cut every ``truncate`` samples."""
    output, _ = model.rnn(x[..., None], model.initial(x.size(1)), truncated_bptt_steps=truncate)
    prediction: Tensor = model.head(output)
    return prediction[..., 0]


def chunk_by_chunk(model: EffectModel, x: Tensor, truncate: int) -> Tensor:
    """The same by hand, as with torch.nn."""
    state = model.initial(x.size(1))
    outputs = []
    for start in range(0, len(x), truncate):
        if start > 0:
            state = detach(state)
        output, state = model.rnn(x[start : start + truncate, :, None], state)
        outputs.append(output)
    prediction: Tensor = model.head(torch.cat(outputs))
    return prediction[..., 0]


Method = Callable[[EffectModel, Tensor, int], Tensor]
METHODS: dict[str, Method] = {"chunks": chunk_by_chunk, "hsm": one_call}


def detach(state: State) -> State:
    """The same state without its history."""
    if isinstance(state, tuple):
        h, c = state
        return h.detach(), c.detach()
    return state.detach()


@dataclass
class Trainee:
    """One model in training: how it runs a window, its optimizer and its record."""

    model: EffectModel
    method: Method
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)  # held-out ESR

    def update(self, windows: Audio, options: Options) -> None:
        """One training step."""
        start = time.perf_counter()
        prediction = self.method(self.model, windows.x, options.truncate)
        loss = error_to_signal(prediction, windows.y, options.burn_in)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)


def make_trainees(options: Options) -> dict[str, Trainee]:
    """A model for each method, with equal weights."""
    torch.manual_seed(options.seed)
    ours = EffectModel(options.cell, options.hidden)
    models = {"chunks": torch_twin(ours), "hsm": ours}
    return {name: make_trainee(model, METHODS[name], options) for name, model in models.items()}


def make_trainee(model: EffectModel, method: Method, options: Options) -> Trainee:
    """A model with its optimizer."""
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.updates)
    return Trainee(model, method, optimizer, schedule)


def evaluated_updates(options: Options) -> list[int]:
    """After how many updates the held-out ESR is taken: at the start, at the end and in between."""
    points = min(EVALUATIONS, options.updates)
    return [round(point * options.updates / points) for point in range(points + 1)]


def train(trainees: list[Trainee], training: Audio, held_out: Audio, options: Options) -> None:
    """Train all models on the same windows, taking turns at going first."""
    generator = torch.Generator().manual_seed(options.seed)
    progress = tqdm(total=options.updates, desc=f"training two {options.cell.upper()}s", unit="update")
    for start, end in pairwise([0, *evaluated_updates(options)]):
        for step in range(start, end):
            windows = draw_windows(training, options, generator)
            for trainee in trainees if step % 2 == 0 else reversed(trainees):
                trainee.update(windows, options)
            progress.update()
        for trainee in trainees:
            trainee.curve.append(evaluate(trainee.model, held_out, options.burn_in))
        progress.set_postfix_str("ESR " + " / ".join(f"{t.curve[-1]:.4f}" for t in trainees))
    progress.close()


@torch.inference_mode()
def evaluate(model: EffectModel, audio: Audio, burn_in: int) -> float:
    """The ESR over whole streams, each in one call from the learned state."""
    return error_to_signal(model(audio.x)[0], audio.y, burn_in).item()


@torch.inference_mode()
def run_in_blocks(model: EffectModel, x: Tensor, block: int) -> Tensor:
    """The output for ``x`` as a plug-in gets it: ``block`` samples at a time, with carried state."""
    state: State | None = None
    outputs = []
    for samples in x.split(block):
        output, state = model(samples, state)
        outputs.append(output)
    return torch.cat(outputs)


# The report


def quartiles(seconds: list[float]) -> list[float]:
    """The three quartiles in ms, without the first updates, which warm up."""
    values = [1e3 * s for s in seconds[min(10, len(seconds) // 5) :]]
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def format_table(trainees: dict[str, Trainee], linear: float, options: Options) -> str:
    """The results as text, one column for each method."""
    rows = [
        ("", *(f"{name}: {library}.{options.cell.upper()}" for name, library in LIBRARIES.items())),
        ("ESR, held out", *(f"{trainee.curve[-1]:.5f}" for trainee in trainees.values())),
        ("ESR, best linear filter", *(f"{linear:.5f}" for _ in trainees)),
        ("ms per update, median", *(f"{quartiles(trainee.seconds)[1]:.2f}" for trainee in trainees.values())),
        (
            "ms per update, quartiles",
            *("{0:.2f} to {2:.2f}".format(*quartiles(trainee.seconds)) for trainee in trainees.values()),
        ),
        ("longest call in training, samples", f"{min(options.truncate, options.window)}", f"{options.window}"),
    ]
    return "\n".join(f"{row[0]:34}" + "".join(f"{entry:>24}" for entry in row[1:]) for row in rows)


def format_ratio(trainees: dict[str, Trainee]) -> str:
    """How the update times compare, pair by pair."""
    pairs = zip(trainees["chunks"].seconds, trainees["hsm"].seconds, strict=True)
    low, middle, high = (1e-3 * ratio for ratio in quartiles([theirs / ours for theirs, ours in pairs]))
    return f"time per update, chunks / hsm: {middle:.2f} (quartiles {low:.2f} to {high:.2f})"


def draw(trainees: dict[str, Trainee], linear: float, held_out: Audio, options: Options) -> None:
    """Save the picture: ESR curves, an excerpt of the audio, update times."""
    figure, (curves, excerpt, times) = plt.subplots(1, 3, figsize=(17, 4.8), width_ratios=(5, 7, 3))
    figure.suptitle(
        f"Audio effect, {options.cell.upper()}({options.hidden}), {options.batch} windows of {options.window} samples, "
        f"burn-in {options.burn_in}, gradient cut every {options.truncate}, float32 on CPU"
    )
    draw_curves(curves, trainees, linear, options)
    draw_excerpt(excerpt, trainees["hsm"].model, held_out)
    draw_times(times, trainees)
    figure.tight_layout()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=120)
    plt.close(figure)


def draw_curves(axes: Axes, trainees: dict[str, Trainee], linear: float, options: Options) -> None:
    """Both ESR curves; ours dashed, so that both are seen where they coincide."""
    for (name, trainee), style in zip(trainees.items(), ("-", "--"), strict=True):
        axes.semilogy(evaluated_updates(options), trainee.curve, style, label=name, color=COLORS[name], linewidth=2)
    axes.axhline(linear, color="tab:red", linestyle="-.", label="best linear filter")
    axes.axhline(options.bound * linear, color="tab:red", linestyle=":", label="largest allowed at the end")
    axes.set(title="Error-to-signal ratio, held out", xlabel="update", ylabel="ESR")
    axes.legend()
    axes.grid(alpha=0.3, which="both")


@torch.inference_mode()
def draw_excerpt(axes: Axes, model: EffectModel, audio: Audio) -> None:
    """Input, target and model where the first held-out stream is loudest at low frequencies."""
    x, y, prediction = (signal[:, 0] for signal in (audio.x, audio.y, model(audio.x[:, :1])[0]))
    loudest = int(nn.functional.avg_pool1d(x[None], 8, stride=1).abs().argmax())
    part = slice(max(0, loudest - 100), loudest + 140)
    time_ms = [1e3 * sample / SAMPLE_RATE for sample in range(len(x))][part]
    axes.plot(time_ms, x[part].numpy(), color="0.7", label="input")
    axes.plot(time_ms, y[part].numpy(), color="black", linewidth=2, label="target")
    axes.plot(time_ms, prediction[part].numpy(), "--", color=COLORS["hsm"], linewidth=2, label="model (hsm)")
    axes.set(title="Held-out audio", xlabel="time, ms", ylabel="amplitude")
    axes.legend()
    axes.grid(alpha=0.3)


def draw_times(axes: Axes, trainees: dict[str, Trainee]) -> None:
    """The median update time of both, with quartiles."""
    for name, trainee in trainees.items():
        low, middle, high = quartiles(trainee.seconds)
        bar = axes.bar(name, middle, yerr=[[middle - low], [high - middle]], capsize=6, color=COLORS[name], alpha=0.6)
        axes.bar_label(bar, fmt="%.1f", label_type="center")
    axes.set(title="Time per update", ylabel="ms (median, quartiles)")
    axes.grid(alpha=0.3, axis="y")


def largest_difference(first: list[float], second: list[float]) -> float:
    """The largest distance of two loss curves over the checked updates; NaN anywhere gives infinity."""
    distances = [abs(a - b) for a, b in zip(first, second, strict=True)][:CHECKED_UPDATES]
    return math.inf if any(math.isnan(d) for d in distances) else max(distances)


def failures(
    trainees: dict[str, Trainee], linear: float, difference: float, streamed: float, bound: float
) -> list[str]:
    """What does not hold of what the program claims. Comparisons are written so that a NaN fails."""
    found = []
    if not difference <= LARGEST_LOSS_DIFFERENCE:
        found.append(
            f"the losses of the first {CHECKED_UPDATES} updates must coincide within {LARGEST_LOSS_DIFFERENCE}, "
            f"but differ by {difference:.2g}"
        )
    for name, trainee in trainees.items():
        if not trainee.curve[-1] <= bound * linear:
            found.append(
                f"the ESR of {name} must be at most {bound:g} of the best linear filter's {linear:.4f}, "
                f"but is {trainee.curve[-1]:.4f}"
            )
    if not streamed <= LARGEST_STREAM_DIFFERENCE:
        found.append(
            f"blocks must give the output of one call within {LARGEST_STREAM_DIFFERENCE}, but differ by {streamed:.2g}"
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; 0 if everything holds that the program claims, else 1."""
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    training, held_out = make_audio(options)
    minutes = (training.x.numel() + held_out.x.numel()) / SAMPLE_RATE / 60
    print(
        f"{minutes:.1f} minutes of audio at {SAMPLE_RATE} Hz, in {training.x.size(1)} streams to learn from and "
        f"{held_out.x.size(1)} held out; --threads {options.threads}"
    )
    linear = linear_esr(training, held_out, options.burn_in)
    trainees = make_trainees(options)
    train(list(trainees.values()), training, held_out, options)
    draw(trainees, linear, held_out, options)

    difference = largest_difference(trainees["chunks"].losses, trainees["hsm"].losses)
    ours = trainees["hsm"].model
    with torch.inference_mode():
        whole = ours(held_out.x)[0]
    streamed = (run_in_blocks(ours, held_out.x, options.block) - whole).abs().max().item()
    print(f"\n{format_table(trainees, linear, options)}\n\n{format_ratio(trainees)}")
    checked = min(CHECKED_UPDATES, options.updates)
    print(f"largest difference of the losses, first {checked} updates: {difference:.2g}")
    print(f"{len(whole)} samples in one call and in blocks of {options.block}: outputs differ by {streamed:.2g}")
    print(f"picture: {options.out}")
    found = failures(trainees, linear, difference, streamed, options.bound)
    for failure in found:
        print(f"audio_effect: {failure}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
