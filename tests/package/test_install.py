"""Wheel, sdist, `pip install .` and `pip install -e .`, each used from outside the sources."""

from __future__ import annotations

import json
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fused_resnet

IMPORTS = """
import json, fused_resnet, fused_resnet.kernels, fused_resnet._C
try:
    import kernels
    top_level_kernels = True
except ImportError:
    top_level_kernels = False
print(json.dumps({
    "package": fused_resnet.__file__,
    "kernels": fused_resnet.kernels.__file__,
    "extension": fused_resnet._C.__file__,
    "version": fused_resnet.__version__,
    "top_level_kernels": top_level_kernels,
}))
"""
TRAINS = """
import json, torch, fused_resnet
torch.manual_seed(0)
model = fused_resnet.resnet18(num_classes=5)
loss = model(torch.randn(2, 3, 64, 64)).square().sum()
loss.backward()
print(json.dumps([loss.item(), model.conv1.weight.grad.norm().item(), model.bn1.running_var.sum().item()]))
"""


@pytest.fixture(scope="session")
def wheel(sources, run, tmp_path_factory) -> Path:
    return build_wheel(sources, run, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def pure_wheel(copy_sources, run, tmp_path_factory) -> Path:
    return build_wheel(copy_sources(), run, tmp_path_factory.mktemp("wheel"), FUSED_RESNET_BUILD="none")


@pytest.fixture(scope="session")
def sdist(sources, run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    done = run([sys.executable, "setup.py", "sdist", "--dist-dir", folder], sources)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.iterdir()
    return path


def build_wheel(sources, run, folder, **variables) -> Path:
    offline = ("--no-index", "--no-deps", "--no-build-isolation")
    done = run([sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", folder, sources], sources, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.iterdir()
    return path


def test_wheel_holds_the_package_and_nothing_beside_it(wheel, sources):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "fused_resnet",
        f"fused_resnet-{fused_resnet.__version__}.dist-info",
    }
    installed = {path.relative_to(sources).as_posix() for path in (sources / "fused_resnet").rglob("*.py")}
    installed |= {f"fused_resnet/{path.relative_to(sources).as_posix()}" for path in sources.glob("kernels/**/*.py")}
    assert installed | {"fused_resnet/py.typed"} <= set(names)
    assert len([name for name in names if name.startswith("fused_resnet/_C.")]) == 1


def test_sdist_holds_every_source(sdist, sources):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    python = ("benchmarks/**/*.py", "fused_resnet/**/*.py", "kernels/**/*.py", "packaging/*.py", "tests/**/*.py")
    for pattern in ("csrc/**/*.*", "docs/*.*", "requirements/*.txt", "benchmarks/results/*.json", *python):
        files = {path.relative_to(sources).as_posix() for path in sources.glob(pattern)}
        assert files
        assert files <= names
    assert {"setup.py", "pyproject.toml", "Makefile", "mkdocs.yml", "LICENSE", "README.md", "SECURITY.md"} <= names


@pytest.mark.parametrize("form", ["wheel", "sdist", "folder", "editable"])
def test_every_form_installs_and_runs(form, environment, request):
    flags = ["--editable"] if form == "editable" else []
    environment.pip_install(request.getfixturevalue("sources" if form in ("folder", "editable") else form), *flags)
    found = json.loads(environment.python_prints("-c", IMPORTS))
    assert found["version"] == fused_resnet.__version__
    assert not found["top_level_kernels"]
    home = request.getfixturevalue("sources") if form == "editable" else environment.folder
    for name in ("package", "kernels", "extension"):
        assert Path(found[name]).resolve().is_relative_to(home.resolve()), name
    info = environment.info()
    assert info["extension"]["built"]
    assert info["extension"]["version"] == fused_resnet.__version__
    assert info["backends"]["native"] == info["backends"]["reference"] == []


def test_without_the_extension_the_models_compute_the_same(environment, wheel, pure_wheel):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    environment.pip_install(pure_wheel)
    info = environment.info()
    assert not info["extension"]["built"]
    assert "_C" in info["backends"]["native"][0]
    pure = json.loads(environment.python_prints("-c", TRAINS))
    environment.pip_install(wheel)
    assert environment.info()["extension"]["built"]
    compiled = json.loads(environment.python_prints("-c", TRAINS))
    torch.testing.assert_close(torch.tensor(pure), torch.tensor(compiled), rtol=1e-3, atol=0)


def test_without_a_compiler_it_installs_and_runs(environment, copy_sources):
    environment.pip_install(copy_sources(), PATH="/nonexistent", CXX="", FUSED_RESNET_BUILD="auto")
    assert not environment.info()["extension"]["built"]
    loss, *_ = json.loads(environment.python_prints("-c", TRAINS))
    assert loss > 0
