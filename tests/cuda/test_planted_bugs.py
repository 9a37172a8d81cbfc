"""Errors planted into a copy of the kernels: the tests on the CPU have to find each of them.

All are compiled into one program, and the environment variable PLANTED_BUG says which of them there is: a statement or
an expression is replaced by one that asks. The text that is replaced has to stand in the kernel exactly once, so that
these tests fail when the kernel changes, and are then adapted.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache, partial
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


@dataclass(frozen=True)
class Bug:
    """`wrong` instead of what stands between « and » in `place`: in `case` of sanitized_cases `tool` says `report`."""

    tool: str | None
    report: str
    name: str
    case: str
    place: str
    wrong: str = ""

    def span(self, text: str) -> tuple[int, int] | None:
        """Where in the kernel's text that stands; None unless once."""
        before, _, rest = self.place.partition("«")
        original, _, after = rest.partition("»")
        whole = before + original + after
        start = text.find(whole) + len(before)
        return (start, start + len(original)) if original and text.count(whole) == 1 else None

    def planted(self, otherwise: str, number: int) -> str:
        if ";»" in self.place:
            return f"if (planted_bug == {number}) {{ {self.wrong} }} else {{ {otherwise} }}"
        return f"(planted_bug == {number} ? ({self.wrong}) : ({otherwise}))"


race = partial(Bug, THREAD, "ThreadSanitizer: data race")
overrun = partial(Bug, ADDRESS, "AddressSanitizer: heap-buffer-overflow")
mismatch = partial(Bug, PLAIN, "mismatch")
beyond_shared_memory = partial(Bug, PLAIN, "written beyond the")

BUGS_OF_FILES = {
    "merge.cuh": [
        race(
            "no_barrier_before_numbers_are_written_again", "bn_stats", "«__syncthreads();»  // somebody may still read"
        ),
        race("no_barrier_between_halves", "bn_stats", "half /= 2) {\n    «__syncthreads();»"),
        race(
            "no_barrier_before_the_sum_is_read", "bn_stats", "«__syncthreads();»\n  return shared[threadIdx.x % width];"
        ),
        mismatch("a_half_not_added", "bn_grad_stats", "half >= «width»;", "2 * width"),
    ],
    "rows.cuh": [
        overrun(
            "a_channel_too_many", "bn_grad_apply", "inside(«channel < shape.channels»)", "channel <= shape.channels"
        ),
        overrun("a_row_too_many_written", "bn_apply", "place.inside && «row < shape.rows»", "row <= shape.rows"),
        overrun(
            "a_row_too_many_in_backward", "bn_grad_stats", "place.inside && «row < shape.rows»", "row <= shape.rows"
        ),
        overrun(
            "a_tile_is_thought_whole",
            "bn_grad_apply",
            "«(tile + 1) * (shape.layer * kRows) <= shape.rows»",
            "tile * (shape.layer * kRows) <= shape.rows",
        ),
        mismatch("the_last_part_is_whole", "bn_stats", "«(part == last ? missing : 0)»", "0"),
    ],
    "bn_stats.cuh": [
        race("no_barrier_in_merge_in_block", "bn_stats", "«__syncthreads();»\n  const int index = threadIdx.x;"),
        overrun("a_row_too_many_read", "bn_stats", "«k * shape.layer < left»", "k * shape.layer <= left"),
        mismatch(
            "a_row_further_down",
            "bn_stats",
            "«from += int64_t{place.row} * shape.channels;»",
            "from += int64_t{place.row == 0 ? 1 : place.row} * shape.channels;",
        ),
        mismatch(
            "no_shift", "bn_stats", "«static_cast<double>(shared.shift[index]) + mean»", "static_cast<double>(mean)"
        ),
        mismatch("a_lane_not_merged", "bn_stats", "int offset = «shape.lanes»;", "2 * shape.lanes"),
        mismatch("no_deviation_between_parts", "bn_stats", "«count * distance * distance»", "0.0"),
    ],
    "bn_stats_apply.cuh": [
        race("no_grid_barrier_race", "bn_stats_apply", "«grid_barrier();»\n\n  // The parts"),
        mismatch("no_grid_barrier_numbers", "bn_stats_apply", "«grid_barrier();»\n\n  // The parts"),
        race(
            "block_barrier_for_a_grid_barrier",
            "bn_stats_apply",
            "«grid_barrier();»\n\n  // The parts",
            "__syncthreads();",
        ),
        race("no_second_grid_barrier", "bn_stats_apply", "«grid_barrier();»\n\n  float offset", "__syncthreads();"),
        mismatch(
            "a_part_merges_too_little", "bn_stats_apply", "while («own * parts < width») own", "own * parts < width / 2"
        ),
        mismatch(
            "layers_kept_in_one_place", "bn_stats_apply", "kept[«(k + j) * kResidentThreads»]", "k * kResidentThreads"
        ),
    ],
    "bn_apply.cuh": [
        mismatch("half_bytes_exchanged", "bn_apply", "«bits_of_lane | next << 4»", "next | bits_of_lane << 4"),
    ],
    "bn_grad.cuh": [
        race("no_barrier_before_sums_of_warps", "bn_grad_stats", "«__syncthreads();»\n  const int own = "),
        mismatch(
            "partial_sums_in_one_place",
            "bn_grad_stats",
            "partial_sums[(«int64_t{gridDim.y} + blockIdx.y») * shape.channels + own]",
            "int64_t{gridDim.y}",
        ),
        mismatch(
            "a_part_of_a_gradient_not_divided", "bn_grad_apply", "c[i] *= -normalization.scale[i] * «inverse»;", "1.0f"
        ),
    ],
    "avgpool.cuh": [
        race(
            "no_barrier_before_sums_of_pixels", "avgpool", "shared[threadIdx.x][i] = sums[i];\n    «__syncthreads();»"
        ),
    ],
    "conv.cuh": [
        race(
            "no_barrier_in_the_main_loop", "conv_tile_2_splits_1", "«__syncthreads();»  // this step is there for all"
        ),
        race("no_barrier_after_corners", "conv_tile_2_splits_1", "wait_for_previous_grid();\n  «__syncthreads();»"),
        race(
            "no_barrier_before_sums_overwrite_the_ring",
            "conv_tile_0_splits_1",
            "wait_copies<0>();\n  «__syncthreads();»",
        ),
        race("no_barrier_before_the_epilogue", "conv_tile_1_splits_1", "«__syncthreads();»\n  constexpr int kAtOnce"),
        mismatch("no_wait", "conv_tile_2_splits_1", "«wait_copies<Tile::kStages - 2>();»"),
        mismatch(
            "one_group_too_few_waited_for",
            "conv_tile_2_splits_1",
            "«wait_copies<Tile::kStages - 2>();»",
            "wait_copies<Tile::kStages - 1>();",
        ),
        mismatch(
            "no_groups_at_the_end",
            "conv_tile_2_splits_1",
            "«commit_copies();»\n    const Chunk* const patches",
            "if (step + Tile::kStages - 1 < steps) commit_copies();",
        ),
        overrun(
            "a_pixel_too_many", "conv_tile_0_splits_1", "if («pixel >= shape.pixels» || filter", "pixel > shape.pixels"
        ),
        overrun(
            "a_filter_too_many",
            "conv_tile_1_splits_1",
            "channel < shape.channels && «first_filter + row < shape.filters»;",
            "first_filter + row <= shape.filters",
        ),
        mismatch(
            "a_padded_row_is_not_zero",
            "conv_tile_2_splits_1",
            "static_cast<unsigned>(corner.row + down) < «static_cast<unsigned>(shape.height)»",
            "static_cast<unsigned>(shape.height + 1)",
        ),
        mismatch("a_fragment_four_rows_up", "conv_tile_2_splits_1", "sums.values[«row + 8»]", "row + 4"),
        mismatch(
            "fragments_of_filters_exchanged",
            "conv_tile_2_splits_1",
            "multiply_accumulate<T>(sums[i][j], a[i], b[0], «b[1]»);",
            "b[2]",
        ),
        mismatch(
            "splits_in_one_place",
            "conv_tile_2_splits_3",
            "«(blockIdx.z * shape.pixels + pixel)» * shape.filters",
            "pixel",
        ),
        mismatch("a_share_of_steps_lost", "conv_tile_2_splits_3", "«blockIdx.z * steps_of_split»", "0"),
    ],
    "stem.cuh": [
        race(
            "no_barrier_between_image_and_products",
            "stem",
            "shared.image[index / kColumns][index % kColumns] = pixel;\n    }\n    «__syncthreads();»",
        ),
        race("no_barrier_before_pooling", "stem", "«__syncthreads();»\n\n    // Not negative,"),
        overrun(
            "a_pooled_row_too_many", "stem", "«out_row + down >= shape.out_height»", "out_row + down > shape.out_height"
        ),
        beyond_shared_memory(
            "a_patch_too_many", "stem", "if («patch >= kConvPixels») continue;", "patch > kConvPixels"
        ),
        mismatch("an_eighth_tap", "stem", "if («k % 2 == 1 && lane % 4 >= 2») a[i][2]", "false"),
        mismatch("outside_is_not_zero", "stem", "«inside ? stored : 0u»", "stored"),
    ],
}
BUGS = [(file, bug) for file, bugs in BUGS_OF_FILES.items() for bug in bugs]
NUMBERS = {bug.name: number for number, (_, bug) in enumerate(BUGS, 1)}


def edited(file: str, text: str) -> str:
    """The kernel's text with all the errors of this file in it."""
    found = defaultdict(list)
    for bug in BUGS_OF_FILES.get(file, []):
        found[bug.span(text)].append(bug)
    found.pop(None, None)  # test_caught says so
    for (start, end), bugs in sorted(found.items(), reverse=True):
        planted = text[start:end]
        for bug in bugs:
            planted = bug.planted(planted, NUMBERS[bug.name])
        text = text[:start] + planted + text[end:]
    text = text.replace('#include "../', '#include "')  # of csrc, which host_build names
    return f'#include "planted.h"\n{text}' if found else text


def write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(text)
        os.replace(temporary, path)


@cache
def program(tool: str | None) -> Path:
    """sanitized_cases, with every error that this sanitizer (None: a comparison) finds, and some of the others."""
    cuda = host_build.CSRC / "cuda"
    for source in cuda.iterdir():
        write(COPY / source.name, edited(source.name, source.read_text()))
    write(COPY / "planted.h", CHOICE)
    tested = [bug.case for _, bug in BUGS if bug.tool == tool]
    kernels = [
        (COPY if any(case.startswith(source.stem) for case in tested) else cuda) / source.name
        for source in sorted(cuda.glob("*.cu"))
    ]
    cases = host_build.ROOT / "tests" / "cuda" / "sanitized_cases.cpp"
    return host_build.build([cases, *kernels], output="planted_bugs", sanitizer=tool)


@pytest.mark.parametrize(("file", "bug"), [pytest.param(*pair, id=pair[1].name) for pair in BUGS])
def test_caught(file: str, bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (host_build.CSRC / "cuda" / file).read_text()
    assert bug.span(text), f"{file} has changed; this stands in it {text.count(re.sub('[«»]', '', bug.place))} times"
    monkeypatch.setenv("PLANTED_BUG", str(NUMBERS[bug.name]))
    result = host_build.run(program(bug.tool), bug.case, sanitizer=bug.tool)
    assert result.returncode != 0, f"{bug.name} is not found"
    assert bug.report in result.stderr, result.stderr


@pytest.mark.parametrize(("tool", "case"), sorted({(bug.tool, bug.case) for _, bug in BUGS}, key=str))
def test_right_without_an_error(tool: str | None, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_BUG", "0")
    result = host_build.run(program(tool), case, sanitizer=tool)
    assert result.returncode == 0, result.stderr


def test_names_differ() -> None:
    assert len(NUMBERS) == len(BUGS)
