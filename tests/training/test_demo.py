"""The demo, end to end on very little work."""

from __future__ import annotations

import argparse
import io
import json
import math
import sys

import pytest
import torch

from fused_resnet.bench.suite.network_contenders import FORMATS
from fused_resnet.training import demo
from fused_resnet.training.comparison import FROZEN, FUSED

for package in demo.PACKAGES:
    pytest.importorskip(package)

LITTLE_WORK = [
    *("--device", "cpu", "--steps", "2", "--batch-size", "4", "--size", "32", "--rounds", "2"),
    *("--inference-model", "resnet18", "--inference-size", "32", "--inference-batches", "1", "2"),
]


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "made" / "by the demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", screen := io.StringIO())
        status = demo.main(parse("--output", str(folder), *LITTLE_WORK))
    return status, folder, screen.getvalue()


def test_numbers(finished):
    status, folder, _ = finished
    results = json.loads((folder / "demo.json").read_text())
    assert status == 0
    assert set(results) == {"machine", "settings", "training", "inference", "seconds"}
    training = results["training"]
    assert set(training["contenders"]) == {*FORMATS, FUSED}
    for contender in training["contenders"].values():
        assert len(contender["losses"]) == training["steps"] == 2
        assert all(map(math.isfinite, contender["losses"]))
        assert contender["loss_difference"]["first"] < 1e-4
        assert 0 <= contender["accuracy"] <= 1
        assert contender["saved_bytes"] > 0
        assert contender["median"] > 0
    assert training["contenders"][training["baseline"]]["speedup"] == 1
    assert [entry["batch_size"] for entry in results["inference"]] == [1, 2]
    for entry in results["inference"]:
        assert set(entry["contenders"]) == {*FORMATS, FUSED, FROZEN}
        assert entry["contenders"][entry["baseline"]]["speedup"] == 1
        for contender in entry["contenders"].values():
            assert len(contender["samples"]) == 2
            assert contender["error"] < 1e-4 and contender["status"] == "right"
    assert results["machine"]["torch"] == torch.__version__


def test_picture(finished):
    from matplotlib.image import imread

    _, folder, _ = finished
    pixels = imread(folder / "demo.png")
    assert pixels.shape[:2] == (960, 1760)
    assert pixels.std() > 0.05


def test_screen_without_a_terminal(finished):
    _, folder, screen = finished
    assert "\x1b" not in screen and "\r" not in screen
    assert len(screen.splitlines()) < 60
    for part in ("test accuracy", "loss difference", "saved for backward", "speed", "Inference resnet18, batch 2"):
        assert part in screen
    assert str(folder / "demo.png") in screen


def test_interrupted(monkeypatch, capsys, tmp_path):
    def press_control_c(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", press_control_c)
    assert demo.main(parse("--output", str(tmp_path / "none"))) == demo.INTERRUPTED
    assert "Stopped" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "abacus"], "--device must name a device"),
        (["--device", "cuda:99"], "--device must be cpu or a GPU that PyTorch finds here; got 'cuda:99'"),
        (["--batch-size", "1"], "--batch-size must be 2 to 1437"),
    ],
)
def test_bad_options(words, message, capsys):
    assert demo.main(parse(*words)) == 1
    assert message in capsys.readouterr().err


def test_options_that_the_parser_refuses(capsys):
    for words in (
        ["--rounds", "0"],
        ["--size", "31"],
        ["--inference-size", "8"],
        ["--inference-model", "resnet19"],
        ["--epochs", "many"],
    ):
        with pytest.raises(SystemExit):
            parse(*words)
        assert words[0] in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(demo, "PACKAGES", {"json": "json", "no_such_module": "no-such-package"})
    assert demo.main(parse()) == 1
    assert "pip install no-such-package" in capsys.readouterr().err


def test_progress_in_a_terminal_is_one_bar_and_elsewhere_few_lines():
    from rich.console import Console

    from fused_resnet.training.demo_progress import LINES_PER_PHASE, DemoProgress

    def follow(console: Console) -> str:
        with DemoProgress(console) as progress:
            progress.start("Working", 100)
            for step in range(100):
                progress.advance(f"step {step}")
        return console.file.getvalue()

    assert len(follow(Console(file=io.StringIO())).splitlines()) == 1 + LINES_PER_PHASE
    terminal = follow(Console(file=io.StringIO(), force_terminal=True, width=120))
    assert "100/100" in terminal and "step 99" in terminal
