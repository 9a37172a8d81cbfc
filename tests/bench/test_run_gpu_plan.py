"""The plan of benchmarks/run_gpu.sh: its phases, what its commands take, and that its small ops find a fault."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import run_gpu


@pytest.mark.parametrize("dry", [False, True])
def test_the_real_plan_has_every_phase_and_unique_names(dry: bool, tmp_path: Path):
    found = run_gpu.units(tmp_path, dry)
    names = [unit.name for unit in found]
    assert len(set(names)) == len(names)
    assert list(dict.fromkeys(unit.phase for unit in found)) == list(run_gpu.BUDGETS)
    assert min(run_gpu.BUDGETS.values()) >= run_gpu.LEAST


def test_the_real_plan_asks_bench_and_tune_for_what_they_take(tmp_path: Path):
    """Every command that is one of the package's own is parsed, not run."""
    import argparse

    from fused_resnet.bench import command as bench
    from fused_resnet.bench.suite import registry
    from fused_resnet.bench.tune import command as tune

    parsed = 0
    for dry in (False, True):
        for unit in run_gpu.units(tmp_path, dry):
            words = [*unit.words, *(["--budget", "100"] if unit.budget else [])]
            if words[1:3] != ["-m", "fused_resnet"] or words[3] not in ("bench", "tune") or "report" in words:
                continue
            module = {"bench": bench, "tune": tune}[words[3]]
            parser = argparse.ArgumentParser()
            module.add_arguments(parser)
            arguments = parser.parse_args(words[4:])
            assert arguments.budget == 100.0 or "--dry" in words
            if module is bench:
                assert registry.select(arguments.contenders, arguments.without)
            parsed += 1
    assert parsed > 10


def test_small_ops_find_a_planted_fault(tmp_path: Path, monkeypatch, capsys):
    """What the phase of tests runs on a GPU, here on the reference and of one op only."""
    from fused_resnet.__main__ import main
    from fused_resnet.ops import reference
    from fused_resnet.ops.route import routes

    (unit,) = [unit for unit in run_gpu.units(tmp_path, True) if unit.title == "small ops, reference"]
    words = [*unit.words[3:], "--model", "resnet18"]
    assert main(words) == 0
    real = reference.bn_apply

    def wrong(x: torch.Tensor, *arguments: object) -> torch.Tensor:
        return real(x, *arguments) + (0 if x.dtype == torch.float64 else 0.1)  # the exact result stays

    monkeypatch.setattr(reference, "bn_apply", wrong)
    routes.kept.clear()  # which knows the other
    assert main(words) == 1
    assert "error is" in capsys.readouterr().out
