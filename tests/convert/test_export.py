"""An exported program is of PyTorch's own ops: what other tools do to it, they do to all of it."""

from __future__ import annotations

import onnxruntime
import pytest
import torch

import fused_resnet
from fused_resnet import freeze, fuse
from fused_resnet.modules import BasicBlock, ConvBNAct2d
from tests.convert.twins import images, twins
from tests.modules.compare import randomize

MODELS = {
    "block": lambda: BasicBlock(3, 3),
    "convolution": lambda: ConvBNAct2d(3, 4, 3),
    "network": lambda: fused_resnet.resnet18(num_classes=4),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_no_op_of_ours_is_in_it(name: str, training: bool, frozen: bool):
    if training and frozen:
        pytest.skip("a frozen model does not train")
    torch.manual_seed(0)
    model, x = randomize(fuse(MODELS[name]())).train(training), torch.randn(2, 3, 33, 33)
    exported = torch.export.export(freeze(model.eval(), x) if frozen else model, (x,))
    ops = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert ops and not [op for op in ops if "fused_resnet" in op]
    module, twin = exported.module(), randomize(MODELS[name]()).train(training)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(module(x), twin(x), rtol=1e-4, atol=1e-4)
    if training:  # and the statistics have moved
        for name, buffer in twin.named_buffers():
            torch.testing.assert_close(dict(module.named_buffers())[name], buffer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["BasicBlock", "fuse, Bottleneck", "modules", "CIFAR"])
def test_onnx_of_any_batch_size(name: str, frozen: bool):
    """What ``torch.onnx.export`` writes, run by ONNX Runtime."""
    ours, plain = twins(name)
    model = freeze(ours, images()) if frozen else ours
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.onnx.export(model, (images(),), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    assert {node.domain for node in program.model_proto.graph.node} == {""}  # ONNX's own ops alone
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (argument,) = session.get_inputs()
    for x in (images(), images(3)):
        (out,) = session.run(None, {argument.name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), plain(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["BasicBlock", "modules", "CIFAR"])
def test_a_program_for_any_batch_size_height_and_width(name: str, frozen: bool, strict: bool):
    ours, plain = twins(name)
    free = torch.export.Dim.DYNAMIC
    model, shapes = freeze(ours, images()) if frozen else ours, ({0: free, 2: free, 3: free},)
    exported = torch.export.export(model, (images(),), dynamic_shapes=shapes, strict=strict).module()
    for shape in ((3, 3, 65, 49), (2, 3, 40, 64)):  # upright and across
        x = torch.randn(shape)
        torch.testing.assert_close(exported(x), plain(x), rtol=1e-4, atol=1e-4)
