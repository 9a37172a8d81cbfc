"""Compiles the kernels of csrc/cuda for the CPU, with tests/cuda/host_execution in CUDA's place, and runs programs.

Every object file and program is kept under build/host_execution/<hash>/, where the hash covers the compiler, the
options, the source and every header that it might include: what has not changed is not compiled again. Several
processes may build at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "tests" / "cuda" / "host_execution"
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "host_execution"

SANITIZERS = ("address", "undefined", "thread")
ENGINE_SOURCES = ("fiber.cpp", "engine.cpp", "warp.cpp", "runtime.cpp")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
# Products are not fused with sums, so that results are the same on every machine; kernels read words as other types.
LANGUAGE = ("-std=c++17", "-g", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-strict-aliasing")


def compiler() -> str | None:
    """The C++ compiler: $CXX, g++ or clang++, the first that there is."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++"):
        found = shutil.which(name.split()[0]) if name.strip() else None
        if found is not None:
            return found
    return None


@cache
def _compiler_and_version() -> tuple[str, str]:
    path = compiler()
    if path is None:
        raise RuntimeError("no C++ compiler: host_execution needs g++ or clang++ on PATH, or CXX set")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return path, version


def _headers(directories: Sequence[Path]) -> list[Path]:
    """The headers of this repository in these folders; those outside it do not change."""
    inside = {directory.resolve() for directory in directories if directory.resolve().is_relative_to(ROOT)}
    names = {path for directory in inside for path in directory.rglob("*") if path.suffix in {".h", ".cuh", ".hpp"}}
    return sorted(names)


def _hash(texts: Sequence[str], files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for text in (*texts, *(str(path) for path in files)):
        digest.update(text.encode() + b"\0")
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:24]


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process, and one thread of it, at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(path: Path, command: Callable[[Path], list[str]]) -> Path:
    """The file at `path`, which the command for a temporary name makes if it is not there yet."""
    if path.exists():
        return path
    with _locked(path.parent):
        if path.exists():
            return path
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        arguments = command(temporary)
        result = subprocess.run(arguments, capture_output=True, text=True)
        if result.returncode != 0:
            temporary.unlink(missing_ok=True)
            raise RuntimeError(f"{' '.join(arguments)}\n{result.stdout}{result.stderr}")
        os.replace(temporary, path)
    return path


def _sanitizer_options(sanitizer: str | None) -> list[str]:
    if sanitizer is None:
        return []
    if sanitizer not in SANITIZERS:
        raise ValueError(f"sanitizer is {sanitizer!r}, but has to be one of {', '.join(SANITIZERS)}, or None")
    return [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def _object(source: Path, options: Sequence[str], include: Sequence[Path]) -> Path:
    """The object file of one source, compiled with these options and -I folders."""
    path, version = _compiler_and_version()
    arguments = [path, *LANGUAGE, *WARNINGS, *options, *(f"-I{directory}" for directory in include)]
    folder = CACHE / _hash([version, *arguments], [source, *_headers([*include, CSRC, source.parent])])
    return _make(
        folder / f"{source.stem}.o",
        lambda temporary: [*arguments, "-x", "c++", "-c", str(source), "-o", str(temporary)],
    )


def build(
    sources: Sequence[Path],
    *,
    output: str,
    sanitizer: str | None = None,
    shared: bool = False,
    include: Sequence[Path] = (),
    definitions: Sequence[str] = (),
    jobs: int = 2,
) -> Path:
    """Compiles .cu and .cpp files with host_execution to a program, or a library for ctypes, and says where it is.

    Args:
        sources: what to compile besides host_execution.
        output: the file's name; it lies in a folder of its own.
        sanitizer: "address", "undefined" or "thread". It checks the sources, not host_execution itself.
        shared: a library rather than a program.
        include: folders for -I, after tests/cuda/host_execution and csrc.
        definitions: as NAME or NAME=VALUE, for the sources and host_execution.
        jobs: how many compilers run at a time.

    Raises:
        RuntimeError: there is no compiler, or it refused; the message is the compiler's.
    """
    path, version = _compiler_and_version()
    options = [*(f"-D{definition}" for definition in definitions)]
    checked = ["-O1", *options, *_sanitizer_options(sanitizer)]
    folders = [ENGINE, CSRC, *(Path(folder).resolve() for folder in include)]
    tasks = [(Path(source).resolve(), checked, folders) for source in sources]
    tasks += [(ENGINE / name, ["-O2", *options], [ENGINE]) for name in ENGINE_SOURCES]
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        objects = list(pool.map(lambda task: _object(*task), tasks))
    link = [path, "-pthread", *_sanitizer_options(sanitizer)]
    link += ["-shared", "-Wl,-Bsymbolic"] if shared else ["-rdynamic"]
    files = [str(file) for file in objects]
    folder = CACHE / _hash([version, output, *link, *files], [])
    return _make(folder / output, lambda temporary: [*link, *files, "-ldl", "-o", str(temporary)])


@cache
def _without_random_addresses() -> tuple[str, ...]:
    """What to write before a program so that its addresses are not random, which ThreadSanitizer may not cope with."""
    setarch = shutil.which("setarch")
    if setarch is None or subprocess.run([setarch, "-R", "true"], capture_output=True).returncode != 0:
        return ()
    return (setarch, "-R")


def run(
    program: Path, *arguments: str, sanitizer: str | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Runs a program that `build` made with this sanitizer, to its end; its exit status is not looked at."""
    options = {"TSAN_OPTIONS": "atexit_sleep_ms=0 halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    before = _without_random_addresses() if sanitizer == "thread" else ()
    return subprocess.run(
        [*before, str(program), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **options},
    )
