"""The memory of large outputs and of the C++ kernels: used again, within a limit, and in all else PyTorch's own."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fused_resnet
from fused_resnet import ops
from tests.ops.step import NEEDS_NATIVE

pytestmark = NEEDS_NATIVE
ELEMENTS = 2 << 20
MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    from fused_resnet.ops.backends.native import memory

    gc.collect()
    ops.empty_cache()
    yield
    ops.limit_kept_memory(memory.LIMIT)
    ops.empty_cache()


def kept_bytes() -> int:
    from fused_resnet.ops.backends.native import memory

    return memory.kept_bytes()


def taken(elements: int = ELEMENTS) -> Tensor:
    from fused_resnet.ops.backends.native.norm import empty_strided

    return empty_strided((1, 1, 1, elements), (elements, elements, elements, 1), torch.float32)


def test_what_is_freed_is_used_again() -> None:
    first, second = taken(), taken()
    address = first.data_ptr()
    assert address != second.data_ptr() and kept_bytes() == 0
    del first
    assert kept_bytes() == 8 * MIB
    again = taken()
    assert again.data_ptr() == address and kept_bytes() == 0
    assert taken(ELEMENTS + 16).data_ptr() not in (address, second.data_ptr())


@pytest.mark.parametrize(
    "hold",
    [
        lambda out: out[..., 5:],
        lambda out: out.detach(),
        lambda out: out.untyped_storage(),
        lambda out: out.numpy(),
        lambda out: torch.utils.dlpack.to_dlpack(out),
        lambda out: out.requires_grad_().square().grad_fn,
        lambda out: memoryview(out.numpy()),
    ],
    ids=["view", "detached", "storage", "numpy", "dlpack", "autograd", "buffer"],
)
def test_what_somebody_has_is_not(hold) -> None:
    out = taken()
    address, held = out.data_ptr(), hold(out)
    del out
    assert kept_bytes() == 0 and taken().data_ptr() != address
    del held
    gc.collect()
    assert kept_bytes() > 0


def test_outputs_are_resized_as_pytorchs_are() -> None:
    block = fused_resnet.BasicBlock(64, 64).to(memory_format=torch.channels_last)
    x = torch.randn(4, 64, 128, 64).to(memory_format=torch.channels_last)
    out = block(x).detach()
    assert out.nbytes >= 4 * MIB and out.untyped_storage().resizable()
    out.resize_(8, 64, 128, 64).fill_(1.0)
    torch.add(torch.ones(3), torch.ones(3), out=out)
    assert torch.equal(out, torch.full((3,), 2.0))
    out.untyped_storage().resize_(0)
    del out
    assert block(x).isfinite().all()  # what was resized is not handed out


def test_shared_memory_is_not_handed_out() -> None:
    assert taken().share_memory_().is_shared()
    assert not taken().is_shared()


@pytest.mark.parametrize("limit", [0, 40 * MIB, 200 * MIB])
def test_the_limit_holds(limit: int) -> None:
    ops.limit_kept_memory(limit)
    block = fused_resnet.BasicBlock(64, 64).to(memory_format=torch.channels_last)
    for size in (96, 100, 104, 64, 104):
        x = torch.randn(4, 64, size, size).to(memory_format=torch.channels_last).requires_grad_()
        block(x).sum().backward()
        block.zero_grad()
        assert kept_bytes() <= limit
    assert (kept_bytes() > 0) == (limit > 0)
    many = [taken(ELEMENTS + i) for i in range(40)]
    del many
    assert kept_bytes() <= limit
    ops.empty_cache()
    assert kept_bytes() == 0


@pytest.mark.parametrize(("limit", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("1", TypeError)])
def test_a_limit_that_is_none(limit, error) -> None:
    with pytest.raises(error, match="nbytes must be"):
        ops.limit_kept_memory(limit)


def test_threads_never_share_an_output() -> None:
    failures = []

    def work(number: int) -> None:
        for _ in range(300):
            out = taken(ELEMENTS // 2)
            out[..., :64] = number
            other = taken(ELEMENTS // 2)
            other[..., :64] = -number
            if not (out[..., :64] == number).all() or out.data_ptr() == other.data_ptr():
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
