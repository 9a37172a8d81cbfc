"""The law of layers: every file's imports, read from its syntax tree, point downward.

models -> modules -> ops -> kernels, _C;   all of these but models -> arguments
    ops: public ops and autograd -> route -> (by name) backends -> reference, plan -> layout
convert -> models, modules, ops;   frozen -> convert and below;   cuda_graph -> nothing;
bench, training, info -> anything in the package;   nothing -> tests, benchmarks
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "fused_resnet"

ANYTHING = {
    *("arguments", "models", "modules", "ops", "convert", "frozen"),
    *("cuda_graph", "bench", "training", "info", "version"),
}
MAY_IMPORT = {
    "arguments": set(),
    "kernels": {"arguments"},
    "ops": {"arguments", "kernels", "_C"},
    "modules": {"arguments", "ops"},
    "models": {"modules"},
    "convert": {"arguments", "models", "modules", "ops"},
    "frozen": {"arguments", "models", "modules", "ops", "convert"},
    "cuda_graph": set(),
    "bench": ANYTHING,
    "training": ANYTHING,
    "info": ANYTHING | {"_C"},
    "version": set(),
    "__init__": ANYTHING,
    "__main__": ANYTHING,
}
MAY_IMPORT_IN_OPS = {
    "layout": set(),
    "checks": set(),
    "reference": {"layout"},
    "schemas": {"layout", "reference"},
    "plan": {"layout"},
    "backends": {"layout", "reference", "plan"},
    "route": {"layout", "reference", "plan", "schemas"},
}
"""Inside ops; every other file there holds public ops, autograd or what those share, and may not import backends."""
NEVER = {"tests", "benchmarks", "kernels"}  # as top-level names
# Needed by some commands only, so never imported by a module's top level outside the code of those commands.
EXTRAS = {
    *("rich", "matplotlib", "sklearn", "jinja2", "torchvision", "timm"),
    *("onnx", "onnxruntime", "openvino", "pydantic", "scipy"),
}
READS_ENVIRONMENT = {f"fused_resnet/{name}.py" for name in ("ops/route/request", "ops/plan/plan_file", "info")}


def package_files() -> list[Path]:
    return [path for folder in (PACKAGE, "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, PACKAGE)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def imported_modules(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Absolute dotted names of everything a file imports, wherever in it; ``from a import b`` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")
            above = above[: len(above) - node.level + is_package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    here = layer(module)
    if here not in MAY_IMPORT:
        return [f"{module}: the layer {here!r} has no row in the law"]
    found = []
    for name in imported_modules(ast.parse(source), module, is_package):
        top, *_ = name.split(".")
        if top in NEVER:
            found.append(f"{module} imports {name}")
        elif top == PACKAGE and name != PACKAGE:
            there = layer(name)
            known = there in MAY_IMPORT or there == "_C"  # else a name of the package's own, such as a function
            if there != here and there != "version" and (not known or there not in MAY_IMPORT[here]):
                found.append(f"{module} imports {name}")
    return found


def violations_in_ops(source: str, module: str, is_package: bool = False) -> list[str]:
    _, _, here, *_ = [*module.split("."), "__init__"]
    found = []
    for name in imported_modules(ast.parse(source), module, is_package):
        if not name.startswith(f"{PACKAGE}.ops."):
            continue
        there = name.split(".")[2]
        allowed = MAY_IMPORT_IN_OPS.get(here)
        if there != here and (there == "backends" if allowed is None else there not in allowed):
            found.append(f"{module} imports {name}")
    return found


def test_every_import_in_ops_points_downward():
    found = []
    for path in sorted((ROOT / PACKAGE / "ops").rglob("*.py")):
        found += violations_in_ops(path.read_text(), module_name(path), path.name == "__init__.py")
    assert not found
    assert violations_in_ops("from fused_resnet.ops.route import routes", "fused_resnet.ops.backends.native.conv")
    assert violations_in_ops("from fused_resnet.ops.backends import native", "fused_resnet.ops.bn_act")


def test_no_imports_go_in_circles():
    modules = {module_name(path): path for path in package_files()}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        found = imported_modules(ast.parse(path.read_text()), module, path.name == "__init__.py")
        known = {name if name in modules else name.rpartition(".")[0] for name in found}
        graph[module] = {name for name in known if name in modules and name not in (module, PACKAGE)}
    for _ in graphlib.TopologicalSorter(graph).static_order():  # raises a CycleError that names them
        pass


def test_every_import_points_downward():
    assert package_files()
    found = []
    for path in package_files():
        found += violations(path.read_text(), module_name(path), path.name == "__init__.py")
    assert not found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fused_resnet.kernels.bn_act", "from fused_resnet.ops import reference"),
        ("fused_resnet.kernels.bn_act", "from ..ops.reference import bn_apply"),
        ("fused_resnet.ops.bn_act", "import fused_resnet.modules.bn_act"),
        ("fused_resnet.ops.bn_act", "def f():\n    from fused_resnet import models"),
        ("fused_resnet.modules.bn_act", "from fused_resnet import _C"),
        ("fused_resnet.modules.bn_act", "from fused_resnet.kernels import bn_act"),
        ("fused_resnet.modules.bn_act", "import importlib\nimportlib.import_module('fused_resnet.kernels')"),
        ("fused_resnet.models.resnet", "from fused_resnet.ops import bn_act"),
        ("fused_resnet.models.resnet", "from fused_resnet import resnet18"),
        ("fused_resnet.convert.fuse", "from fused_resnet.training import demo"),
        ("fused_resnet.bench.timer", "from tests.conftest import seed"),
        ("fused_resnet.bench.timer", "import kernels"),
        ("fused_resnet.novelty", "import torch"),
    ],
)
def test_the_law_finds_what_breaks_it(module: str, source: str):
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source", "is_package"),
    [
        ("fused_resnet.kernels", "from .bn_act import bn_apply", True),
        ("fused_resnet.ops.bn_act", "from . import reference", False),
        ("fused_resnet.ops.backends.native", "from fused_resnet import _C", False),
        ("fused_resnet.models.resnet", "from ..modules import Bottleneck", False),
        ("fused_resnet", "from fused_resnet.version import __version__\nfrom .models.resnet import resnet18", True),
    ],
)
def test_the_law_allows_what_keeps_it(module: str, source: str, is_package: bool):
    assert not violations(source, module, is_package)


def test_environment_variables_are_read_in_their_rooms():
    readers = set()
    for path in package_files():
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        if names & {"environ", "getenv"}:
            readers.add(path.relative_to(ROOT).as_posix())
    assert readers <= READS_ENVIRONMENT
    assert "fused_resnet/ops/route/request.py" in readers


def test_importing_the_package_needs_no_extras():
    code = f"import sys, fused_resnet; print(*sorted({EXTRAS!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
