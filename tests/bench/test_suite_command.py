"""``python -m fused_resnet bench``: its options, what it prints and the files it writes, with planted contenders."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_resnet.__main__ import main
from fused_resnet.bench import command
from fused_resnet.bench.command import make_tasks, method_for, with_defaults
from fused_resnet.bench.report import files
from fused_resnet.bench.result import (
    INFERENCE,
    LEVELS,
    MODEL,
    RIGHT,
    TRAINING_STEP,
    Result,
)
from fused_resnet.bench.roofline import Ceilings
from fused_resnet.bench.suite import registry, runner
from fused_resnet.bench.suite.rounds import Method
from fused_resnet.bench.suite.task import Contender, Prepared, Task


class FakeTask(Task):
    def __init__(self, level, subject, mode, batch_size, dtype, device, image_size) -> None:
        self.level, self.subject, self.mode, self.batch_size = level, subject, mode, batch_size
        self.dtype, self.device, self.image_size = dtype, device, image_size

    def why_wrong(self, prepared: Prepared) -> tuple[float | None, str | None]:
        return 0.0, None

    def flop(self) -> int:
        return 10


def fake_maker(level: str) -> Any:
    def tasks(names, modes, batch_sizes, dtypes, device, image_size):
        if "nonsense" in names:
            raise ValueError("no model is named 'nonsense'")
        return [
            FakeTask(level, name, mode, batch, dtype, device, image_size)
            for name in names
            for mode in modes
            for batch in batch_sizes
            for dtype in dtypes
        ]

    return tasks


def contender(name: str, run: Any = lambda: time.sleep(1e-4), absent: tuple[str, ...] = ()) -> Contender:
    return Contender(name, lambda task: list(absent), lambda task: Prepared(run, lambda: []))


EVERYONE = [
    contender("eager NCHW"),
    contender("eager channels_last"),
    contender("torch.compile default"),
    contender("onnxruntime", absent=("onnxruntime is not installed",)),
    contender("ours"),
]


@pytest.fixture(autouse=True)
def planted(monkeypatch, tmp_path) -> Iterator[None]:
    """Tasks and contenders of the tests' own, and a report that is the JSON file only."""
    monkeypatch.setattr(registry, "contenders", lambda: EVERYONE)
    monkeypatch.setattr(command, "MAKERS", {level: fake_maker(level) for level in LEVELS})
    monkeypatch.setattr(files, "write_all", write_all)
    monkeypatch.setattr(runner, "measure_ceilings", lambda device, dtype, rounds: Ceilings(1e10, 1e11))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def write_all(result: Result, folder: Path, name: str) -> list[Path]:
    path = folder / f"{name}.json"
    result.save(path)
    return [path]


def options_of(*words: str) -> Any:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def selected(*words: str) -> argparse.Namespace:
    return with_defaults(options_of("--device", "cpu", *words))


QUICKLY = ("bench", "--device", "cpu", "--rounds", "2", "--min-seconds", "0", "--image-size", "32")
FIRST = ("--mode", "inference", "--batch-size", "1")


def test_a_run_writes_its_file_and_prints_its_table(tmp_path, capsys):
    assert main([*QUICKLY, *FIRST, "--model", "resnet18", "--threads", "1", "--output", "out"]) == 0
    path = tmp_path / "out" / "cpu_float32_resnet18_inference_b1_32px_1threads.json"
    (measured,) = Result.load(path).measurements
    assert measured.key == (MODEL, "resnet18", INFERENCE, 1, "float32", 32)
    assert {name: outcome.status for name, outcome in measured.outcomes.items()} == {
        "eager NCHW": RIGHT, "eager channels_last": RIGHT, "torch.compile default": RIGHT,
        "onnxruntime": "absent", "ours": RIGHT,
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "1 of 1: resnet18, inference, batch 1, float32, 32x32 ..." in printed
    assert "absent: onnxruntime (onnxruntime is not installed)" in printed
    assert "wrote out/cpu_float32" in printed
    assert sum(line.strip().startswith("ours") for line in printed.splitlines()) == 1
    arguments = json.loads(path.read_text())["arguments"]
    assert arguments["model"] == ["resnet18"] and arguments["dry"] is False and arguments["rounds"] == 2


def test_an_earlier_file_is_kept_beside_the_new_one(tmp_path):
    for _ in range(2):
        assert main([*QUICKLY, *FIRST, "--name", "mine", "--output", str(tmp_path)]) == 0
    files = [path.name for path in sorted(tmp_path.iterdir())]
    assert files == ["mine.json", "mine.previous.json"]


def test_resume_goes_on_with_the_file(tmp_path, monkeypatch, capsys):
    machine = {"commit": "abc", "device": "x"}
    monkeypatch.setattr("fused_resnet.bench.suite.runner.machine_facts", lambda device: dict(machine))
    words = [*QUICKLY, "--mode", "inference", "--name", "mine", "--output", str(tmp_path)]
    assert main([*words, "--batch-size", "1"]) == 0
    before = Result.load(tmp_path / "mine.json")
    assert main([*words, "--batch-size", "1", "2", "--resume"]) == 0
    after = Result.load(tmp_path / "mine.json")
    assert [m.batch_size for m in after.measurements] == [1, 2]
    assert after.measurements[0] == before.measurements[0]
    assert not (tmp_path / "mine.previous.json").exists()
    machine["commit"] = "def"
    assert main([*words, "--batch-size", "1", "--resume"]) == 0
    assert Result.load(tmp_path / "mine.previous.json") == after
    assert [m.batch_size for m in Result.load(tmp_path / "mine.json").measurements] == [1]
    assert "is of another commit" in capsys.readouterr().out


def test_resume_refuses_what_is_no_result(tmp_path, capsys):
    (tmp_path / "mine.json").write_text("{}")
    assert main([*QUICKLY, "--name", "mine", "--output", str(tmp_path), "--resume"]) == 1
    assert "mine.json: schema: Field required" in capsys.readouterr().err
    assert (tmp_path / "mine.json").read_text() == "{}"
    (tmp_path / "mine.json").unlink()
    (tmp_path / "mine.json").mkdir()
    assert main([*QUICKLY, "--name", "mine", "--output", str(tmp_path), "--resume"]) == 1
    assert "mine.json" in capsys.readouterr().err


def test_an_interrupt_writes_what_there_is(tmp_path, monkeypatch, capsys):
    calls = []

    def stop() -> None:
        calls.append(1)
        time.sleep(0.3)
        if len(calls) > 8:  # the first measurement makes so many
            raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[__name__], "EVERYONE", [contender("ours", run=stop)])
    words = ["--mode", "inference", "--batch-size", "1", "2", "--name", "mine", "--output", str(tmp_path)]
    assert main([*QUICKLY, *words]) == 130
    assert [m.batch_size for m in Result.load(tmp_path / "mine.json").measurements] == [1]
    assert "--resume" in capsys.readouterr().out


def test_a_dry_run_is_marked_and_tiny(tmp_path):
    assert main(["bench", "--device", "cpu", "--dry", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("dry_cpu_float32_resnet18_inference_b2_training-step_b2_32px")
    result = Result.load(path)
    assert result.arguments["dry"] is True
    assert len(result.measurements) == 2 and result.ceilings == {}
    assert {len(o.timing.samples) for m in result.measurements for o in m.outcomes.values() if o.timing} == {1}


def test_what_a_budget_leaves_out_is_printed(tmp_path, capsys):
    assert main([*QUICKLY, "--budget", "0", "--output", str(tmp_path)]) == 0
    assert "not measured: resnet50, inference, batch 1, float32, 32x32: left out" in capsys.readouterr().out


def test_defaults_of_the_cpu_and_of_a_gpu(monkeypatch):
    found = selected()
    assert found.model == ["resnet50"] and found.level == [MODEL] and found.image_size == 224
    assert found.batch_size == {INFERENCE: [1, 8], TRAINING_STEP: [16]}
    assert found.dtype == ["float32"] and found.device == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = with_defaults(options_of())
    assert found.device == "cuda"
    assert found.batch_size == {INFERENCE: [1, 32, 256], TRAINING_STEP: [1, 32, 256]}
    assert method_for(found).pause == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--mode", "training-step", "--batch-size", "4", "2", "4"], {TRAINING_STEP: [2, 4]}),
        (["--dry"], {INFERENCE: [2], TRAINING_STEP: [2]}),
    ],
)
def test_batch_sizes(words, expected):
    assert selected(*words).batch_size == expected


def test_patterns_choose_contenders():
    chosen = registry.select(["EAGER*", "ours"], ["*NCHW"])
    assert [c.name for c in chosen] == ["eager channels_last", "ours"]


def test_tasks_of_a_model_stand_together_with_growing_batches():
    tasks = make_tasks(selected("--model", "a", "b", "--level", "op", "model", "--batch-size", "8", "1"))
    assert [t.subject for t in tasks] == ["a"] * 8 + ["b"] * 8
    assert [t.batch_size for t in tasks[:4]] == [1, 8, 1, 8]
    assert {t.level for t in tasks} == {"op", "model"}


def test_a_dry_run_takes_one_shape_of_each_op(monkeypatch):
    shapes = ["bn_apply 64x8x8", "bn_apply 128x4x4", "conv_stats 64x8x8 3x3 to 64"]

    def tasks(names, modes, batch_sizes, dtypes, device, image_size):
        return [FakeTask("op", shape, modes[0], batch_sizes[0], dtypes[0], device, None) for shape in shapes]

    monkeypatch.setitem(command.MAKERS, "op", tasks)
    words = ["--level", "op", "--mode", "training-step"]
    assert [task.subject for task in make_tasks(selected(*words, "--dry"))] == [shapes[0], shapes[2]]
    assert [task.subject for task in make_tasks(selected(*words))] == shapes


def test_options_change_the_method():
    assert method_for(selected()) == Method()
    assert method_for(selected("--rounds", "99", "--min-seconds", "0.5")).most_rounds == 99
    dry = method_for(selected("--dry"))
    assert (dry.rounds, dry.warm_up, dry.pause) == (1, False, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "tpu"], "--device must"),
        (["--device", "cuda:77"], "--device must be cpu or a GPU that PyTorch finds here; got 'cuda:77'"),
        (["--model", "nonsense"], "no model is named 'nonsense'"),
        (["--without", "nobody"], "or a pattern that fits one; got 'nobody'"),
        (["--without", "*"], "--without must leave somebody"),
    ],
)
def test_what_does_not_go_together_is_refused(words, message, capsys):
    assert main(["bench", *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    ["--image-size 31", "--batch-size 0", "--dtype int8", "--mode sleep", "--level x", "--rounds 0", "--budget -1"],
)
def test_bad_values_end_with_usage(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *words.split()])
    assert stopped.value.code == 2
    assert words.split()[0] in capsys.readouterr().err


def test_without_rich_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*QUICKLY]) == 1
    assert "pip install 'fused_resnet[bench]'" in capsys.readouterr().err


def test_the_ledger_is_a_command_of_its_own(capsys):
    words = ["--model", "resnet18", "--image-size", "64", "--batch-size", "2", "--dtype", "float32"]
    assert main(["bench", "bytes", *words]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("resnet18, float32, 64x64, batch 2") and "level 3, memory efficient" in printed
    with pytest.raises(SystemExit):
        main(["bench", "bytes", "--dtype", "int8"])


def test_help_imports_nothing_to_draw_with_and_no_peer():
    code = (
        "import sys; from fused_resnet.__main__ import main\n"
        "try: main(['bench', '--help'])\n"
        "except SystemExit: pass\n"
        "names = ('rich', 'matplotlib', 'jinja2', 'torchvision', 'timm', 'onnxruntime')\n"
        "print([name for name in names if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith("[]")
    for name in command.COMMANDS:
        assert name in done.stdout
