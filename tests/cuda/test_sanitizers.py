"""Every kernel under each sanitizer, on the CPU (sanitized_cases.cpp)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import cpp
from tests.cuda import host_build

pytestmark = [
    pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler"),
]

CASES = [
    "avgpool",
    "bn_apply",
    "bn_apply_dual",
    "bn_grad_apply",
    "bn_grad_stats",
    "bn_stats",
    "bn_stats_apply",
    *(f"conv_tile_{tile}_splits_{splits}" for tile in range(3) for splits in (1, 3)),
    "stem",
    "stem_of_bytes",
]
# How many orders of threads, and inputs. ThreadSanitizer, thirty times slower, sees a race in any order.
SEEDS = {"address,undefined": 4, "thread": 1}


def program(sanitizer: str) -> Path:
    sources = [Path(__file__).parent / "sanitized_cases.cpp", *sorted((cpp.CSRC / "cuda").glob("*.cu"))]
    return host_build.build(sources, output="sanitized_cases", sanitizer=sanitizer)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sanitizer", SEEDS)
def test_clean(sanitizer: str, case: str) -> None:
    result = cpp.run(program(sanitizer), case, str(SEEDS[sanitizer]), sanitizer=sanitizer)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Sanitizer" not in result.stderr and "runtime error" not in result.stderr, result.stderr


def test_every_case_is_run() -> None:
    assert cpp.run(program(cpp.SANITIZERS[0])).stdout.split() == sorted(CASES)
