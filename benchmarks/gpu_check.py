"""Everything that only a GPU can show, in one command: whether it builds, whether it is right, how fast it is.

    PYTHONPATH=. python benchmarks/gpu_check.py     # under eight minutes; prints tables, saves results/gpu.json

    ... gpu_check.py --skip tests sanitizer         # the benchmark only
    ... gpu_check.py --only "GRU training" --seconds 120
    ... gpu_check.py --check                        # tiny sizes, on a CPU too, to see that everything works

Runs from the root of a checkout (without PYTHONPATH if the package is installed), with torch, pytest, hypothesis,
matplotlib and tqdm, and with nvcc if the library is not built yet. The stages are build, tests (the test suite's part
for GPUs), sanitizer (compute-sanitizer memcheck and racecheck on small calls) and benchmark: torch.nn, which is cuDNN
here, beside hsm_kernels, by CUDA events, each call with a cold L2 cache. Rows that the time does not suffice for are
named. gpu_probes.py is a command of its own.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_timing
import torch
from bench_boundaries import complain_of_differences
from bench_boundaries import measure_row as measure_boundary_row
from boundary_cases import BoundaryCase
from boundary_results import BoundaryRow
from boundary_results import format_rows as format_boundary_rows
from gpu_rows import (
    CHECK,
    FULL,
    VARIANTS,
    GpuCase,
    GpuRow,
    Sizes,
    boundary_cases,
    cases,
    format_rows,
    importance,
    measure_row,
)
from gpu_timing import float32_precision, measure, recurrence_by
from results import describe_machine, save
from timing import Effort, share_time

import hsm_kernels as hsm
from hsm_kernels._build import cuda, toolchain

HERE = Path(__file__).parent
ROOT = HERE.parent
STAGES = ("build", "tests", "sanitizer", "benchmark")
#: To their options. Race checks are of our kernels alone: those of cuBLAS take long, and are not ours to judge.
SANITIZERS = {"memcheck": [], "racecheck": ["--kernel-regex", "kns=3hsm4cuda"]}
SMALL_CALLS_SHARE = 0.5  # of a sanitizer's time; it needs the rest to start, and to end
SANITIZER_FOUND_SOMETHING = 99
SAVE_EVERY = 5  # seconds


@dataclass(frozen=True)
class Mode:
    """The sizes, and how long to spend on what."""

    sizes: Sizes
    effort: Effort
    seconds: float  # for everything but a build at import
    tests_seconds: float
    sanitizer_seconds: float  # for each tool


MODES = {
    "full": Mode(
        FULL,
        Effort(block_seconds=0, row_seconds=0.4, fewest_rounds=3, most_rounds=15),
        seconds=370,
        tests_seconds=120,
        sanitizer_seconds=60,
    ),
    "check": Mode(
        CHECK,
        Effort(block_seconds=0, row_seconds=0.01, fewest_rounds=2, most_rounds=3),
        seconds=120,
        tests_seconds=60,
        sanitizer_seconds=30,
    ),
}


@dataclass
class Report:
    """All that was found, as it is saved."""

    machine: dict[str, Any]
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[GpuRow] = field(default_factory=list)
    boundary_rows: list[BoundaryRow] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # rows, and why
    not_measured: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write a JSON file."""
        save(
            path,
            self.machine,
            [row.to_json() for row in self.rows],
            stages=self.stages,
            boundary_rows=[row.to_json() for row in self.boundary_rows],
            failed=self.failed,
            not_measured=self.not_measured,
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; 1 if tests fail, a sanitizer finds something, a row fails or results disagree."""
    options = parse_options(arguments)
    if options.small_calls:
        return small_calls(gpu_timing.device(), options.small_calls)
    mode = MODES["check" if options.check else "full"]
    if not options.check and not torch.cuda.is_available():
        raise SystemExit("gpu_check: torch sees no GPU; on a CPU only --check runs, which measures nothing of use")
    end = time.monotonic() + (options.seconds or mode.seconds)
    path = options.out or HERE / "results" / ("gpu-check.json" if options.check else "gpu.json")
    machine = describe_gpu()
    report = Report(machine | {"commit": options.commit or machine["commit"]})
    for stage, run in (("build", build), ("tests", tests), ("sanitizer", sanitizer)):
        begin = time.monotonic()
        try:
            report.stages[stage] = {"skipped": "by --skip"} if stage in options.skip else run(mode)
        except Exception as error:  # the other stages may say more
            report.stages[stage] = {"failed": f"{type(error).__name__}: {error}"}
        report.stages[stage]["seconds"] = round(time.monotonic() - begin, 1)
        print(f"{stage}: {json.dumps(report.stages[stage])}", flush=True)
        report.save(path)
    if "benchmark" not in options.skip and not _has_no_kernels(report):
        try:
            benchmark(report, path, mode, options.only, end)
        finally:  # an interrupt, too, leaves the rows
            report.save(path)
    print_report(report)
    print(f"\nsaved {path}")
    return judge(report)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line (``sys.argv`` if ``arguments`` is None)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--check", action="store_true", help="tiny sizes, to see that everything works")
    add("--skip", nargs="+", choices=STAGES, default=[], help="stages to leave out")
    add("--only", default="", help="only rows whose name holds this text, e.g. 'GRU training'")
    add("--seconds", type=float, help="for everything but a build at import (370)")
    add("--out", type=Path, help="JSON file (default: results/gpu.json)")
    add("--commit", help="what is measured, where the checkout has no .git")
    add("--small-calls", type=float, metavar="SECONDS", help="nothing but small calls of everything, for a sanitizer")
    return parser.parse_args(arguments)


# The stages


def describe_gpu() -> dict[str, Any]:
    """What ran where and when."""
    machine = describe_machine() | {"cudnn": torch.backends.cudnn.version(), "cuda": torch.version.cuda}
    if not torch.cuda.is_available():
        return machine
    properties = torch.cuda.get_device_properties(0)
    return machine | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver_version(),
    }


def _driver_version() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().partition("\n")[0] or None


def build(mode: Mode) -> dict[str, Any]:
    """Which library is loaded, and which backend a call would use. Importing it has compiled it, if it had to."""
    device = gpu_timing.device()
    info = hsm.build_info()
    rnn = hsm.LSTM(8, 8).to(device)
    plan = hsm.explain(rnn, torch.zeros(2, 1, 8, device=device))
    return {
        "loaded": info.loaded,
        "how": info.how,
        "reasons": list(info.reasons),
        "plan": str(plan),
        "backend": plan.backend,
    }


def _has_no_kernels(report: Report) -> bool:
    """Whether there is a GPU, and calls on it do not take its kernels: nothing is worth a measurement then."""
    device = gpu_timing.device()
    return torch.cuda.is_available() and report.stages["build"].get("backend", device) != device


def tests(mode: Mode) -> dict[str, Any]:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "test_on_gpu.py"]
    if not torch.cuda.is_available():
        return {"skipped": "there is no GPU", "command": " ".join(command[1:])}
    status, output = _run(command, mode.tests_seconds)
    return {"status": status, "output": output}


def sanitizer(mode: Mode) -> dict[str, Any]:
    """compute-sanitizer over small calls of everything."""
    program = find_sanitizer()
    if not torch.cuda.is_available() or program is None:
        return {"skipped": "there is no GPU" if program else "compute-sanitizer was not found; install it, or set PATH"}
    found: dict[str, Any] = {"program": program}
    calls = [sys.executable, __file__, "--small-calls", str(SMALL_CALLS_SHARE * mode.sanitizer_seconds)]
    for tool, options in SANITIZERS.items():
        command = [program, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND_SOMETHING), *options]
        # Without torch's cache every tensor has an allocation of its own, whose ends the tool knows.
        status, output = _run([*command, *calls], mode.sanitizer_seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found[tool] = {"status": status, "output": output}
    return found


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, or in the CUDA toolkit that compiles the kernels."""
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    try:
        root = cuda.find_toolkit(os.environ, Path(torch.__file__).parent).nvcc.parents[1]
    except toolchain.Unavailable:
        return None
    places = (root / folder / "compute-sanitizer" for folder in ("bin", "compute-sanitizer"))
    return next((str(place) for place in places if place.is_file()), None)


def _run(command: list[str], seconds: float, **variables: str) -> tuple[int | str, str]:
    """The exit status of a command, or why it has none, and the end of what it printed.

    It finds the package that this program has found: not its sources where it is installed.
    """
    given = os.environ.get("PYTHONPATH")
    paths = [str(Path(hsm.__file__).resolve().parent.parent), *([given] if given else [])]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT / "tests",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables,
            timeout=seconds,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        return f"stopped after {seconds:g} s", text[-2000:]
    return done.returncode, done.stdout[-2000:]


def small_calls(device: str, seconds: float) -> int:
    """Forward and backward of every cell, dtype, kind of boundary and variant, small, as many as there is time for."""
    end = time.monotonic() + seconds
    length, batch, size = 7, 3, 20
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "resets": {"reset_mask": torch.rand(length, batch) < 0.3},
        "detaches": {"detach_mask": torch.rand(length, batch) < 0.3},
        "truncated": {"truncated_bptt_steps": 2},
        "lengths": {"lengths": torch.tensor([7, 0, 4])},
        "recompute": {"recompute": True},
    }
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    modules: tuple[tuple[Any, dict[str, Any]], ...] = ((hsm.LSTM, {}), (hsm.LSTM, {"proj_size": 5}), (hsm.GRU, {}))
    calls = [
        (given, dtype, module, options, both, variant)
        for given, dtype, (module, options), both in itertools.product(kinds.values(), dtypes, modules, (True, False))
        for variant in ("step", *VARIANTS)
        if variant == "step" or not (options or dtype == torch.float64)  # which step runs
    ]
    for done, (given, dtype, module, options, both, variant) in enumerate(calls):
        if time.monotonic() > end:
            print(f"the time was over after {done} of {len(calls)} calls")
            return 0
        rnn = module(size, size, bidirectional=both, **options).to(device, dtype)
        moved = {name: value.to(device) if torch.is_tensor(value) else value for name, value in given.items()}
        x = torch.randn(length, batch, size, device=device, dtype=dtype, requires_grad=True)
        with recurrence_by(variant):
            output, _ = rnn(x, **moved)
            output.sum().backward()
    print(f"{len(calls)} of {len(calls)} calls")
    return 0


# The benchmark


def benchmark(report: Report, path: Path, mode: Mode, only: str, end: float) -> None:
    """Measure rows, the most important first, until the time is over."""
    chosen = [case for case in _in_order(mode.sizes, gpu_timing.device()) if only in str(case)]
    if not chosen:
        raise SystemExit(f"gpu_check: --only {only!r} leaves no row")
    measured, saved = 0, time.monotonic()
    for case, left in share_time(chosen, end - time.monotonic()):
        try:
            measure_any(report, case, mode.effort.within(left))
        except Exception as error:  # mostly torch.OutOfMemoryError and what CUDA reports
            report.failed[str(case)] = str(error).partition("\n")[0] or type(error).__name__
        measured += 1
        if _gpu_is_lost():
            break
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if time.monotonic() - saved > SAVE_EVERY:
            report.save(path)
            saved = time.monotonic()
    report.not_measured = [str(case) for case in chosen[measured:]]


def _in_order(sizes: Sizes, device: str) -> Iterator[GpuCase | BoundaryCase]:
    """The rows with boundaries come after the most important group of the others."""
    plain = cases(sizes, device)
    yield from (case for case in plain if importance(case) == 0)
    yield from boundary_cases(sizes, device)
    yield from (case for case in plain if importance(case) > 0)


def _gpu_is_lost() -> bool:
    """Whether an error of the GPU has ended all work on it."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def measure_any(report: Report, case: GpuCase | BoundaryCase, effort: Effort) -> None:
    """Measure a row of either kind and add it to the report."""
    if isinstance(case, GpuCase):
        report.rows.append(measure_row(case, effort))
        return
    with float32_precision("float32"):
        report.boundary_rows.append(measure_boundary_row(case, effort, measure))


def print_report(report: Report) -> None:
    """The machine and the tables."""
    for name, value in report.machine.items():
        print(f"{name + ':':17}{value}")
    if report.rows:
        print(f"\n{format_rows(report.rows)}")
    if report.boundary_rows:
        print(f"\n{format_boundary_rows(report.boundary_rows)}")
    if report.not_measured:
        shown = ", ".join(report.not_measured[:5])
        print(f"\nthe time was over: {len(report.not_measured)} rows were not measured: {shown}, ...")


def judge(report: Report) -> int:
    """Name what is wrong; 1 if anything is."""
    wrong = [f"{name}: {reason}" for name, reason in report.failed.items()]
    wrong += [
        f"{row.case}: torch.nn and hsm_kernels differ by {row.difference:.2g}" for row in report.rows if row.differs
    ]
    wrong += [f"{name}: {stage['failed']}" for name, stage in report.stages.items() if "failed" in stage]
    if _has_no_kernels(report):
        wrong.append(f"build: nothing was measured, as calls on the GPU run by {report.stages['build']['plan']}")
    if report.stages["tests"].get("status", 0) != 0:
        wrong.append(f"tests: {report.stages['tests']['status']}")
    for tool in SANITIZERS:
        status = report.stages["sanitizer"].get(tool, {}).get("status", 0)
        if status != 0:
            wrong.append(f"compute-sanitizer {tool}: {status}")
    for line in wrong:
        print(f"gpu_check: {line}", file=sys.stderr)
    return 1 if wrong or complain_of_differences(report.boundary_rows) else 0


if __name__ == "__main__":
    sys.exit(main())
