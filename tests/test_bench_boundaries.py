"""The boundary benchmark runs at tiny sizes, and notices results that differ and targets that are missed."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Measurement
from torch.utils.benchmark.utils.common import TaskSpec

import hsm_kernels as hsm

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
Load = Callable[[str], ModuleType]


@pytest.fixture
def run(load: Load, tmp_path: Path) -> Callable[[str], tuple[int, list[dict[str, Any]]]]:
    """Runs the tiny rows whose name holds a text: the exit code and the rows of the file."""

    def run(only: str) -> tuple[int, list[dict[str, Any]]]:
        path = tmp_path / "rows.json"
        arguments = ["--check", "--threads", "1", "--only", only, "--out", str(path)]
        code = load("bench_boundaries").main(arguments)
        return code, json.loads(path.read_text())["rows"]

    return run


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The results file and the output of one --check run as a program."""
    path = tmp_path_factory.mktemp("boundaries") / "check.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "bench_boundaries.py", "--check", "--threads", "1", "--out", path],
        env=os.environ | {"PYTHONPATH": str(Path(hsm.__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return path, done.stdout


def test_check_measures_every_kind_of_row(checked: tuple[Path, str]) -> None:
    path, output = checked
    rows = json.loads(path.read_text())["rows"]
    topics = {row["case"]["topic"] for row in rows}
    assert topics - {"memory"} == {
        "resets p=0.2",
        "truncated every 4",
        "backward alone",
        "lengths",
        "resets p=0.1",
        "resets everywhere",
        "resets nowhere",
        "bidirectional resets p=0.2",
    }
    assert {(row["case"]["op"], row["case"]["topic"]) for row in rows} == {
        (op, topic) for op in ("LSTM", "GRU") for topic in topics
    }
    for row in rows:
        assert row["findings"] and row["differences"] and row["rounds"] >= 2
        for finding in row["findings"]:
            over, under = finding["comparison"]["over"], finding["comparison"]["under"]
            values = row["milliseconds"] if finding["comparison"]["quantity"] == "time" else row["saved_bytes"]
            assert over in values and under in values
            assert finding["ratio"]["low"] <= finding["ratio"]["median"] <= finding["ratio"]["high"]
            assert (finding["verdict"] == "") == (finding["comparison"]["target"] is None)
        assert f"{row['case']['op']} {row['case']['topic']} L=" in output
    assert "targets: " in output


def test_check_names_the_machine_and_saves_a_picture(checked: tuple[Path, str]) -> None:
    path, _ = checked
    assert json.loads(path.read_text())["machine"]["hsm_kernels"] == hsm.__version__
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_rows_with_targets_are_those_of_the_contract(load: Load) -> None:
    cases = load("boundary_cases")
    targets = {
        (case.topic, case.sizes.batch, str(comparison.target))
        for case in cases.all_cases(replace(cases.CHECK, memory=()), 1)
        for comparison in case.plan(case.sizes).comparisons
        if comparison.target is not None
    }
    assert targets == {
        ("resets p=0.2", 3, "at most 1.05"),
        ("resets p=0.2", 3, "at least 3"),
        ("resets p=0.2", 3, "at least 6"),
        ("truncated every 4", 2, "at least 1.5"),
        ("backward alone", 2, "at least 4"),
    }


def test_boundaries_of_a_row_change_its_results(load: Load) -> None:
    """Else contenders that ignore them would agree too."""
    cases, agreement = load("boundary_cases"), load("agreement")
    for case in cases.all_cases(cases.CHECK, 1):
        results = {entry.result: entry.call() for entry in case.plan(case.sizes).entries}
        plain = results.pop("plain")
        if case.topic in ("resets nowhere", "memory"):
            continue
        assert results
        for name, tensors in results.items():
            assert agreement.largest_distance(tensors, plain) > 0.01, f"{case}: {name}"


def forgets_resets(module: nn.Module, sequence: Tensor, *_: Any) -> Tensor:
    return module(sequence)[0]


@pytest.mark.parametrize("peer", ["union split", "step loop", "split and pad"])
def test_a_peer_without_resets_fails_the_run(
    peer: str, load: Load, run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(load("boundary_cases").RESET_RECIPES, peer, forgets_resets)
    code, _ = run("GRU resets p=0.2")
    assert code == 1
    assert f"hsm_kernels and {peer} must agree within 0.0001" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "only", "name"),
    [
        ("chunks", "LSTM truncated", "hsm_kernels and chunks"),
        ("folded_chunks", "LSTM truncated", "hsm_kernels and folded chunks"),
        ("chunks", "LSTM backward", "hsm_kernels, every 4 and chunks"),
        ("detaching_step_loop", "GRU backward", "hsm_kernels, p=1/4 and step loop"),
        ("packed", "GRU lengths", "hsm_kernels and PackedSequence"),
        ("plain", "LSTM truncated", "hsm_kernels, no detaches and torch.nn"),
    ],
)
def test_wrong_gradients_alone_fail_the_run(
    recipe: str,
    only: str,
    name: str,
    load: Load,
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipes = load("recipes")
    right = getattr(recipes, recipe)

    def wrong(*arguments: Any) -> Tensor:
        output = right(*arguments)
        return output.detach() + 0.99 * (output - output.detach())

    monkeypatch.setattr(recipes, recipe, wrong)
    code, _ = run(only)
    assert code == 1
    assert f"{name} must agree within" in capsys.readouterr().err


def test_a_missed_target_is_told_and_fails_nothing(
    load: Load, run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = load("boundary_cases")
    targets = {
        cases.WITHOUT_MASK: cases.Target("at most", 1e9),
        "union split": cases.Target("at least", 1e9),
    }
    monkeypatch.setattr(cases, "RESET_TARGETS", targets)
    code, [row] = run("LSTM resets p=0.2")
    assert code == 0
    verdicts = {f["comparison"]["over"]: f["verdict"] for f in row["findings"]}
    assert verdicts == {
        "hsm_kernels": "met",
        "union split": "missed",
        "step loop": "",
        "split and pad": "",
        "torch.nn, no mask": "",
    }
    output = capsys.readouterr().out
    assert "at least 1e+09 missed" in output
    assert "targets: 1 met, 1 missed" in output


def test_a_target_is_met_on_its_side(load: Load) -> None:
    target = load("boundary_cases").Target
    assert [target("at least", 2).met_by(ratio) for ratio in (1.9, 2, 2.1)] == [False, True, True]
    assert [target("at most", 2).met_by(ratio) for ratio in (1.9, 2, 2.1)] == [True, True, False]


def test_a_finding_divides_round_by_round(load: Load) -> None:
    cases, bench = load("boundary_cases"), load("bench_boundaries")

    def blocks(*times: float) -> list[Measurement]:
        return [Measurement(1, [time], TaskSpec("", "")) for time in times]

    measured = {"slow": blocks(6, 4, 10), "fast": blocks(2, 2, 2)}
    ratio = bench.finding(cases.Comparison("slow", "fast"), measured, {}).ratio
    assert (ratio.median, ratio.low, ratio.high) == (3, 2.5, 4)
    saved = bench.finding(cases.Comparison("slow", "fast", None, "bytes"), measured, {"slow": 1, "fast": 4})
    assert saved.ratio.median == 0.25


def test_memory_rows_compare_time_and_bytes(run: Any) -> None:
    code, rows = run("memory")
    assert code == 0
    assert [row["case"]["op"] for row in rows] == ["LSTM", "GRU"]
    for row in rows:
        time, size = row["findings"]
        assert time["comparison"]["target"] == {"kind": "at most", "ratio": 1.35}
        assert size["comparison"]["target"] == {"kind": "at most", "ratio": 0.45}
        assert (size["comparison"]["quantity"], size["verdict"]) == ("bytes", "met")
        kept, again = (row["saved_bytes"][name] for name in ("hsm_kernels", "hsm_kernels, recompute"))
        assert 0.2 < again / kept < 0.45 if hsm.build_info().loaded else again <= kept


def test_saved_bytes_count_each_storage_once_and_no_parameter(load: Load) -> None:
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, x: Tensor) -> Tensor:
            y = x.sigmoid()  # saves y
            return y[:1] * y * self.weight  # saves a view of y, y, their product, the weight

    problem = SimpleNamespace(ours=Squares(), input=torch.randn(3, 1000))
    assert load("boundary_cases").saved_bytes(problem) == 2 * 3 * 1000 * 4


def test_distance_of_zeros_and_of_nan(load: Load) -> None:
    distance = load("agreement").relative_distance
    zero, one, nan = torch.zeros(2), torch.ones(2), torch.tensor([1.0, math.nan])
    assert distance(zero, zero) == 0
    assert distance(one, 2 * one) == 1
    for a, b in [(zero, one), (one, nan), (nan, one), (nan, nan)]:
        assert distance(a, b) == math.inf


def test_only_must_leave_a_row(load: Load) -> None:
    with pytest.raises(SystemExit, match="'tanh' leaves no row"):
        load("bench_boundaries").main(["--only", "tanh"])
