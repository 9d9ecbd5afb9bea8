"""The GPU check runs at tiny sizes without a GPU, measures what matters first, and notices what is wrong."""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from build_helpers import script

import hsm_kernels as hsm

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
Load = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The results file and the output of one --check run as a program, on one thread."""
    path = tmp_path_factory.mktemp("gpu") / "check.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_check.py", "--check", "--skip", "tests", "sanitizer", "--out", path],
        env=os.environ | {"PYTHONPATH": str(Path(hsm.__file__).parent.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def test_check_measures_every_kind_of_row(checked: tuple[dict[str, Any], str]) -> None:
    saved, output = checked
    cases = [row["case"] for row in saved["rows"]]
    assert len({(case["sizes"]["op"], case["sizes"]["kind"], case["precision"]) for case in cases}) == 2 * 3 * 4
    for row in saved["rows"]:
        assert set(row["milliseconds"]) == {"hsm_kernels", "torch.nn"}
        assert row["ratio"]["median"] > 0 and row["us_per_step"] > 0 and row["rounds"] >= 2
        assert row["explanation"]
    assert {row["case"]["topic"] for row in saved["boundary_rows"]} == {"resets p=0.2", "truncated every 4"}
    assert saved["failed"] == {} and saved["not_measured"] == []
    assert {"device", "torch", "cudnn", "cuda", "commit", "date"} <= set(saved["machine"])
    assert saved["stages"]["build"]["plan"] and saved["stages"]["tests"]["skipped"]
    assert "GRU training bfloat16 L=5" in output and "not measured" not in output


def test_variants_are_measured_where_they_run(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what runs by default, and each while it is asked for."""
    rows, timing, asked = load("gpu_rows"), load("timing"), []

    def explain(rnn: Any, input: Any) -> Any:
        wanted = os.environ.get("HSM_KERNELS_CUDA_VARIANT") or "step"
        return hsm._backend.Plan("cuda", "cluster" if wanted == "cluster" else "step", "pretended")

    def measure(contenders: Any, threads: int, effort: Any) -> Any:
        for contender in contenders:
            with contender.context():
                asked.append((contender.name, os.environ.get("HSM_KERNELS_CUDA_VARIANT") or "step"))
        return plain(contenders, threads, effort)

    plain = rows.measure
    monkeypatch.setattr(hsm, "explain", explain)
    monkeypatch.setattr(rows, "measure", measure)
    case = next(case for case in rows.cases(rows.CHECK, "cpu") if case.sizes.kind == "training")
    row = rows.measure_row(case, timing.Effort(0, 0.01, 2, 3))
    assert asked == [("hsm_kernels", "step"), ("torch.nn", "step"), ("cluster", "cluster")]
    assert row.variants.keys() == {"cluster"} and row.explanations == {"cluster": "cuda (cluster): pretended"}
    assert row.explanation == "cuda (step): pretended" and not row.differs
    table = rows.format_rows([row])
    assert f"{case.sizes.op} training {case.precision} L=5, cluster" in table and "grid" not in table
    assert not os.environ.get("HSM_KERNELS_CUDA_VARIANT")


def test_the_grid_of_the_issue_in_the_order_of_importance(load: Load) -> None:
    rows = load("gpu_rows")
    found = rows.cases(rows.FULL, "cpu")
    assert len(found) == len(set(found)) == 2 * 4 * 6 * 4 * (1 + 2 * 2)
    first = [case for case in found if rows.importance(case) == 0]
    assert found[: len(first)] == first
    sizes = {(case.sizes.hidden, case.sizes.batch, case.sizes.length, case.precision) for case in first}
    assert sizes == {(h, n, 1024, "bfloat16") for h in (128, 256, 512) for n in (1, 16, 64)}
    assert {(case.sizes.op, case.sizes.kind) for case in first} == {
        (op, kind) for op in ("LSTM", "GRU") for kind in ("inference", "training")
    }


def test_what_is_not_measured_is_named(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    arguments = ["--check", "--skip", "tests", "sanitizer", "--seconds", "0.01", "--out", str(path)]
    assert load("gpu_check").main(arguments) == 0
    saved = json.loads(path.read_text())
    assert len(saved["rows"]) <= 1 and len(saved["not_measured"]) > 40
    assert f"{len(saved['not_measured'])} rows were not measured" in capsys.readouterr().out


def run_with(load: Load, tmp_path: Path, only: str) -> int:
    arguments = ["--check", "--skip", "tests", "sanitizer", "--only", only, "--out", str(tmp_path / "rows.json")]
    result: int = load("gpu_check").main(arguments)
    return result


def test_wrong_results_are_noticed(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = hsm.GRU.forward

    def doubled(self: hsm.GRU, *arguments: Any, **options: Any) -> Any:
        output, state = plain(self, *arguments, **options)
        return 2 * output, state

    assert run_with(load, tmp_path, "GRU inference L=5 N=3 H=8 float32") == 0
    monkeypatch.setattr(hsm.GRU, "forward", doubled)
    assert run_with(load, tmp_path, "GRU inference L=5 N=3 H=8 float32") == 1
    assert "differ by" in capsys.readouterr().err
    assert run_with(load, tmp_path, "GRU resets") == 1


def test_a_row_that_fails_leaves_the_others(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = hsm.LSTM.forward

    def out_of_memory(self: hsm.LSTM, input: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if input.size(1) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory\nand more")
        return plain(self, input, *arguments, **options)

    monkeypatch.setattr(hsm.LSTM, "forward", out_of_memory)
    assert run_with(load, tmp_path, "LSTM inference L=5") == 1
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert len(saved["rows"]) == 4 and len(saved["failed"]) == 4
    assert set(saved["failed"].values()) == {"CUDA out of memory"}
    assert "N=3 H=8 bfloat16: CUDA out of memory" in capsys.readouterr().err


def test_nothing_is_measured_on_a_gpu_that_is_lost(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load("gpu_check"), "_gpu_is_lost", lambda: True)
    run_with(load, tmp_path, "LSTM inference L=5")
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert len(saved["rows"]) == 1 and len(saved["not_measured"]) == 7


@pytest.mark.parametrize(
    ("stage", "found", "words"),
    [
        ("tests", {"status": 1}, "tests: 1"),
        ("tests", {"status": "stopped after 120 s"}, "tests: stopped after 120 s"),
        ("sanitizer", {"memcheck": {"status": 99}, "racecheck": {"status": 0}}, "compute-sanitizer memcheck: 99"),
    ],
)
def test_failed_stages_are_failures(
    load: Load, stage: str, found: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check = load("gpu_check")
    report = check.Report({}, {"tests": {"skipped": ""}, "sanitizer": {"skipped": ""}} | {stage: found})
    assert check.judge(report) == 1
    assert words in capsys.readouterr().err
    assert check.judge(check.Report({}, {"tests": {"status": 0}, "sanitizer": {"skipped": ""}})) == 0


def test_commands_find_the_package_that_is_tested(load: Load) -> None:
    """Not the sources beside the tests, which would be compiled first."""
    code = "import importlib.util; print(importlib.util.find_spec('hsm_kernels').origin)"
    status, output = load("gpu_check")._run([sys.executable, "-c", code], 60)
    assert (status, output.strip()) == (0, str(Path(hsm.__file__).resolve()))


def test_a_command_that_does_not_end_is_stopped(load: Load) -> None:
    code = "import time; print('begun', flush=True); time.sleep(60)"
    status, output = load("gpu_check")._run([sys.executable, "-c", code], 3)
    assert status == "stopped after 3 s" and "begun" in output


def test_small_calls_touch_everything(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    assert load("gpu_check").small_calls("cpu", 600) == 0
    assert capsys.readouterr().out == "288 of 288 calls\n"


def test_small_calls_end_in_time(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    """Under a sanitizer they may take a hundred times as long."""
    assert load("gpu_check").small_calls("cpu", 0) == 0
    assert capsys.readouterr().out == "the time was over after 0 of 288 calls\n"


# What needs a GPU, in a process that believes to have one, by programs that find none.


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


class Event:
    """A CUDA event by the clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.time - self.time)


@pytest.fixture
def computing_gpu(load: Load, gpu: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Its tensors are on the CPU; counts what is asked of it."""
    asked: dict[str, int] = defaultdict(int)

    def count(name: str, result: Any = None) -> Any:
        def call(*_: Any, **__: Any) -> Any:
            asked[name] += 1
            return result

        return call

    nothing = SimpleNamespace(wait_stream=count("wait_stream"), replay=count("replay"))
    properties = SimpleNamespace(name="A GPU", major=9, minor=0, multi_processor_count=132)
    results = {
        "synchronize": None,
        "empty_cache": None,
        "get_device_properties": properties,
        "Stream": nothing,
        "current_stream": nothing,
        "CUDAGraph": nothing,
        "stream": nullcontext(),
        "graph": nullcontext(),
    }
    for name, result in results.items():
        monkeypatch.setattr(torch.cuda, name, count(name, result))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timing = load("gpu_timing")
    monkeypatch.setattr(timing, "device", lambda: "cpu")
    monkeypatch.setattr(timing, "FLUSH_BYTES", 1024)
    timing._flush_buffer.cache_clear()
    return asked


@pytest.mark.requires_library
def test_every_row_runs_as_it_would_on_a_gpu(load: Load, computing_gpu: dict[str, int], tmp_path: Path) -> None:
    """Events, a flushed cache, graphs of single steps, and no row that fails: inference and training in turns."""
    path = tmp_path / "rows.json"
    assert load("gpu_check").main(["--check", "--skip", "tests", "sanitizer", "--out", str(path)]) == 0
    saved = json.loads(path.read_text())
    assert saved["failed"] == {} and saved["not_measured"] == []
    assert {row["case"]["sizes"]["kind"] for row in saved["rows"]} == {"step", "inference", "training"}
    assert len(saved["rows"]) == 48 and len(saved["boundary_rows"]) == 8
    assert saved["machine"]["device"] == "A GPU" and saved["machine"]["capability"] == "9.0"
    steps = [row for row in saved["rows"] if row["case"]["sizes"]["kind"] == "step"]
    assert computing_gpu["graph"] == computing_gpu["CUDAGraph"] == 2 * len(steps)
    assert computing_gpu["replay"] >= 4 * len(steps)
    load("gpu_timing")._flush_buffer.cache_clear()


def test_tests_for_gpus_are_found(load: Load, gpu: None) -> None:
    check = load("gpu_check")
    found = check.tests(replace(check.MODES["full"], tests_seconds=600))
    assert found["status"] == 0 and " skipped" in found["output"], found
    collected = [line for line in found["output"].splitlines() if "skipped" in line]
    assert "failed" not in collected[-1] and "error" not in collected[-1]


def test_sanitizers_get_their_options_and_the_small_calls(
    load: Load, gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = script(
        tmp_path / "bin" / "compute-sanitizer",
        f'echo "options: $@; cache off: $PYTORCH_NO_CUDA_MEMORY_CACHING"\n'
        f'while [ "$1" != "{sys.executable}" ]; do shift; done\nexec "$@"',
    )
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", ".")  # as GPU.md says
    check = load("gpu_check")
    monkeypatch.setattr(check, "SMALL_CALLS_SHARE", 1e-7)
    found = check.sanitizer(replace(check.MODES["full"], sanitizer_seconds=600))
    assert found.pop("program") == str(program)
    assert {tool: entry["status"] for tool, entry in found.items()} == {"memcheck": 0, "racecheck": 0}
    for tool, entry in found.items():
        assert f"options: --tool {tool} --error-exitcode 99 " in entry["output"]
        assert "cache off: 1" in entry["output"] and "of 288 calls" in entry["output"]


def test_the_sanitizer_of_a_toolkit_that_is_not_on_path(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = load("gpu_check")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert check.find_sanitizer() is None
    for name in ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a"):
        script(tmp_path / name, "")
    assert check.find_sanitizer() is None
    program = script(tmp_path / "compute-sanitizer" / "compute-sanitizer", "")
    assert check.find_sanitizer() == str(program)


def test_a_stage_that_fails_leaves_the_others(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(mode: Any) -> dict[str, Any]:
        raise OSError("no such program")

    monkeypatch.setattr(load("gpu_check"), "build", fail)
    assert run_with(load, tmp_path, "GRU inference L=5 N=3 H=8 float32") == 1
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert saved["stages"]["build"]["failed"] == "OSError: no such program" and len(saved["rows"]) == 1
    assert "build: OSError: no such program" in capsys.readouterr().err


def test_nothing_is_measured_without_kernels(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference's times would stand there as ours."""
    check = load("gpu_check")
    plan = {"backend": "reference", "plan": "reference (python): built without CUDA kernels"}
    monkeypatch.setattr(check, "build", lambda mode: plan)
    monkeypatch.setattr(check, "describe_gpu", lambda: {"commit": None})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run_with(load, tmp_path, "GRU") == 1
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == []
    assert "as calls on the GPU run by reference (python): built without CUDA kernels" in capsys.readouterr().err


def test_an_interrupt_leaves_the_rows(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = load("gpu_check")
    measure, calls = check.measure_any, []

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        measure(*arguments)

    monkeypatch.setattr(check, "measure_any", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_with(load, tmp_path, "LSTM inference L=5")
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 2


def test_the_benchmark_needs_a_gpu(load: Load) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        load("gpu_check").main([])
