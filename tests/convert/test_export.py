"""An exported program is of PyTorch's own ops: what other tools do to it, they do to all of it."""

from __future__ import annotations

import pytest
import torch

import fused_resnet
from fused_resnet import freeze, fuse
from fused_resnet.modules import BasicBlock, ConvBNAct2d
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
