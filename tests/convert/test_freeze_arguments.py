"""What freeze takes and refuses: arguments, images, bytes; and a CUDA graph."""

from __future__ import annotations

import copy

import pytest
import torch

import fused_resnet
from fused_resnet.frozen import freeze
from fused_resnet.models import cifar_resnet20
from tests.convert.test_freeze import make

X = torch.randn(1, 3, 16, 16)


@pytest.mark.parametrize(
    ("args", "settings", "error", "message"),
    [
        ((lambda x: x, X), {}, TypeError, "model must be a torch.nn.Module; got function"),
        (("resnet50", X), {}, TypeError, "model must be a torch.nn.Module; got str"),
        ((cifar_resnet20(), None), {}, TypeError, "example_input must be a Tensor; got NoneType"),
        ((cifar_resnet20(), (1, 3, 16, 16)), {}, TypeError, "example_input must be a Tensor; got tuple"),
        ((cifar_resnet20(), X.int()), {}, TypeError, "example_input must have dtype .* got torch.int32"),
        ((cifar_resnet20(), X[0]), {}, ValueError, "example_input must have 4 dimensions .* got 3"),
        (
            (cifar_resnet20(), X.to("meta")),
            {},
            ValueError,
            "example_input must be on the model's device, cpu; got meta",
        ),
        ((cifar_resnet20(), X), {"dtype": "bf16"}, TypeError, "dtype must be one of .* or None; got 'bf16'"),
        ((cifar_resnet20(), X), {"dtype": torch.int8}, TypeError, "dtype must be one of .* got torch.int8"),
        (
            (cifar_resnet20(), X),
            {"dtype": torch.float8_e5m2},
            TypeError,
            "dtype must be one of .* got torch.float8_e5m2",
        ),
        ((cifar_resnet20(), X), {"cuda_graph": True}, ValueError, "cuda_graph must be False for a model on cpu"),
    ],
)
def test_bad_arguments(args, settings, error, message):
    with pytest.raises(error, match=message):
        freeze(*args, **settings)


def test_bad_images():
    frozen = freeze(make("cifar_resnet20"), X)
    for bad, error in ((None, TypeError), (X[0], ValueError), (X.int(), TypeError)):
        with pytest.raises(error, match="^x must"):
            frozen(bad)
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 4 channels"):  # as PyTorch says it
        frozen(torch.randn(1, 4, 16, 16))
    with pytest.raises(RuntimeError, match=r"kernel|size|descriptor"):
        frozen(X[:, :, :0])


@pytest.mark.gpu
def test_cuda_graph():
    model, x = make("cifar_resnet20").cuda(), torch.randn(2, 3, 16, 16, device="cuda")
    frozen = freeze(model, x, dtype=torch.float32, cuda_graph=True)
    first = frozen(x)
    expected = first.clone()
    frozen(torch.randn_like(x))
    assert torch.equal(first, expected)
    torch.testing.assert_close(first, model(x), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="shape the CUDA graph was captured with"):
        frozen(torch.randn(3, 3, 16, 16, device="cuda"))
    torch.testing.assert_close(copy.deepcopy(frozen)(x), expected, rtol=1e-3, atol=1e-3)
    assert frozen.to("cuda")._graph is not None
    assert frozen.half()(x).dtype == torch.float16


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_images_of_bytes_are_normalized(dtype):
    """The numbers that bytes stand for, rounded to the dtype, are what is computed with; stem or not."""
    images = torch.randint(0, 256, (2, 3, 40, 48), dtype=torch.uint8)
    numbers = ((images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]).to(dtype)
    plain = cifar_resnet20().eval()
    for model in (fused_resnet.resnet18(num_classes=10).eval(), plain):
        frozen = fused_resnet.freeze(model, images, dtype=dtype, normalize=(MEAN, STD))
        expected = fused_resnet.freeze(model, numbers, dtype=dtype)(numbers)
        torch.testing.assert_close(frozen(images), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)
        assert torch.equal(frozen(numbers), expected)  # numbers are taken as before


@pytest.mark.parametrize(
    ("normalize", "error", "message"),
    [
        ((MEAN,), TypeError, r"normalize must be \(mean, std\)"),
        (0.5, TypeError, r"normalize must be \(mean, std\)"),
        ((("a", "b", "c"), STD), TypeError, "normalize's mean must be a float; got str"),
        ((MEAN, (1.0, 0.0, 1.0)), ValueError, "normalize's std must not be 0"),
        ((MEAN, (1.0, 1.0)), ValueError, "mean and std must be of the same length; got 3 and 2"),
        (((0.5,), (0.5,)), ValueError, r"example_input must be \(N, 1, H, W\); got shape \(1, 3, 32, 32\)"),
    ],
)
def test_normalize_of_nonsense(normalize, error, message):
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(error, match=message):
        fused_resnet.freeze(fused_resnet.resnet18(), images, normalize=normalize)


def test_bytes_without_normalize_are_refused():
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(TypeError, match="example_input must have dtype float64, float32"):
        fused_resnet.freeze(fused_resnet.resnet18(), images)
    frozen = fused_resnet.freeze(fused_resnet.resnet18().eval(), torch.zeros(1, 3, 32, 32))
    with pytest.raises(TypeError, match="or the model frozen with normalize; got torch.uint8"):
        frozen(images)
