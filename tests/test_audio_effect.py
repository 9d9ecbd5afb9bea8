"""The audio example: its recipe is exact, its audio is what it says, and it fails when its claims do not hold."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import hsm_kernels as hsm

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = ["--window", "48", "--burn-in", "5", "--truncate", "16", "--hidden", "8", "--batch", "4"]
TINY = [*SIZES, "--streams", "6", "--seconds", "0.05", "--updates", "25", "--bound", "100", "--block", "7"]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example as a module; torch's thread count is put back afterwards."""
    monkeypatch.syspath_prepend(EXAMPLES)
    threads = torch.get_num_threads()
    yield importlib.import_module("audio_effect")
    torch.set_num_threads(threads)


def table_row(output: str, label: str) -> list[str]:
    line = next(line for line in output.splitlines() if line.startswith(label))
    return line.removeprefix(label).split()


def check_report(output: str, picture: Path) -> None:
    """Both columns are there and agree, and the picture too."""
    assert picture.read_bytes().startswith(b"\x89PNG")
    theirs, ours = map(float, table_row(output, "ESR, held out"))
    assert 0 < theirs < 1.5
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert all(0 < float(entry) < 1 for entry in table_row(output, "ESR, best linear filter"))
    assert all(float(entry) > 0 for entry in table_row(output, "ms per update, median"))
    assert table_row(output, "longest call in training, samples") == ["16", "48"]
    assert "time per update, chunks / hsm: " in output


def test_as_a_program(tmp_path: Path) -> None:
    picture = tmp_path / "folder" / "curves.png"
    done = subprocess.run(
        [sys.executable, EXAMPLES / "audio_effect.py", *TINY, "--out", picture],
        env=os.environ | {"PYTHONPATH": str(Path(hsm.__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    check_report(done.stdout, picture)
    assert "hsm_kernels.LSTM" in done.stdout
    assert "25/25" in done.stderr  # progress


def test_with_a_gru(example: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "curves.png"
    assert example.main([*TINY, "--cell", "gru", "--out", str(picture)]) == 0
    output = capsys.readouterr().out
    check_report(output, picture)
    assert "hsm_kernels.GRU" in output


# It fails when what it claims does not hold.


def uncut(model: Any, x: torch.Tensor, truncate: int) -> torch.Tensor:
    """Chunk by chunk with the detach forgotten."""
    state = model.initial(x.size(1))
    outputs = []
    for chunk in x.split(truncate):
        output, state = model.rnn(chunk[..., None], state)
        outputs.append(output)
    return model.head(torch.cat(outputs))[..., 0]


def failure(example: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> str:
    """What a failing run says."""
    assert example.main([*TINY, "--out", str(tmp_path / "curves.png"), *arguments]) == 1
    return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("audio_effect: "))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_fails_when_a_detach_is_forgotten(
    example: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    cell: str,
) -> None:
    monkeypatch.setitem(example.METHODS, "chunks", uncut)
    said = failure(example, capsys, tmp_path, "--cell", cell)
    assert "the losses of the first 20 updates must coincide within 1e-05, but differ by" in said


@pytest.mark.parametrize("error", [-1, 1])
def test_fails_when_the_gradient_is_cut_one_sample_off(
    example: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    error: int,
) -> None:
    monkeypatch.setitem(example.METHODS, "hsm", lambda model, x, k: example.one_call(model, x, k + error))
    assert "must coincide" in failure(example, capsys, tmp_path)


def test_fails_when_nothing_was_learned(
    example: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = failure(example, capsys, tmp_path, "--bound", "0.001")
    assert "the ESR of chunks must be at most 0.001 of the best linear filter's" in said


def test_fails_when_blocks_differ(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def forgetful(model: Any, x: torch.Tensor, block: int) -> torch.Tensor:
        return torch.cat([model(samples)[0] for samples in x.split(block)]).detach()

    monkeypatch.setattr(example, "run_in_blocks", forgetful)
    assert "blocks must give the output of one call within 1e-05" in failure(example, capsys, tmp_path)


def test_nan_fails_every_claim(example: ModuleType) -> None:
    nan = float("nan")
    assert example.largest_difference([1.0, nan], [1.0, 1.0]) == float("inf")
    trainees = example.make_trainees(example.parse_options(TINY))
    for trainee in trainees.values():
        trainee.curve.append(nan)
    assert len(example.failures(trainees, 0.2, nan, nan, 0.1)) == 4
    for trainee in trainees.values():
        trainee.curve.append(0.01)
    assert example.failures(trainees, 0.2, 0.0, 0.0, 0.1) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--burn-in", "16"], "--burn-in must be at least 0 and less than --truncate 16 and --window 48, got 16"),
        (["--burn-in", "-1"], "--burn-in must be at least 0"),
        (["--truncate", "99", "--burn-in", "48"], "less than --truncate 99 and --window 48, got 48"),
        (["--streams", "1"], "--streams must be at least 2"),
        (["--seconds", "0.005"], "--seconds 0.005 are 40 samples, less than --window 48"),
        (["--updates", "0"], "argument --updates: must be at least 1, got 0"),
    ],
)
def test_says_which_sizes_do_not_fit(
    example: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        example.parse_options([*TINY, *arguments])
    assert message in capsys.readouterr().err


# The recipe


def float64_twins(example: ModuleType, cell: str) -> tuple[Any, Any]:
    """One model by hsm_kernels and its twin by torch.nn, with an initial state that is not zero."""
    ours = example.EffectModel(cell, 6).double()
    with torch.no_grad():
        for parameter in ours.initial.parameters():
            parameter.normal_()
    return ours, example.torch_twin(ours)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("window", [16, 48, 50])  # one chunk, three, three and a rest
def test_one_call_is_the_loop_over_chunks(example: ModuleType, cell: str, window: int) -> None:
    ours, theirs = float64_twins(example, cell)
    x, y = torch.randn(2, window, 4, dtype=torch.float64)
    losses = []
    for model, method in ((ours, example.one_call), (theirs, example.chunk_by_chunk)):
        loss = example.error_to_signal(method(model, x, 16), y, 5)
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert {"initial.h_0", *(["initial.c_0"] if cell == "lstm" else [])} < gradients.keys()
    for name, parameter in ours.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-10, atol=1e-13, msg=name)


def test_twins_share_weights_but_no_memory(example: ModuleType) -> None:
    theirs, ours = (trainee.model for trainee in example.make_trainees(example.parse_options(TINY)).values())
    assert type(theirs.rnn) is torch.nn.LSTM
    assert type(ours.rnn) is hsm.LSTM
    for name, parameter in ours.named_parameters():
        other = theirs.get_parameter(name)
        assert torch.equal(parameter, other)
        assert parameter.data_ptr() != other.data_ptr()


def test_the_burn_in_carries_no_loss(example: ModuleType) -> None:
    prediction = torch.randn(48, 4, requires_grad=True)
    target = torch.randn(48, 4)
    loss = example.error_to_signal(prediction, target, 5)
    loss.backward()
    assert prediction.grad[:5].abs().max() == 0
    assert prediction.grad[5:].abs().min() > 0
    target[:5] = 1e3
    assert example.error_to_signal(prediction, target, 5) == loss


def test_the_loss_ends_at_the_first_cut(example: ModuleType) -> None:
    model, _ = float64_twins(example, "lstm")
    x = torch.randn(48, 4, dtype=torch.float64)
    output = example.one_call(model, x, 16)
    for first, reaches in ((16, False), (15, True)):
        model.zero_grad()
        output[first:].square().sum().backward(retain_graph=True)
        assert (model.initial.h_0.grad.abs().max() > 0) == reaches


def test_error_to_signal(example: ModuleType) -> None:
    target = torch.randn(10, 3)
    assert example.error_to_signal(target, target, 0) == 0
    assert example.error_to_signal(torch.zeros(10, 3), target, 4) == 1
    assert example.error_to_signal(0.9 * target, target, 2) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_blocks_give_what_one_call_gives(example: ModuleType, cell: str, block: int) -> None:
    for model in float64_twins(example, cell):
        x = torch.randn(200, 2, dtype=torch.float64)
        torch.testing.assert_close(example.run_in_blocks(model, x, block), model(x)[0], rtol=1e-12, atol=1e-12)


def test_the_esr_is_taken_at_the_start_and_at_the_end(example: ModuleType) -> None:
    for updates, points in ((1, [0, 1]), (3, [0, 1, 2, 3]), (1000, [*range(0, 1001, 50)])):
        assert example.evaluated_updates(example.parse_options(["--updates", str(updates)])) == points


# The audio


def test_audio_is_repeatable(example: ModuleType) -> None:
    first, again, other = (example.synthesize(3, 4000, seed) for seed in (1, 1, 2))
    assert first.shape == (4000, 3)
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)
    assert np.array_equal(example.effect(first), example.effect(first))


def test_every_sound_is_heard_and_dies_or_moves(example: ModuleType) -> None:
    t = np.arange(8000) / example.SAMPLE_RATE
    for sound in example.SOUNDS:
        wave = sound(t, np.random.default_rng(0))
        assert wave.shape == t.shape
        assert 0.3 < np.abs(wave).max() < 6
        assert np.isfinite(sound(t[:1], np.random.default_rng(0))).all()
    for sound in (example.pluck, example.burst):
        wave = sound(t, np.random.default_rng(0))
        assert np.square(wave[-1000:]).sum() < 0.1 * np.square(wave[:1000]).sum()


def test_the_effect_is_its_formula(example: ModuleType) -> None:
    x = example.synthesize(3, 500, 0)
    expected = np.empty_like(x)
    for stream in range(3):
        u = e = y = before = 0.0
        for t, now in enumerate(x[:, stream]):
            u = 0.5 * u + now - 0.9 * before
            e += (0.02 if abs(u) > e else 0.003) * (abs(u) - e)
            y += 0.35 * (np.tanh(4 * u / (1 + 2 * e) - e) - y)
            expected[t, stream], before = y, now
    np.testing.assert_allclose(example.effect(x), expected, rtol=0, atol=1e-12)


def test_the_effect_is_causal_nonlinear_and_remembers(example: ModuleType) -> None:
    x = example.synthesize(2, 2000, 0)
    y = example.effect(x)
    assert np.abs(example.effect(2 * x) - 2 * y).max() > 0.1
    struck = x.copy()
    struck[500, 0] += 20
    change = np.abs(example.effect(struck) - y)
    assert change[:500].max() == 0
    assert change[:, 1].max() == 0
    assert change[800:, 0].max() > 1e-3  # longer than the linear filters, which forget within FIR_TAPS


def test_the_linear_model_is_the_best_one(example: ModuleType) -> None:
    options = example.parse_options([*TINY, "--seconds", "0.5"])
    training, held_out = example.make_audio(options)
    assert 0.05 < example.linear_esr(training, held_out, 5) < 0.9

    def linear(audio: Any) -> Any:
        y = 0.3 + audio.x.clone()
        y[10:] -= 0.5 * audio.x[:-10]
        return example.Audio(audio.x, y)

    assert example.linear_esr(linear(training), linear(held_out), 5) < 1e-10


def test_a_part_is_held_out(example: ModuleType) -> None:
    options = example.parse_options([*TINY, "--streams", "33", "--seconds", "0.2"])
    training, held_out = example.make_audio(options)
    assert training.x.shape == training.y.shape == (1600, 31)
    assert held_out.x.shape == held_out.y.shape == (1600, 2)
    whole = example.synthesize(33, 1600, 0)
    assert torch.equal(torch.cat([training.x, held_out.x], 1), torch.from_numpy(whole).float())
    assert torch.equal(torch.cat([training.y, held_out.y], 1), torch.from_numpy(example.effect(whole)).float())


def test_the_default_audio_is_longer_than_ten_minutes(example: ModuleType) -> None:
    options = example.parse_options([])
    assert options.streams * example.samples_per_stream(options) >= 600 * example.SAMPLE_RATE


def test_windows_are_drawn_from_everywhere(example: ModuleType) -> None:
    options = example.parse_options([*SIZES, "--batch", "500"])
    numbers = torch.arange(60 * 3).view(60, 3)
    windows = example.draw_windows(example.Audio(numbers, -numbers), options, torch.Generator().manual_seed(0))
    assert windows.x.shape == (48, 500)
    assert torch.equal(windows.y, -windows.x)
    assert torch.equal(windows.x, windows.x[0] + 3 * torch.arange(48)[:, None])  # one stream, step by step
    assert windows.x[0].unique().tolist() == list(range(13 * 3))  # every start of every stream
