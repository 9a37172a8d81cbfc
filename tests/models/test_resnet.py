"""The ten builders against the real torchvision: names, initial weights, training and inference."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fused_resnet import models
from fused_resnet.ops import use_backend

BUILDERS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
# Odd sizes in every stage (20, 10, 5, 3, 2), and 8 values for each channel of the last norms.
IMAGE_SIZE, BATCH_SIZE, STEPS = 40, 2, 3
# Of each kind of block one builder takes all steps. The others differ in depth and width only, which one step shows:
# its gradients, updated weights and statistics, and then an output in eval mode.
SEVERAL_STEPS = ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2")
# A residual network with random weights is chaotic: three steps turn float64's 1e-16 into 1e-7. With the last norm of
# every block at a fifth, as training leaves them, it is not: 1e-13 was seen. A wrong formula, a missed update or a
# swapped operand shows at 1e-3 and above.
LAST_NORM_WEIGHT = 0.2
FLOAT64_TOLERANCE = 1e-9


@pytest.fixture(scope="module", params=BUILDERS)
def pair(request):
    """(ours, torchvision's, steps to train), built from one seed."""
    torch.manual_seed(1)
    ours = getattr(models, request.param)(num_classes=10)
    torch.manual_seed(1)
    theirs = getattr(torchvision.models, request.param)(num_classes=10)
    return ours, theirs, STEPS if request.param in SEVERAL_STEPS else 1


def test_same_names_and_bitwise_the_same_initial_weights(pair):
    ours, theirs, _ = pair
    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name
    for attribute in ("inplanes", "dilation", "groups", "base_width"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)


def test_training_and_inference_in_float64(pair):
    """Per-tensor relative distance of losses, last gradients, weights, running statistics and eval outputs."""
    ours, theirs, steps = pair
    expected = train(well_conditioned(copy.deepcopy(theirs)).double(), steps)
    with use_backend("reference"):  # the only one that takes float64; else this would be ATen's own batch_norm
        got = train(well_conditioned(copy.deepcopy(ours)).double(), steps)
    assert got.tensors.keys() == expected.tensors.keys()
    distances = {name: distance(got.tensors[name], expected.tensors[name]) for name in expected.tensors}
    worst = max(distances, key=distances.__getitem__)
    assert distances[worst] < FLOAT64_TOLERANCE, (worst, distances[worst])
    assert all(torch.isfinite(tensor).all() for tensor in expected.tensors.values())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_float32_channels_last_is_as_accurate_as_torchvision(name, device):
    """Against float64, our error is at most twice torchvision's own in float32, over all tensors of a kind.

    One tensor's error is a draw of rounding noise that scatters by more than two; its mean over all running statistics
    does not. Gradients jump where rounding carries a value across a ReLU's kink: a few such values among those of the
    last stages move all gradients by a few percent, in one run and not in the next, so that much is allowed on top.
    """
    torch.manual_seed(1)
    theirs = well_conditioned(getattr(torchvision.models, name)(num_classes=10))
    ours = getattr(models, name)(num_classes=10)
    ours.load_state_dict(theirs.state_dict())
    truth = train(copy.deepcopy(theirs).double(), steps=1, learning_rate=0.0)
    expected, got = (
        train(model.to(device, memory_format=torch.channels_last), steps=1, learning_rate=0.0)
        for model in (theirs, ours)
    )
    for kind, allowance in {"statistics": 0.0, "eval": 1e-6, "gradient": 5e-2}.items():
        error, their_error = got.distance_to(truth, kind), expected.distance_to(truth, kind)
        assert their_error > 0
        assert error <= 2 * their_error + allowance, kind
    # And no one gradient is far off: a wrong one is about as far from the truth as it is long.
    gradients = [name for name in truth.tensors if name.startswith("gradient.")]
    worst = max(gradients, key=lambda name: distance(got.tensors[name], truth.tensors[name]))
    assert distance(got.tensors[worst], truth.tensors[worst]) < 0.3, worst


def test_output_keeps_no_trace_of_the_memory_format():
    torch.manual_seed(1)
    model = models.resnet18(num_classes=5).double().eval()
    x = torch.randn(2, 3, 65, 47, dtype=torch.float64)  # odd sizes: every stride rounds
    expected = model(x)
    got = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@dataclass
class Record:
    """What training leaves: "loss.0", "gradient.fc.bias", "weight.fc.bias", "statistics.bn1.running_mean", "eval"."""

    tensors: dict[str, Tensor]

    def distance_to(self, truth: Record, kind: str) -> float:
        """The relative distance to the truth, averaged over the tensors of this kind."""
        names = [name for name in truth.tensors if name.split(".")[0] == kind]
        return sum(distance(self.tensors[name], truth.tensors[name]) for name in names) / len(names)


def well_conditioned(model: nn.Module) -> nn.Module:
    for block in model.modules():
        if hasattr(block, "downsample"):
            nn.init.constant_(getattr(block, "bn3", block.bn2).weight, LAST_NORM_WEIGHT)
    return model


def train(model: nn.Module, steps: int = STEPS, learning_rate: float = 0.01) -> Record:
    """SGD with momentum on random images and labels, always the same; then a forward in eval mode."""
    device, dtype = model.fc.weight.device, model.fc.weight.dtype
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(steps + 1, BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(device, dtype)
    labels = torch.randint(10, (BATCH_SIZE,), generator=generator).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, weight_decay=1e-4)
    tensors = {}
    model.train()
    for step in range(steps):
        loss = F.cross_entropy(model(images[step]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tensors[f"loss.{step}"] = loss.detach()
    with torch.inference_mode():
        tensors["eval"] = model.eval()(images[-1])
    tensors |= {f"statistics.{name}": buffer for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        tensors |= {f"weight.{name}": parameter.detach(), f"gradient.{name}": parameter.grad}
    return Record(tensors)


def distance(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|, in float64."""
    assert got.shape == expected.shape
    got, expected = got.detach().double().cpu(), expected.double().cpu()
    return (torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected)).item()
