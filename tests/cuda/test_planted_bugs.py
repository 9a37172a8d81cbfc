"""Errors planted into a copy of the kernels: the tests on the CPU have to find each of them.

All are compiled into one program, and the environment variable PLANTED_BUG says which of them there is: a statement or
an expression is replaced by one that asks. The text that is replaced has to stand in the kernel exactly once, so that
these tests fail when the kernel changes, and are then adapted.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.cuda import host_build

pytestmark = [
    pytest.mark.skipif(host_build.compiler() is None, reason="no C++ compiler"),
    pytest.mark.xdist_group("cuda_sanitizers"),
]

# Inside the repository, so that host_build sees when a header there changes.
COPY = host_build.CACHE / "planted_bugs"
CHOICE = """// Which error there is, by its number; 0 for none.
#pragma once
#include <cstdlib>

inline const int planted_bug = [] {
  const char* const number = std::getenv("PLANTED_BUG");
  return number == nullptr ? 0 : std::atoi(number);
}();
"""

PLAIN, THREAD, ADDRESS = None, "thread", "address"
REPORTS = {
    PLAIN: "mismatch",
    THREAD: "ThreadSanitizer: data race",
    ADDRESS: "AddressSanitizer: heap-buffer-overflow",
}


@dataclass(frozen=True)
class Bug:
    """`wrong` instead of what stands between « and » in `place`, which is text of `file`."""

    name: str
    file: str
    place: str
    wrong: str
    case: str  # of sanitized_cases.cpp
    caught_by: str | None
    report: str = ""

    def span(self, text: str) -> tuple[int, int]:
        before, _, rest = self.place.partition("«")
        original, _, after = rest.partition("»")
        whole = before + original + after
        assert original and text.count(whole) == 1, f"{self.name}: not once in {self.file}, but has to be:\n{whole}"
        start = text.index(whole) + len(before)
        return start, start + len(original)

    def planted(self, original: str, number: int) -> str:
        if original.endswith(";"):
            return f"if (planted_bug == {number}) {{ {self.wrong} }} else {{ {original} }}"
        return f"(planted_bug == {number} ? ({self.wrong}) : ({original}))"


BUGS = [
    # Barriers that are not there.
    Bug(
        "no_barrier_after_a_lane_is_written",
        "merge.cuh",
        "shared[lane][channel] = value;\n  «__syncthreads();»",
        "",
        "bn_stats",
        THREAD,
    ),
    Bug(
        "no_barrier_before_lanes_are_written_again",
        "merge.cuh",
        "«__syncthreads();»\n  shared[lane][channel] = value;",
        "",
        "bn_stats",
        THREAD,
    ),
    Bug(
        "no_barrier_in_merge_in_block",
        "bn_stats.cuh",
        "«__syncthreads();»\n  const int index = threadIdx.x;",
        "",
        "bn_stats",
        THREAD,
    ),
    Bug("no_grid_barrier_race", "bn_stats_apply.cuh", "«grid_barrier();»", "", "bn_stats_apply", THREAD),
    Bug("no_grid_barrier_numbers", "bn_stats_apply.cuh", "«grid_barrier();»", "", "bn_stats_apply", PLAIN),
    Bug(
        "block_barrier_for_a_grid_barrier",
        "bn_stats_apply.cuh",
        "«grid_barrier();»",
        "__syncthreads();",
        "bn_stats_apply",
        THREAD,
    ),
    Bug(
        "no_barrier_before_parts_are_summed_again",
        "bn_stats_apply.cuh",
        "«__syncthreads();»\n  shared[threadIdx.x] = sum;",
        "",
        "bn_stats_apply",
        THREAD,
    ),
    Bug(
        "no_barrier_before_the_normalization",
        "bn_stats_apply.cuh",
        "«__syncthreads();»\n\n  float center[kCount]",
        "",
        "bn_stats_apply",
        THREAD,
    ),
    Bug(
        "no_barrier_before_sums_of_warps",
        "bn_grad.cuh",
        "«__syncthreads();»\n  const int own = ",
        "",
        "bn_grad_stats",
        THREAD,
    ),
    Bug(
        "no_barrier_before_sums_of_pixels",
        "avgpool.cuh",
        "shared[threadIdx.x][i] = sums[i];\n    «__syncthreads();»",
        "",
        "avgpool",
        THREAD,
    ),
    Bug(
        "no_barrier_in_the_main_loop",
        "conv.cuh",
        "«__syncthreads();»  // this step is there for all",
        "",
        "conv_tile_2_splits_1",
        THREAD,
    ),
    Bug(
        "no_barrier_after_corners",
        "conv.cuh",
        "wait_for_previous_grid();\n  «__syncthreads();»",
        "",
        "conv_tile_2_splits_1",
        THREAD,
    ),
    Bug(
        "no_barrier_before_sums_overwrite_the_ring",
        "conv.cuh",
        "wait_copies<0>();\n  «__syncthreads();»",
        "",
        "conv_tile_0_splits_1",
        THREAD,
    ),
    Bug(
        "no_barrier_before_the_epilogue",
        "conv.cuh",
        "«__syncthreads();»\n  constexpr int kAtOnce",
        "",
        "conv_tile_1_splits_1",
        THREAD,
    ),
    Bug(
        "no_barrier_between_image_and_products",
        "stem.cuh",
        "shared.image[index / kColumns][index % kColumns] = pixel;\n    }\n    «__syncthreads();»",
        "",
        "stem",
        THREAD,
    ),
    Bug(
        "no_barrier_before_pooling",
        "stem.cuh",
        "«__syncthreads();»\n\n    // Not negative,",
        "",
        "stem",
        THREAD,
    ),
    # Asynchronous copies that are not waited for.
    Bug("no_wait", "conv.cuh", "«wait_copies<Tile::kStages - 2>();»", "", "conv_tile_2_splits_1", PLAIN),
    Bug(
        "one_group_too_few_waited_for",
        "conv.cuh",
        "«wait_copies<Tile::kStages - 2>();»",
        "wait_copies<Tile::kStages - 1>();",
        "conv_tile_2_splits_1",
        PLAIN,
    ),
    Bug(
        "no_groups_at_the_end",
        "conv.cuh",
        "«commit_copies();»\n    const Chunk* const patches",
        "if (step + Tile::kStages - 1 < steps) commit_copies();",
        "conv_tile_2_splits_1",
        PLAIN,
    ),
    # Bounds that are off by one.
    Bug("a_row_too_many_read", "bn_stats.cuh", "«k * shape.layer < left»", "k * shape.layer <= left", "bn_stats", ADDRESS),
    Bug(
        "a_row_too_many_written",
        "bn_apply.cuh",
        "const bool inside = place.inside && «row + k * shape.layer < shape.rows»;",
        "row + k * shape.layer <= shape.rows",
        "bn_apply",
        ADDRESS,
    ),
    Bug(
        "a_row_too_many_in_backward",
        "bn_grad.cuh",
        "if («row + k * shape.layer >= shape.rows») continue;\n      grads[k] = load_vector<kCount>(grad_out",
        "row + k * shape.layer > shape.rows",
        "bn_grad_stats",
        ADDRESS,
    ),
    Bug(
        "a_channel_too_many",
        "rows.cuh",
        "inside(«channel < shape.channels»)",
        "channel <= shape.channels",
        "bn_grad_apply",
        ADDRESS,
    ),
    Bug(
        "a_pixel_too_many",
        "conv.cuh",
        "if («pixel >= shape.pixels» || filter",
        "pixel > shape.pixels",
        "conv_tile_0_splits_1",
        ADDRESS,
    ),
    Bug(
        "a_filter_too_many",
        "conv.cuh",
        "«first_filter + row < shape.filters»",
        "first_filter + row <= shape.filters",
        "conv_tile_1_splits_1",
        ADDRESS,
    ),
    Bug(
        "a_pooled_row_too_many",
        "stem.cuh",
        "«out_row + down >= shape.out_height»",
        "out_row + down > shape.out_height",
        "stem",
        ADDRESS,
    ),
    Bug(
        "a_patch_too_many",
        "stem.cuh",
        "if («patch >= kConvPixels») continue;",
        "patch > kConvPixels",
        "stem",
        PLAIN,
        report="of shared memory",
    ),
    Bug(
        "a_padded_row_is_not_zero",
        "conv.cuh",
        "static_cast<unsigned>(corner.row + down) < «static_cast<unsigned>(shape.height)»",
        "static_cast<unsigned>(shape.height + 1)",
        "conv_tile_2_splits_1",
        PLAIN,
    ),
    # Wrong places.
    Bug(
        "a_row_further_down",
        "bn_stats.cuh",
        "«from += int64_t{place.row} * shape.channels;»",
        "from += int64_t{place.row == 0 ? 1 : place.row} * shape.channels;",
        "bn_stats",
        PLAIN,
    ),
    Bug(
        "layers_kept_in_one_place",
        "bn_stats_apply.cuh",
        "kept[«(k + j) * kResidentThreads»]",
        "k * kResidentThreads",
        "bn_stats_apply",
        PLAIN,
    ),
    Bug("half_bytes_exchanged", "bn_apply.cuh", "«bits_of_lane | next << 4»", "next | bits_of_lane << 4", "bn_apply", PLAIN),
    Bug(
        "partial_sums_in_one_place",
        "bn_grad.cuh",
        "partial_sums[(«int64_t{gridDim.y} + blockIdx.y») * shape.channels + own]",
        "int64_t{gridDim.y}",
        "bn_grad_stats",
        PLAIN,
    ),
    Bug("a_fragment_four_rows_up", "conv.cuh", "sums.values[«row + 8»]", "row + 4", "conv_tile_2_splits_1", PLAIN),
    Bug(
        "fragments_of_filters_exchanged",
        "conv.cuh",
        "multiply_accumulate<T>(sums[i][j], a[i], b[0], «b[1]»);",
        "b[2]",
        "conv_tile_2_splits_1",
        PLAIN,
    ),
    Bug(
        "splits_in_one_place",
        "conv.cuh",
        "«(blockIdx.z * shape.pixels + pixel)» * shape.filters",
        "pixel",
        "conv_tile_2_splits_3",
        PLAIN,
    ),
    Bug("a_share_of_steps_lost", "conv.cuh", "«blockIdx.z * steps_of_split»", "0", "conv_tile_2_splits_3", PLAIN),
    # Terms that are not there.
    Bug(
        "no_shift",
        "bn_stats.cuh",
        "«static_cast<double>(shared.shift[index]) + mean»",
        "static_cast<double>(mean)",
        "bn_stats",
        PLAIN,
    ),
    Bug("a_lane_not_merged", "bn_stats.cuh", "int offset = «shape.lanes»;", "2 * shape.lanes", "bn_stats", PLAIN),
    Bug("no_deviation_between_parts", "bn_stats.cuh", "«count * distance * distance»", "0.0", "bn_stats", PLAIN),
    Bug("the_last_part_is_whole", "rows.cuh", "«(part == last ? missing : 0)»", "0", "bn_stats", PLAIN),
    Bug(
        "a_part_of_a_gradient_not_divided",
        "bn_grad.cuh",
        "c[i] *= -normalization.scale[i] * «inverse»;",
        "1.0f",
        "bn_grad_apply",
        PLAIN,
    ),
    Bug("outside_is_not_zero", "stem.cuh", "«inside ? stored : 0u»", "stored", "stem", PLAIN),
]
NUMBERS = {bug.name: number for number, bug in enumerate(BUGS, 1)}


def edited(name: str, text: str) -> str:
    """The kernel's text with all the errors of this file in it."""
    found = defaultdict(list)
    for bug in BUGS:
        if bug.file == name:
            found[bug.span(text)].append(bug)
    for (start, end), bugs in sorted(found.items(), reverse=True):
        planted = text[start:end]
        for bug in bugs:
            planted = bug.planted(planted if planted.endswith(";") or len(bugs) == 1 else planted, NUMBERS[bug.name])
            planted += ";" if text[start:end].endswith(";") and bug is not bugs[-1] else ""
        text = text[:start] + planted + text[end:]
    return f'#include "planted.h"\n{text}' if found else text


def write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(text)
        os.replace(temporary, path)


@cache
def program(sanitizer: str | None) -> Path:
    """sanitized_cases with every error in it."""
    cuda = host_build.CSRC / "cuda"
    for source in [*host_build.CSRC.glob("*.h"), *cuda.iterdir()]:
        write(COPY / source.relative_to(host_build.CSRC), edited(source.name, source.read_text()))
    write(COPY / "cuda" / "planted.h", CHOICE)
    kernels = [COPY / "cuda" / source.name for source in sorted(cuda.glob("*.cu"))]
    cases = host_build.ROOT / "tests" / "cuda" / "sanitized_cases.cpp"
    return host_build.build([cases, *kernels], output="planted_bugs", sanitizer=sanitizer)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_caught(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_BUG", str(NUMBERS[bug.name]))
    result = host_build.run(program(bug.caught_by), bug.case, sanitizer=bug.caught_by)
    assert result.returncode != 0, f"{bug.name} is not found"
    assert (bug.report or REPORTS[bug.caught_by]) in result.stderr, result.stderr


@pytest.mark.parametrize(("sanitizer", "case"), sorted({(bug.caught_by, bug.case) for bug in BUGS}, key=str))
def test_right_without_an_error(sanitizer: str | None, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_BUG", "0")
    result = host_build.run(program(sanitizer), case, sanitizer=sanitizer)
    assert result.returncode == 0, result.stderr


def test_names_differ() -> None:
    assert len(NUMBERS) == len(BUGS)
