"""Compiles the kernels of csrc/cuda for the CPU, with tests/cuda/host_execution in CUDA's place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests import cpp
from tests.cpp import CSRC, ROOT, Source, sanitizer_options

ENGINE = ROOT / "tests" / "cuda" / "host_execution"
ENGINE_SOURCES = ("fiber.cpp", "engine.cpp", "warp.cpp", "runtime.cpp")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
# Products are not fused with sums, so that results are the same on every machine; kernels read words as other types.
LANGUAGE = ("-fPIC", "-pthread", "-ffp-contract=off", "-fno-strict-aliasing", *WARNINGS)


def build(
    sources: Sequence[Path],
    *,
    output: str,
    sanitizer: str | None = None,
    shared: bool = False,
    include: Sequence[Path] = (),
    definitions: Sequence[str] = (),
) -> Path:
    """Compiles .cu and .cpp files with host_execution to a program, or a library for ctypes, and says where it is.

    Args:
        sources: what to compile besides host_execution.
        output: the file's name; it lies in a folder of its own.
        sanitizer: one of cpp.SANITIZERS. It checks the sources, not host_execution itself.
        shared: a library rather than a program.
        include: folders for -I, after tests/cuda/host_execution and csrc.
        definitions: as NAME or NAME=VALUE, for the sources and host_execution.

    Raises:
        RuntimeError: there is no compiler, or it refused; the message is the compiler's.
    """
    options = (*LANGUAGE, *(f"-D{definition}" for definition in definitions))
    checked = ("-O1", *options, *sanitizer_options(sanitizer))
    files = [Source(source, checked, (ENGINE, CSRC, *include)) for source in sources]
    files += [Source(ENGINE / name, ("-O2", *options), (ENGINE,)) for name in ENGINE_SOURCES]
    link = ["-shared", "-Wl,-Bsymbolic"] if shared else ["-rdynamic"]
    return cpp.build(files, output=output, options=["-pthread", *sanitizer_options(sanitizer), *link])
