"""benchmarks/run_gpu.sh without a GPU: units that are planted; resuming, failures, budgets, packing; the real plan."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import run_gpu
from benchmarks.run_gpu import DONE, FAILED, ROOT, SKIPPED, UNFINISHED, Unit, fingerprint, last_line, run
from fused_resnet.bench.result import INFERENCE, MODEL, RIGHT, WRONG, Measurement, Outcome, Result
from fused_resnet.bench.suite.measure import NO_TIME
from fused_resnet.bench.timer import Timing

MakeUnits = Callable[[Path, bool], list[Unit]]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def note_in(path: Path, word: str, then: str = "") -> list[str]:
    """A command that leaves a word in a file, so that a test can count its runs."""
    return python(f"open({str(path)!r}, 'a').write({word!r} + ' '); print('said ' + {word!r}); {then}")


def summary_in(folder: Path) -> str:
    """Without the spaces that pad its tables."""
    return re.sub(" +", " ", (folder / "summary.md").read_text())


def status_of(folder: Path) -> dict[str, str]:
    return {name: entry["status"] for name, entry in json.loads((folder / "state.json").read_text()).items()}


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    path = tmp_path / "ran"
    path.write_text("")
    return path


def test_a_second_call_skips_what_is_done_and_repeats_what_failed(tmp_path: Path, ran: Path, capsys):
    broken = tmp_path / "broken"
    broken.write_text("")

    def make(work: Path, dry: bool) -> list[Unit]:
        return [
            Unit("build", "info", note_in(ran, "info"), repeated=True),
            Unit("test", "good", note_in(ran, "good")),
            Unit("test", "planted", note_in(ran, "planted", f"import os; assert not os.path.exists({str(broken)!r})")),
            Unit("ops", "absent", note_in(ran, "absent"), why_skipped="no device"),
            Unit("ops", "later", note_in(ran, "later")),
        ]

    words = ["--output", str(tmp_path / "out")]
    assert run_gpu.main(words, make) == run_gpu.SOMETHING_FAILED
    assert ran.read_text() == "info good planted later "  # a failure stops nobody else
    assert status_of(tmp_path / "out") == {
        "build/info": DONE,
        "test/good": DONE,
        "test/planted": FAILED,
        "ops/absent": SKIPPED,
        "ops/later": DONE,
    }
    summary = summary_in(tmp_path / "out")
    assert "- test/planted: failed; exit status 1; AssertionError" in summary
    assert "| test | 1 | 1 | 0 | 0 |" in summary
    assert "- ops/absent: skipped; no device" in summary
    assert "failed: test/planted" in capsys.readouterr().out

    broken.unlink()
    ran.write_text("")
    assert run_gpu.main(words, make) == run_gpu.OK
    assert ran.read_text() == "info planted "
    assert "test/good: done before" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "state.json").read_text())["test/planted"]["tries"] == 2
    assert "failed;" not in (tmp_path / "out" / "summary.md").read_text()

    ran.write_text("")
    assert run_gpu.main([*words, "--again", "ops", "--", "ops"], make) == run_gpu.OK
    assert ran.read_text() == "later "


def test_only_the_phases_that_are_asked_for_and_in_their_order(tmp_path: Path, ran: Path):
    def make(work: Path, dry: bool) -> list[Unit]:
        return [Unit(phase, "one", note_in(ran, phase)) for phase in run_gpu.BUDGETS]

    assert run_gpu.main(["models", "build", "--output", str(tmp_path / "out")], make) == run_gpu.OK
    assert ran.read_text() == "build models "


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["", "in the background"])
def test_what_runs_out_of_time_is_asked_to_stop_and_goes_on_in_the_next_call(
    handler, tmp_path: Path, ran: Path, monkeypatch
):
    """The command saves when it is interrupted, as bench does; nothing behind it is begun in that call. What a shell
    runs in the background begins with interrupts ignored."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        assert_stops_and_goes_on(tmp_path, ran, monkeypatch)
    finally:
        signal.signal(signal.SIGINT, before)


def assert_stops_and_goes_on(tmp_path: Path, ran: Path, monkeypatch):
    monkeypatch.setattr("benchmarks.run_gpu.LEAST", 0.5)
    saved = tmp_path / "saved"
    slow = f"""
import os, sys, time
if os.path.exists({str(saved)!r}):
    print("went on"); sys.exit()
print("begun", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    open({str(saved)!r}, "w").write("half")
    print("saved")
    sys.exit(130)
"""

    def make(work: Path, dry: bool) -> list[Unit]:
        return [Unit("ops", "slow", python(slow)), Unit("ops", "behind", note_in(ran, "behind"))]

    # two seconds were too few for Python to start on a busy machine
    words = ["ops", "--output", str(tmp_path / "out"), "--budget", "ops=8"]
    start = time.monotonic()
    assert run_gpu.main(words, make) == run_gpu.CALL_AGAIN
    assert time.monotonic() - start < 50
    assert saved.read_text() == "half"
    assert ran.read_text() == ""
    assert status_of(tmp_path / "out") == {"ops/slow": UNFINISHED}
    assert "unfinished; its 8 s were up; saved" in (tmp_path / "out" / "summary.md").read_text()
    assert run_gpu.main([*words[:-1], "ops=60"], make) == run_gpu.OK
    assert status_of(tmp_path / "out") == {"ops/slow": DONE, "ops/behind": DONE}
    assert "said behind" in (tmp_path / "out" / "logs" / "ops_behind.log").read_text()


def test_the_call_ends_before_its_total(tmp_path: Path, ran: Path):
    def make(work: Path, dry: bool) -> list[Unit]:
        return [Unit(phase, "one", note_in(ran, phase)) for phase in run_gpu.BUDGETS]

    assert run_gpu.main(["--output", str(tmp_path / "out"), "--total", "1"], make) == run_gpu.CALL_AGAIN
    assert ran.read_text() == ""


def test_a_command_that_does_not_stop_is_ended_with_its_children(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("benchmarks.run_gpu.TIME_TO_SAVE", 0.3)
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    end = run(Unit("ops", "stubborn", python(code)), 1.5, tmp_path / "log", {})
    assert end[0] == UNFINISHED
    child = int(last_line(tmp_path / "log"))
    for _ in range(50):  # init needs a moment to take it away
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"{child} is still there")


def test_what_ends_of_a_unit_mean(tmp_path: Path):
    def status(code: str, seconds: float = 30.0, **settings) -> tuple[str, str]:
        end = run(Unit("ops", "one", python(code), **settings), seconds, tmp_path / "log", {"HERE": "of all"})
        return end[0], end[2]

    assert status("import os; print(os.environ['HERE'])") == (DONE, "of all")
    assert status("import sys; print('some left'); sys.exit(75)") == (UNFINISHED, "some left")
    assert status("import sys; sys.exit(5)", fine=(0, 5))[0] == DONE
    assert status("import sys; sys.exit(5)") == (FAILED, "exit status 5; it said nothing")
    assert status("", left=lambda log: "3 left") == (UNFINISHED, "3 left")
    assert status("", left=lambda log: None)[0] == DONE
    slow = "import time; time.sleep(30)"
    assert status(slow, 1.0, left=lambda log: None) == (DONE, "all is measured; there was no time for its page")
    assert status(slow, 1.0, left=lambda log: "3 left") == (UNFINISHED, "3 left")
    missing = Unit("ops", "one", ["/no/such/program"])
    assert run(missing, 5.0, tmp_path / "log", {})[0] == FAILED


def result(*measurements: Measurement, **arguments: object) -> Result:
    return Result({"device": "a GPU", "commit": "abc"}, dict(arguments), {}, list(measurements))


def measurement(level: str = MODEL, **outcomes: Outcome) -> Measurement:
    return Measurement(level, "resnet50", INFERENCE, 32, "bfloat16", 224, outcomes)


def right(*samples: float) -> Outcome:
    return Outcome(RIGHT, timing=Timing(samples))


def test_headlines_of_the_summary(tmp_path: Path):
    network = measurement(
        **{"eager NCHW": right(4.0, 4.0), "torch.compile": right(2.5, 2.5), "frozen": right(2.0, 2.0)},
        fused=Outcome(WRONG, "its error is 3", Timing((0.1, 0.1))),
    )
    ops = [measurement("op", **{"eager": right(3.0), "ours cuda": right(1.0), "ours triton": right(6.0)})]
    ops.append(measurement("op", **{"eager": right(3.0), "ours cuda": right(0.75)}))
    ops[1] = dataclasses.replace(ops[1], subject="another")
    result(network).save(tmp_path / "results" / "models_resnet50.json")
    result(*ops).save(tmp_path / "results" / "ops_batch32.json")
    (tmp_path / "results" / "blocks_x.json").write_text("{")
    assert run_gpu.main(["tune", "--output", str(tmp_path)], lambda work, dry: [Unit("tune", "a", python(""))]) == 0
    summary = summary_in(tmp_path)
    title = "resnet50, inference, batch 32, bfloat16, 224x224"
    best = "frozen 2.00 s | torch.compile 2.50 s | eager NCHW 4.00 s"  # not the one that is wrong
    assert f"| {title} | 2.00x | 1.25x | {best} |" in summary
    assert "1 contenders wrong or failed.\n- fused wrong" in summary and "its error is 3" in summary
    assert "| ours cuda | 32 | 2 | 3.46x |" in summary  # the root of 3 * 4
    assert "| ours triton | 32 | 1 | 0.50x |" in summary
    assert "blocks_x.json cannot be read" in summary


def test_a_report_is_of_the_newest_condition(tmp_path: Path):
    paths = [tmp_path / f"{name}.json" for name in "abcd"]
    for path, cpu, date in zip(paths, ("one", "two", "two"), ("1", "2", "3"), strict=False):
        dataclasses.replace(result(), machine={"cpu": cpu, "date": date}).save(path)
    paths[3].write_text("{")
    assert run_gpu.of_the_newest_condition(paths) == paths[1:3]
    assert run_gpu.of_the_newest_condition([]) == []


def test_what_bench_had_no_time_for_is_left(tmp_path: Path):
    path = tmp_path / "ops.json"
    assert run_gpu.left_out(path) == "nothing was measured yet"
    done = measurement(eager=right(1.0), fused=Outcome("absent", "no GPU"))
    result(done, left_out=["resnet50: it would take 90 GB, and 1 GB are available"]).save(path)
    assert run_gpu.left_out(path) is None
    result(done, left_out=[f"resnet50: {NO_TIME}"]).save(path)
    assert run_gpu.left_out(path) == "1 measurements and 0 contenders are left for the next call"
    result(measurement(eager=right(1.0), fused=Outcome("absent", NO_TIME)), left_out=[]).save(path)
    assert run_gpu.left_out(path) == "0 measurements and 1 contenders are left for the next call"
    result(done, left_out=[], interrupted=True).save(path)
    assert run_gpu.left_out(path) is not None


def test_what_tune_had_no_time_for_is_left(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text("$ tune\nleft: 3 (the time was used up): a, b, c\nplan: x\n$ tune\n3 measured\nplan: x\n")
    assert run_gpu.left_in_log(log) is None
    log.write_text("$ tune\n3 measured\nplan: x\n$ tune\nleft: 2 (the time was used up): a, b\nplan: x\n")
    assert run_gpu.left_in_log(log) == "left: 2 (the time was used up): a, b"
    log.write_text("$ tune\nmeasuring\n")
    assert run_gpu.left_in_log(log) == "it was cut off"


def test_packed_results_are_few_files_and_the_next_machine_goes_on_from_them(tmp_path: Path, ran: Path, monkeypatch):
    monkeypatch.setattr(run_gpu, "WORK", tmp_path / "machine 1")

    def make(work: Path, dry: bool) -> list[Unit]:
        (work / "triton_cache" / "deep" / "er").mkdir(parents=True, exist_ok=True)
        (work / "triton_cache" / "deep" / "er" / "kernel.cubin").write_bytes(b"code")
        (work / "results").mkdir(exist_ok=True)
        (work / "results" / "report.html").write_text("<p>")
        return [Unit("test", "one", note_in(ran, "one")), Unit("ops", "two", note_in(ran, "two"))]

    out = tmp_path / "out"
    assert run_gpu.main(["test", "--pack", "--output", str(out)], make) == run_gpu.OK
    assert {path.name for path in out.iterdir()} == {"summary.md", "report.html", "results.tar.gz", "kernels.tar.gz"}
    shutil.rmtree(tmp_path / "machine 1")

    monkeypatch.setattr(run_gpu, "WORK", tmp_path / "machine 2")
    words = ["--pack", "--from", str(out), "--output", str(tmp_path / "out 2")]
    assert run_gpu.main(words, make) == run_gpu.OK
    assert ran.read_text() == "one two "
    assert (tmp_path / "machine 2" / "triton_cache" / "deep" / "er" / "kernel.cubin").read_bytes() == b"code"
    assert set(status_of(tmp_path / "machine 2")) == {"test/one", "ops/two"}
    ran.write_text("")
    assert run_gpu.main(words, make) == run_gpu.OK  # a warm machine has a newer state than the archive
    assert ran.read_text() == ""
    assert run_gpu.main(["--from", str(tmp_path), "--output", str(tmp_path / "out 3")], make) == 2


def test_an_archive_that_is_too_large_is_left_out_with_a_word(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(run_gpu, "LARGEST", 2000)
    (tmp_path / "work" / "triton_cache").mkdir(parents=True)
    (tmp_path / "work" / "triton_cache" / "kernel").write_bytes(os.urandom(5000))
    (tmp_path / "work" / "summary.md").write_text("short")
    run_gpu.pack(tmp_path / "work", tmp_path / "out")
    assert capsys.readouterr().out == "kernels.tar.gz is 0 MiB and was left out\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"summary.md", "results.tar.gz"}


def test_results_of_other_sources_are_named(tmp_path: Path, ran: Path, monkeypatch):
    def make(work: Path, dry: bool) -> list[Unit]:
        return [Unit("ops", "one", note_in(ran, "one"))]

    words = ["ops", "--output", str(tmp_path / "out")]
    assert run_gpu.main(words, make) == run_gpu.OK
    assert "other sources" not in (tmp_path / "out" / "summary.md").read_text()
    monkeypatch.setattr(run_gpu, "fingerprint", lambda: "changed")
    assert run_gpu.main(words, make) == run_gpu.OK
    assert (
        "other sources of the package (--again does them anew): ops/one"
        in (tmp_path / "out" / "summary.md").read_text()
    )


def test_the_fingerprint_changes_with_a_kernel(tmp_path: Path):
    (tmp_path / "csrc").mkdir()
    before = fingerprint(tmp_path)
    (tmp_path / "csrc" / "kernel.cu").write_text("1")
    after = fingerprint(tmp_path)
    (tmp_path / "csrc" / "notes.txt").write_text("1")
    assert before != after == fingerprint(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "a phase is one of build, test, ops, .*; got 'nothing'"),
        (["--budget", "ops"], "a budget is a phase and its seconds, such as ops=420; got 'ops'"),
        (["--budget", "other=3"], "got 'other=3'"),
    ],
)
def test_bad_words_are_refused(words: list[str], message: str, capsys, tmp_path: Path):
    with pytest.raises(SystemExit):
        run_gpu.main([*words, "--output", str(tmp_path)])
    assert re.search(message, capsys.readouterr().err)


def test_a_damaged_state_is_said(tmp_path: Path, capsys):
    (tmp_path / "state.json").write_text("[]")
    assert run_gpu.main(["--output", str(tmp_path)], lambda work, dry: []) == 2
    assert "remove it to begin anew" in capsys.readouterr().err


def test_budgets_come_from_the_environment_and_the_words_win(monkeypatch):
    monkeypatch.setenv("BUDGET_ops", "77")
    monkeypatch.setenv("BUDGET_test", "78")
    found = run_gpu.parse(["--budget", "test=9"]).budgets
    assert (found["ops"], found["test"], found["build"]) == (77.0, 9.0, run_gpu.BUDGETS["build"])


def test_the_script_finds_the_repository_and_the_interpreter(tmp_path: Path):
    script = ROOT / "benchmarks" / "run_gpu.sh"
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["sh", script, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--pack" in done.stdout
