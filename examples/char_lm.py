"""Train a character language model twice, with torch.nn and with hsm_kernels, and compare them.

Both models start from the same seed and see the same batches of real English, so their loss
curves must coincide; the program fails if they do not. The state is carried from chunk to chunk
and detached in between (truncated backpropagation through time).

    python examples/char_lm.py                      # LSTM on the help texts inside CPython
    python examples/char_lm.py --cell gru --text my_book.txt --steps 1000
"""

import argparse
import math
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
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

LIBRARIES: dict[str, ModuleType] = {"torch.nn": nn, "hsm_kernels": hsm}
COLORS = {"torch.nn": "tab:blue", "hsm_kernels": "tab:orange"}
LARGEST_DIFFERENCE = 0.01  # bits per character, between the smoothed losses
HELD_OUT_PART = 0.1
EMBEDDING_SIZE = 64
MEMORY_STEPS = 3  # the peak is reached in the first full steps

State = Tensor | tuple[Tensor, Tensor]  # h for a GRU, (h, c) for an LSTM


@dataclass(frozen=True)
class Options:
    """The command line; see ``parse_options`` for the meaning of each."""

    cell: str
    text: Path | None
    steps: int
    batch: int
    chunk: int
    hidden: int
    layers: int
    learning_rate: float
    seed: int
    device: str
    compile: bool
    threads: int
    sample: int
    out: Path


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_options(arguments: list[str] | None = None) -> Options:
    """Read the command line (``sys.argv`` if ``arguments`` is None)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cell", choices=("lstm", "gru"), default="lstm")
    add("--text", type=Path, help="a UTF-8 text file (default: CPython's help texts)")
    add("--steps", type=positive, default=500, help="training steps of each model (default: 500)")
    add("--batch", type=positive, default=32, help="parallel streams of text (default: 32)")
    add("--chunk", type=positive, default=64, help="characters per step and stream (default: 64)")
    add("--hidden", type=positive, default=256, help="hidden size (default: 256)")
    add("--layers", type=positive, default=1, help="stacked layers (default: 1)")
    # Much faster learning would let rounding errors grow into visible differences of the curves.
    add("--learning-rate", type=float, default=1.5e-3, help="Adam's step size (default: 0.0015)")
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    add("--compile", action="store_true", help="run both models through torch.compile")
    # Two threads that wait for each other lose far more than they win when a core is taken.
    add("--threads", type=positive, default=1, help="CPU threads (default: 1, steady on any load)")
    add("--sample", type=int, default=300, help="characters to write at the end (default: 300)")
    add("--out", type=Path, default=Path("out/char_lm.png"), help="the picture")
    return Options(**vars(parser.parse_args(arguments)))


# The text


def read_text(path: Path | None) -> str:
    """The text of ``path``, or the help texts that ship with CPython."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


class Corpus:
    """A text as character numbers, split into a training and a held-out part."""

    def __init__(self, text: str, options: Options) -> None:
        self.characters = sorted(set(text))
        number = {character: i for i, character in enumerate(self.characters)}
        encoded = torch.tensor([number[character] for character in text], dtype=torch.long)
        split = len(encoded) - int(HELD_OUT_PART * len(encoded))
        self.training = as_streams(encoded[:split], options)
        self.held_out = as_streams(encoded[split:], options)

    def decode(self, numbers: list[int]) -> str:
        """The text of ``numbers``."""
        return "".join(self.characters[number] for number in numbers)


def as_streams(encoded: Tensor, options: Options) -> Tensor:
    """Cut a text of characters into ``batch`` contiguous streams side by side: (time, batch)."""
    length = len(encoded) // options.batch
    if length <= options.chunk:
        wanted = options.batch * (options.chunk + 1)
        raise SystemExit(
            f"char_lm: --batch {options.batch} with --chunk {options.chunk} needs at least "
            f"{wanted} characters in the training and in the held-out part, got {len(encoded)}; "
            "give a longer --text or lower --batch or --chunk"
        )
    return encoded[: length * options.batch].view(options.batch, length).t().to(options.device)


def chunks(streams: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Successive (input, target) pairs of ``size`` characters; a shorter rest is left out."""
    for start in range(0, len(streams) - size, size):
        yield streams[start : start + size], streams[start + 1 : start + size + 1]


# The model


class CharacterModel(nn.Module):
    """Embedding, recurrent net, linear layer: logits of the next character at every step."""

    def __init__(self, library: ModuleType, vocabulary: int, options: Options) -> None:
        super().__init__()
        recurrent = getattr(library, options.cell.upper())
        self.embedding = nn.Embedding(vocabulary, EMBEDDING_SIZE)
        self.rnn = recurrent(EMBEDDING_SIZE, options.hidden, num_layers=options.layers)
        self.head = nn.Linear(options.hidden, vocabulary)

    def forward(self, characters: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Logits (time, batch, vocabulary) and the state after the last character."""
        output, state = self.rnn(self.embedding(characters), state)
        return self.head(output), state


def detach(state: State) -> State:
    """The same state without its history: the cut of truncated backpropagation."""
    if isinstance(state, tuple):
        h, c = state
        return h.detach(), c.detach()
    return state.detach()


def bits_per_character(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross entropy in bits."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) / math.log(2)


@dataclass
class Trainee:
    """One model in training: its optimizer, its carried state and its record."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    state: State | None = None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """One training step on one chunk; the state carries over, its gradient does not."""
        start = time.perf_counter()
        logits, state = self.model(inputs, self.state)
        loss = bits_per_character(logits, targets)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.state = detach(state)
        self.losses.append(loss.item())  # waits for a GPU to finish
        self.seconds.append(time.perf_counter() - start)


def make_trainee(name: str, vocabulary: int, options: Options) -> Trainee:
    """A model of library ``name`` with the weights of ``options.seed``."""
    torch.manual_seed(options.seed)
    model: nn.Module = CharacterModel(LIBRARIES[name], vocabulary, options).to(options.device)
    if options.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    return Trainee(model, torch.optim.Adam(model.parameters(), lr=options.learning_rate))


def train(trainees: list[Trainee], streams: Tensor, options: Options) -> None:
    """Train all models step by step on the same chunks, taking turns at going first."""
    progress = tqdm(range(options.steps), desc=f"training two {options.cell.upper()}s", unit="step")
    batches: Iterator[tuple[Tensor, Tensor]] = iter(())
    for step in progress:
        batch = next(batches, None)
        if batch is None:  # the text is over: start again, with an empty memory
            batches = chunks(streams, options.chunk)
            batch = next(batches)
            for trainee in trainees:
                trainee.state = None
        for trainee in trainees if step % 2 == 0 else reversed(trainees):
            trainee.step(*batch)
        if step % 10 == 0:
            progress.set_postfix_str(" / ".join(f"{t.losses[-1]:.3f}" for t in trainees) + " bits")


@torch.inference_mode()
def evaluate(model: nn.Module, streams: Tensor, chunk: int) -> float:
    """Bits per character over whole streams, with carried state."""
    state: State | None = None
    bits = []
    for inputs, targets in chunks(streams, chunk):
        logits, state = model(inputs, state)
        bits.append(bits_per_character(logits, targets).item())
    return statistics.fmean(bits)


@torch.inference_mode()
def write_sample(model: nn.Module, corpus: Corpus, options: Options) -> str:
    """Text drawn from the model, one character at a time."""
    generator = torch.Generator().manual_seed(options.seed)
    state: State | None = None
    numbers = [corpus.characters.index("\n") if "\n" in corpus.characters else 0]
    for _ in range(options.sample):
        last = torch.tensor([[numbers[-1]]], device=options.device)
        logits, state = model(last, state)
        likely = torch.softmax(logits[0, 0].float().cpu() / 0.7, dim=0)
        numbers.append(int(torch.multinomial(likely, 1, generator=generator)))
    return corpus.decode(numbers[1:])


# Peak memory: each model alone in a fresh process, because a peak cannot be divided between two


def peak_memory(name: str, options: Options) -> float:
    """MiB that training with library ``name`` adds to a process that has all else in place."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(memory_of_training, name, options).result()


def memory_of_training(name: str, options: Options) -> float:
    """Train a few steps in this process and return the growth of its peak memory in MiB."""
    torch.set_num_threads(options.threads)
    corpus = Corpus(read_text(options.text), options)
    before = peak_so_far(options.device)
    trainee = make_trainee(name, len(corpus.characters), options)
    for _, batch in zip(range(MEMORY_STEPS), chunks(corpus.training, options.chunk), strict=False):
        trainee.step(*batch)
    return (peak_so_far(options.device) - before) / 2**20


def peak_so_far(device: str) -> float:
    """The peak memory of this process in bytes: on the GPU if it trains there, else resident."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where a child's ru_maxrss starts at its parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# The report


@dataclass(frozen=True)
class Summary:
    """One column of the table."""

    training_bits: float
    held_out_bits: float
    step_quartiles: list[float]
    memory: float


def smoothed(losses: list[float]) -> list[float]:
    """The mean of the last tenth of the steps (at most 50) before each step."""
    window = max(1, min(50, len(losses) // 10))
    return [statistics.fmean(losses[max(0, i + 1 - window) : i + 1]) for i in range(len(losses))]


def after_warm_up(seconds: list[float]) -> list[float]:
    """The step times without the first ones, which build caches or compile."""
    return seconds[min(10, len(seconds) // 5) :]


def quartiles(values: list[float]) -> list[float]:
    """The three quartiles of ``values``."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def summarize(name: str, trainee: Trainee, corpus: Corpus, options: Options) -> Summary:
    """Collect the figures of one trained model."""
    return Summary(
        training_bits=smoothed(trainee.losses)[-1],
        held_out_bits=evaluate(trainee.model, corpus.held_out, options.chunk),
        step_quartiles=[1e3 * s for s in quartiles(after_warm_up(trainee.seconds))],
        memory=peak_memory(name, options),
    )


def format_table(summaries: dict[str, Summary], cell: str) -> str:
    """The results as text, one column for each library."""
    columns = [
        (
            f"{name}.{cell.upper()}",
            f"{summary.training_bits:.4f}",
            f"{summary.held_out_bits:.4f}",
            f"{summary.step_quartiles[1]:.2f}",
            f"{summary.step_quartiles[0]:.2f} to {summary.step_quartiles[2]:.2f}",
            f"{summary.memory:.0f}",
        )
        for name, summary in summaries.items()
    ]
    labels = (
        "",
        "bits per character, training",
        "bits per character, held out",
        "ms per step, median",
        "ms per step, quartiles",
        "peak memory of training, MiB",
    )
    rows = zip(labels, *columns, strict=True)
    return "\n".join(f"{row[0]:30}" + "".join(f"{entry:>20}" for entry in row[1:]) for row in rows)


def format_ratio(ours: Trainee, theirs: Trainee) -> str:
    """How the step times compare, pair by pair."""
    pairs = zip(after_warm_up(theirs.seconds), after_warm_up(ours.seconds), strict=True)
    low, middle, high = quartiles([peer / own for peer, own in pairs])
    spread = f"quartiles {low:.2f} to {high:.2f}"
    return f"time per step, torch.nn / hsm_kernels: {middle:.2f} ({spread})"


def draw(trainees: dict[str, Trainee], options: Options) -> None:
    """Save the picture: both loss curves, their difference, both step times."""
    figure, (curves, differences, times) = plt.subplots(1, 3, figsize=(15, 4.5))
    figure.suptitle(
        f"Character model, {options.layers} x {options.cell.upper()}({options.hidden}), batch "
        f"{options.batch}, chunks of {options.chunk}, float32 on {options.device}"
    )
    draw_losses(curves, trainees)
    draw_difference(differences, trainees)
    draw_times(times, trainees)
    figure.tight_layout()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=120)
    plt.close(figure)


def draw_losses(axes: Axes, trainees: dict[str, Trainee]) -> None:
    """Both smoothed losses; ours dashed, so that both are seen where they coincide."""
    for (name, trainee), style in zip(trainees.items(), ("-", "--"), strict=True):
        axes.plot(smoothed(trainee.losses), style, label=name, color=COLORS[name], linewidth=2)
    axes.set(title="Loss, smoothed", xlabel="step", ylabel="bits per character")
    axes.legend()
    axes.grid(alpha=0.3)


def draw_difference(axes: Axes, trainees: dict[str, Trainee]) -> None:
    """The distance of the smoothed losses against what is allowed."""
    theirs, ours = (smoothed(trainee.losses) for trainee in trainees.values())
    distance = [max(abs(a - b), 1e-9) for a, b in zip(theirs, ours, strict=True)]
    axes.semilogy(distance, color="tab:green", label="measured")
    axes.axhline(LARGEST_DIFFERENCE, color="tab:red", linestyle=":", label="largest allowed")
    axes.set(title="Difference of the losses", xlabel="step", ylabel="bits per character")
    axes.legend()
    axes.grid(alpha=0.3)


def draw_times(axes: Axes, trainees: dict[str, Trainee]) -> None:
    """The spread of the step times of both."""
    times = [[1e3 * s for s in after_warm_up(trainee.seconds)] for trainee in trainees.values()]
    boxes = axes.boxplot(times, showfliers=False, widths=0.5, patch_artist=True)
    for box, name in zip(boxes["boxes"], trainees, strict=True):
        box.set(facecolor=COLORS[name], alpha=0.6)
    for line in boxes["medians"]:
        line.set(color="black")
    axes.set_xticks(range(1, len(times) + 1), list(trainees))
    axes.set_ylim(bottom=0)
    axes.set(title="Time per training step", ylabel="ms (box: quartiles)")
    axes.grid(alpha=0.3, axis="y")


def largest_difference(first: list[float], second: list[float]) -> float:
    """The largest distance of two smoothed loss curves; NaN anywhere gives infinity."""
    pairs = zip(smoothed(first), smoothed(second), strict=True)
    distances = [abs(a - b) for a, b in pairs]
    return math.inf if any(math.isnan(d) for d in distances) else max(distances)


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; 0 if the loss curves coincide, else 1."""
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    # Both compute in full float32 on a GPU too, or else the curves could not be compared.
    torch.backends.cudnn.rnn.fp32_precision = "ieee"  # type: ignore[attr-defined]
    corpus = Corpus(read_text(options.text), options)
    print(
        f"{corpus.training.numel()} characters to learn from, {corpus.held_out.numel()} held out, "
        f"{len(corpus.characters)} different ones; --threads {options.threads}"
    )
    trainees = {name: make_trainee(name, len(corpus.characters), options) for name in LIBRARIES}
    train(list(trainees.values()), corpus.training, options)
    summaries = {
        name: summarize(name, trainee, corpus, options) for name, trainee in trainees.items()
    }
    draw(trainees, options)

    theirs, ours = trainees["torch.nn"], trainees["hsm_kernels"]
    difference = largest_difference(theirs.losses, ours.losses)
    if options.sample > 0:
        print(f"\nWritten by the hsm_kernels model:\n{write_sample(ours.model, corpus, options)}")
    print(f"\n{format_table(summaries, options.cell)}\n\n{format_ratio(ours, theirs)}")
    print(f"largest difference of the smoothed losses: {difference:.2g} bits per character")
    print(f"picture: {options.out}")
    if difference >= LARGEST_DIFFERENCE:
        print(
            f"char_lm: the loss curves must coincide within {LARGEST_DIFFERENCE} bits per "
            f"character, but differ by {difference:.2g}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
