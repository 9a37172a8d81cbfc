"""``torch.fx``: our models are traced as the plain ones are, and what is traced can be saved, written and scripted."""

import copy
import importlib
import io
import pickle
import sys
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx
from torchvision.models import resnet
from torchvision.models.feature_extraction import create_feature_extractor

import fused_resnet
from fused_resnet import BatchNormAct2d, freeze, ops
from tests.convert.twins import TWINS, images, twins
from tests.modules.compare import assert_close, randomize, step

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:torch.ao.quantization"),
]
NETWORKS = ("BasicBlock", "Bottleneck", "fuse", "fuse, Bottleneck", "unfuse", "unfuse after fuse")
"""Traced node by node as torchvision's."""


def names(traced: torch.fx.GraphModule) -> list[str]:
    return [node.name for node in traced.graph.nodes]


def saved(traced: torch.fx.GraphModule, folder: Path) -> nn.Module:
    file = io.BytesIO()
    torch.save(traced, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(traced: torch.fx.GraphModule, folder: Path) -> nn.Module:
    return pickle.loads(pickle.dumps(traced))


def written(traced: torch.fx.GraphModule, folder: Path) -> nn.Module:
    traced.to_folder(folder / "written", "Written")
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module("written")
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("written", None)
        sys.modules.pop("written.module", None)
    return module.Written()


def scripted(traced: torch.fx.GraphModule, folder: Path) -> nn.Module:
    return torch.jit.script(traced)


@pytest.mark.parametrize("keep", [saved, pickled, written, scripted])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", TWINS)
def test_a_traced_model_answers_and_trains_as_the_plain_one(name: str, training: bool, keep, tmp_path: Path):
    ours, plain = twins(name, training)
    kept = keep(torch.fx.symbolic_trace(ours), tmp_path).train(training)
    found, wanted = step(kept, kept, images()), step(plain, plain, images())
    assert_close({key: found[key] for key in wanted}, wanted)
    assert found.keys() == wanted.keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_graph_is_that_of_torchvision(name: str):
    ours, plain = map(torch.fx.symbolic_trace, twins(name))
    assert names(ours) == names(plain)


@pytest.mark.parametrize("name", ["BasicBlock", "fuse, Bottleneck", "modules", "CIFAR"])
def test_a_frozen_model_is_traced(name: str, tmp_path: Path):
    ours, plain = twins(name)
    traced = torch.fx.symbolic_trace(freeze(ours, images()))
    for keep in (saved, pickled, written, scripted):
        torch.testing.assert_close(keep(traced, tmp_path)(images(3)), plain(images(3)))


def test_a_frozen_model_that_takes_bytes_cannot_be_traced():
    frozen = freeze(twins("BasicBlock")[0], images(), normalize=([0.5] * 3, [0.5] * 3))
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(frozen)


@pytest.mark.parametrize(
    "make",
    [
        lambda: resnet.resnet18(norm_layer=BatchNormAct2d, num_classes=4),
        lambda: fused_resnet.resnet18(norm_layer=BatchNormAct2d, num_classes=4),
        lambda: timm.create_model("resnet18", norm_layer=BatchNormAct2d, num_classes=4),
        lambda: timm.create_model("resnet26d", norm_layer=BatchNormAct2d, num_classes=4),
    ],
    ids=["torchvision", "ours", "timm resnet18", "timm resnet26d"],
)
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_act_is_a_leaf(make, training: bool):
    """One node of the graph, in training and eval; so its statistics move, and its mode can change, after tracing."""
    model = randomize(make()).train(training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    norms = [name for name, module in model.named_modules() if isinstance(module, BatchNormAct2d)]
    assert norms and Counter(norms) == Counter(node.target for node in traced.graph.nodes if node.target in norms)
    extracted = create_feature_extractor(copy.deepcopy(model), [norms[-1], norms[0]])
    seen: dict[str, Tensor] = {}
    for name in (norms[0], norms[-1]):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.__setitem__(name, out.detach().clone())
        )
    assert_close(step(traced, traced, images(4)), step(model, model, images(4)))
    features = extracted(images(4))
    for name in (norms[0], norms[-1]):
        torch.testing.assert_close(features[name], seen[name])
    with torch.no_grad():
        torch.testing.assert_close(traced.eval()(images()), model.eval()(images()))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*NETWORKS, "frozen"])
def test_quantization_matches_the_same_patterns(name: str, training: bool):
    """``prepare_fx``, in training ``prepare_qat_fx``, and ``convert_fx`` find convolution, norm and ReLU, and the add
    before a ReLU."""
    ours, plain = twins("BasicBlock" if name == "frozen" else name, training)
    if name == "frozen":
        if training:
            pytest.skip("a frozen model does not train")
        ours = freeze(ours, images())
    prepare, mapping = (
        (prepare_qat_fx, get_default_qat_qconfig_mapping) if training else (prepare_fx, get_default_qconfig_mapping)
    )
    kinds, answers = [], []
    for model in (ours, plain):
        prepared = prepare(model, mapping("x86"), (images(),))
        for _ in range(2):
            prepared(images())
        converted = convert_fx(prepared.eval())
        found = [type(module).__name__ for module in converted.modules() if "nn" in type(module).__module__]
        found += [getattr(node.target, "__name__", "") for node in converted.graph.nodes if node.op == "call_function"]
        kinds.append(Counter(each for each in found if each != "Module"))
        answers.append(converted(images()))
    assert kinds[0] == kinds[1] and kinds[0]["ConvReLU2d"] and kinds[0]["add_relu"]
    torch.testing.assert_close(*answers)


class OfFunctions(nn.Module):
    """A block of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        vectors = (n.weight, n.bias, n.running_mean, n.running_var)
        link = ops.ConvNorm(self.conv.weight, ops.BatchNorm(*vectors), (1, 1), (1, 1))
        y = ops.bn_act(self.conv(x), *vectors, residual=x)
        y = ops.conv_bn_act(y, self.conv.weight, *vectors, padding=1)
        y = ops.bn_act_dual(y, link.norm, x, link.norm)
        y = ops.residual_block(y, [link], None)
        return ops.conv_bn_act_pool(y, link)


@pytest.mark.parametrize("keep", [saved, pickled])
def test_a_function_is_a_node(keep, tmp_path: Path):
    model = randomize(OfFunctions())
    traced = torch.fx.symbolic_trace(model)
    functions = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    for function in (ops.bn_act, ops.conv_bn_act, ops.bn_act_dual, ops.residual_block, ops.conv_bn_act_pool):
        assert functions.count(function) == 1
    x = torch.randn(2, 4, 9, 9)
    kept = keep(traced, tmp_path)
    found, wanted = step(kept, kept, x), step(model, model, x)
    del wanted["buffer norm.num_batches_tracked"]  # of which functions know nothing
    assert found.keys() == wanted.keys()
    assert_close({key: found[key] for key in wanted}, wanted)
