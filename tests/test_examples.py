"""The examples run as a user runs them, and say so when something is wrong."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import hsm_kernels as hsm

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ["--steps", "6", "--hidden", "16", "--batch", "4", "--chunk", "8", "--sample", "20"]


@pytest.fixture
def char_lm(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example as a module; torch's thread count is put back afterwards."""
    monkeypatch.syspath_prepend(EXAMPLES)
    threads = torch.get_num_threads()
    yield importlib.import_module("char_lm")
    torch.set_num_threads(threads)


def table_row(output: str, label: str) -> list[str]:
    line = next(line for line in output.splitlines() if line.startswith(label))
    return line.removeprefix(label).split()


def check_report(output: str, picture: Path) -> None:
    """Both columns are there and agree, and the picture too."""
    assert picture.read_bytes().startswith(b"\x89PNG")
    for part in ("training", "held out"):
        theirs, ours = map(float, table_row(output, f"bits per character, {part}"))
        assert 3 < theirs < 8
        assert ours == pytest.approx(theirs, abs=1e-3)
    for label in ("ms per step, median", "peak memory of training, MiB"):
        assert all(float(entry) > 0 for entry in table_row(output, label))
    assert "torch.nn / hsm_kernels: " in output


def test_char_lm_as_a_program(tmp_path: Path) -> None:
    picture = tmp_path / "folder" / "curves.png"
    done = subprocess.run(
        [sys.executable, EXAMPLES / "char_lm.py", *TINY, "--out", picture],
        env=os.environ | {"PYTHONPATH": str(Path(hsm.__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    check_report(done.stdout, picture)
    assert "hsm_kernels.LSTM" in done.stdout
    assert "6/6" in done.stderr  # progress


def test_char_lm_with_a_gru(
    char_lm: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(char_lm, "peak_memory", lambda name, options: 1.0)
    picture = tmp_path / "curves.png"
    assert char_lm.main([*TINY, "--cell", "gru", "--layers", "2", "--out", str(picture)]) == 0
    output = capsys.readouterr().out
    check_report(output, picture)
    assert "hsm_kernels.GRU" in output


@pytest.mark.slow
def test_char_lm_compiles(
    char_lm: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(char_lm, "peak_memory", lambda name, options: 1.0)
    arguments = [*TINY, "--compile", "--sample", "0", "--out", str(tmp_path / "curves.png")]
    assert char_lm.main(arguments) == 0


def test_char_lm_fails_when_the_curves_differ(
    char_lm: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    class Wrong(nn.LSTM):
        def forward(self, *args: object) -> object:
            output, state = super().forward(*args)
            return 1.5 * output, state

    monkeypatch.setitem(char_lm.LIBRARIES, "hsm_kernels", SimpleNamespace(LSTM=Wrong))
    monkeypatch.setattr(char_lm, "peak_memory", lambda name, options: 1.0)
    assert char_lm.main([*TINY, "--out", str(tmp_path / "curves.png")]) == 1
    assert "char_lm: the loss curves must coincide within 0.01 bits" in capsys.readouterr().err


def test_a_curve_with_nan_coincides_with_nothing(char_lm: ModuleType) -> None:
    good = [1.0] * 20
    bad = [*good[:19], float("nan")]
    assert char_lm.largest_difference(good, good) == 0
    assert char_lm.largest_difference(good, bad) == float("inf")


def test_char_lm_reads_a_text_file(
    char_lm: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(char_lm, "peak_memory", lambda name, options: 1.0)
    text = tmp_path / "text.txt"
    text.write_text("Ein kühler Tag, ein früher Zug. " * 40, encoding="utf-8")
    arguments = [*TINY, "--text", str(text), "--out", str(tmp_path / "curves.png")]
    assert char_lm.main(arguments) == 0


def test_char_lm_says_how_much_text_it_needs(char_lm: ModuleType, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("too short")
    with pytest.raises(SystemExit, match=r"needs at least 36 characters .* got 9; give a longer"):
        char_lm.main([*TINY, "--text", str(text), "--out", str(tmp_path / "curves.png")])


def test_streams_are_contiguous(char_lm: ModuleType) -> None:
    options = char_lm.parse_options(["--batch", "3", "--chunk", "4"])
    streams = char_lm.as_streams(torch.arange(100), options)
    pairs = list(char_lm.chunks(streams, options.chunk))
    inputs = torch.cat([pair[0] for pair in pairs])
    targets = torch.cat([pair[1] for pair in pairs])
    assert inputs.shape == (32, 3)
    for stream in range(3):
        start = 33 * stream
        assert inputs[:, stream].tolist() == list(range(start, start + 32))
    assert torch.equal(targets, inputs + 1)


def test_the_state_is_carried_over_chunks(char_lm: ModuleType) -> None:
    options = char_lm.parse_options(["--hidden", "16"])
    model = char_lm.CharacterModel(hsm, 10, options)
    streams = torch.randint(10, (49, 2))
    by_chunks = char_lm.evaluate(model, streams, 8)
    assert by_chunks == pytest.approx(char_lm.evaluate(model, streams, 48), rel=1e-5)


def test_a_training_step_detaches_the_state(char_lm: ModuleType) -> None:
    options = char_lm.parse_options(["--hidden", "16"])
    trainee = char_lm.make_trainee("hsm_kernels", 10, options)
    for _ in range(2):  # the second would fail, had the first one's graph been kept
        trainee.step(torch.randint(10, (4, 2)), torch.randint(10, (4, 2)))
    assert not any(tensor.requires_grad for tensor in trainee.state)
    assert trainee.state[0].abs().max() > 0
