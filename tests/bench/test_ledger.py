"""The ledger against bytes counted by hand, and a dry run against a real one."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_resnet
from benchmarks import step_bytes
from fused_resnet.__main__ import main
from fused_resnet.bench.dry_run import DryRun
from fused_resnet.bench.ledger import BACKWARD, FORWARD, OPTIMIZER, Ledger, ledger, saved_bytes
from fused_resnet.bench.traffic import ROWS, passes
from fused_resnet.bench.training_ledger import EAGER, LEVELS, DryStep
from fused_resnet.ops.schemas import SCHEMAS

FLOAT, LONG = 4, 8
CONVOLUTIONS = ("convolution", "input gradient", "weight gradient")


def groups(found: Ledger) -> dict[tuple[str, str], tuple[int, int]]:
    return {(entry.phase, entry.kind): (entry.reads, entry.writes) for entry in found.entries}


def test_convolution_norm_relu_in_eager_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(inplace=True))
    images, grad = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8, 8)
    x, y, w, c = 2 * 3 * 8 * 8 * FLOAT, 2 * 5 * 8 * 8 * FLOAT, 5 * 3 * 3 * 3 * FLOAT, 5 * FLOAT
    assert groups(ledger(lambda: model(images).backward(grad))) == {
        (FORWARD, "convolution"): (x + w, y),
        (FORWARD, "add"): (LONG, LONG),  # num_batches_tracked
        (FORWARD, "statistics"): (y + 2 * c, 4 * c),  # the running ones are moved, those of the batch written
        (FORWARD, "normalise"): (y + 4 * c, y),
        (FORWARD, "relu"): (y, y),
        (BACKWARD, "relu"): (2 * y, y),
        (BACKWARD, "statistics"): (2 * y + 3 * c, 2 * c),
        (BACKWARD, "normalise"): (2 * y + 5 * c, y),
        (BACKWARD, "weight gradient"): (y + x, w),
    }


@pytest.mark.parametrize(("eager", "forward", "backward"), [(True, 13, 16), (False, 7, 12)])
def test_a_basic_block_moves_what_readme_says_beside_its_convolutions(eager, forward, backward):
    block = fused_resnet.BasicBlock(8, 8).to(memory_format=torch.channels_last)
    if eager:
        block.bn1.__dict__["_fused_resnet_unfused"] = block.bn2.__dict__["_fused_resnet_unfused"] = True
    x = torch.randn(4, 8, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
    one = x.numel() * FLOAT
    with fused_resnet.use_backend("reference"), fused_resnet.ops.use_fusion_level(0):
        found = ledger(lambda: block(x).backward(torch.ones_like(x)))
    beside = {
        phase: sum(e.total for e in found.entries if e.phase == phase and e.kind not in (*CONVOLUTIONS, "fill"))
        for phase in (FORWARD, BACKWARD)
    }
    assert beside[FORWARD] // one == forward  # and vectors, which are less than one activation
    assert beside[BACKWARD] // one == backward + 3  # the sum of the gradients of x
    assert sum(groups(found)[BACKWARD, "add"]) == 3 * one


def test_an_op_without_a_row_is_an_error():
    with pytest.raises(NotImplementedError, match="no row in fused_resnet.bench.traffic says what aten.cumsum.default"):
        ledger(lambda: torch.ones(3).cumsum(0))


def test_every_op_of_this_package_has_a_row():
    assert {name.partition(".")[2] for name in ROWS if name.startswith("fused_resnet.")} == set(SCHEMAS)


def test_statistics_alone_by_hand():
    x = torch.randn(2, 5, 8, 8)
    total, c = 2 * 5 * 8 * 8 * FLOAT, 5 * FLOAT
    assert groups(ledger(lambda: torch.var_mean(x, (0, 2, 3)))) == {(FORWARD, "statistics"): (total, 2 * c)}
    # CUDA's, so its result is made up
    vectors, aten = [torch.rand(5) for _ in range(4)], torch.ops.aten
    (applied,) = passes(aten.batch_norm_elemt.default, (x, *vectors, 1e-5), {}, torch.empty_like(x))
    assert (applied.kind, applied.reads, applied.writes) == ("normalise", total + 4 * c, total)


def test_views_allocations_and_inference_of_shapes_move_nothing():
    x = torch.randn(2, 3, 4, 4)

    def step() -> None:
        x.transpose(1, 2).detach()[0].expand(7, 4, 3, 4)
        torch.empty_like(x)
        torch.ops.aten.cumsum(x.to("meta"), 0)

    assert ledger(step).total == 0


def test_what_expand_repeats_is_read_once():
    assert ledger(lambda: torch.ones(1).expand(1000) / 4).entries[-1].reads == FLOAT


def case(
    op: str, read: str, rewritten: str = "", *, absent: str = "", relu: bool = True
) -> tuple[str, str, str, str, bool]:
    return op, read, rewritten, absent, relu


ACTIVATIONS = "x x2 residual grad_out out dz y"
VECTORS = "mean invstd weight bias mean2 invstd2 weight2 bias2 running_mean running_var sum_dz sum_dz_xhat scale shift"
CONV = "x conv_weight mean invstd weight bias"
RUNNING = "running_mean running_var"


@pytest.mark.parametrize(
    ("op", "read", "rewritten", "absent", "relu"),
    [
        case("bn_stats", f"x {RUNNING}", RUNNING),
        case("bn_stats", "x", absent=RUNNING),
        case("bn_apply", "x mean invstd weight bias residual"),
        case("bn_apply", "x mean invstd weight bias", absent="residual"),
        case("bn_apply_dual", "x mean invstd weight bias x2 mean2 invstd2 weight2 bias2"),
        case("bn_grad_stats", "grad_out x out mean invstd weight bias"),
        case("bn_grad_stats", "grad_out x mean invstd weight bias", absent="out"),
        case("bn_grad_apply", "grad_out x mean invstd weight bias sum_dz sum_dz_xhat"),
        case("bn_grad_apply", "grad_out x mean invstd weight bias", absent="sum_dz sum_dz_xhat"),
        case("bn_grad_apply", "grad_out mean invstd weight bias", absent="sum_dz sum_dz_xhat", relu=False),
        case("bn_grad_coefficients", "sum_dz sum_dz_xhat mean invstd weight"),
        case("conv_bn_act", "x conv_weight scale shift residual"),
        case("conv_stats", f"{CONV} {RUNNING}", RUNNING),
        case("conv_stats", f"x conv_weight {RUNNING}", RUNNING, absent="mean invstd weight bias"),
        case("conv_grad_input", f"dz y coefficients {CONV} residual"),
        case("conv_grad_input", "dz conv_weight", absent="y coefficients mean invstd weight bias residual"),
        case("conv_grad_weight", "dz y coefficients x mean invstd weight bias"),
        case("conv_grad_weight", "dz x", absent="y coefficients mean invstd weight bias"),
    ],
)
def test_a_fused_op_reads_what_its_docstring_says_once_and_writes_its_results(op, read, rewritten, absent, relu):
    image = (2, 8, 6, 6)
    values = {name: torch.randn(image) for name in ACTIVATIONS.split()}
    values |= {name: torch.rand(8) + 0.5 for name in VECTORS.split()}
    values |= {"conv_weight": torch.randn(8, 8, 3, 3), "coefficients": torch.randn(4, 8)}
    values |= {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1, "statistics": True}
    values |= {"momentum": 0.1, "eps": 1e-5, "count": 72.0, "relu": relu}
    values |= dict.fromkeys(absent.split())
    function = getattr(torch.ops.fused_resnet, op).default
    results: list[Tensor] = []

    def call() -> None:
        found = function(*(values[argument.name] for argument in function._schema.arguments))
        results.extend([found] if isinstance(found, Tensor) else found)

    with fused_resnet.use_backend("reference"):
        (entry,) = ledger(call).entries
    assert entry.reads == sum(values[name].numel() for name in read.split()) * FLOAT
    assert entry.writes == sum(t.numel() for t in [*results, *(values[name] for name in rewritten.split())]) * FLOAT


@pytest.mark.parametrize("level", LEVELS)
def test_bytes_grow_linearly_with_the_images(level):
    two, four, six = (DryStep("resnet18", level, images, image_size=64).ledger().total for images in (2, 4, 6))
    assert six - four == four - two > 0


def test_the_update_is_one_pass_over_parameters_gradients_and_momenta():
    weight = nn.Parameter(torch.randn(1000))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True, fused=True)

    def step() -> None:
        weight.sum().backward()
        optimizer.step()

    step()  # makes the momentum
    phases = {entry.phase: entry for entry in ledger(step).entries}
    assert list(phases) == [FORWARD, BACKWARD, OPTIMIZER]
    assert (phases[OPTIMIZER].reads, phases[OPTIMIZER].writes) == (3 * 1000 * FLOAT, 2 * 1000 * FLOAT)


def step_on(model: nn.Module, autocast: bool = False, size: int = 64):
    model = model.to(memory_format=torch.channels_last)
    images = torch.zeros(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(2, dtype=torch.int64)

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return F.cross_entropy(model(images), labels)

    return model, forward


@pytest.mark.parametrize(("level", "autocast"), [(EAGER, False), (0, True), (2, False), (3, False), (3, True)])
def test_a_dry_run_moves_and_saves_what_a_real_one_does(level, autocast):
    found = []
    for context in (contextlib.nullcontext(), DryRun()):
        with (
            context,
            fused_resnet.use_backend("reference"),
            fused_resnet.ops.use_fusion_level(level if level != EAGER else 0),
        ):
            model = fused_resnet.resnet18(num_classes=10)
            model, forward = step_on(fused_resnet.unfuse(model) if level == EAGER else model, autocast)
            found.append((groups(ledger(lambda: forward().backward())), saved_bytes(model, forward)))  # noqa: B023
    assert found[0] == found[1]


def test_eager_is_what_torchvision_runs():
    from torchvision.models import resnet18

    found = []
    for model in (resnet18(), fused_resnet.unfuse(fused_resnet.resnet18())):
        with DryRun():
            _, forward = step_on(model, autocast=True)
            found.append(groups(ledger(lambda: forward().backward())))  # noqa: B023
    assert found[0] == found[1]


def test_every_level_of_resnet50_moves_less_than_the_one_before():
    eager, *levels = (DryStep("resnet50", level, 256, torch.bfloat16).ledger().bytes_per_image for level in LEVELS)
    assert eager > levels[0] > levels[1] > levels[2] > levels[3] > levels[4]
    assert levels[0] < 0.80 * eager
    assert levels[3] <= 0.60 * eager
    assert levels[4] <= 0.57 * eager


def test_saved_bytes_of_resnet50():
    eager = DryStep("resnet50", EAGER).saved_bytes()
    assert eager == pytest.approx(86.0e6, rel=0.01)
    assert DryStep("resnet50", 3).saved_bytes() <= 0.80 * eager
    assert DryStep("resnet50", 3, memory="efficient").saved_bytes() <= 0.56 * eager


def test_a_level_that_is_none():
    with pytest.raises(ValueError, match="level must be 'eager', 0, 1, 2, 3 or 'level 3, masks'; got 4"):
        DryStep("resnet18", 4, 2).ledger()


def test_the_command_prints_both_tables(capsys):
    words = ["--model", "resnet18", "--image-size", "64", "--batch-size", "2", "--dtype", "float32"]
    assert main(["bench", "bytes", *words]) == 0
    printed = capsys.readouterr().out
    (total,) = (line.split() for line in printed.splitlines() if line.startswith("all "))
    for cell, level in zip(total[1:], LEVELS, strict=True):
        expected = DryStep("resnet18", level, 2, torch.float32, 64).ledger().bytes_per_image / 1e6
        assert float(cell) == pytest.approx(expected, abs=0.05)
    assert "level 3, memory efficient" in printed


@pytest.mark.parametrize("words", ["--image-size 31", "--batch-size 0", "--dtype int8", "--model alexnet"])
def test_the_command_refuses(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "bytes", *words.split()])
    assert stopped.value.code == 2
    assert words.split()[0] in capsys.readouterr().err


def test_the_benchmark_writes_every_ratio(tmp_path, capsys):
    path = tmp_path / "new" / "step_bytes.json"
    step_bytes.main(["--models", "resnet18", "--write", "--output", str(path)])
    found = json.loads(path.read_text())
    assert found["step"] == {"dtype": "bfloat16", "batch_size": 256}
    assert "commit" in found["machine"]
    for part in found["models"]["resnet18"].values():
        for entry in part.values():
            assert entry["ratio_to_eager"] == entry["bytes_per_image"] / part[EAGER]["bytes_per_image"]
    assert "resnet18" in capsys.readouterr().out
