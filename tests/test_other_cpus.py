"""Tests of the ops once more, with the arithmetic of other CPUs and on more threads.

Libraries choose their code by the CPU. Variables of theirs make this one compute as an older one does, so that a
tolerance that holds on one CPU only is met here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CPUS = {
    "any-x86": {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "2"},
    "mkl-compatible": {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"},  # other sums of float32 products
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"},  # no bfloat16 units
    "onednn-avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "OMP_NUM_THREADS": "16"},  # none either
}
OPS = ("attention", "distillation_loss", "gelu", "koleo", "linear_gelu", "packed_kernels", "prototype_losses")
# What a CPU has no part in, and what draws its cases at random.
LEFT_OUT = "triton or opcheck or gradcheck or compile or fake or reference_in_float64 or any_shape or bad_arguments"


@pytest.mark.parametrize("cpu", CPUS)
def test_ops(cpu: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    files = [f"tests/kernels/test_{op}.py" for op in OPS]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env = {**inherited, **CPUS[cpu], "OMP_WAIT_POLICY": "PASSIVE"}  # threads beyond the cores do not spin
    done = subprocess.run(
        [*command, *files, "-k", f"not ({LEFT_OUT})"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 300
