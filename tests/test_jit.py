"""The just-in-time build: its cache, and what may go wrong with it."""

import dataclasses
import json
import os
import signal
import stat
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from build_helpers import (
    REPORT,
    Child,
    FakeCompiler,
    answer,
    environment,
    needs_compiler,
    start,
    tiny_package,
    tiny_sources,
)

import hsm_kernels
from hsm_kernels._build import cache, description, jit, toolchain

TORCH = Path(torch.__file__).parent


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return tiny_package(tmp_path / "site")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def compiler(tmp_path: Path) -> FakeCompiler:
    return FakeCompiler(tmp_path / "bin")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def request_for(tmp_path: Path, directory: Path, compiler: FakeCompiler) -> Iterator[jit.Request]:
    """A request inside this process, where no torch has to be imported anew."""
    environ = {
        "PATH": os.environ["PATH"],
        "CXX": str(compiler.script),
        "HSM_KERNELS_CACHE_DIR": str(directory),
        "XDG_CACHE_HOME": str(tmp_path / "other"),
    }
    sources = description.describe(tiny_sources(tmp_path / "csrc"), python_module=False)
    yield jit.Request(sources, TORCH, "2.13", environ)


def changed(request: jit.Request, **changes: Any) -> jit.Request:
    """The same request, asked anew."""
    return dataclasses.replace(request, **{"refused": [], **changes})


def warnings_in(stderr: str) -> int:
    return stderr.count("RuntimeWarning")


# One build.


@needs_compiler
def test_second_import_builds_nothing(site: Path, home: Path, compiler: FakeCompiler) -> None:
    environ = environment(site, home, CXX=str(compiler.script))
    first, second = Child(environ), Child(environ)
    assert first.report["how"] == second.report["how"] == "just in time"
    assert first.library == second.library
    assert answer(second.library) == 42
    assert compiler.compiled == 1
    assert first.stderr.count("\n") == 1, "one line says that it compiles, and how long it took"
    assert "compiling" in first.stderr and first.stderr.endswith(" s\n")
    assert second.stderr == ""
    cache_directory = home / ".cache" / "hsm_kernels"
    assert stat.S_IMODE(cache_directory.stat().st_mode) == 0o700


@needs_compiler
@pytest.mark.parametrize("known", [True, False])
def test_kernels_whose_instructions_the_compiler_does_not_know(
    site: Path, home: Path, compiler: FakeCompiler, known: bool
) -> None:
    """They are left out, and that is said each time; everything else is built."""
    if not known:
        says = "echo 'Assembler messages:'; echo '3: Error: no such instruction'"
        compiler.misbehave(f'case "$*" in *probe-amx*) {says}; exit 1;; esac')
    source = site / "hsm_kernels" / "csrc" / "cpu" / "kernels_amx_bf16.cpp"
    source.write_text(f"#if{'' if known else 'n'}def HSM_WITHOUT_AMX\n#error wrong\n#endif\n")
    environ = environment(site, home, CXX=str(compiler.script))
    for child in (Child(environ), Child(environ)):
        assert child.report["how"] == "just in time"
        assert answer(child.library) == 42
        assert ("amx_bf16: left out" in child.reasons) == (not known)
        assert ("no such instruction" in child.reasons) == (not known)


@needs_compiler
def test_eight_processes_build_once(site: Path, home: Path, compiler: FakeCompiler) -> None:
    # The compiler takes so long that all of them find the build under way.
    compiler.misbehave("sleep 8")
    environ = environment(site, home, CXX=str(compiler.script))
    children = [start(environ, REPORT) for _ in range(8)]
    results = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0] * 8
    reports = [json.loads(stdout) for stdout, _ in results]
    assert [report["how"] for report in reports] == ["just in time"] * 8
    assert {answer(report["library"]) for report in reports} == {42}
    assert compiler.compiled == 1
    assert sum("waiting for another process" in stderr for _, stderr in results) >= 1


# Killed.


@needs_compiler
def test_next_import_after_a_killed_build(site: Path, home: Path, compiler: FakeCompiler) -> None:
    compiler.misbehave("sleep 60")
    environ = environment(site, home, CXX=str(compiler.script))
    victim = start(environ)
    deadline = time.monotonic() + 60
    while compiler.compiled == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert compiler.compiled == 1
    os.kill(victim.pid, signal.SIGKILL)
    try:
        # Its compiler still runs: it must not hold the lock.
        compiler.misbehave("")
        start_time = time.monotonic()
        child = Child(environ)
        assert time.monotonic() - start_time < 30
        assert child.report["how"] == "just in time"
        assert answer(child.library) == 42
        assert "waiting" not in child.stderr
    finally:
        os.killpg(victim.pid, signal.SIGKILL)
        victim.communicate()


@needs_compiler
def test_old_build_folders_are_swept(request_for: jit.Request, directory: Path) -> None:
    jit.obtain(request_for)
    abandoned, running = directory / "build-abandoned", directory / "build-running"
    for folder in (abandoned, running):
        folder.mkdir()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(abandoned, (two_days_ago, two_days_ago))
    jit.obtain(changed(request_for, rebuild=True))
    assert not abandoned.exists()
    assert running.exists()


# Damaged.


def truncate(entry: cache.Entry) -> None:
    os.truncate(entry.library, entry.library.stat().st_size // 2)


def flip_a_byte(entry: cache.Entry) -> None:
    content = bytearray(entry.library.read_bytes())
    content[len(content) // 2] ^= 0xFF
    entry.library.write_bytes(content)


def delete_library(entry: cache.Entry) -> None:
    entry.library.unlink()


def delete_record(entry: cache.Entry) -> None:
    entry.library.with_name("record.json").unlink()


def empty_record(entry: cache.Entry) -> None:
    entry.library.with_name("record.json").write_text("")


@needs_compiler
@pytest.mark.parametrize("damage", [truncate, flip_a_byte, delete_library, delete_record, empty_record])
def test_damaged_entry_is_rebuilt(
    damage: Callable[[cache.Entry], None], request_for: jit.Request, compiler: FakeCompiler
) -> None:
    damage(jit.obtain(request_for))
    entry = jit.obtain(changed(request_for))
    assert answer(entry.library) == 42
    assert compiler.compiled == 2
    jit.obtain(changed(request_for))
    assert compiler.compiled == 2


@needs_compiler
def test_import_with_a_truncated_library(site: Path, home: Path, compiler: FakeCompiler) -> None:
    environ = environment(site, home, CXX=str(compiler.script))
    library = Child(environ).library
    assert library is not None
    os.truncate(library, 4096)
    again = Child(environ)
    assert again.report["how"] == "just in time"
    assert answer(again.library) == 42
    assert compiler.compiled == 2


@needs_compiler
def test_library_that_does_not_load_is_rebuilt(site: Path, home: Path, compiler: FakeCompiler) -> None:
    environ = environment(site, home, CXX=str(compiler.script))
    library = Child(environ).library
    assert library is not None
    # Whole and with the right checksum, but no library: as from a machine with another libc.
    cache_directory, key = Path(library).parents[1], Path(library).parent.name
    folder = cache_directory / "planted"
    folder.mkdir()
    cache.library_in(folder).write_text("not a library")
    cache.publish(cache_directory, key, folder, {})
    again = Child(environ)
    assert again.report["how"] == "just in time"
    assert answer(again.library) == 42
    assert compiler.compiled == 2


# The cache directory.


@needs_compiler
@pytest.mark.parametrize("nowhere", ["/proc/nonexistent", "/dev/null/x", "/sys/kernel", "relative"])
def test_unusable_home(site: Path, home: Path, compiler: FakeCompiler, nowhere: str) -> None:
    environ = {**environment(site, home, CXX=str(compiler.script)), "HOME": nowhere}
    first, second = Child(environ), Child(environ)
    assert first.report["how"] == "just in time"
    assert first.library == second.library
    assert str(first.library).startswith(environ["TMPDIR"])
    assert warnings_in(first.stderr) == 0
    assert compiler.compiled == 1


@needs_compiler
def test_nothing_is_writable_but_a_private_folder(site: Path, home: Path, compiler: FakeCompiler) -> None:
    environ = {**environment(site, home, CXX=str(compiler.script)), "HOME": "/dev/null/x"}
    planted = Path(environ["TMPDIR"]) / f"hsm_kernels-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    child = Child(environ)
    assert child.report["how"] == "just in time"
    assert Path(str(child.library)).parents[1] != planted
    assert "other users can write to it" in child.reasons
    assert list(Path(environ["TMPDIR"]).iterdir()) == [planted], "the private folder is deleted"


@needs_compiler
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722, 0o1777])
def test_directory_that_others_can_write_is_refused(
    request_for: jit.Request, directory: Path, compiler: FakeCompiler, mode: int
) -> None:
    planted = jit.obtain(request_for)
    directory.chmod(mode)
    request = changed(request_for)
    entry = jit.obtain(request)
    assert entry.library != planted.library
    assert directory not in entry.library.parents
    assert compiler.compiled == 2
    assert [str(directory) in reason for reason in request.refused] == [True]
    assert "other users can write to it; use chmod go-w" in request.refused[0]


@needs_compiler
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_directory_of_another_user_is_refused(request_for: jit.Request, directory: Path) -> None:
    planted = jit.obtain(request_for)
    os.chown(directory, 12345, 12345)
    request = changed(request_for)
    assert jit.obtain(request).library != planted.library
    assert "belongs to another user (uid 12345)" in request.refused[0]


@needs_compiler
def test_refused_directory_is_reported(site: Path, home: Path) -> None:
    shared = home / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    child = Child(environment(site, home, HSM_KERNELS_CACHE_DIR=str(shared)))
    assert child.report["how"] == "just in time"
    assert f"cache directory {shared}: other users can write to it" in child.reasons
    assert list(shared.iterdir()) == []


def test_order_of_the_cache_directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    environ = {
        "HSM_KERNELS_CACHE_DIR": "/a",
        "TORCH_EXTENSIONS_DIR": "/b",
        "XDG_CACHE_HOME": "/c",
    }
    directories = [str(path) for path in cache.candidate_directories(environ)]
    assert directories[:4] == [
        "/a",
        "/b/hsm_kernels",
        "/c/hsm_kernels",
        "/home/somebody/.cache/hsm_kernels",
    ]
    assert directories[4].endswith(f"/hsm_kernels-{os.getuid()}")
    assert [str(path) for path in cache.candidate_directories({})] == directories[3:]


# The key.


def test_key_follows_the_contents_and_not_the_place(tmp_path: Path) -> None:
    def digest(root: Path) -> str:
        return description.describe(root, python_module=False).digest()

    first, second = tiny_sources(tmp_path / "first"), tiny_sources(tmp_path / "second")
    assert digest(first) == digest(second)
    (second / "cpu" / "tiny.h").write_text("// changed")
    assert digest(first) != digest(second)
    (second / "cpu" / "tiny.h").write_text("")
    (second / "cpu" / "tiny.h").rename(second / "cpu" / "tiny_moved.h")
    assert digest(first) != digest(second)


def test_key_follows_flags_version_and_torch_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = description.describe(tiny_sources(tmp_path / "csrc"), python_module=False)
    digests = {sources.digest()}
    digests.add(dataclasses.replace(sources, compile_flags=("-O0",)).digest())
    for name, value in {"VERSION": "9", "SCHEMA": 9}.items():
        with monkeypatch.context() as patch:
            patch.setattr(description, name, value)
            digests.add(sources.digest())
    assert len(digests) == 4
    assert any(description.TORCH_TARGET_VERSION in flag for flag in sources.flags)


@needs_compiler
def test_every_compiler_has_its_own_library(request_for: jit.Request, compiler: FakeCompiler, tmp_path: Path) -> None:
    def with_compiler(command: str) -> Path:
        environ = {**request_for.environ, "CXX": command}
        return jit.obtain(changed(request_for, environ=environ)).library

    first = with_compiler(str(compiler.script))
    assert with_compiler(f"{compiler.script} -g0") != first
    moved = FakeCompiler(tmp_path / "elsewhere")
    assert with_compiler(str(moved.script)) == first, "the compiler's path does not count"
    compiler.misbehave("", before_asking="echo '\"99\"'; exit")
    assert with_compiler(str(compiler.script)) != first, "the same path with another version does"


@needs_compiler
def test_cache_hit_starts_no_process(
    request_for: jit.Request, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    jit.obtain(request_for)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("subprocess.Popen.__init__", forbidden)
    jit.obtain(changed(request_for))


# No compiler, or one that fails.


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("PATH", "/nonexistent", "no C++ compiler was found on PATH"),
        ("CXX", "/nonexistent/c++", "CXX names was not found: /nonexistent/c++"),
        ("CXX", "/bin/false", "the C++ compiler does not work"),
    ],
)
def test_no_compiler(site: Path, home: Path, variable: str, value: str, reason: str) -> None:
    environ = environment(site, home)
    environ.pop("CXX", None)
    child = Child({**environ, variable: value})
    assert child.report["how"] == "none"
    assert reason in child.reasons
    assert warnings_in(child.stderr) == 1
    assert reason in child.stderr
    assert "<string>:2: RuntimeWarning" in child.stderr, "the warning shows the importing line"


@needs_compiler
def test_cached_library_outlives_the_compiler(site: Path, home: Path) -> None:
    environ = environment(site, home)
    library = Child(environ).library
    without = Child({**environ, "PATH": "/nonexistent", "CXX": ""})
    assert without.library == library
    assert without.stderr == ""


@needs_compiler
def test_failing_compiler(site: Path, home: Path, compiler: FakeCompiler) -> None:
    complaint = "tiny.cpp:2:1: error: 'answer' was not declared"
    compiler.misbehave(f'echo "note: hold on"; echo "{complaint}"; exit 1')
    environ = environment(site, home, CXX=str(compiler.script))
    child = Child(environ)
    assert child.report["how"] == "none"
    assert warnings_in(child.stderr) == 1
    assert f"the C++ compiler failed: {complaint} (log: " in child.stderr
    log = Path(child.stderr.split("(log: ")[1].split(")")[0])
    assert complaint in log.read_text() and "note: hold on" in log.read_text()
    assert str(compiler.script) in log.read_text(), "the log has the command"

    again = Child(environ)
    assert compiler.compiled == 1, "a failing build is not repeated at each import"
    assert warnings_in(again.stderr) == 1
    assert complaint in again.stderr and "HSM_KERNELS_JIT=force" in again.stderr

    compiler.misbehave("")
    assert Child(environ).report["how"] == "none"
    assert Child({**environ, "HSM_KERNELS_JIT": "force"}).report["how"] == "just in time"
    assert Child(environ).report["how"] == "just in time"
    assert not log.exists(), "the failure is forgotten"


@needs_compiler
def test_when_a_failing_build_is_tried_again(request_for: jit.Request, directory: Path, compiler: FakeCompiler) -> None:
    compiler.misbehave("echo 'error: no'; exit 1")
    tries = []

    def attempt(**changes: object) -> None:
        with pytest.raises(toolchain.Unavailable, match="error: no"):
            jit.obtain(changed(request_for, **changes))
        tries.append(compiler.compiled)

    attempt()
    attempt()
    attempt(retry=True)
    attempt(torch_version="2.14")
    (failure,) = directory.glob("*.failed.json")
    record = json.loads(failure.read_text())
    failure.write_text(json.dumps({**record, "time": record["time"] - 2 * 24 * 3600}))
    attempt(torch_version="2.14")
    assert tries == [1, 1, 2, 3, 4]
    assert not list(directory.glob("build-*"))


@needs_compiler
def test_failing_linker(request_for: jit.Request) -> None:
    broken = dataclasses.replace(request_for.description, libraries=("absent",))
    with pytest.raises(toolchain.Unavailable, match=r"failed: .*(cannot|unable to) find.*absent"):
        jit.obtain(changed(request_for, description=broken))


@needs_compiler
def test_real_compile_error(request_for: jit.Request) -> None:
    (request_for.description.root / "cpu" / "tiny.cpp").write_text("\nint answer(\n")
    with pytest.raises(toolchain.Unavailable, match=r"tiny\.cpp:\d+:\d+: error: "):
        jit.obtain(request_for)


def test_torch_without_headers(request_for: jit.Request, tmp_path: Path) -> None:
    with pytest.raises(toolchain.Unavailable, match=r"has no include/torch/csrc/stable/library\.h"):
        toolchain.torch_files(tmp_path)


# The variables.


def test_jit_off(site: Path, home: Path) -> None:
    child = Child(environment(site, home, HSM_KERNELS_JIT="0"))
    assert child.report["how"] == "none"
    assert "HSM_KERNELS_JIT=0 switches it off" in child.reasons
    assert warnings_in(child.stderr) == 1
    assert not (home / ".cache").exists()


def test_jit_required(site: Path, home: Path) -> None:
    child = Child(environment(site, home, HSM_KERNELS_JIT="1", CXX="/nonexistent"))
    assert child.status == 1
    assert "RuntimeError: hsm_kernels: no native library is loaded." in child.stderr
    assert "/nonexistent" in child.stderr


@needs_compiler
def test_unknown_jit_mode_is_auto(site: Path, home: Path) -> None:
    child = Child(environment(site, home, HSM_KERNELS_JIT="yes"))
    assert child.report["how"] == "just in time"
    assert "HSM_KERNELS_JIT must be one of auto, 0, 1, force; 'yes' is taken as auto" in child.reasons


def test_no_library_wanted(site: Path, home: Path) -> None:
    child = Child(environment(site, home, HSM_KERNELS_BUILD="none"))
    assert child.report["how"] == "none"
    assert "HSM_KERNELS_BUILD=none is set" in child.reasons
    assert warnings_in(child.stderr) == 1
    assert not (home / ".cache").exists()


# A library that was built ahead.


def install(site: Path, library: str | None) -> Path:
    """Put a cached library where the installation has its own."""
    assert library is not None
    installed = site / "hsm_kernels" / "_C.abi3.so"
    installed.write_bytes(Path(library).read_bytes())
    sources = description.describe(site / "hsm_kernels" / "csrc", python_module=False)
    installed.with_suffix(".json").write_text(json.dumps({"digest": sources.digest()}))
    return installed


@needs_compiler
def test_library_of_the_installation_comes_first(site: Path, home: Path, compiler: FakeCompiler) -> None:
    environ = environment(site, home, CXX=str(compiler.script))
    built = Child(environ).library
    installed = install(site, built)
    assert Child(environ).library == str(installed)
    assert Child({**environ, "HSM_KERNELS_JIT": "0"}).library == str(installed)
    assert compiler.compiled == 1
    assert Child({**environ, "HSM_KERNELS_JIT": "force"}).library == built
    assert compiler.compiled == 2


@needs_compiler
def test_library_of_older_sources_is_not_used(site: Path, home: Path) -> None:
    environ = environment(site, home)
    installed = install(site, Child(environ).library)
    (site / "hsm_kernels" / "csrc" / "cpu" / "tiny.h").write_text("// edited")
    child = Child(environ)
    assert child.report["how"] == "just in time"
    assert f"ahead of time: {installed} is stale" in child.reasons


@needs_compiler
@pytest.mark.parametrize("fault", ["library", "record"])
def test_broken_library_of_the_installation(site: Path, home: Path, fault: str) -> None:
    environ = environment(site, home)
    installed = install(site, Child(environ).library)
    (installed if fault == "library" else installed.with_suffix(".json")).write_text("broken")
    child = Child(environ)
    assert child.report["how"] == "just in time"
    assert answer(child.library) == 42
    assert f"ahead of time: {installed} cannot be loaded" in child.reasons
    assert warnings_in(child.stderr) == 0


def test_job_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(toolchain, "_available_memory", lambda: 7 << 30)
    assert toolchain.job_limit({}) == 3
    assert toolchain.job_limit({"MAX_JOBS": "5"}) == 5
    assert toolchain.job_limit({"MAX_JOBS": "0"}) == 1
    monkeypatch.setattr(toolchain, "_available_memory", lambda: 1 << 30)
    assert toolchain.job_limit({"MAX_JOBS": "many"}) == 1


# What is reported, and what it costs.


def test_build_info_reads_well() -> None:
    info = hsm_kernels.build_info()
    text = str(info)
    assert text.splitlines()[0].split() == ["hsm_kernels:", info.version]
    assert str(info.library or "none") in text
    assert all(reason in text for reason in info.reasons)
    assert info.version == description.VERSION == hsm_kernels.__version__
    assert (info.how == "none") == (info.library is None) == (not info.loaded)
    with pytest.raises(AttributeError):
        info.how = "none"  # type: ignore[misc]


@pytest.mark.requires_library
def test_import_adds_at_most_60_ms_to_torch(tmp_path: Path) -> None:
    """In CPU time, which other processes on the machine do not change."""
    code = (
        "import time, torch; start = time.process_time(); import hsm_kernels; "
        "assert hsm_kernels.build_info().loaded; print(time.process_time() - start)"
    )
    # The first run writes the byte code, away from the installation.
    search = os.pathsep.join([str(Path(hsm_kernels.__file__).parents[1]), str(TORCH.parent)])
    environ = {**os.environ, "PYTHONPATH": search, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    times = [float(Child(environ, code).stdout) for _ in range(6)]
    assert statistics.median(times[1:]) <= 0.060, times
