"""The benchmark runs at tiny sizes, notices wrong results, and compares two files."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import hsm_kernels as hsm

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of the benchmark by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The results file and the output of one --check run."""
    path = tmp_path_factory.mktemp("benchmark") / "check.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "bench_rnn.py", "--check", "--out", path],
        env=os.environ | {"PYTHONPATH": str(Path(hsm.__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return path, done.stdout


def test_check_measures_every_kind_of_row(checked: tuple[Path, str]) -> None:
    path, output = checked
    rows = json.loads(path.read_text())["rows"]
    seen = {(row["case"]["op"], row["case"]["kind"], row["case"]["dtype"]) for row in rows}
    assert len(seen) == 2 * 3 * 2
    for row in rows:
        names = ["hsm_kernels", "torch.nn", "torch.nn, oneDNN off"]
        assert list(row["milliseconds"]) == names
        assert all(s["low"] <= s["median"] <= s["high"] for s in row["milliseconds"].values())
        assert list(row["ratio"]) == list(row["difference"]) == names[1:]
        assert 0 < row["share_of_gemm"] < 1
        assert row["rounds"] >= 2
    assert "Geometric means" in output
    assert "vs torch.nn, oneDNN off" in output


def test_results_name_the_machine_but_no_path_of_it(checked: tuple[Path, str]) -> None:
    path, _ = checked
    machine = json.loads(path.read_text())["machine"]
    assert machine["device"] == "cpu"
    assert machine["torch"] == torch.__version__
    assert machine["hsm_kernels"] == hsm.__version__
    assert machine["build"].startswith(hsm.build_info().how)
    text = path.read_text()
    for place in (Path.home(), Path.cwd(), Path(sys.prefix), path.parent):
        assert f"{place}/" not in text


def test_check_saves_pictures(checked: tuple[Path, str]) -> None:
    path, _ = checked
    for dtype in ("float32", "bfloat16"):
        assert (path.parent / f"check-{dtype}.png").read_bytes().startswith(b"\x89PNG")


def test_results_survive_saving(
    checked: tuple[Path, str], load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    path, _ = checked
    load("results").Results.load(path).save(tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_text() == path.read_text()


def test_compare_finds_nothing_in_equal_files(
    checked: tuple[Path, str], load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = checked
    assert load("bench_rnn").main(["--compare", str(path), str(path)]) == 0
    assert "0 of 32 rows are slower" in capsys.readouterr().out


@pytest.mark.parametrize("measure", ["ratio", "time"])
def test_compare_fails_when_a_row_is_slower(
    measure: str,
    checked: tuple[Path, str],
    load: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def make_slower(row: dict[str, Any]) -> None:
        row["milliseconds"]["hsm_kernels"]["median"] *= 1.5
        row["ratio"]["torch.nn"]["median"] /= 1.5

    before, _ = checked
    after = edited(before, tmp_path, lambda data: make_slower(data["rows"][3]))
    compare = ["--compare", str(before), str(after), "--by", measure]
    assert load("bench_rnn").main(compare) == 1
    output = capsys.readouterr().out
    assert "1 of 32 rows are slower" in output
    assert output.splitlines()[1].endswith("1.500  SLOWER")
    assert load("bench_rnn").main([*compare, "--threshold", "1.6"]) == 0


def test_compare_refuses_what_it_cannot_compare(
    checked: tuple[Path, str], load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    before, _ = checked

    def refusal(after: Path) -> str:
        with pytest.raises(SystemExit) as caught:
            load("bench_rnn").main(["--compare", str(before), str(after)])
        return str(caught.value)

    no_rows = edited(before, tmp_path, lambda data: data.update(rows=[]))
    assert "no case in common" in refusal(no_rows)
    other_format = edited(before, tmp_path, lambda data: data.update(format=99))
    assert "format 1 is wanted, got 99" in refusal(other_format)
    assert "missing.json" in refusal(tmp_path / "missing.json")


def edited(path: Path, folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    data = json.loads(path.read_text())
    edit(data)
    copy = folder / "edited.json"
    copy.write_text(json.dumps(data))
    return copy


def test_a_peer_with_other_results_fails_the_run(
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    bench, peers = load("bench_rnn"), load("peers")

    def prepare(problem: Any) -> Callable[[], tuple[torch.Tensor, ...]]:
        call = peers.module_call(problem.torch_nn, problem)
        return lambda: tuple(1.01 * tensor for tensor in call())

    wrong = replace(peers.PEERS[1], prepare=prepare)
    monkeypatch.setattr(bench, "PEERS", (peers.PEERS[0], wrong))
    path = tmp_path / "wrong.json"
    only = ["--only", "GRU training", "--threads", "1"]
    assert bench.main(["--check", *only, "--out", str(path)]) == 1
    assert "hsm_kernels and torch.nn must agree within 0.0001" in capsys.readouterr().err


def test_a_peer_may_decline_a_case(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench, peers = load("bench_rnn"), load("peers")
    absent = peers.Peer("absent", lambda problem: None)
    monkeypatch.setattr(bench, "PEERS", (*peers.PEERS, absent))
    path = tmp_path / "absent.json"
    only = ["--only", "LSTM step", "--threads", "1"]
    assert bench.main(["--check", *only, "--out", str(path)]) == 0
    assert "absent" not in path.read_text()


def test_rows_are_left_out_when_the_time_is_over(
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    bench = load("bench_rnn")
    # Over after the first row.
    monkeypatch.setitem(bench.MODES, "check", replace(bench.MODES["check"], seconds=1e-3))
    path = tmp_path / "short.json"
    only = ["--only", "LSTM", "--threads", "1"]
    assert bench.main(["--check", *only, "--out", str(path)]) == 0
    assert len(json.loads(path.read_text())["rows"]) == 1
    assert "7 rows are left out" in capsys.readouterr().err


def test_only_must_leave_a_row(load: Callable[[str], ModuleType]) -> None:
    with pytest.raises(SystemExit, match="'tanh' leaves no row of --quick"):
        load("bench_rnn").main(["--only", "tanh"])


def test_flops_count_the_products(load: Callable[[str], ModuleType]) -> None:
    case = load("cases").Case("LSTM", "step", 1, 1, 64, "float32", 1)
    assert case.flops == 2 * (4 * 64) * (64 + 64)
    assert replace(case, op="GRU").flops == case.flops * 3 // 4
    assert replace(case, kind="training", length=5, batch=3).flops == 45 * case.flops


def test_contenders_take_turns(load: Callable[[str], ModuleType]) -> None:
    timing = load("timing")
    called: list[str] = []
    contenders = [
        timing.Contender(name, lambda name=name: (called.append(name), torch.ones(1))[1:])
        for name in "ab"
    ]
    effort = timing.Effort(block_seconds=0, row_seconds=0, fewest_rounds=4, most_rounds=4)
    threads = torch.get_num_threads()
    blocks = timing.measure(contenders, threads=1, effort=effort)
    assert torch.get_num_threads() == threads
    assert {name: len(measured) for name, measured in blocks.items()} == {"a": 4, "b": 4}
    turns = [a for a, b in zip(called, [*called[1:], ""], strict=True) if a != b]
    assert "".join(turns).endswith("ababa")  # ab ba ab ba, less repetitions


def test_onednn_is_off_only_inside(load: Callable[[str], ModuleType]) -> None:
    before = torch.backends.mkldnn.enabled
    with load("peers").without_onednn():
        assert torch.backends.mkldnn.enabled is False
    assert torch.backends.mkldnn.enabled == before
