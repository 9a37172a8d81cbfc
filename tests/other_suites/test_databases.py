"""PyTorch's own databases of modules and ops, run through ours: what passes there for PyTorch's passes for ours."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet import BatchNormAct2d
from fused_resnet.modules import ConvBNAct2d
from fused_resnet.ops import bn_act, conv_bn_act
from tests.accuracy import assert_at_most_twice

pytest.importorskip("expecttest", reason="PyTorch's databases need expecttest")
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
(NORM,) = (info for info in module_db if info.name == "nn.BatchNorm2d")
OPS = {info.name: info for info in op_db if info.variant_test_name == ""}


def module_samples(dtype: torch.dtype, training: bool) -> Iterator[Any]:
    arguments = {"device": "cpu", "dtype": dtype, "requires_grad": True, "training": training}
    return iter(NORM.module_inputs_func(NORM, **arguments))


def samples(name: str, dtype: torch.dtype) -> list[Any]:
    return [
        sample
        for sample in OPS[f"nn.functional.{name}"].sample_inputs("cpu", dtype, requires_grad=True)
        if sample.input.dim() == 4
    ]


def outcome(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The output and every gradient."""
    out = function()
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def assert_alike(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> None:
    for index, (actual, baseline, wide) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert_at_most_twice(actual, baseline, wide, what=f"result {index}", terms=max(1, exact[0].numel()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_norm_modules(dtype: torch.dtype, training: bool):
    for sample in module_samples(dtype, training):
        given, forward = sample.constructor_input, sample.forward_input
        torch.manual_seed(0)
        theirs = nn.BatchNorm2d(*given.args, **given.kwargs, dtype=dtype).train(training)
        ours = BatchNormAct2d(*given.args, **given.kwargs, dtype=dtype, activation=None).train(training)
        ours.load_state_dict(theirs.state_dict())
        assert list(ours.state_dict()) == list(theirs.state_dict())
        found = []
        for module, to in ((ours, dtype), (theirs, dtype), (copy.deepcopy(theirs).double(), torch.float64)):
            x = forward.args[0].detach().to(to).requires_grad_()
            leaves = [x, *module.parameters()]
            found.append([*outcome(lambda m=module, x=x: m(x), leaves), *[b.double() for b in module.buffers()]])
        results = len(found[0]) - len(list(ours.buffers()))
        assert_alike(*(each[:results] for each in found))
        for actual, expected in zip(found[0][results:], found[1][results:], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-2 if dtype in DTYPES[2:] else 1e-5, atol=1e-5)
        twin = pickle.loads(pickle.dumps(ours)).eval()
        assert torch.equal(twin(x.to(dtype)), ours.eval()(x.to(dtype)))
        assert repr(ours).startswith("BatchNormAct2d(")


def test_errors_of_batch_norm_modules():
    arguments = {"device": "cpu", "dtype": torch.float32, "requires_grad": False, "training": True}
    errors = list(NORM.module_error_inputs_func(NORM, **arguments))
    assert errors
    for error in errors:
        given = error.module_error_input.constructor_input
        with pytest.raises(error.error_type, match="eps must be"):
            module = BatchNormAct2d(*given.args, **given.kwargs)
            forward = error.module_error_input.forward_input
            module(*forward.args, **forward.kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_norm_samples(dtype: torch.dtype):
    taken = samples("batch_norm", dtype)
    assert taken
    for sample in taken:
        mean, var, *affine = [*sample.args, None, None][:4]
        weight, bias = sample.kwargs.get("weight", affine[0]), sample.kwargs.get("bias", affine[1])
        more = {name: sample.kwargs[name] for name in ("training", "momentum", "eps") if name in sample.kwargs}
        found = []
        for function, to in ((bn_act, dtype), (None, dtype), (None, torch.float64)):
            x, w, b = (None if t is None else t.detach().to(to).requires_grad_() for t in (sample.input, weight, bias))
            m, v = (None if t is None else t.detach().to(to, copy=True) for t in (mean, var))
            leaves = [leaf for leaf in (x, w, b) if leaf is not None]
            if function is None:
                found.append(outcome(partial(F.batch_norm, x, m, v, w, b, **more), leaves))
            else:
                found.append(outcome(partial(bn_act, x, w, b, m, v, activation=None, **more), leaves))
        assert_alike(*found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolution_samples(dtype: torch.dtype):
    """With statistics and parameters of a norm that leaves the convolution's result as it is, and one that does not."""
    taken = [sample for sample in samples("conv2d", dtype) if not isinstance(sample.kwargs.get("padding", 0), str)]
    assert taken
    for sample in taken:
        weight, filters = sample.args[0], len(sample.args[0])
        more = {
            name: sample.kwargs[name] for name in ("stride", "padding", "dilation", "groups") if name in sample.kwargs
        }
        for vectors in ([torch.ones(filters), torch.zeros(filters)] * 2, [torch.rand(filters) + 0.5 for _ in range(4)]):
            w, b, v, m = (vector.to(dtype) for vector in vectors)
            found = []
            for ours, to in ((True, dtype), (False, dtype), (False, torch.float64)):
                x, k = (tensor.detach().to(to).requires_grad_() for tensor in (sample.input, weight))
                norm = [vector.to(to) for vector in (w, b, m, v)]

                def call(ours=ours, x=x, k=k, norm=norm, more=more) -> Tensor:
                    if ours:
                        return conv_bn_act(x, k, *norm, **more)
                    weight, bias, mean, var = norm
                    return F.relu(F.batch_norm(F.conv2d(x, k, **more), mean, var, weight, bias))

                found.append(outcome(call, [x, k]))
                with torch.no_grad():
                    found[-1].append(call())
            assert_alike(*found)


def test_convolution_errors():
    """What PyTorch refuses of a convolution, ConvBNAct2d and conv_bn_act refuse with an error of the same class."""
    seen = 0
    for error in OPS["nn.functional.conv2d"].error_inputs("cpu"):
        sample = error.sample_input
        weight = sample.args[0]
        if not isinstance(weight, Tensor) or weight.dim() != 4 or sample.input.dim() != 4:
            continue
        more = {
            name: sample.kwargs[name] for name in ("stride", "padding", "dilation", "groups") if name in sample.kwargs
        }
        vectors = [torch.ones(len(weight)) for _ in range(4)]
        for call in (F.conv2d, lambda x, weight, vectors=vectors, **more: conv_bn_act(x, weight, *vectors, **more)):
            with pytest.raises(error.error_type):
                call(sample.input, weight, **more)
        seen += 1
    assert seen
    module = ConvBNAct2d(3, 4, 3, padding=0)
    for x in (torch.ones(1, 2, 5, 5), torch.ones(1, 3, 5, 5).double(), torch.ones(1, 3, 1, 1)):
        for training in (True, False):
            with pytest.raises(RuntimeError):
                module.train(training)(x)
