"""A frozen network as one call of C++: the same bits as part by part, and only while nobody has touched a part."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet import freeze
from fused_resnet.bench.dry_run import DryRun
from fused_resnet.frozen.model import FrozenModel
from fused_resnet.modules.plain import FROZEN
from fused_resnet.ops.backends.native.conv import average, takes_dtype
from fused_resnet.ops.route.context import runs_unseen

pytestmark = pytest.mark.skipif(not takes_dtype(torch.float32), reason="no C++ convolutions for this processor")


@pytest.fixture(scope="module", params=["resnet18", "resnext50_32x4d"])
def frozen(request: pytest.FixtureRequest) -> FrozenModel:
    torch.manual_seed(0)
    model = getattr(fused_resnet, request.param)(num_classes=10).eval()
    return freeze(model, torch.randn(2, 3, 64, 64))


@torch.no_grad()
def chain_of(frozen: FrozenModel, x: Tensor) -> Tensor | None:
    """By one call of C++; None where that is not how the network runs."""
    frozen(x)
    kept = frozen.module.__dict__[FROZEN]._kept
    plan = None if kept is None or not kept.snapshot.holds() else kept.plan
    chain = None if plan is None or not runs_unseen(x) else plan._chain(x)
    return None if chain is None else chain(x)


@torch.no_grad()
def by_parts(frozen: FrozenModel, x: Tensor) -> Tensor:
    """Every block and every end called alone, each a frozen module itself."""
    plan = frozen.module.__dict__[FROZEN]._kept.plan
    x = plan.stem(x)
    for stage in plan.stages:
        for block in stage.blocks:
            x = block(x)
    return plan.last(average(x).flatten(1))


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 3, 97, 33), (3, 3, 224, 224)], ids=str)
def test_the_same_bits_as_part_by_part(frozen: FrozenModel, shape: tuple[int, ...]):
    x = torch.randn(shape)
    out = chain_of(frozen, x)
    assert out is not None and out.shape == (shape[0], 10) and out.is_contiguous()
    assert torch.equal(out, by_parts(frozen, x)) and torch.equal(out, frozen(x))
    assert torch.equal(out, frozen(x.contiguous(memory_format=torch.channels_last)))


def test_whoever_watches_or_replaces_a_part_is_heard(frozen: FrozenModel):
    frozen = copy.deepcopy(frozen)
    x = torch.randn(2, 3, 64, 64)
    before = frozen(x)
    seen: list[Tensor] = []
    conv = frozen.module.layer3[1].conv1
    hook = conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(frozen(x), before, rtol=1e-4, atol=1e-5)
    assert len(seen) == 1
    hook.remove()
    assert torch.equal(frozen(x), before) and len(seen) == 1 and chain_of(frozen, x) is not None
    everywhere = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(output))
    frozen(x)
    everywhere.remove()
    assert len(seen) > 20
    conv.load_state_dict({name: tensor * 0 for name, tensor in conv.state_dict().items()})
    changed = frozen(x)
    assert not torch.equal(changed, before) and torch.equal(changed, by_parts(frozen, x))
    frozen.module.fc.load_state_dict({name: tensor * 2 for name, tensor in frozen.module.fc.state_dict().items()})
    torch.testing.assert_close(frozen(x), changed * 2)
    frozen.module.fc = nn.Identity()
    assert frozen(x).shape[1] > 10 and chain_of(frozen, x) is None


@torch.no_grad()
def test_copies_and_other_dtypes_have_their_own(frozen: FrozenModel):
    x = torch.randn(2, 3, 64, 64)
    before = frozen(x)
    twin = copy.deepcopy(frozen)
    assert torch.equal(twin(x), before)
    twin.module.fc.load_state_dict({name: tensor * 2 for name, tensor in twin.module.fc.state_dict().items()})
    torch.testing.assert_close(twin(x), before * 2)
    assert torch.equal(frozen(x), before)
    half = twin.to(torch.bfloat16)(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), before * 2, rtol=0.1, atol=0.1)
    saved = io.BytesIO()
    torch.save(frozen, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=False)(x), before)


@torch.no_grad()
def test_a_network_that_is_not_all_ours_runs_part_by_part(frozen: FrozenModel):
    x = torch.randn(2, 3, 64, 64)
    with DryRun():  # sees every op
        assert chain_of(frozen, x) is None
    with fused_resnet.use_backend("reference"):
        assert chain_of(frozen, x) is None
    model = fused_resnet.resnet18(num_classes=10).eval()
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.fc = nn.Linear(2048, 10)
    other = freeze(model, x)
    assert chain_of(other, x) is None and other(x).shape == (2, 10)
    assert other(x[:0]).shape == (0, 10)


@torch.no_grad()
def test_a_stage_alone_hears_of_what_happens_inside_and_is_copied(frozen: FrozenModel):
    stage = copy.deepcopy(frozen.module.layer2)
    x = torch.randn(2, stage[0].conv1.in_channels, 16, 16)
    before = stage(x)
    kept = stage.__dict__[FROZEN]._kept
    assert [chain is not None for chain in kept.plan._chains.values()] == [True]
    for twin in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        assert torch.equal(twin(x), before) and twin.__dict__[FROZEN]._kept is not kept
    seen: list[Tensor] = []
    stage.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert torch.equal(stage(x), before) and len(seen) == 1
    assert stage.__dict__[FROZEN]._kept is kept  # its own hooks are around it
    block = copy.deepcopy(stage[1])
    for conv in (block.conv1, block.conv2):
        conv.load_state_dict({name: tensor * 2 for name, tensor in conv.state_dict().items()})
    stage[1] = block
    after, by_parts = stage(x), x
    for part in stage:
        by_parts = part(by_parts)
    assert torch.equal(after, by_parts) and not torch.equal(after, before)


@torch.no_grad()
def test_stages_go_with_their_last_name(frozen: FrozenModel):
    stage = copy.deepcopy(frozen.module.layer2)
    stage(torch.randn(1, stage[0].conv1.in_channels, 8, 8))
    gone = weakref.ref(stage)
    gc.disable()  # no collector is needed
    try:
        del stage
        assert gone() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_another_default_device_changes_nothing(frozen: FrozenModel):
    x = torch.randn(2, 3, 64, 64)
    before = frozen(x)
    with torch.device("meta"):
        again = copy.deepcopy(frozen)(x)
    assert torch.equal(again, before)
