"""Which backend is asked first, and who runs a pass without asking again."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet.bench.dry_run import DryRun
from fused_resnet.ops import bn_act
from fused_resnet.ops.backends import cuda
from fused_resnet.ops.backends.cuda import launch as cuda_launch
from fused_resnet.ops.plan import measured_plan, plan_file, plan_key
from fused_resnet.ops.route import choose, context, preference, reasons, routes
from fused_resnet.ops.route.packing import BY_DISPATCHER
from fused_resnet.ops.route.routes import pass_route
from fused_resnet.ops.schemas import SCHEMAS
from tests.ops.step import NEEDS_NATIVE

HOPPER, AMPERE = (9, 132), (8, 108)
SETTINGS = ([1, 1], [0, 0], [1, 1])


def on_cuda(*shape: int) -> SimpleNamespace:
    """As much of a CUDA tensor as the ranking looks at."""
    return SimpleNamespace(shape=shape, is_cuda=True, device=torch.device("cuda", 0))


def ranked(chip: tuple[int, int], monkeypatch: pytest.MonkeyPatch, *shape: int, filters: int = 256) -> str:
    monkeypatch.setattr(preference, "_chip", lambda device: chip)
    args = (on_cuda(*shape), on_cuda(filters, shape[1], 1, 1), None, None, None, *SETTINGS, 1, True)
    return preference.ranking("conv_bn_act", args)[0]


def test_a_convolution_goes_to_triton_where_it_fills_a_chip_with_wgmma(monkeypatch):
    assert ranked(HOPPER, monkeypatch, 256, 64, 56, 56) == "triton"
    assert ranked(HOPPER, monkeypatch, 1, 64, 56, 56) == "cuda"
    assert ranked(AMPERE, monkeypatch, 256, 64, 56, 56) == "cuda"
    # Exactly a tile of 128 x 128 for each of 132 multiprocessors, and one pixel less.
    assert ranked(HOPPER, monkeypatch, 66, 64, 16, 8) == "triton"
    assert ranked(HOPPER, monkeypatch, 1, 64, 1, 66 * 128 - 1) == "cuda"


def test_passes_go_to_cuda_first_and_every_backend_is_asked():
    assert preference.ranking("bn_apply", (on_cuda(256, 64, 56, 56),))[0] == "cuda"
    for order in (preference.CUDA_FIRST, preference.TRITON_FIRST):
        assert sorted(order) == sorted(reasons.MODULES) and order[-1] == "reference"


@pytest.fixture
def cuda_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cuda backend says that it takes CPU tensors; nothing runs on it here."""
    monkeypatch.setattr(routes, "kept", {})
    monkeypatch.setattr(routes, "why_not_device", lambda name, device: [] if device.type == "cpu" else ["elsewhere"])
    monkeypatch.setattr(cuda, "fits_on_chip", lambda x: False)


def runs(x: Tensor) -> str | None:
    """Whose function ``bn_apply`` is by the route of passes over x."""
    route = pass_route(x)
    if route is None:
        return None
    function = inspect.unwrap(route.passes.bn_apply)
    return "dispatcher" if function is BY_DISPATCHER["bn_apply"] else function.__module__.split(".")[-2]


def test_pass_route(cuda_on_the_cpu):
    nhwc = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last)
    assert runs(nhwc) == runs(nn.Parameter(nhwc)) == "cuda"
    route = pass_route(nhwc)
    assert route is pass_route(nhwc.clone()) and route.masks.bn_apply_mask is cuda.bn_apply_mask
    assert runs(nhwc.contiguous()) is runs(nhwc.double()) is runs(nhwc[:0]) is runs(nhwc.to("meta")) is None
    with fused_resnet.use_backend("reference"):
        assert runs(nhwc) == "reference" and pass_route(nhwc).masks is None
    with fused_resnet.use_backend("separate"):
        assert runs(nhwc) == "dispatcher"  # which raises
    with DryRun():
        assert runs(nhwc) == "dispatcher"
        assert inspect.unwrap(pass_route(nhwc).masks.bn_apply_mask) is BY_DISPATCHER["bn_apply_mask"]

    seen = []
    torch.func.vmap(lambda t: seen.append(runs(nhwc)) or t)(torch.randn(4, *nhwc.shape))
    torch.jit.trace(lambda t: seen.append(runs(t)) or t, nhwc, check_trace=False)
    assert seen == [None, "dispatcher"]  # autograd of torch.func takes PyTorch's own ops only

    class Subclass(Tensor):
        pass

    assert runs(nhwc.as_subclass(Subclass)) is None
    assert runs(nhwc) == "cuda"


@NEEDS_NATIVE
def test_passes_on_the_cpu_go_straight_to_native():
    x = torch.randn(2, 8, 3, 3, dtype=torch.bfloat16)
    assert runs(x) == "native" and pass_route(x).masks is None
    with fused_resnet.use_backend("native"):
        assert runs(x) == "native"
    with fused_resnet.use_backend("reference"):
        assert runs(x) == "reference"
    with DryRun():
        assert runs(x) == "dispatcher"
    assert runs(x.double()) is None


def test_a_route_is_found_again_and_never_under_another_request():
    x = torch.randn(2, 8, 3, 3)
    first = pass_route(x)
    with fused_resnet.use_backend("reference"):
        assert pass_route(x) is not first
    assert pass_route(x) is first
    assert pass_route(torch.randn(3, 8, 3, 3)) is not first


def test_cpu_tensors_do_not_wake_a_gpu(monkeypatch):
    """A context costs half a gigabyte, and in a forked worker cannot be made at all."""

    def start(*args, **kwargs):
        raise AssertionError("CUDA was initialised for a CPU tensor")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", start)
    reasons.unavailable.cache_clear()
    try:
        x = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
        vectors = (torch.ones(8), torch.zeros(8), torch.zeros(8), torch.ones(8))
        bn_act(x, *vectors, residual=x.detach(), training=True).sum().backward()
        bn_act(x.detach(), *vectors)
        fused_resnet.freeze(fused_resnet.resnet18(), torch.randn(1, 3, 32, 32))
        assert choose.why_not("cuda", "avgpool", x.detach())[0].endswith("it takes CUDA tensors") or not hasattr(
            cuda_launch.extension, "cuda"
        )
    finally:
        reasons.unavailable.cache_clear()


def test_the_cuda_backend_has_every_pass_that_is_asked_of_it():
    """``passes_for`` hands out the module without asking for the op."""
    passes = [name for name in SCHEMAS if name.startswith("bn_")]
    asked = {name for name in passes if not ("pool" in name or name == "bn_grad_coefficients")}
    assert asked <= set(cuda.__all__)


@pytest.fixture
def no_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No plan is there; what is recorded is forgotten."""
    monkeypatch.setenv(plan_file.ENVIRONMENT_VARIABLE, str(tmp_path))
    monkeypatch.setattr(plan_file, "SHIPPED_FOLDER", tmp_path / "shipped")
    measured_plan.reload()
    yield
    monkeypatch.undo()
    measured_plan.reload()


def bn_apply_arguments(channels: int = 8) -> tuple:
    x = torch.randn(2, channels, 3, 3).to(memory_format=torch.channels_last)
    vector = torch.rand(channels) + 0.5
    return (x, vector, vector, vector, vector, None, True)


def record(op: str, args: tuple, winner: str) -> None:
    measured_plan.record(op, plan_key.key_of(op, args), winner, {})


def chosen(op: str, args: tuple) -> str:
    module = choose.choose(op, args)
    return next(name for name, path in reasons.MODULES.items() if path == module.__name__)


def test_a_measured_winner_is_asked_first(no_plan):
    args, others = bn_apply_arguments(), bn_apply_arguments(16)
    usual = chosen("bn_apply", args)
    record("bn_apply", args, "reference")
    assert preference.ranking("bn_apply", args) == ("reference", *preference.CUDA_FIRST[:-1])
    assert chosen("bn_apply", args) == "reference"
    assert chosen("bn_apply", others) == usual
    assert chosen("bn_apply", (*args[:5], args[0], True)) == usual  # with a residual it is another pass
    with measured_plan.ignoring_measured_plan():
        assert chosen("bn_apply", args) == usual


def test_the_winner_runs(no_plan, monkeypatch):
    ran = []
    args = bn_apply_arguments()
    original = reasons.module("reference").bn_apply
    monkeypatch.setattr(
        reasons.module("reference"), "bn_apply", lambda *each: ran.append("reference") or original(*each)
    )
    record("bn_apply", args, "reference")
    torch.ops.fused_resnet.bn_apply(*args)
    assert ran == ["reference"]


def test_a_winner_that_cannot_run_is_passed_over(no_plan):
    args = bn_apply_arguments()
    usual = chosen("bn_apply", args)
    for name in ("separate", "cuda", "a backend of the future"):
        assert name != usual
        record("bn_apply", args, name)
        assert chosen("bn_apply", args) == usual


@NEEDS_NATIVE
def test_a_backend_asked_for_by_name_runs_whatever_was_measured(no_plan):
    args = bn_apply_arguments()
    record("bn_apply", args, "reference")
    with fused_resnet.use_backend("native"):
        assert chosen("bn_apply", args) == "native"
    record("bn_apply", args, "native")
    with fused_resnet.use_backend("reference"):
        assert chosen("bn_apply", args) == "reference"


def test_without_a_plan_the_ranking_asks_one_boolean(no_plan, monkeypatch):
    args = bn_apply_arguments()
    preference.ranking("bn_apply", args)
    assert not measured_plan.speaks

    def asked(*arguments):
        raise AssertionError("the plan was asked")

    for name in ("backend_for", "key_of", "_plan_of"):
        monkeypatch.setattr(measured_plan, name, asked)
    assert preference.ranking("bn_apply", args) is preference.CUDA_FIRST


def test_a_convolution_by_its_weight_and_settings(no_plan):
    x, weight = torch.randn(1, 4, 6, 6), torch.randn(4, 4, 3, 3)

    def arguments(stride: int) -> tuple:
        return (x, weight, None, None, None, [stride] * 2, [1, 1], [1, 1], 1, True)

    record("conv_bn_act", arguments(2), "reference")
    assert preference.ranking("conv_bn_act", arguments(2))[0] == "reference"
    assert preference.ranking("conv_bn_act", arguments(1)) == preference.CUDA_FIRST


def test_torch_compile_does_not_look_at_the_plan(no_plan):
    """One graph, with the plan in effect, and the same numbers; what runs beneath it may follow the plan."""
    block = fused_resnet.BasicBlock(8, 8).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    record("bn_apply", bn_apply_arguments(), "reference")
    measured_plan.record("thing", (1,), "fast", {})
    assert measured_plan.speaks and measured_plan.winner("thing", (1,)) == "fast"

    def step(x: Tensor) -> Tensor:
        y = block(x)
        return y if measured_plan.winner("thing", (1,)) is None else y + 1000

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for training in (False, True):
        block.train(training)
        torch.testing.assert_close(compiled(x), block(x))
    measured_plan.reload()
    torch.testing.assert_close(compiled(x), block(x))


def test_passes_that_are_faster_elsewhere_are_known_by_shape(no_plan):
    args = bn_apply_arguments()
    record("bn_apply", args, "reference")
    assert measured_plan.other_backend_for_passes(args[0], "native")
    assert not measured_plan.other_backend_for_passes(args[0], "reference")
    assert not measured_plan.other_backend_for_passes(bn_apply_arguments(16)[0], "native")


@NEEDS_NATIVE
def test_passes_over_a_small_activation_are_pytorchs_own_unless_ours_are_asked_for(monkeypatch):
    monkeypatch.setattr(routes, "FEWEST_ELEMENTS", 1 << 15)
    small, large = torch.ones(1, 8, 64, 63), torch.ones(1, 8, 64, 64)
    assert pass_route(small) is None and pass_route(large) is not None
    assert pass_route(small.bfloat16()) is not None  # which PyTorch rounds three times
    assert routes.kept_pass_route(small) is not None  # as part of a block, which is one step anyway
    for asked in ({"backend": "native"}, {"masks": True}):
        with context.asking(**asked):
            assert pass_route(small) is not None
