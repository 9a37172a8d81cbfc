"""host_execution, on which the tests of csrc/cuda stand: it runs what is right, and finds what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import cpp
from tests.cuda import host_build

pytestmark = [
    pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler"),
]

CASES = [
    "addresses",
    "checks",
    "copies",
    "deadlocks",
    "elements",
    "grid_barriers",
    "last_block",
    "neighbour",
    "next_lane",
    "order",
    "product_bfloat16",
    "product_half",
    "reduction",
    "votes",
]
BROKEN = [
    ("address,undefined", "broken_overrun", "AddressSanitizer: heap-buffer-overflow"),
    ("thread", "broken_copy", "ThreadSanitizer: data race"),
    ("thread", "broken_last_block", "ThreadSanitizer: data race"),
    ("thread", "broken_neighbour", "ThreadSanitizer: data race"),
    ("thread", "broken_shuffle", "ThreadSanitizer: data race"),
    ("address,undefined", "broken_misaligned", "misaligned address"),
]


def self_test(sanitizer: str | None = None, definitions: tuple[str, ...] = ()) -> Path:
    sources = [host_build.ENGINE / "self_test.cpp"]
    return host_build.build(sources, output="self_test", sanitizer=sanitizer, definitions=definitions)


@pytest.mark.parametrize("sanitizer", [None, *cpp.SANITIZERS])
@pytest.mark.parametrize("case", CASES)
def test_right(case: str, sanitizer: str | None) -> None:
    result = cpp.run(self_test(sanitizer), case, sanitizer=sanitizer)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("case", ["deadlocks", "grid_barriers", "reduction"])
def test_portable_switch_of_fibers(case: str) -> None:
    result = cpp.run(self_test(definitions=("HOST_EXECUTION_UCONTEXT",)), case)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("sanitizer", "case", "report"), BROKEN)
def test_sanitizer_reports(sanitizer: str, case: str, report: str) -> None:
    result = cpp.run(self_test(sanitizer), case, sanitizer=sanitizer)
    assert result.returncode != 0
    assert report in result.stderr


def test_shared_memory_is_guarded_without_a_sanitizer() -> None:
    assert cpp.run(self_test(), "overrun").returncode == 0


def test_every_case_is_run() -> None:
    named = cpp.run(self_test(), "none").stdout.split()
    assert sorted(named) == sorted([*CASES, "overrun", *(case for _, case, _ in BROKEN)])


def test_compiler_errors_are_shown(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text("#include <cuda_runtime.h>\n__global__ void kernel() { __shared__ int x; }\n")
    with pytest.raises(RuntimeError, match="__shared__"):
        host_build.build([source], output="wrong")
