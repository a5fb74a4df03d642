"""Ahead-of-time compilation of the Triton kernels, without a GPU: registers, shared memory and spills per architecture.

``python -m pera_kernels.aot`` prints the table. Every op with Triton kernels lists in its ``triton.py`` the
``VARIANTS`` that the recipes launch.
"""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)  # A100, H100/H200, B200


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as a recipe launches it.

    Attributes:
        name: what it is used for, such as "vit_b16 bf16".
        kernel: the ``triton.jit`` function.
        signature: type of each runtime argument ("*bf16", "i32", "fp32"); pointers count as 16-byte aligned.
        constants: value of each constexpr argument.
        num_warps, num_stages: launch options.
        least: compute capability that the kernel needs, as 89: e4m3 does not exist before.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    least: int = 80

    @property
    def architectures(self) -> tuple[int, ...]:
        """The ``ARCHITECTURES`` that the kernel compiles for."""
        return tuple(architecture for architecture in ARCHITECTURES if architecture >= self.least)


@dataclass(frozen=True)
class Resources:
    """Resources that one variant takes on one architecture.

    Attributes:
        registers: per thread.
        shared: bytes per block.
        local: bytes of local memory per thread: spilled registers and stack. Not 0 means a slow kernel.
    """

    registers: int
    shared: int
    local: int


def variants() -> Iterator[tuple[str, Variant]]:
    """(op, variant) of every op with Triton kernels."""
    package = importlib.import_module("pera_kernels")
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        if module.ispkg and (Path(package.__path__[0]) / module.name / "triton.py").exists():
            kernels = importlib.import_module(f"pera_kernels.{module.name}.triton")
            yield from ((module.name, variant) for variant in kernels.VARIANTS)


def compile_variant(variant: Variant, architecture: int) -> Resources:
    """Compile for a compute capability (80, 90, 100) and read the cubin's resource usage.

    Raises:
        RuntimeError: TRITON_INTERPRET is set: kernels are Python functions then.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels cannot be compiled in a process with TRITON_INTERPRET set")
    names = list(variant.kernel.arg_names)
    signature = {name: "constexpr" if name in variant.constants else variant.signature[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(variant.kernel, signature=signature, constexprs=variant.constants, attrs=aligned)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    return Resources(usage["REG"], compiled.metadata.shared, usage["LOCAL"] + usage["STACK"])


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL as cuobjdump prints them; the tool comes with Triton."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    if not {"REG", "STACK", "LOCAL"} <= usage.keys():
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return usage


@dataclass
class Table:
    """Rows of the resource table."""

    rows: list[tuple[str, str, str, dict[int, Resources]]] = field(default_factory=list)

    def markdown(self) -> str:
        """The table, one row a variant: registers, shared bytes and spilled bytes for each architecture."""
        heads = [f"sm_{arch}: registers, shared B, spilled B" for arch in ARCHITECTURES]
        lines = ["| op | kernel | variant | " + " | ".join(heads) + " |", "| --- " * (3 + len(heads)) + "|"]
        for op, kernel, name, found in self.rows:
            some = [found.get(arch) for arch in ARCHITECTURES]
            cells = ["-" if r is None else f"{r.registers}, {r.shared}, {r.local}" for r in some]
            lines.append("| " + " | ".join([op, f"`{kernel}`", name, *cells]) + " |")
        return "\n".join(lines) + "\n"


def table() -> Table:
    """Compile every variant for every architecture that it is for."""
    result = Table()
    for op, variant in variants():
        found = {arch: compile_variant(variant, arch) for arch in variant.architectures}
        result.rows.append((op, variant.kernel.__name__, variant.name, found))
    return result


if __name__ == "__main__":
    sys.stdout.write(table().markdown())
