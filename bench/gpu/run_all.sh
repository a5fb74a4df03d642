#!/usr/bin/env bash
# Everything that needs a GPU, in 8 minutes on one: tests, steps, training from files, ops, memory, the loader.
#
#   bench/gpu/run_all.sh OUT --quick    in 4 minutes: correctness, the step, its kernels, the loader
#   bench/gpu/run_all.sh OUT            writes OUT/results.json, pictures, and a log of each part
#   PERA_OFFICIAL=CHECKOUT bench/gpu/run_all.sh OUT      with the published implementation's step
#
# From a checkout, installed or not. PYTHON chooses the interpreter; further options: run_all.sh OUT --help.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export PYTHONPATH="$here:$here/kernels:$here/bench${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m pera_bench.gpu "$@"
