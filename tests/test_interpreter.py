"""The Triton kernels in Triton's interpreter, on CPU: the ops' own tests, in a process where it is switched on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton kernels need Triton")
ROOT = Path(__file__).parents[1]

PACKED = ["tests/kernels/test_packed_ops.py", "tests/kernels/test_packed_kernels.py", "-k"]
SELECTIONS = {
    "attention": ["tests/kernels/test_attention.py", "-k", "triton and not opcheck"],
    "bands": ["tests/kernels/test_bands.py", "-k", "triton and not opcheck"],
    "pixel_loss": ["tests/kernels/test_pixel_loss.py", "-k", "triton and not opcheck and not compiles"],
    "visible_patches": [
        *("tests/kernels/test_visible_patches.py", "tests/kernels/test_color_golden.py"),
        *("-k", "triton and not opcheck and not compiles and not alone and not bad_arguments and not pil"),
    ],
    "distillation_loss": [
        *("tests/kernels/test_distillation_loss.py", "-k"),
        "(error_within and native) or extreme or noncontiguous or equal_bits or uninitialised or odd or nan_is",
    ],
    "embed_tokens": [*PACKED, "embed_tokens and triton and not opcheck"],
    "mask_tokens": [*PACKED, "mask_tokens and triton and not opcheck"],
    "sequence_add": [*PACKED, "sequence_add and triton and not opcheck"],
    "prototype_losses": ["tests/kernels/test_prototype_losses.py", "-k", "triton and not alone"],
    "sequence_norm": [*PACKED, "sequence_norm and triton and not opcheck"],
    "a whole training step": ["tests/test_official_parity.py", "-k", "every_backend and triton"],
}


@pytest.mark.parametrize("op", list(SELECTIONS))
def test_kernels_in_the_interpreter(op: str) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "PERA_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *SELECTIONS[op]]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
