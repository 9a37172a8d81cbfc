"""Is the fused_resnet that is installed here whole? To be run outside the sources, in an environment of its own.

Its extension is there, it shares torch's OpenMP runtime, and a network trains and runs frozen with the numbers of plain
PyTorch. Ends with an AssertionError if not.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch

import fused_resnet
import fused_resnet.kernels
from fused_resnet import _C

HERE = Path(fused_resnet.__file__).parent
MAPS = Path("/proc/self/maps")


def check() -> None:
    sources = Path(__file__).resolve().parents[1]
    for module in (fused_resnet, fused_resnet.kernels, _C):
        assert module.__file__ is not None and not Path(module.__file__).is_relative_to(sources), module.__file__
    assert _C.build_info()["version"] == fused_resnet.__version__
    if MAPS.exists():
        runtimes = {line.split()[-1] for line in MAPS.read_text().splitlines() if "libgomp" in line}
        assert len(runtimes) == 1, f"OpenMP runtimes in one process: {sorted(runtimes)}"

    torch.manual_seed(0)
    fused = fused_resnet.resnet18(num_classes=5).to(memory_format=torch.channels_last)
    plain = fused_resnet.unfuse(copy.deepcopy(fused))
    images = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    with fused_resnet.use_backend("native"):  # raises, with the reasons, if the extension cannot run here
        fused.eval()(images)
    for model in (fused, plain):
        model.train()(images).square().sum().backward()
    gradients = [model.conv1.weight.grad for model in (fused, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[1].abs().max()))
    frozen = fused_resnet.freeze(fused.eval(), images)
    with torch.inference_mode():
        torch.testing.assert_close(frozen(images), plain.eval()(images), rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    check()
    print(f"fused_resnet {fused_resnet.__version__} in {HERE} is whole (torch {torch.__version__})")
