"""Generated calls, the same in every run, beside plain PyTorch: equal by the accuracy rule, or an error in both.

Each kind runs in a process of its own, so that one that dies names the call it died of. By option (CONTRIBUTING.md):
more calls, and with ``_C`` under AddressSanitizer and UBSan.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import cpp
from tests.fuzz.run import SANITIZED_EXTENSION
from tests.ops.step import NEEDS_NATIVE

SHARES = {"functions": 700, "modules": 600, "raw_ops": 550, "networks": 150}
"""Of 2,000 calls."""
CALLS = int(os.environ.get("FUSED_RESNET_FUZZ_CALLS") or sum(SHARES.values()))
SANITIZED = bool(os.environ.get("FUSED_RESNET_FUZZ_SANITIZED"))
SECONDS_PER_CALL = 5 if SANITIZED else 1

pytestmark = NEEDS_NATIVE


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    variables = {
        **os.environ,
        "MALLOC_PERTURB_": "165",  # fresh and freed memory is filled with a pattern, so that what reads it differs
        "OMP_WAIT_POLICY": "passive",  # with more processes than cores, threads that wait busily take their time
        "FUSED_RESNET_BACKEND": "",
        "FUSED_RESNET_LEVEL": "",
    }
    if not SANITIZED:
        return variables
    options = cpp.sanitizer_options("address,undefined")
    build = {
        "FUSED_RESNET_BUILD": "cpu",
        "CXXFLAGS": " ".join(("-O1", "-g1", *options)),
        "LDFLAGS": " ".join(options),
    }
    folder = cpp.ROOT / "build" / "sanitized"
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={folder}", f"--build-temp={folder / 'objects'}"]
    subprocess.run(command, cwd=cpp.ROOT, env={**os.environ, **build}, check=True)
    (extension,) = folder.glob("fused_resnet/_C*.so")
    runtimes = [
        subprocess.run([cpp.compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return variables | {
        SANITIZED_EXTENSION: str(extension),
        "LD_PRELOAD": " ".join(path.strip() for path in runtimes),
        # Python and PyTorch free little at their end.
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0:handle_abort=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


@pytest.mark.slow
@pytest.mark.timeout(300 + SECONDS_PER_CALL * CALLS)
@pytest.mark.parametrize("kind", SHARES)
def test_equal_or_refused(kind: str, environment: dict[str, str], tmp_path: Path):
    count, last = max(1, round(SHARES[kind] * CALLS / sum(SHARES.values()))), tmp_path / "last.txt"
    command = [sys.executable, "-m", "tests.fuzz.run", kind, str(count), str(last)]
    done = subprocess.run(command, cwd=cpp.ROOT, env=environment, capture_output=True, text=True)
    of = last.read_text() if last.exists() and done.returncode < 0 else ""
    assert done.returncode == 0, f"exit status {done.returncode}\n{of}\n{(done.stdout + done.stderr)[-6000:]}"
    print(done.stdout)


PLANTED = {
    "a result a little off": "ours.mul(1.001)",
    "another dtype": "ours.double()",
    "an error": "ours.no_such_thing",
    "a death": "ctypes.string_at(0)",
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path):
    last = tmp_path / "last.txt"
    code = f"""
import ctypes, faulthandler, pathlib, torch
from tests.fuzz import functions, run
whole = functions.bn_act
functions.bn_act = lambda *args, **more: (lambda ours: {PLANTED[fault]})(whole(*args, **more))
faulthandler.enable()
run.run("functions", 200, pathlib.Path({str(last)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=cpp.ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and last.read_text().splitlines()[0].endswith(": bn_act"), done.stderr[-3000:]
