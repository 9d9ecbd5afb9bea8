"""The benchmark of transforms runs at tiny sizes, and notices results that differ."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import hsm_kernels as hsm

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "bench_transforms.py"
Load = Callable[[str], ModuleType]


@pytest.mark.slow
def test_check_measures_every_row() -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARK, "--check", "--threads", "1"],
        env=os.environ | {"PYTHONPATH": str(Path(hsm.__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for cell in ("LSTM", "GRU"):
        rows = [line for line in done.stdout.splitlines() if line.startswith(f"{cell} ")]
        assert [row.partition(" L=")[0].removeprefix(f"{cell} ") for row in rows] == [
            "call", "training call", "cell in a loop", "3 per-sample gradients", "character model",
        ]  # fmt: skip
    assert done.stdout.count("met") + done.stdout.count("missed") == 2 * 7


def test_results_that_differ_are_named(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = load("bench_transforms")
    wrong = {bench.OURS: lambda: (torch.ones(1),), bench.TORCH: lambda: (torch.zeros(1),)}
    wrong[bench.OPERATOR] = wrong[bench.OURS]
    rows = bench.all_rows
    monkeypatch.setattr(bench, "all_rows", lambda *sizes: [replace(rows(*sizes)[0], make=lambda case: wrong)])
    assert bench.main(["--check", "--threads", "1"]) == 1
    assert "WRONG: torch.nn and hsm_kernels must agree within 0.0001" in capsys.readouterr().out


def test_a_filter_that_leaves_nothing_is_an_error(load: Load) -> None:
    with pytest.raises(SystemExit, match="leaves no row"):
        load("bench_transforms").main(["--check", "--only", "nothing"])
