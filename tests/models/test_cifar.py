"""The paper's CIFAR networks and their plain twins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fused_resnet import models
from fused_resnet.models.cifar import ZeroPadShortcut

# He et al. 2015, table 6: millions of parameters.
PAPER_MILLIONS = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7}


@pytest.mark.parametrize("depth", PAPER_MILLIONS)
def test_parameter_counts_are_the_papers_and_shortcuts_have_none(depth):
    residual = getattr(models, f"cifar_resnet{depth}")()
    plain = getattr(models, f"cifar_plain{depth}")()
    millions = sum(parameter.numel() for parameter in residual.parameters()) / 1e6
    assert f"{millions:.{1 if depth == 110 else 2}f}" == str(PAPER_MILLIONS[depth])
    layers = [m for m in residual.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) == depth
    shapes = {name: tensor.shape for name, tensor in residual.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in plain.state_dict().items()}


@pytest.mark.parametrize("shortcut", [True, False])
def test_stages_have_the_papers_shapes(shortcut):
    """Table of section 4.2: outputs of 32x32, 16x16 and 8x8 with 16, 32 and 64 channels."""
    model = models.CIFARResNet(20, num_classes=7, shortcut=shortcut)
    shapes = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert shapes == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_twins_differ_only_by_adding_x(shortcut, training):
    """Loss, logits, gradients and buffers against the definition written out, for both twins from one state_dict."""
    torch.manual_seed(1)
    state = models.CIFARResNet(20).state_dict()
    for name, tensor in state.items():
        if name.endswith(("running_var", "running_mean")):
            tensor.uniform_(0.5, 1.5)
    images = torch.randn(4, 3, 31, 29, dtype=torch.float64)  # odd sizes: every second pixel, rounded up
    results = []
    for forward in (lambda model, x: model(x), lambda model, x: written_out(model, x, shortcut)):
        model = models.CIFARResNet(20, shortcut=shortcut)
        model.load_state_dict(state)
        model.double().train(training)
        logits = forward(model, images)
        F.cross_entropy(logits, torch.tensor([0, 3, 5, 9])).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((logits.detach(), gradients, dict(model.named_buffers())))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def written_out(model, x, shortcut):
    x = F.relu(model.bn1(model.conv1(x)))
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            out = F.relu(block.bn1(block.conv1(x)))
            out = block.bn2(block.conv2(out))
            if shortcut:
                if out.shape != x.shape:
                    x = x[:, :, ::2, ::2]
                    x = torch.cat([x, torch.zeros_like(x)], dim=1)
                out = out + x
            x = F.relu(out)
    return model.fc(x.mean((2, 3)))


def test_a_residual_network_of_zeros_is_its_shortcuts():
    """With every last norm at zero, the features are the stem's own, in the first 16 channels of 64."""
    model = models.cifar_resnet20().eval()
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            torch.nn.init.zeros_(block.bn2.weight)
    images = torch.randn(2, 3, 32, 32)
    stem = torch.relu(model.bn1(model.conv1(images)))
    features = model.layer3(model.layer2(model.layer1(stem)))
    torch.testing.assert_close(features[:, :16], stem[:, :, ::4, ::4])
    assert not features[:, 16:].any()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(8, 6), (5, 4)])
def test_zero_pad_shortcut(memory_format, size):
    x = torch.arange(2 * 3 * size[0] * size[1], dtype=torch.float64).reshape(2, 3, *size)
    out = ZeroPadShortcut(3, 7, stride=2)(x.contiguous(memory_format=memory_format))
    assert out.shape == (2, 7, -(-size[0] // 2), -(-size[1] // 2))
    assert torch.equal(out[:, :3], x[:, :, ::2, ::2])
    assert not out[:, 3:].any()
    if size[0] % 2 == 0:  # so that the add behind it reads memory in one order
        assert out.is_contiguous(memory_format=memory_format)
    assert repr(ZeroPadShortcut(3, 7, stride=2)) == "ZeroPadShortcut(3, 7, stride=2)"


def test_convolutions_start_from_hes_distribution():
    """Variance 2 / (9 * outputs); 64 * 64 * 9 draws put the sample variance within 3% (5 standard deviations)."""
    torch.manual_seed(1)
    for model in (models.cifar_resnet20(), models.cifar_plain20()):
        weight = model.layer3[1].conv1.weight
        assert weight.var().item() == pytest.approx(2 / (9 * 64), rel=0.04)
        assert weight.mean().abs() < 5 * (2 / (9 * 64) / weight.numel()) ** 0.5


@pytest.mark.parametrize("shortcut", [True, False])
def test_a_few_steps_overfit_one_batch(shortcut):
    torch.manual_seed(1)
    model = models.CIFARResNet(8, shortcut=shortcut).to(memory_format=torch.channels_last)
    images = torch.randn(16, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.arange(16) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


@pytest.mark.parametrize("depth", [0, 2, 7, 21, -4])
def test_depth_must_be_6n_plus_2(depth):
    with pytest.raises(ValueError, match=rf"depth must be 6n \+ 2 .*got {depth}"):
        models.CIFARResNet(depth)
