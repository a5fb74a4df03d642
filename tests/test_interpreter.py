"""The Triton kernels in Triton's interpreter, on CPU: the ops' own tests, in a process where it is switched on."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton kernels need Triton")
ROOT = Path(__file__).parents[1]

SHARED = "tests/kernels/test_packed_kernels.py"
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
    # The two cases left out take a minute, and their kinds of groups come with the other sort of subsets.
    "add_norm": [
        *("tests/kernels/test_add_norm.py", "-k"),
        "triton and not opcheck and not False-groups3 and not True-groups2",
    ],
    "adamw_ema": ["tests/kernels/test_adamw_ema.py", "-k", "triton"],
    "unit_rows": ["tests/kernels/test_unit_rows.py", "-k", "triton and not opcheck"],
    "column_sums": ["tests/kernels/test_column_sums.py", "-k", "triton and not opcheck"],
    "partial_sums": ["tests/kernels/test_partial_sums.py"],
    "linear_gelu": ["tests/kernels/test_linear_gelu.py", "-k", "triton"],
    "gelu": ["tests/kernels/test_gelu.py", "-k", "triton and not opcheck"],
    "embed_tokens": ["tests/kernels/test_embed_tokens.py", SHARED, "-k", "embed_tokens and triton and not opcheck"],
    "mask_tokens": ["tests/kernels/test_mask_tokens.py", SHARED, "-k", "mask_tokens and triton and not opcheck"],
    "sequence_add": ["tests/kernels/test_sequence_add.py", SHARED, "-k", "sequence_add and triton and not opcheck"],
    "prototype_losses": ["tests/kernels/test_prototype_losses.py", "-k", "(triton and not alone) or without_kernels"],
    "gelu_fp8": ["tests/kernels/test_gelu_fp8.py", "-k", "triton and not cuda and not opcheck"],
    "add_norm_fp8": ["tests/kernels/test_add_norm_fp8.py", "-k", "triton and not cuda and not opcheck"],
    "quantize_rows": ["tests/kernels/test_quantize_rows.py", "-k", "triton and not cuda and not opcheck"],
    "sequence_norm": ["tests/kernels/test_sequence_norm.py", SHARED, "-k", "sequence_norm and triton and not opcheck"],
    # With drop path every kernel has its part: blocks take a subset of the sequences, the last norm takes all of them.
    "a whole training step": ["tests/test_official_parity.py", "-k", "every_backend and triton and droppath"],
}


# Torch and Triton are imported once for all selections. Answers: [exit status, what pytest printed], a line each.
RUNNER = """
import contextlib, io, json, sys
import pytest
answers = sys.stdout
for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = pytest.main(json.loads(line))
    print(json.dumps([int(status), said.getvalue()]), file=answers, flush=True)
"""


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[[list[str]], tuple[int, str]]]:
    """Runs pytest where kernels are interpreted; a process that died is followed by another one."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PERA_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    processes: list[subprocess.Popen[str]] = []

    def run(arguments: list[str]) -> tuple[int, str]:
        if not processes or processes[-1].poll() is not None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            processes.append(subprocess.Popen([sys.executable, "-c", RUNNER], cwd=ROOT, env=env, text=True, **pipes))
        process = processes[-1]
        print(json.dumps(arguments), file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer:
            return process.wait(), "the process died"
        status, said = json.loads(answer)
        return status, said

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("op", list(SELECTIONS))
def test_kernels_in_the_interpreter(op: str, interpreted: Callable[[list[str]], tuple[int, str]]) -> None:
    status, said = interpreted(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *SELECTIONS[op]])
    assert status == 0, said[-6000:]
    assert " passed" in said
