"""``bench compare``: silent about noise, loud about what was planted. Runs are simulated: drift that all contenders
share, noise that lasts for several rounds, an offset of each process, and spikes."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

import numpy
import pytest

from fused_resnet.bench.report import compare as command
from fused_resnet.bench.report import noise
from fused_resnet.bench.report.comparison import APPEARED, FASTER, SLOWER, compare
from fused_resnet.bench.report.figures import PLAIN_EAGER, is_ours
from fused_resnet.bench.result import ABSENT, FAILED, INFERENCE, MODEL, RIGHT, WRONG, Measurement, Outcome, Result
from fused_resnet.bench.suite.registry import contenders
from fused_resnet.bench.timer import Timing

RIVALS = ("eager NCHW", "eager channels_last", "onnxruntime")
OURS = ("fused", "frozen")
MACHINE = {"device": "simulated", "threads": 2, "torch": "2.13.0", "commit": "a" * 40, "date": "2026-11-25"}
MEGA = 10**6
NOISE = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "noise"


def simulated(
    seed: int,
    factors: dict[tuple[int, str], float] | None = None,
    measurements: int = 20,
    rounds: int = 20,
    rivals: tuple[str, ...] = RIVALS,
    sigma: float = 0.02,
    drift: float = 1.0,
) -> Result:
    """A run of ``measurements`` x 5 times; ``factors`` by measurement and contender are what was planted."""
    random, entries = numpy.random.default_rng(seed), []
    for index in range(measurements):
        shared = numpy.exp(drift * (random.normal(0, 0.1) + numpy.cumsum(random.normal(0, 0.01, rounds))))
        outcomes = {}
        for place, name in enumerate((*rivals, *OURS)):
            fresh = random.normal(0, sigma, rounds + 1)
            lasting = (fresh[1:] + 0.35 * fresh[:-1]) / math.hypot(1, 0.35)  # neighbours correlate by 0.31
            spikes = numpy.where(random.random(rounds) < 0.05, 1 + random.exponential(0.7, rounds), 1)
            process = random.normal(0, 0.004)
            seconds = 0.01 * (index + 1) * (1 + place / 10) * shared * numpy.exp(lasting + process) * spikes
            planted = (factors or {}).get((index, name), 1.0)
            outcomes[name] = Outcome(RIGHT, timing=Timing(tuple((seconds * planted).tolist())))
        entries.append(Measurement(MODEL, f"model{index}", INFERENCE, 1, "float32", 224, outcomes))
    return Result(dict(MACHINE), {}, {}, entries)


def changed(found):
    return [speed for speed in (*found.overall, *found.speeds) if speed.kind]


def replaced(result: Result, index: int, name: str, outcome: Outcome | None) -> Result:
    """The result with another outcome, or none, of one contender in one measurement."""
    entry = result.measurements[index]
    outcomes = {key: value for key, value in entry.outcomes.items() if key != name}
    if outcome is not None:
        outcomes[name] = outcome
    entries = list(result.measurements)
    entries[index] = dataclasses.replace(entry, outcomes=outcomes)
    return dataclasses.replace(result, measurements=entries)


def test_a_hundred_pairs_of_the_same_commit_show_no_change():
    alarms = [changed(compare(simulated(seed), simulated(1000 + seed))) for seed in range(100)]
    assert sum(map(len, alarms)) <= 1  # of 10 000 times; none of it is a sure thing


def test_two_real_runs_of_a_commit_show_no_change_and_a_planted_slowdown_is_reported():
    """Two networks at two batch sizes on a shared machine; in the third run `frozen` waits for a tenth of its time."""
    first, second, planted = (Result.load(NOISE / f"{name}.json") for name in ("first", "second", "planted"))
    assert not changed(compare(first, second)) and not changed(compare(second, first))
    for before in (first, second):
        found = compare(before, planted)
        assert found.losses
        assert {speed.contender for speed in changed(found)} == {"frozen"}


def test_a_planted_slowdown_is_found_and_a_small_one_left_alone():
    planted = {(index, "frozen"): 1.10 if index % 4 == 0 else 1.03 if index % 4 == 1 else 1.0 for index in range(20)}
    large, small, others = [], [], 0
    for seed in range(20):
        found = compare(simulated(seed), simulated(1000 + seed, planted))
        assert not any(speed.kind for speed in found.overall)  # 3.3 % in the mean
        for index, speed in enumerate(speed for speed in found.speeds if speed.contender == "frozen"):
            factor = planted[index, "frozen"]
            (large if factor == 1.10 else small if factor == 1.03 else []).append(speed.kind == SLOWER)
        others += sum(bool(speed.kind) for speed in found.speeds if speed.contender != "frozen")
    assert len(large) == len(small) == 100
    assert sum(large) >= 95
    assert sum(small) <= 1  # where the noise of all rounds adds 2 %; none of 400 with other seeds
    assert others == 0


def test_what_is_too_noisy_to_be_seen_in_one_is_seen_in_all_together():
    planted = {(index, "fused"): 1.10 for index in range(20)}
    found = compare(simulated(0, sigma=0.04), simulated(1, planted, sigma=0.04))
    each = [speed for speed in found.speeds if speed.contender == "fused"]
    assert sum(bool(speed.kind) for speed in each) < 15
    (overall,) = [speed for speed in found.overall if speed.contender == "fused"]
    assert overall.is_loss
    assert math.exp(overall.verdict.value) == pytest.approx(1.10, abs=0.03)
    assert not any(speed.kind for speed in found.overall if speed.contender == "frozen")


def test_a_speedup_is_told_and_no_loss():
    found = compare(simulated(0), simulated(1, {(3, "frozen"): 0.8}))
    (change,) = changed(found)
    assert (change.kind, change.contender, change.measurement.split(",")[0]) == (FASTER, "frozen", "model3")
    assert change.verdict.low < math.log(0.8) < change.verdict.high
    assert not found.losses


def test_a_machine_that_is_slower_for_all_has_changed_nothing():
    everything = {(index, name): 1.3 for index in range(20) for name in (*RIVALS, *OURS)}
    assert not changed(compare(simulated(0), simulated(1, everything)))


def test_a_rival_that_changed_is_told_without_moving_the_others_or_counting_as_a_loss():
    found = compare(simulated(0), simulated(1, {(index, "onnxruntime"): 1.25 for index in range(20)}))
    assert {speed.contender for speed in changed(found)} == {"onnxruntime"}
    assert found.turned_rivals == ["onnxruntime"]
    assert not found.losses


def test_of_two_rivals_that_moved_apart_neither_is_told():
    two, apart = RIVALS[:2], {(5, "eager NCHW"): 1.1}
    found = compare(simulated(0, rivals=two), simulated(1, apart, rivals=two))
    assert not [speed for speed in found.speeds if speed.contender in two]
    assert not found.losses


def test_without_references_only_a_large_change_is_told():
    drifting = {(index, name): 1.07 for index in range(20) for name in OURS}
    assert not changed(compare(simulated(0, rivals=(), drift=0), simulated(1, drifting, rivals=(), drift=0)))
    found = compare(simulated(0, rivals=(), drift=0), simulated(1, {(2, "frozen"): 1.5}, rivals=(), drift=0))
    assert ("model2", SLOWER) in [(speed.measurement.split(",")[0], speed.kind) for speed in changed(found)]


def test_a_change_in_half_of_the_rounds_only_is_the_machines():
    result = simulated(1)
    timing = result.measurements[0].outcomes["frozen"].timing
    assert timing is not None
    busy = tuple(seconds * (1.3 if index >= 9 else 1) for index, seconds in enumerate(timing.samples))
    after = replaced(result, 0, "frozen", Outcome(RIGHT, timing=Timing(busy)))
    assert not changed(compare(simulated(0), after))


def test_changes_of_status_are_told_and_a_new_error_is_a_loss():
    before, timing = simulated(0), Timing((0.1,) * 20)
    assert not compare(before, before).statuses
    wrong = compare(before, replaced(before, 0, "fused", Outcome(WRONG, "off by one", timing)))
    (status,) = wrong.statuses
    assert (status.before, status.after, status.reason, status.is_loss) == (RIGHT, WRONG, "off by one", True)
    assert compare(before, replaced(before, 0, "fused", Outcome(FAILED, "RuntimeError"))).losses
    absent = compare(before, replaced(before, 0, "fused", Outcome(ABSENT, "not built")))
    assert [(s.before, s.after) for s in absent.statuses] == [(RIGHT, ABSENT)] and not absent.losses
    new = compare(before, replaced(before, 0, "ours new", Outcome(RIGHT, timing=timing)))
    assert [(s.before, s.after, s.contender) for s in new.statuses] == [(APPEARED, RIGHT, "ours new")]
    repaired = compare(replaced(before, 0, "fused", Outcome(WRONG, "off by one", timing)), before)
    assert [(s.before, s.after) for s in repaired.statuses] == [(WRONG, RIGHT)] and not repaired.losses
    assert not compare(before, replaced(before, 0, "apex", Outcome(ABSENT, "not installed"))).statuses


def test_too_few_rounds_are_not_judged():
    found = compare(simulated(0, rounds=4), simulated(1, {(0, "frozen"): 3.0}, rounds=4))
    assert not found.speeds and len(found.too_few_rounds) == 100


def test_a_change_is_past_the_threshold_with_nine_chances_in_ten_and_its_interval_excludes_none():
    def verdict(value, error, comparisons=1):
        return noise.judge(noise.Difference(value, error, 0.0, 38), 0.0, 0.05, comparisons)

    bar = math.log(1.05)
    for sign in (1, -1):
        assert not verdict(sign * (bar + 1.2 * 0.01), 0.01).changed
        assert verdict(sign * (bar + 1.4 * 0.01), 0.01).changed
    wide = verdict(0.15, 0.04, comparisons=300)  # past the threshold by two and a half errors, but one of many
    assert wide.low < 0 < wide.high and not wide.changed
    assert verdict(0.15, 0.04).changed


def test_what_differs_between_runs_is_learnt_from_the_controls():
    random = numpy.random.default_rng(0)
    values = random.normal(0, math.hypot(0.01, 0.03), 400)
    controls = [noise.Difference(float(value), 0.01, 0.0, 38) for value in values]
    assert noise.between_runs(controls) == pytest.approx(0.03, rel=0.15)
    changed_ones = [dataclasses.replace(control, value=0.5) for control in controls[:40]]
    assert noise.between_runs([*controls[40:], *changed_ones]) == pytest.approx(0.03, rel=0.3)
    assert noise.between_runs(controls[:3]) == noise.ASSUMED_BETWEEN_RUNS


def test_the_error_of_the_middle_is_that_of_many_runs():
    random = numpy.random.default_rng(0)
    fresh = random.normal(0, 1, (2000, 41))
    runs = (fresh[:, 1:] + 0.35 * fresh[:, :-1]) / math.hypot(1, 0.35)
    errors = [noise.difference(run[:20], run[20:]).error for run in runs]
    true = (noise.middle(runs[:, 20:]) - noise.middle(runs[:, :20])).std()
    assert numpy.median(errors) == pytest.approx(true, rel=0.2)


def test_ours_is_who_the_suite_says_it_is():
    everyone = contenders()
    assert {contender.name: is_ours(contender.name) for contender in everyone} == {
        contender.name: contender.ours for contender in everyone
    }
    assert {contender.name for contender in everyone} >= set(PLAIN_EAGER)


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args([str(word) for word in words]))


def saved(folder, **results: Result):
    paths = {name: folder / f"{name}.json" for name in results}
    for name, result in results.items():
        result.save(paths[name])
    return paths


def test_exit_status_and_words(tmp_path, capsys):
    slow = {(4, "frozen"): 1.3}
    paths = saved(tmp_path, a=simulated(0), b=simulated(1), c=simulated(1, slow), d=simulated(1, {(4, "frozen"): 0.7}))
    assert run(paths["a"], paths["b"]) == 0
    assert "No change beyond noise and 5 %." in capsys.readouterr().out
    assert run(paths["a"], paths["c"]) == 1
    (speed,) = compare(*(Result.load(paths[name]) for name in "ac")).losses
    assert speed.references == RIVALS and math.exp(speed.verdict.value) > 1.2
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "LOSS" in line]
    assert "model4" in line and "frozen" in line
    assert run(paths["a"], paths["d"]) == 0
    assert run(paths["a"], paths["c"], "--threshold", 40) == 0


def test_another_condition_is_said_aloud(tmp_path, capsys):
    other = dataclasses.replace(simulated(1), machine=MACHINE | {"threads": 1, "packages": {"openvino": "2026.4"}})
    paths = saved(tmp_path, a=simulated(0), b=other)
    assert run(paths["a"], paths["b"]) == 0
    said = capsys.readouterr().out
    assert "The conditions differ: threads 2 -> 1; openvino None -> 2026.4." in said


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    small = simulated(1)
    small = dataclasses.replace(
        small, measurements=[dataclasses.replace(entry, image_size=64) for entry in small.measurements]
    )
    paths = saved(tmp_path, a=simulated(0), small=small)
    old = tmp_path / "old.json"
    old.write_text('{"schema": 0}')
    for words, message in [
        ((paths["a"], tmp_path / "missing.json"), "missing.json"),
        ((paths["a"], old), "schema: Input should be 1; got 0"),
        ((paths["a"], paths["small"]), "no measurement in common: model0, inference, batch 1, float32, 224x224"),
    ]:
        assert run(*words) == 2
        assert message in capsys.readouterr().err
