"""The GPU probes: their kernels on the simulator, and, where there is nvcc, that they compile for sm_90a."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from build_helpers import needs_compiler, script
from simulator import ROOT, Build, Library

PROBES = ROOT / "benchmarks" / "gpu_probes.py"
KERNELS = "benchmarks/probes/kernels.cuh"
BUILD = Build(("tests/sim/probes.cu",), includes=("csrc", "tests", "benchmarks/probes"))
THREADS = 256


@pytest.fixture(scope="module")
def library() -> Library:
    return BUILD.load()


def found_errors(library: Library, blocks: int, run: str, *arguments: object) -> int | str:
    """How many words were wrong, or the simulator's error."""
    errors = torch.full((blocks * THREADS,), -(10**6), dtype=torch.int32)
    status = getattr(library, run)(*arguments, errors)
    return library.last_error if status else int(errors.sum())


def exchange(library: Library, seed: int) -> int | str:
    library.set_seed(seed)
    return found_errors(library, 4, "probe_exchange_in_cluster", 4, 64, 5)


def gather(library: Library, seed: int) -> int | str:
    library.set_seed(seed)
    buffers = torch.full((3, 48, 4), -1, dtype=torch.int32)
    return found_errors(library, 3, "probe_gather_by_sentinel", 3, 48, 7, buffers)


@needs_compiler
def test_kernels(library: Library) -> None:
    for seed in range(4):
        assert exchange(library, seed) == 0
        assert gather(library, seed) == 0
    assert found_errors(library, 1, "probe_multiply", 3) == 0
    values = torch.zeros(THREADS, dtype=torch.int32)
    for before in range(2):
        assert library.probe_link(before, values) == 0
    assert (values == 2).all()


FAULTS = {
    "missing barrier": (
        "    sync_threads();\n    if (thread() == 0 && t + 2",
        "    if (thread() == 0 && t + 2",
        exchange,
    ),
    "missing wait": ("    mbarrier_wait(barrier, t / 2 % 2);\n", "", exchange),
    "wrong phase": ("t / 2 % 2);", "(t / 2 + 1) % 2);", exchange),
    "wrong byte count": (
        "mbarrier_arrive_expect(barrier, bytes)",
        "mbarrier_arrive_expect(barrier, bytes - 16)",
        exchange,
    ),
    "two buffers, not three": ("buffers + (t + 2) % 3 * chunks", "buffers + (t + 1) % 3 * chunks", gather),
    "cleared too early": ("    sync_threads();\n    Words4* before", "    Words4* before", gather),
}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str) -> None:
    old, new, run = FAULTS[fault]
    library = BUILD.patched(KERNELS, old, new).load()
    assert any(run(library, seed) != 0 for seed in range(8))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_compiles_for_sm_90a(tmp_path: Path) -> None:
    program = tmp_path / "probes"
    done = subprocess.run([sys.executable, str(PROBES), "--compile-only", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert program.stat().st_size > 0


def test_prints_what_the_program_printed(tmp_path: Path) -> None:
    """The script around the program, with a program that needs no GPU."""
    program, out = tmp_path / "probes", tmp_path / "out.json"
    report = {
        "device": "A GPU",
        "multiprocessors": 132,
        "active_clusters": [{"blocks": 16, "shared_bytes": 204800, "clusters": 5}],
        "launch_gap": [{"blocks": 1, "overlaps": False, "us_per_kernel": 1.3, "wrong_values": 0}],
        "multiply_from_registers": [{"columns": 8, "us_per_pass": 0.5, "tflops": 100.0, "wrong_sums": 0}],
        "cluster_exchange": [{"blocks": 16, "bytes": 8192, "us_per_step": 0.7, "wrong_words": 0}],
        "grid_gather": [{"blocks": 128, "bytes": 4096, "fences": True, "us_per_step": 1.0, "wrong_words": 3}],
    }
    program.write_text(f"#!/bin/sh\ncat << 'EOF'\n{json.dumps(report)}\nEOF\n")
    program.chmod(0o755)
    command = [sys.executable, str(PROBES), "--program", str(program), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert "C = 16 with 8 KB: 0.70 us, above 0.6: prefer C = 8" in done.stdout
    assert "grid variant" in done.stdout and "above 1.3" not in done.stdout
    assert done.returncode == 1 and "3 wrong_words" in done.stderr
    assert json.loads(out.read_text())["cluster_exchange"] == report["cluster_exchange"]


def test_a_program_that_hangs_is_stopped(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels that wait for each other may."""
    probes = load("gpu_probes")
    monkeypatch.setattr(probes, "LONGEST_RUN", 0.5)
    with pytest.raises(SystemExit, match=r"stopped after 0\.5 s"):
        probes.run(script(tmp_path / "probes", "exec sleep 60"))


def test_nvcc_beside_path(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = load("gpu_probes")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="neither on PATH nor in"):
        probes.compile_program(tmp_path / "probes")
    script(tmp_path / "bin" / "nvcc", f'echo "$@" > {tmp_path}/called')
    probes.compile_program(tmp_path / "probes")
    assert (tmp_path / "called").read_text().split()[-2:] == ["-o", str(tmp_path / "probes")]
