"""``norm_act``, ``norm_act_dual`` and ``BatchNormAct2d`` against nn.BatchNorm2d, +, and nn.ReLU."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_resnet.modules import BatchNormAct2d, norm_act, norm_act_dual, why_not_fuse
from fused_resnet.modules.plain import UNFUSED
from tests.modules.compare import LANES, assert_close, assert_equal, counted, randomize, step

CHANNELS = 7
SHAPES = [(3, CHANNELS, 5, 4), (1, CHANNELS, 1, 3), (2, CHANNELS, 13, 1)]


def plain(norm: nn.Module, act: nn.Module | None, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """The result keeps norm's dtype, as torchvision's ``out += identity`` does."""
    out = norm(x)
    out = out if residual is None else (out + residual).to(out.dtype)
    return out if act is None else act(out)


def norm_and_act(dtype: torch.dtype = torch.float32, **settings) -> tuple[nn.Module, nn.Module]:
    pair = nn.ModuleList([randomize(nn.BatchNorm2d(CHANNELS, **settings)), nn.ReLU(inplace=True)]).to(dtype)
    return pair[0], pair[1]


@pytest.fixture
def no_module_calls():
    """Makes the ordinary way an error."""
    with counted(nn.BatchNorm2d.forward) as calls:
        yield
    assert calls == []


@LANES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("with_act", [True, False])
def test_norm_act_equals_the_modules(dtype, backend, shape, training, with_residual, with_act):
    norm, act = norm_and_act(dtype)
    norm.train(training)
    act = act if with_act else None
    twin = copy.deepcopy(norm)
    inputs = [torch.randn(shape, dtype=dtype) for _ in range(1 + with_residual)]
    for _ in range(2):
        actual = step(norm, lambda *tensors: norm_act(norm, act, *tensors), *inputs, backend=backend)
        expected = step(twin, lambda *tensors: plain(twin, act, *tensors), *inputs)
        assert_close(actual, expected)


SETTINGS = {
    "cumulative average": {"momentum": None},
    "momentum 0": {"momentum": 0.0},
    "momentum 1": {"momentum": 1.0},
    "large eps": {"eps": 0.5},
    "no affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "nothing but the formula": {"affine": False, "track_running_stats": False, "momentum": None},
}


@LANES
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings_of_batch_norm(dtype, backend, settings):
    """Three steps, the statistics frozen in the second (``norm.eval()`` inside training, gradients on)."""
    norm, act = norm_and_act(dtype, **settings)
    twin = copy.deepcopy(norm)
    for training in (True, False, True):
        norm.train(training), twin.train(training)
        inputs = torch.randn(3, CHANNELS, 4, 5, dtype=dtype), torch.randn(3, CHANNELS, 4, 5, dtype=dtype)
        actual = step(norm, lambda x, r: norm_act(norm, act, x, r), *inputs, backend=backend)
        expected = step(twin, lambda x, r: plain(twin, act, x, r), *inputs)
        assert_close(actual, expected)


@pytest.mark.parametrize("change", ["track_running_stats", "num_batches_tracked", "weight"])
def test_attributes_changed_after_construction(change):
    norm, act = norm_and_act()
    setattr(norm, change, False if change == "track_running_stats" else None)
    twin = copy.deepcopy(norm)
    for training in (True, False):
        norm.train(training), twin.train(training)
        x = torch.randn(3, CHANNELS, 4, 5)
        actual = step(norm, lambda x: norm_act(norm, act, x), x)
        assert_close(actual, step(twin, lambda x: plain(twin, act, x), x))


@LANES
@pytest.mark.parametrize("training", [(True, True), (False, False), (True, False)])
@pytest.mark.parametrize("with_act", [True, False])
def test_norm_act_dual_equals_the_modules(dtype, backend, training, with_act):
    norms = nn.ModuleList([norm_and_act(dtype)[0], norm_and_act(dtype, momentum=None, eps=1e-3)[0]])
    for norm, mode in zip(norms, training, strict=True):
        norm.train(mode)
    twins = copy.deepcopy(norms)
    act = nn.ReLU() if with_act else None
    inputs = [torch.randn(3, CHANNELS, 4, 5, dtype=dtype) for _ in range(2)]
    actual = step(norms, lambda x, x2: norm_act_dual(norms[0], act, x, norms[1], x2), *inputs, backend=backend)
    expected = step(twins, lambda x, x2: plain(twins[0], act, x, twins[1](x2)), *inputs)
    assert_close(actual, expected)


def test_plain_modules_run_fused(no_module_calls):
    norm, act = norm_and_act()
    x = torch.randn(2, CHANNELS, 3, 3)
    norm_act(norm, act, x, residual=x)
    norm_act(norm, None, x)
    norm_act_dual(norm, act, x, norm_and_act()[0], x)
    norm_act(BatchNormAct2d(CHANNELS, activation=None), act, x)
    assert why_not_fuse(norm, act) == []


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def _hook(kind: str):
    return lambda norm, act: getattr(norm, kind)(lambda *args: None)


def _other_forward(norm, act):
    norm.forward = lambda x: x - 1


NOT_PLAIN = {
    "forward hook": (_hook("register_forward_hook"), "the norm has hooks"),
    "forward pre-hook": (_hook("register_forward_pre_hook"), "the norm has hooks"),
    "backward hook": (_hook("register_full_backward_hook"), "the norm has hooks"),
    "backward pre-hook": (_hook("register_full_backward_pre_hook"), "the norm has hooks"),
    "hook on act": (lambda norm, act: act.register_forward_hook(lambda *args: None), "the activation has hooks"),
    "forward of its own": (_other_forward, "forward of its own"),
    "compiled norm": (lambda norm, act: norm.compile(backend="eager"), "forward of its own"),
    "unfused": (lambda norm, act: norm.__dict__.update({UNFUSED: True}), "unfuse was called"),
}


@pytest.mark.parametrize(("change", "reason"), NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_is_not_plain_runs_the_ordinary_way_bit_for_bit(change, reason):
    norm, act = norm_and_act(torch.float64)
    act.inplace = False  # PyTorch refuses an in-place ReLU behind a norm with backward hooks
    twin, twin_act = copy.deepcopy(norm), nn.ReLU()
    change(norm, act), change(twin, twin_act)
    assert [reason in line for line in why_not_fuse(norm, act)] == [True]
    inputs = [torch.randn(3, CHANNELS, 4, 5, dtype=torch.float64) for _ in range(2)]
    actual = step(norm, lambda *tensors: norm_act(norm, act, *tensors), *inputs)
    assert_equal(actual, step(twin, lambda *tensors: plain(twin, twin_act, *tensors), *inputs))


OTHER_NORMS = {
    "subclass": lambda: Doubled(CHANNELS),
    "GroupNorm": lambda: nn.GroupNorm(1, CHANNELS),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
    "Identity": nn.Identity,
    "BatchNormAct2d with relu": lambda: BatchNormAct2d(CHANNELS),
}


@pytest.mark.parametrize("make", OTHER_NORMS.values(), ids=OTHER_NORMS)
def test_other_norms_run_the_ordinary_way_bit_for_bit(make):
    norm, act = make(), nn.ReLU()
    assert len(why_not_fuse(norm, act)) == 1
    twin = copy.deepcopy(norm)
    inputs = [torch.randn(3, CHANNELS, 4, 5) for _ in range(2)]
    actual = step(norm, lambda *tensors: norm_act(norm, act, *tensors), *inputs)
    assert_equal(actual, step(twin, lambda *tensors: plain(twin, act, *tensors), *inputs))


@pytest.mark.parametrize("act", [nn.ReLU6(), nn.LeakyReLU(), nn.SiLU()], ids=lambda act: type(act).__name__)
def test_other_activations_run_the_ordinary_way_bit_for_bit(act):
    norm, _ = norm_and_act()
    twin, x = copy.deepcopy(norm), torch.randn(3, CHANNELS, 4, 5)
    assert len(why_not_fuse(norm, act)) == 1
    assert_equal(step(norm, lambda x: norm_act(norm, act, x), x), step(twin, lambda x: act(twin(x)), x))


@pytest.mark.parametrize("hooked", [0, 1])
def test_dual_with_one_hooked_norm_fuses_the_other(hooked):
    norms = nn.ModuleList(norm_and_act(torch.float64)[0] for _ in range(2))
    twins, act, calls = copy.deepcopy(norms), nn.ReLU(), []
    norms[hooked].register_forward_hook(lambda *args: calls.append("hook"))
    inputs = [torch.randn(3, CHANNELS, 4, 5, dtype=torch.float64) for _ in range(2)]
    actual = step(norms, lambda x, x2: norm_act_dual(norms[0], act, x, norms[1], x2), *inputs)
    assert_close(actual, step(twins, lambda x, x2: act(twins[0](x) + twins[1](x2)), *inputs))
    assert calls == ["hook"]


def test_hooks_on_all_modules_fire():
    norm, act = norm_and_act()
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        assert why_not_fuse(norm, act) == ["a hook is registered on all modules"]
        norm_act(norm, act, torch.randn(2, CHANNELS, 3, 3))
    finally:
        handle.remove()
    assert seen == ["BatchNorm2d", "ReLU"]
    assert why_not_fuse(norm, act) == []


@pytest.mark.parametrize("shape", [(1, CHANNELS, 1, 1), (CHANNELS, 3, 3), (2, CHANNELS), (2, CHANNELS, 3, 3, 3)])
def test_refused_shapes_raise_what_batch_norm_raises(shape):
    norm, act = norm_and_act()
    twin, x = copy.deepcopy(norm), torch.randn(shape)
    with pytest.raises(ValueError) as expected:
        twin(x)
    with pytest.raises(ValueError) as actual:
        norm_act(norm, act, x)
    assert str(actual.value) == str(expected.value)
    for name, buffer in twin.named_buffers():
        assert torch.equal(getattr(norm, name), buffer), name


def test_empty_batch():
    norm, act = norm_and_act()
    twin, x = copy.deepcopy(norm), torch.randn(0, CHANNELS, 4, 4)
    assert_equal(step(norm, lambda x: norm_act(norm, act, x), x), step(twin, lambda x: act(twin(x)), x))


def test_residual_that_broadcasts():
    norm, act = norm_and_act(torch.float64)
    twin = copy.deepcopy(norm)
    inputs = torch.randn(3, CHANNELS, 4, 5, dtype=torch.float64), torch.randn(3, CHANNELS, 1, 1, dtype=torch.float64)
    actual = step(norm, lambda x, r: norm_act(norm, act, x, r), *inputs)
    assert_close(actual, step(twin, lambda x, r: act(twin(x) + r), *inputs))


def test_statistics_move_in_training_without_gradients():
    norm, act = norm_and_act()
    twin, x = copy.deepcopy(norm), torch.randn(3, CHANNELS, 4, 5)
    with torch.no_grad():
        out, expected = norm_act(norm, act, x), act(twin(x))
    assert not out.requires_grad
    assert_close({"out": out, **dict(norm.named_buffers())}, {"out": expected, **dict(twin.named_buffers())})


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_checkpointing_updates_statistics_once(use_reentrant, momentum, dtype):
    norm, act = norm_and_act(dtype, momentum=momentum)
    twin, x = copy.deepcopy(norm), torch.randn(3, CHANNELS, 4, 5, dtype=dtype)
    for _ in range(2):
        actual = step(norm, lambda x: checkpoint(norm_act, norm, act, x, use_reentrant=use_reentrant), x)
        assert_equal(actual, step(twin, lambda x: norm_act(twin, act, x), x))


@pytest.mark.parametrize("with_residual", [True, False])
def test_autocast(with_residual):
    """bfloat16 has 8 bits: each of the plain way's three results is rounded by up to 2^-9 of its size."""
    conv, (norm, act) = nn.Conv2d(3, CHANNELS, 3, padding=1), norm_and_act()
    modules = nn.ModuleList([conv, norm])
    twins, x = copy.deepcopy(modules), torch.randn(3, 3, 6, 5)
    residual = [torch.randn(3, CHANNELS, 6, 5)] if with_residual else []
    with torch.autocast("cpu", torch.bfloat16):
        actual = step(modules, lambda x, *r: norm_act(norm, act, conv(x), *r), x, *residual)
        expected = step(twins, lambda x, *r: plain(twins[1], act, twins[0](x), *r), x, *residual)
    assert_close(actual, expected, tolerance=2**-6)


def test_fx_and_jit_trace_see_the_modules():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act = norm_and_act()

        def forward(self, x):
            return norm_act(self.norm, self.act, x, residual=x)

    model, x = Model().eval(), torch.randn(2, CHANNELS, 3, 3)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["norm", "act"]
    expected = model.act(model.norm(x) + x)
    assert torch.equal(traced(x), expected)
    assert torch.equal(torch.jit.trace(model, x)(x), expected)


@LANES
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_act_module(dtype, backend, activation, training):
    module = randomize(BatchNormAct2d(CHANNELS, 1e-3, 0.3, activation=activation)).to(dtype).train(training)
    twin = nn.BatchNorm2d(CHANNELS, 1e-3, 0.3).to(dtype).train(training)
    twin.load_state_dict(module.state_dict())
    act = nn.ReLU() if activation else None
    inputs = [torch.randn(3, CHANNELS, 4, 5, dtype=dtype) for _ in range(2)]
    for tensors in (inputs, inputs[:1]):
        assert_close(
            step(module, module, *tensors, backend=backend), step(twin, lambda *t: plain(twin, act, *t), *tensors)
        )
    module.load_state_dict(twin.state_dict())


def test_batch_norm_act_module_runs_fused(no_module_calls):
    BatchNormAct2d(CHANNELS)(torch.randn(2, CHANNELS, 3, 3))


def test_batch_norm_act_module_copies_pickles_and_says_what_it_is():
    module = randomize(BatchNormAct2d(CHANNELS, activation=None)).eval()
    assert repr(module).endswith("track_running_stats=True, activation=None)")
    x = torch.randn(2, CHANNELS, 3, 3)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
        assert twin.activation is None


def test_batch_norm_act_module_refuses():
    with pytest.raises(ValueError, match=r"activation must be 'relu' or None; got 'gelu'"):
        BatchNormAct2d(CHANNELS, activation="gelu")
    with pytest.raises(ValueError, match="expected 4D input"):
        BatchNormAct2d(CHANNELS)(torch.randn(2, CHANNELS))
    module = BatchNormAct2d(CHANNELS)
    module.__dict__[UNFUSED] = True
    x = torch.randn(2, CHANNELS, 3, 3)
    assert torch.equal(module(x, x), F.relu(F.batch_norm(x, None, None, module.weight, module.bias, True) + x))


@pytest.mark.parametrize(
    "take",
    [
        lambda norm: nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 3), norm)),
        lambda norm: torch.nn.utils.fuse_conv_bn_eval(nn.Conv2d(3, 8, 3).eval(), norm.eval()),
        lambda norm: torch.nn.utils.fuse_linear_bn_eval(nn.Linear(3, 8).eval(), norm.eval()),
    ],
    ids=["sync", "conv", "linear"],
)
def test_what_would_drop_the_activation_raises(take):
    norm = BatchNormAct2d(8)
    with pytest.raises(TypeError, match="would drop the activation"):
        take(norm)
    take(BatchNormAct2d(8, activation=None))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("x", [torch.ones(2, 0, 3, 3), torch.ones(2, CHANNELS, 3, 3).int(), torch.ones(2, 5, 3, 3)])
def test_batch_norm_act_module_does_with_odd_images_what_pytorch_does(x, training):
    outcomes = []
    for module in (nn.BatchNorm2d(CHANNELS), BatchNormAct2d(CHANNELS, activation=None)):
        try:
            outcomes.append(module.train(training)(x).shape)
        except Exception as error:  # the other's is of this class too
            outcomes.append(type(error))
    expected, actual = outcomes
    assert actual == expected or (isinstance(expected, type) and issubclass(actual, expected))


@pytest.mark.parametrize("training", [True, False])
def test_a_lazily_negated_residual(training):
    x, residual = torch.randn(3, CHANNELS, 5, 4), torch.randn(3, CHANNELS, 5, 4)
    negated = torch._neg_view(-residual)
    assert negated.is_neg()
    module = randomize(BatchNormAct2d(CHANNELS)).train(training)
    norm, act = norm_and_act()
    for call in (module, lambda x, residual: norm_act(norm, act, x, residual)):
        assert torch.equal(call(x, negated), call(x, residual))
