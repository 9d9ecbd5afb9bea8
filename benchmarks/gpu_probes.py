"""Measure the latencies of an sm_90 GPU (H100, H200) that decide how a recurrence should run on it.

    python benchmarks/gpu_probes.py                     # compiles with nvcc, runs, prints, saves; about a minute
    python benchmarks/gpu_probes.py --compile-only FILE # makes the program only, on a machine that has nvcc
    python benchmarks/gpu_probes.py --program FILE      # runs a program that was made elsewhere

What is measured, in probes/kernels.cuh: how long the blocks of a cluster take to exchange a hidden state by
asynchronous stores; how many clusters fit on the chip; how long all multiprocessors take to exchange it through memory
that holds a sentinel until it is written; how fast mma.sync goes with one operand in registers; the time from kernel to
kernel in a CUDA graph, overlapping or not. Every kernel checks what it received. Needs no torch.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCE = HERE / "probes" / "probes.cu"
FLAGS = ("-arch=sm_90a", "-std=c++17", "-O3", f"-I{HERE.parent / 'csrc'}")
WORST_EXCHANGE, WORST_GATHER = 0.6, 1.3  # microseconds
LONGEST_RUN = 300  # seconds: kernels that wait for each other wait for ever if something is wrong


def main(arguments: list[str] | None = None) -> int:
    """Compile, run, print and save; 1 if a kernel received something wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-only", type=Path, metavar="FILE", help="make the program and stop")
    parser.add_argument("--program", type=Path, metavar="FILE", help="run this instead of compiling")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu-probes.json", help="JSON file")
    options = parser.parse_args(arguments)
    if options.compile_only:
        compile_program(options.compile_only)
        return 0
    report = run(options.program)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{format_report(report)}\n\nsaved {options.out}")
    wrong = wrong_rows(report)
    for line in wrong:
        print(f"gpu_probes: {line}", file=sys.stderr)
    return 1 if wrong else 0


def compile_program(path: Path) -> None:
    """Make the program with nvcc."""
    toolkit = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=toolkit / "bin")
    if nvcc is None:
        raise SystemExit(
            f"gpu_probes: nvcc is neither on PATH nor in {toolkit}; set CUDA_HOME to the CUDA toolkit, or compile "
            "elsewhere and pass --program"
        )
    subprocess.run([nvcc, *FLAGS, str(SOURCE), "-o", str(path)], check=True)


def run(program: Path | None) -> dict[str, Any]:
    """What the program printed."""
    with tempfile.TemporaryDirectory() as folder:
        if program is None:
            program = Path(folder) / "probes"
            compile_program(program)
        try:
            done = subprocess.run([str(program.absolute())], stdout=subprocess.PIPE, text=True, timeout=LONGEST_RUN)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"gpu_probes: the program was stopped after {LONGEST_RUN} s; a kernel hangs") from None
    if done.returncode:
        raise SystemExit(done.returncode)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def wrong_rows(report: dict[str, Any]) -> list[str]:
    """The rows in which a kernel received, summed up or found something wrong."""
    return [
        f"{name}: {count} {key} in {row}"
        for name, rows in report.items()
        if isinstance(rows, list)
        for row in rows
        for key, count in row.items()
        if key.startswith("wrong") and count
    ]


def format_report(report: dict[str, Any]) -> str:
    """A table for each probe, and what follows from it."""
    lines = [f"{report['device']}, {report['multiprocessors']} multiprocessors"]
    for name, rows in report.items():
        if isinstance(rows, list) and rows:
            lines += ["", name, "  ".join(f"{key:>14}" for key in rows[0])]
            lines += ["  ".join(f"{value!s:>14}" for value in row.values()) for row in rows]
    return "\n".join([*lines, "", *conclusions(report)])


def conclusions(report: dict[str, Any]) -> list[str]:
    """The two rules that were set before anything was measured."""
    lines = []
    for row in report["cluster_exchange"]:
        if (row["blocks"], row["bytes"]) == (16, 8192):
            time = row["us_per_step"]
            verdict = "above 0.6: prefer C = 8" if time > WORST_EXCHANGE else "at most 0.6: C = 16 is usable"
            lines.append(f"C = 16 with 8 KB: {time:.2f} us, {verdict}")
    gathers = [row["us_per_step"] for row in report["grid_gather"] if row["fences"]]
    if gathers:
        fastest = min(gathers)
        slow = fastest > WORST_GATHER
        verdict = "above 1.3: no grid variant against cuDNN's fp16" if slow else "at most 1.3: a grid variant may pay"
        lines.append(f"exchange over the grid, with fences: {fastest:.2f} us at best, {verdict}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
