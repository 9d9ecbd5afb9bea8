"""The benchmark runs at tiny sizes, notices wrong results, judges targets, and compares two files.

Peers that are not installed take no part here either.
"""

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import hsm_kernels as hsm

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
OPTIONAL = {"ONNX Runtime": ("onnxruntime", "onnx"), "OpenVINO": ("openvino", "onnx"), "JAX": ("jax",)}
INSTALLED = {
    name for name, packages in OPTIONAL.items() if all(importlib.util.find_spec(package) for package in packages)
}


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
        training, single = row["case"]["kind"] == "training", row["case"]["dtype"] == "float32"
        names = ["hsm_kernels", "torch.nn", "torch.nn, oneDNN off"]
        light = single and not training and row["case"]["batch"] == 1
        names += ["hsm_kernels, bfloat16 weights"] * light
        names += ["ONNX Runtime"] * ("ONNX Runtime" in INSTALLED and single and not training)
        # Not where the CPU has no kernels for bfloat16.
        names += ["OpenVINO"] * ("OpenVINO" in (INSTALLED if single else row["milliseconds"]) and not training)
        names += ["JAX"] * ("JAX" in INSTALLED and single)
        assert list(row["milliseconds"]) == list(row["error"]) == names
        assert all(s["low"] <= s["median"] <= s["high"] for s in row["milliseconds"].values())
        assert list(row["ratio"]) == list(row["difference"]) == names[1:]
        assert row["skipped"] == {}
        for name, error in row["error"].items():
            largest = 1e-5 if single and name != "hsm_kernels, bfloat16 weights" else 5e-2
            assert 0 < error["output"] < largest
            assert (0 < error["gradients"] < largest) if training else error["gradients"] is None
        ours = row["milliseconds"]["hsm_kernels"]["median"]
        assert row["share_of_limit"] == pytest.approx(row["limit_ms"] / ours)
        assert row["limit_ms"] == max(row["limit"].values())
        assert row["rounds"] >= 2
    assert "Geometric means" in output
    assert "vs torch.nn, oneDNN off" in output


def test_targets_are_judged_at_the_end(checked: tuple[Path, str]) -> None:
    path, output = checked
    verdicts = json.loads(path.read_text())["targets"]
    assert {verdict["threads"] for verdict in verdicts} == {row["case"]["threads"] for row in rows_of(path)}
    met = [verdict["verdict"] for verdict in verdicts].count("met")
    assert f"  {met} met, " in output


def test_missing_peers_are_named(checked: tuple[Path, str]) -> None:
    path, output = checked
    described = json.loads(path.read_text())["machine"]["peers"]
    for name, packages in OPTIONAL.items():
        if name in INSTALLED:
            assert set(described[name]["versions"]) == set(packages)
            assert f"{name}: {packages[0]} " in output
        else:
            assert f"{name}: MISSING, not measured: pip install " in output


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
        for name in ("ratios", "times"):
            picture = path.parent / f"check-1-thread-{dtype}-{name}.png"
            assert picture.read_bytes().startswith(b"\x89PNG")


def test_results_survive_saving(
    checked: tuple[Path, str], load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    path, _ = checked
    targets = json.loads(path.read_text())["targets"]
    load("results").Results.load(path).save(tmp_path / "copy.json", targets=targets)
    assert (tmp_path / "copy.json").read_text() == path.read_text()


def test_compare_finds_nothing_in_equal_files(
    checked: tuple[Path, str], load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = checked
    assert load("bench_rnn").main(["--compare", str(path), str(path)]) == 0
    assert f"0 of {len(rows_of(path))} rows are slower" in capsys.readouterr().out


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
    assert f"1 of {len(rows_of(before))} rows are slower" in output
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
    older_format = edited(before, tmp_path, lambda data: data.update(format=1))
    assert "format 2 is wanted, got 1" in refusal(older_format)
    assert "missing.json" in refusal(tmp_path / "missing.json")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text())["rows"])


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

    def prepare(problem: Any) -> Any:
        call = peers.module_call(problem.torch_nn, problem)
        return peers.Prepared(call, lambda results: tuple(1.01 * tensor for tensor in results))

    wrong = replace(peers.TORCH_PEERS[1], prepare=prepare)
    monkeypatch.setattr(bench, "PEERS", (peers.TORCH_PEERS[0], wrong))
    path = tmp_path / "wrong.json"
    only = ["--only", "GRU training", "--threads", "1"]
    assert bench.main(["--check", *only, "--out", str(path)]) == 1
    assert "hsm_kernels and torch.nn must agree within 0.0001" in capsys.readouterr().err


def test_a_peer_may_decline_a_case(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench, peers = load("bench_rnn"), load("peers")
    absent = peers.Peer("absent", lambda problem: None)
    monkeypatch.setattr(bench, "PEERS", (*peers.TORCH_PEERS, absent))
    path = tmp_path / "absent.json"
    only = ["--only", "LSTM step", "--threads", "1"]
    assert bench.main(["--check", *only, "--out", str(path)]) == 0
    assert all("absent" not in row["milliseconds"] for row in rows_of(path))


def test_a_peer_that_is_not_installed_is_named(
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    bench, peers = load("bench_rnn"), load("peers")
    absent = peers.Peer("absent", lambda problem: pytest.fail("not installed"), packages=("torch", "no_such_package"))
    monkeypatch.setattr(bench, "PEERS", (*peers.TORCH_PEERS, absent))
    path = tmp_path / "absent.json"
    only = ["--only", "LSTM step", "--threads", "1"]
    assert bench.main(["--check", *only, "--out", str(path)]) == 0
    assert "absent: MISSING, not measured: pip install no_such_package" in capsys.readouterr().out
    assert json.loads(path.read_text())["machine"]["peers"]["absent"] == {"missing": ["no_such_package"]}


def test_a_slow_peer_is_compared_but_not_timed(
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    bench, peers = load("bench_rnn"), load("peers")
    calls = []

    def prepare(problem: Any) -> Any:
        call = peers.module_call(problem.torch_nn, problem)
        return peers.Prepared(lambda: (calls.append(1), time.sleep(0.3), call())[2])

    slow = replace(peers.TORCH_PEERS[1], name="slow", prepare=prepare)
    monkeypatch.setattr(bench, "PEERS", (*peers.TORCH_PEERS, slow))
    monkeypatch.setitem(bench.MODES, "check", replace(bench.MODES["check"], longest_call=0.25))
    path = tmp_path / "slow.json"
    name = "GRU inference L=5 N={} H=16 float32"
    assert bench.main(["--check", "--only", name[:13], "--threads", "1", "--out", str(path)]) == 0
    small, large, *_ = rows_of(path)
    assert len(calls) == 2  # in float32 and bfloat16; none for N=3
    assert "slow" not in small["milliseconds"] and small["difference"]["slow"] < 1e-6
    reason = small["skipped"]["slow"]
    assert reason.startswith("one call took 0.3 s, more than 0.25")
    assert large["skipped"] == {"slow": f"too slow in {name.format(1)} x1 already"}
    assert f"{name.format(1)} x1: slow is left out: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_peer_uses_the_threads_of_the_row(name: str, load: Callable[[str], ModuleType]) -> None:
    if name not in INSTALLED:
        pytest.skip(f"{name} is not installed")
    bench, cases, timing = load("bench_rnn"), load("cases"), load("timing")
    (peer,) = (peer for peer in bench.PEERS if peer.name == name)
    problem = cases.make_problem(cases.Case("LSTM", "inference", 32, 16, 256, "float32", 1))
    prepared = peer.prepare(problem)
    with bench.context_of(peer, problem)():
        prepared.run()
        timing._wait_for_workers(2)
        wall, used = time.perf_counter(), time.process_time()
        for _ in range(20):
            prepared.run()
        cores = (time.process_time() - used) / (time.perf_counter() - wall)
    assert cores < 1.15  # about 1.7 with two


def test_resume_measures_what_is_missing(
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    bench, peers = load("bench_rnn"), load("peers")
    monkeypatch.setattr(bench, "PEERS", peers.TORCH_PEERS)
    path = tmp_path / "resumed.json"
    run = ["--check", "--threads", "1", "--out", str(path), "--only"]
    assert bench.main([*run, "GRU step"]) == 0
    before = json.loads(path.read_text())
    assert bench.main([*run, "step", "--resume"]) == 0
    after = json.loads(path.read_text())
    assert after["rows"][:2] == before["rows"]
    assert [row["case"]["op"] for row in after["rows"]] == ["GRU", "GRU", "LSTM", "LSTM"]
    assert after["limits"] == before["limits"]

    assert bench.main([*run, "step"]) == 0  # without --resume all of them
    again = json.loads(path.read_text())["rows"]
    assert len(again) == 4 and again[1] != after["rows"][0]

    commit = before["machine"]["commit"]
    if commit is not None:  # a checkout; the results file itself may be what makes it dirty
        commit = commit.removesuffix("-dirty") if commit.endswith("-dirty") else f"{commit}-dirty"
    edited_path = edited(path, tmp_path, lambda data: data["machine"].update(commit=commit))
    assert bench.main(["--check", "--threads", "1", "--out", str(edited_path), "--only", "step", "--resume"]) == 0
    edited_path = edited(path, tmp_path, lambda data: data["machine"].update(torch="1.0"))
    with pytest.raises(SystemExit, match=r"were measured with torch = 1\.0, now it is"):
        bench.main(["--check", "--threads", "1", "--out", str(edited_path), "--only", "step", "--resume"])


def test_a_row_is_limited_by_products_or_by_reading(load: Callable[[str], ModuleType]) -> None:
    cases, limits = load("cases"), load("limits")
    mega = 2**20
    found = limits.Limits(
        1,
        {"float32": {"a": 1e11, "b": 2e11}, "bfloat16": {"a": 4e11}},
        {str(mega // 4): {"a": 2e11}, str(mega): {"a": 1e11, "b": 5e10}},
    )
    step = cases.Case("LSTM", "step", 1, 1, 256, "float32", 1)
    assert found.of(step).weights_ms == pytest.approx(1e3 * 2 * mega / 1e11)  # W_ih and W_hh
    assert found.of(step).products_ms == pytest.approx(1e3 * step.flops / 2e11)
    assert found.of(step).milliseconds == found.of(step).weights_ms

    half = found.of(replace(step, dtype="bfloat16", hidden=128))  # nearest: 0.25 MB
    assert half.weights_ms == pytest.approx(1e3 * 2 * mega / 8 / 2e11)
    long = replace(step, kind="training", length=10, batch=64)
    assert found.of(long).weights_ms == pytest.approx(1e3 * 2 * 11 * mega / 1e11)  # forward, backward
    assert found.of(long).milliseconds == found.of(long).products_ms


def test_weights_are_not_read_faster_than_memory(load: Callable[[str], ModuleType]) -> None:
    limits = load("limits").measure_limits(1, 0.05, (64,))
    assert set(limits.gemm) == {"float32", "bfloat16"}
    assert {"torch.mm", "hsm_kernels product"} <= set(limits.gemm["float32"])
    assert [int(size) / 2**20 for size in limits.reading] == [0.25, 1, 4, 16]
    for speeds in limits.reading.values():
        assert 1e8 < max(speeds.values()) < 2e12


def test_errors_are_measured_from_float64(load: Callable[[str], ModuleType]) -> None:
    agreement, cases, peers = load("agreement"), load("cases"), load("peers")
    problem = cases.make_problem(cases.Case("GRU", "training", 4, 2, 8, "float32", 1))
    exact = agreement.exact_results(problem)
    assert all(tensor.dtype == torch.float64 for tensor in exact)
    results = [tensor.detach().clone() for tensor in exact]
    assert agreement.error_of(results, exact, problem) == agreement.Error(0.0, 0.0)
    results[0] *= 1 + 1e-3
    results[1] *= 1 + 1e-2  # the first gradient
    error = agreement.error_of(results, exact, problem)
    assert error.output == pytest.approx(1e-3) and error.gradients == pytest.approx(1e-2)
    assert agreement.error_of(peers.module_call(problem.ours, problem)(), exact, problem).output < 1e-6


def test_verdicts(checked: tuple[Path, str], load: Callable[[str], ModuleType]) -> None:
    path, _ = checked
    results, targets, peers = load("results"), load("targets"), load("peers")
    row = results.Results.load(path).rows[0]

    def made(kind: str, ratio: float, **sizes: Any) -> Any:
        case = replace(row.case, op="LSTM", kind=kind, dtype="float32", threads=1, **sizes)
        error = {peers.OURS: load("agreement").Error(3e-7, 1e-7), peers.TORCH: load("agreement").Error(1e-7, 1e-7)}
        spreads = {peers.TORCH: results.Spread(ratio, ratio, ratio), "OpenVINO": results.Spread(0.9, 0.9, 0.9)}
        return replace(row, case=case, ratio=spreads, error=error)

    rows = [made("step", 5.0, hidden=64), made("step", 3.0, hidden=256), made("inference", 2.0)]
    rows += [made("training", 1.5, hidden=64), made("training", 0.9, hidden=256)]
    found = {(v.target, v.wanted): v for v in targets.verdicts(rows)}

    step = found["LSTM step vs torch.nn", "at least 4 (each row)"]
    assert (step.verdict, step.found, step.rows) == ("MISSED", 3.0, 2)
    assert step.worst_row == str(rows[1].case)
    assert found["GRU step vs torch.nn", "at least 2 (each row)"].verdict == "not measured"
    mean = found["LSTM training vs torch.nn", "at least 1.3 (geometric mean)"]
    assert mean.found == pytest.approx((1.5 * 0.9) ** 0.5) and mean.verdict == "MISSED"
    best = found["inference vs the best of torch.nn, ONNX Runtime, OpenVINO", "at least 0.95 (each row)"]
    assert (best.verdict, best.found) == ("MISSED", 0.9)
    assert found["LSTM inference vs torch.nn", "at least 1.3 (geometric mean)"].verdict == "met"
    errors = [found[f"error of the {part} / torch.nn's", "at most 1.5 (each row)"] for part in ("output", "gradients")]
    assert [e.verdict for e in errors] == ["MISSED", "met"]
    text = targets.format_verdicts(list(found.values()))
    assert "MISSED       x1  LSTM step vs torch.nn" in text


def test_rows_are_left_out_when_the_time_is_over(
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    bench, peers = load("bench_rnn"), load("peers")
    monkeypatch.setattr(bench, "PEERS", peers.TORCH_PEERS)
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


def test_a_block_begins_when_other_threads_have_gone_to_sleep(load: Callable[[str], ModuleType]) -> None:
    timing = load("timing")
    end = time.monotonic() + 0.05

    def spin() -> None:
        while time.monotonic() < end:
            pass

    spinning = threading.Thread(target=spin)
    spinning.start()
    timing._wait_for_workers(2)
    assert time.monotonic() >= end
    spinning.join()


def test_onednn_is_off_only_inside(load: Callable[[str], ModuleType]) -> None:
    before = torch.backends.mkldnn.enabled
    with load("peers").without_onednn():
        assert torch.backends.mkldnn.enabled is False
    assert torch.backends.mkldnn.enabled == before
