"""benchmarks/bench_launch.py without a GPU, on a few calls: every op, every way to call it, and a profile."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import bench_launch
from benchmarks.norm_step import NormStepTask
from fused_resnet.bench.passes import PASSES, STATS_APPLY, NormPass, PassTask
from fused_resnet.bench.sites import ENDINGS, NormSite
from fused_resnet.bench.suite.op_base import OpTask
from fused_resnet.bench.suite.op_stem import LAYOUTS, StemTask
from fused_resnet.bench.suite.registry import op_contenders
from fused_resnet.bench.suite.task import Prepared
from fused_resnet.ops import schemas
from fused_resnet.ops.backends.cuda import launch as cuda_launch
from fused_resnet.ops.route import reasons
from tests import cpp

pytestmark = [
    pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler"),
]


def test_it_writes_the_cost_of_every_op(tmp_path, capsys):
    path, extension, threads = tmp_path / "new" / "cost.json", cuda_launch.extension, torch.get_num_threads()
    words = ["--on-host", "--calls", "2", "--rounds", "2", "--output", str(path)]
    assert bench_launch.main(words) == 0
    found = json.loads(path.read_text())
    assert found["machine"]["threads"] == 1
    assert "Not in these times: the CUDA driver's launch" in found["statement"]
    assert (found["calls"], found["rounds"]) == (2, 2)
    assert set(found["microseconds"]) == set(bench_launch.OP_NAMES)
    entries = list(found["floors"].values()) + list(found["parts"].values())
    for ways in found["microseconds"].values():
        assert list(ways) == ["dispatcher", "nothing", "choice", "module", "extension"]
        entries += ways.values()
    for entry in entries:
        assert 0 < entry["p20"] <= entry["median"] <= entry["p80"]
    assert "bn_stats_apply residual" in capsys.readouterr().out
    assert cuda_launch.extension is extension
    assert torch.get_num_threads() == threads


def test_every_op_of_the_backend_is_there():
    with bench_launch.on_host():
        ops = {op.name for op in bench_launch.ops("cpu").values()}
        assert ops == set(schemas.SCHEMAS) & set(dir(reasons.module("cuda")))


def test_the_function_alone_is_given_what_the_backend_gives():
    """With the launches not skipped it computes what the op computes."""
    with bench_launch.on_host() as machine:
        machine.skip_launches(False)
        op = bench_launch.ops("cpu")["bn_apply residual"]
        call = bench_launch.recorded(op)
        given = {tensor.data_ptr() for tensor in op.arguments if isinstance(tensor, torch.Tensor)}
        (out,) = {t.data_ptr(): t for t in call.kept if t.data_ptr() not in given}.values()
        expected = out.clone()
        out.zero_()
        machine.launches()
        assert call() is None
        assert len(machine.launches()) == 1
        assert torch.equal(out, expected)
        assert out.count_nonzero() > 0


def prepared_on_cuda(task: OpTask) -> Prepared:
    """The contender that is the cuda backend, which must take the task and be right."""
    (contender,) = (each for each in op_contenders() if each.name == "ours cuda")
    assert contender.why_absent(task) == []
    prepared = contender.prepare(task)
    assert task.why_wrong(prepared)[1] is None
    return prepared


@pytest.mark.parametrize("norm_pass", [*PASSES, STATS_APPLY], ids=str)
def test_the_backend_takes_what_the_benchmark_of_passes_gives_it(norm_pass: NormPass):
    with bench_launch.on_host() as machine:
        machine.skip_launches(False)
        site = NormSite(40, 5, 7, norm_pass.endings[0])
        prepared = prepared_on_cuda(PassTask(norm_pass, site, 2, torch.bfloat16, "cpu"))
        machine.launches()
        prepared.run()
        assert 1 <= len(machine.launches()) <= 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_backend_takes_what_the_benchmark_of_the_stem_gives_it(layout: str):
    with bench_launch.on_host() as machine:
        machine.skip_launches(False)
        prepared = prepared_on_cuda(StemTask(17, 1, torch.float16, "cpu", layout))
        machine.launches()
        prepared.run()
        assert len(machine.launches()) == 1


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_step_runs_on_the_backend_and_moves_less_in_one_launch(ending: str):
    with bench_launch.on_host() as machine:
        machine.skip_launches(False)
        task = NormStepTask(NormSite(64, 17, 17, ending), 8, torch.float16, "cpu")
        moved = prepared_on_cuda(task).moved_bytes()
        one = task.first.images[0].nbytes
        bits = one // 16
        by_hand = {
            "relu": {(1 + 2 + 2 + 3) * one, (2 + 2 + 3) * one},
            "residual": {(1 + 3 + 2 + 4) * one + 3 * bits, (3 + 2 + 4) * one + 3 * bits},
            "projection": {(1 + 1 + 3 + 2 * (2 + 3)) * one + 5 * bits},
        }
        assert any(0 <= moved - expected < bits for expected in by_hand[ending])  # and vectors


def test_only_some_ops_and_a_profile(tmp_path, capsys):
    words = ["--on-host", "--calls", "2", "--rounds", "1"]
    path = tmp_path / "one.json"
    assert bench_launch.main([*words, "--ops", "avgpool", "--output", str(path)]) == 0
    assert set(json.loads(path.read_text())["microseconds"]) == {"avgpool"}
    assert bench_launch.main([*words, "--profile", "bn_apply"]) == 0
    assert "(body)" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--ops", "conv"], ["--profile", "relu"]])
def test_an_unknown_op_is_refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_launch.main(["--on-host", *words])
    assert stopped.value.code == 2
    assert "an op is one of bn_stats, " in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_what_to_do():
    with pytest.raises(SystemExit, match="--on-host measures"):
        bench_launch.main([])
