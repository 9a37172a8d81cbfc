"""``ConvBNAct2d`` against nn.Conv2d, nn.BatchNorm2d, + and nn.ReLU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fused_resnet.modules import ConvBNAct2d
from fused_resnet.modules import conv_bn_act as module_under_test
from fused_resnet.modules.conv_bn_act import why_not_fold
from tests.modules.compare import LANES, TOLERANCE, assert_close, randomize, step


class Plain(nn.Module):
    """The same children, called one by one."""

    def __init__(self, module: ConvBNAct2d) -> None:
        super().__init__()
        self.conv, self.bn, self.act = copy.deepcopy((module.conv, module.bn, module.act))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = self.bn(self.conv(x))
        out = out if residual is None else (out + residual).to(out.dtype)
        return out if self.act is None else self.act(out)


CONVOLUTIONS = {
    "3x3": (6, 8, 3),
    "1x1": (6, 8, 1),
    "stride 2, 7x7": (6, 8, 7, 2),
    "dilated, uneven": (6, 8, (3, 5), (2, 1), None, (1, 2)),
    "padding given": (6, 8, 2, 2, (1, 0)),
    "groups": (6, 9, 3, 1, None, 1, 3),
}


@LANES
@pytest.mark.parametrize("arguments", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("activation", ["relu", None])
def test_training_and_eval(dtype, backend, arguments, activation):
    module = randomize(ConvBNAct2d(*arguments, momentum=0.3, eps=1e-3, activation=activation, dtype=dtype))
    twin = Plain(module)
    x = torch.randn(2, 6, 9, 8, dtype=dtype)
    residual = torch.randn_like(twin.conv(x))
    for training in (True, False):
        module.train(training), twin.train(training)
        for inputs in ((x,), (x, residual)):
            assert_close(step(module, module, *inputs, backend=backend), step(twin, twin, *inputs))
            with torch.no_grad():
                actual, expected = module(*inputs), twin(*inputs)
            assert_close(
                {"output": actual, **dict(module.named_buffers())}, {"output": expected, **dict(twin.named_buffers())}
            )


@pytest.fixture
def one_kernel_calls(monkeypatch):
    """Counts the calls of the one-kernel op, which are still made."""
    calls = []
    op = module_under_test.conv_bn_act

    def counted(*args, **kwargs):
        calls.append(kwargs["activation"])
        return op(*args, **kwargs)

    monkeypatch.setattr(module_under_test, "conv_bn_act", counted)
    return calls


def test_inference_is_one_kernel(one_kernel_calls):
    module = randomize(ConvBNAct2d(6, 8, 3))
    x = torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        module(x)
        assert one_kernel_calls == []
        module.eval()(x)
    assert one_kernel_calls == ["relu"]
    module.requires_grad_(False)(x)
    assert one_kernel_calls == ["relu", "relu"]


NOT_PLAIN = {
    "hook on conv": (lambda m: m.conv.register_forward_hook(lambda *args: None), "the convolution has hooks"),
    "hook on bn": (lambda m: m.bn.register_forward_hook(lambda *args: None), "the norm has hooks"),
    "hook on act": (lambda m: m.act.register_forward_hook(lambda *args: None), "the activation has hooks"),
    "bias": (lambda m: setattr(m, "conv", nn.Conv2d(6, 8, 3, padding=1)), "the convolution has a bias"),
    "reflected padding": (lambda m: setattr(m.conv, "padding_mode", "reflect"), "padding other than numbers of zeros"),
    "padding in words": (lambda m: setattr(m.conv, "padding", "same"), "padding other than numbers of zeros"),
    "other convolution": (lambda m: setattr(m, "conv", nn.LazyConv2d(8, 3)), "the convolution is"),
    "no running statistics": (
        lambda m: setattr(m, "bn", nn.BatchNorm2d(8, track_running_stats=False)),
        "no running statistics",
    ),
    "other norm": (
        lambda m: setattr(m, "bn", nn.GroupNorm(2, 8)),
        "the norm is torch.nn.modules.normalization.GroupNorm",
    ),
}


@pytest.mark.parametrize(("change", "reason"), NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_children_that_are_not_plain_run_one_by_one(change, reason, one_kernel_calls):
    module = randomize(ConvBNAct2d(6, 8, 3)).eval()
    change(module)
    reasons = why_not_fold(module.conv, module.bn, module.act)
    assert [reason in line for line in reasons] == [True]
    x = torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        actual, expected = module(x), Plain(module)(x)
    assert one_kernel_calls == []
    assert_close({"output": actual}, {"output": expected})


@pytest.mark.parametrize("training", [True, False])
def test_sync_batch_norm_conversion_keeps_the_activation_and_the_fusion(training, one_kernel_calls):
    module = nn.SyncBatchNorm.convert_sync_batchnorm(randomize(ConvBNAct2d(6, 8, 3))).train(training)
    assert type(module.bn) is nn.SyncBatchNorm
    twin, x = Plain(module), torch.randn(2, 6, 5, 5)
    assert_close(step(module, module, x), step(twin, twin, x))
    with torch.no_grad():
        assert_close({"output": module(x)}, {"output": twin(x)})
    assert len(one_kernel_calls) == (0 if training else 2)


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training):
    """bfloat16 has 8 bits: the plain way rounds the convolution, the norm and the sum by up to 2^-9 of their size."""
    module = randomize(ConvBNAct2d(6, 8, 3)).train(training)
    twin, x, residual = Plain(module), torch.randn(4, 6, 5, 5), torch.randn(4, 8, 5, 5)
    for inputs in ((x,), (x, residual)):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert_close({"output": module(*inputs)}, {"output": twin(*inputs)}, tolerance=2**-6)


def test_compiles_without_a_graph_break():
    module = randomize(ConvBNAct2d(6, 8, 3))
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 5, 5)
    assert_close(step(module, compiled, x), step(twin, twin, x))
    module.eval(), twin.eval()
    with torch.no_grad():
        assert torch.allclose(compiled(x), twin(x), rtol=0, atol=10 * TOLERANCE[torch.float32])


def test_defaults_keep_the_size_and_the_names():
    module = ConvBNAct2d(6, 8, (5, 3), dilation=(1, 2))
    assert module(torch.randn(2, 6, 9, 8)).shape == (2, 8, 9, 8)
    assert list(module.state_dict()) == ["conv.weight", *(f"bn.{name}" for name in nn.BatchNorm2d(8).state_dict())]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"activation": "gelu"}, "activation must be 'relu' or None; got 'gelu'"),
        ({"kernel_size": 4}, "padding must be given where a kernel size is even; got kernel_size=4"),
        ({"groups": 4}, "divisible by groups"),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises(ValueError, match=words):
        ConvBNAct2d(**{"in_channels": 6, "out_channels": 8, "kernel_size": 3, **arguments})
