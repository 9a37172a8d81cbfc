#!/bin/sh
# Everything that a machine with an NVIDIA GPU can tell, without network: benchmarks/run_gpu.sh [phase...]
#
#   phases: build test ops blocks models tune report (all, in this order, if none is named)
#   PYTHON=python3      the interpreter, with torch, triton, pytest, rich in it; nothing is installed but this package
#   OUT=./gpu_results   where results, logs and summary.md go; a second call goes on where the first one stopped
#   BUDGET_ops=420      seconds of a phase in this call; BUDGET=540 of the call
#   --dry               no GPU: the reference, tiny shapes, nothing measured that means anything
#   --pack --from DIR   for machines that keep and give back few files; see `benchmarks/run_gpu.sh --help`
#
# Exit status: 0 all done; 1 something failed (summary.md says what); 75 time was up: call again.
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.run_gpu "$@"
