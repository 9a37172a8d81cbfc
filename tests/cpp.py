"""Compiles C++ for the tests, one object file at a time, and keeps what it made (build_cache.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests import build_cache

ROOT = build_cache.ROOT
CSRC = ROOT / "csrc"
SANITIZERS = ("address,undefined", "thread")
# -g1: the lines for a sanitizer's report, without the variables, which take a third of the time of compiling.
LANGUAGE = ("-std=c++17", "-g1", f"-ffile-prefix-map={ROOT}=.")
JOBS = 2


class Source(NamedTuple):
    """A file, and what it is compiled with; the folders to include from (-I) hold all headers that may change."""

    path: Path
    options: tuple[str, ...]
    include: tuple[Path, ...] = ()


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
        raise RuntimeError("no C++ compiler: the tests need g++ or clang++ on PATH, or CXX set")
    return path, subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout


def sanitizer_options(sanitizer: str | None) -> tuple[str, ...]:
    if sanitizer is None:
        return ()
    if sanitizer not in SANITIZERS:
        raise ValueError(f"sanitizer is {sanitizer!r}, but has to be one of {', '.join(SANITIZERS)}, or None")
    return (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


@cache
def _headers(folder: Path) -> tuple[Path, ...]:
    """Those of this repository or of the cache in a folder; others do not change."""
    ours = any(folder.is_relative_to(home) for home in (ROOT, build_cache.FOLDER))
    return tuple(path for path in folder.rglob("*") if path.suffix in {".h", ".cuh", ".hpp"}) if ours else ()


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def _object(source: Source) -> Path:
    path, version = _compiler_and_version()
    folders = [folder.resolve() for folder in source.include]
    command = [path, *LANGUAGE, *source.options, *(f"-I{folder}" for folder in folders)]
    command += ["-x", "c++", "-c", str(source.path)]
    headers = {header for folder in (*folders, source.path.parent) for header in _headers(folder)}
    return build_cache.made(
        build_cache.key([version, *command], [source.path, *headers]),
        f"{source.path.stem}.o",
        lambda output: _run([*command, "-o", str(output)]),
    )


def build(sources: Sequence[Source], *, output: str, options: Sequence[str] = ()) -> Path:
    """Compiles and links; ``options`` are the linker's.

    Raises:
        RuntimeError: there is no compiler, or it refused; the message is the compiler's.
    """
    path, version = _compiler_and_version()
    with ThreadPoolExecutor(JOBS) as pool:
        objects = [str(file) for file in pool.map(_object, sources)]
    command = [path, *options, *objects]
    key = build_cache.key([version, *command])  # an object's path is a hash of what is in it
    return build_cache.made(key, output, lambda to: _run([*command, "-ldl", "-o", str(to)]))


@cache
def _without_random_addresses() -> tuple[str, ...]:
    """What to write before a program so that its addresses are not random, which ThreadSanitizer may not cope with."""
    setarch = shutil.which("setarch")
    if setarch is None or subprocess.run([setarch, "-R", "true"], capture_output=True).returncode != 0:
        return ()
    return (setarch, "-R")


def run(
    program: Path, *arguments: str, sanitizer: str | None = None, timeout: float = 120, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program that `build` made with this sanitizer, to its end; its exit status is not looked at."""
    options = {"TSAN_OPTIONS": "atexit_sleep_ms=0 halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    before = _without_random_addresses() if sanitizer == "thread" else ()
    return subprocess.run(
        [*before, str(program), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **options, **variables},
    )
