"""Every Triton kernel compiles for A100, Hopper and Blackwell without a GPU, and spills nothing."""

import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton kernels need Triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are Python functions under the interpreter", allow_module_level=True)

from pera_kernels import aot

VARIANTS = list(aot.variants())


@pytest.mark.parametrize(
    ("op", "variant"), VARIANTS, ids=[f"{v.kernel.__name__}-{v.name.replace(' ', '-')}" for _, v in VARIANTS]
)
@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_compiles_without_spills(op: str, variant: aot.Variant, architecture: int) -> None:
    if architecture not in variant.architectures:
        pytest.skip(f"the kernel needs sm_{variant.least}")
    found = aot.compile_variant(variant, architecture)
    assert found.local == 0, f"{op}: {found.local} bytes a thread are spilled on sm_{architecture}"
    assert 0 < found.registers <= 255
    assert found.shared <= 227 * 1024


def test_every_kernel_is_listed() -> None:
    """A kernel without a variant would escape the check above."""
    listed = {variant.kernel.__name__ for _, variant in VARIANTS}
    written = set()
    for path in Path(aot.__file__).parent.glob("*/triton.py"):
        names = [line.split("(")[0].removeprefix("def ") for line in path.read_text().splitlines()]
        written |= {name for name in names if name.endswith("_kernel")}
    assert written == listed


def test_the_table_holds_every_variant() -> None:
    text = (Path(__file__).parents[2] / "docs" / "kernel_resources.md").read_text(encoding="utf-8")
    rows = {
        tuple(cell.strip(" `") for cell in line.split("|")[1:4]) for line in text.splitlines() if line.startswith("|")
    }
    for op, variant in VARIANTS:
        assert (op, variant.kernel.__name__, variant.name) in rows, "run python -m pera_kernels.aot"
