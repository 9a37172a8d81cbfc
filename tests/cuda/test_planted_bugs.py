"""Errors planted into a copy of the kernels: the tests on the CPU have to find each of them."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import cpp
from tests.cuda import host_build
from tests.planted import Fault, copy_with_faults, numbered

pytestmark = [
    pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler"),
]

CUDA = cpp.CSRC / "cuda"
ADDRESS, THREAD = cpp.SANITIZERS


class Bug(NamedTuple):
    """A fault that has to end `case` of sanitized_cases, compiled with the sanitizer `tool`, with `report`."""

    tool: str
    report: str
    name: str
    case: str
    place: str
    wrong: str = ""


race = partial(Bug, THREAD, "ThreadSanitizer: data race")
overrun = partial(Bug, ADDRESS, "AddressSanitizer: heap-buffer-overflow")
mismatch = partial(Bug, ADDRESS, "mismatch")

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
        overrun(
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
        overrun("a_patch_too_many", "stem", "if («patch >= kConvPixels») continue;", "patch > kConvPixels"),
        mismatch("an_eighth_tap", "stem", "if («k % 2 == 1 && lane % 4 >= 2») a[i][2]", "false"),
        mismatch("outside_is_not_zero", "stem", "«inside ? stored : 0u»", "stored"),
    ],
}
BUGS = [bug for bugs in BUGS_OF_FILES.values() for bug in bugs]
FAULTS = [Fault(file, bug.name, bug.place, bug.wrong) for file, bugs in BUGS_OF_FILES.items() for bug in bugs]
NUMBERS = numbered(FAULTS)


@cache
def program(tool: str) -> Path:
    """sanitized_cases, with every error that this sanitizer finds, and some of the others."""
    copy = copy_with_faults(CUDA, FAULTS)
    tested = [bug.case for bug in BUGS if bug.tool == tool]
    kernels = [
        (copy if any(case.startswith(source.stem) for case in tested) else CUDA) / source.name
        for source in sorted(CUDA.glob("*.cu"))
    ]
    cases = Path(__file__).with_name("sanitized_cases.cpp")
    return host_build.build([cases, *kernels], output="planted_bugs", sanitizer=tool)


@pytest.mark.parametrize(("bug", "fault"), list(zip(BUGS, FAULTS, strict=True)), ids=NUMBERS)
def test_caught(bug: Bug, fault: Fault) -> None:
    fault.assert_plantable(CUDA)
    result = cpp.run(program(bug.tool), bug.case, sanitizer=bug.tool, PLANTED_FAULT=str(NUMBERS[bug.name]))
    assert result.returncode != 0, f"{bug.name} is not found"
    assert bug.report in result.stderr, result.stderr


@pytest.mark.parametrize(("tool", "case"), sorted({(bug.tool, bug.case) for bug in BUGS}))
def test_right_without_an_error(tool: str, case: str) -> None:
    result = cpp.run(program(tool), case, sanitizer=tool, PLANTED_FAULT="0")
    assert result.returncode == 0, result.stderr


def test_names_differ() -> None:
    assert len(NUMBERS) == len(BUGS)
