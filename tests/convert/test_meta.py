"""Models on the meta device, which has shapes and no numbers, and back from it."""

import pytest
import torch
from torch import nn

from fused_resnet import freeze
from tests.convert.twins import FOLDED, TWINS, images, twins

pytestmark = pytest.mark.usefixtures("one_thread")


def frozen_too(name: str, frozen: bool) -> tuple[nn.Module, nn.Module]:
    ours, plain = twins(name)
    return (freeze(ours, images()) if frozen else ours), plain


PRODUCT = [*((name, False) for name in TWINS), *((name, True) for name in FOLDED)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "frozen"), PRODUCT)
def test_on_meta_shape_dtype_and_strides_are_the_plain_models(name, frozen, training, memory_format):
    if training and frozen:
        pytest.skip("a frozen model does not train")
    ours, plain = (model.to("meta").train(training) for model in frozen_too(name, frozen))
    x = images().to(memory_format=memory_format).to("meta")
    found, wanted = ours(x), plain(x)
    assert (found.device, found.shape, found.dtype) == (wanted.device, wanted.shape, wanted.dtype)
    if not frozen:
        assert found.stride() == wanted.stride()
        found.sum().backward()
        assert all(parameter.grad is not None for parameter in ours.parameters())


@pytest.mark.parametrize(("name", "frozen"), PRODUCT)
@pytest.mark.parametrize("assign", [False, True])
def test_a_model_comes_back_from_meta(name: str, frozen: bool, assign: bool):
    """By ``to_empty`` and ``load_state_dict``, or by ``load_state_dict(assign=True)`` alone."""
    ours, plain = frozen_too(name, frozen)
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    ours = ours.to("meta")
    if not assign:
        ours = ours.to_empty(device="cpu")
    ours.load_state_dict(state, assign=assign)
    with torch.no_grad():
        torch.testing.assert_close(ours(images()), plain(images()), rtol=1e-4, atol=1e-4)
