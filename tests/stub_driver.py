"""A stand-in for a GPU's driver: launches of Triton kernels run up to the compiled kernel, which is not compiled.

What is tested that way is Python: the arguments of a launch and their specialisation, the constants, the grid, and that
Triton's front end accepts the kernel with exactly these types. Ahead-of-time compilation (``pera_kernels.aot``) tests
the rest, with signatures that are written down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from pera_kernels import backend, fp8

CAPABILITY = 90


class Driver:
    """What Triton asks of its active driver before it compiles: a device of compute capability 9.0."""

    def get_current_target(self) -> Any:
        """Compiler target."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        """Its only device."""
        return 0

    def get_current_stream(self, _device: int) -> int:
        """The default stream."""
        return 0


class Kernel:
    """A kernel that a launch got instead of a compiled one."""

    function = packed_metadata = None

    def __init__(self, name: str, launches: list[tuple[str, tuple[int, ...]]]) -> None:
        self.name, self.launches = name, launches

    def launch_metadata(self, *_arguments: Any) -> None:
        """Nothing."""

    def run(self, x: int, y: int, z: int, *_arguments: Any) -> None:
        """Notes the grid."""
        assert all(isinstance(size, int) and size > 0 for size in (x, y, z)), (self.name, (x, y, z))
        assert y < 65536, (self.name, "a grid's second dimension has 16 bits")
        assert z < 65536, (self.name, "a grid's third dimension has 16 bits")
        self.launches.append((self.name, (x, y, z)))


@contextmanager
def stub_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Inside, Triton kernels may be launched on CPU tensors: yields (kernel, grid) of each launch, as they come.

    The kernels' results are what their memory held before.
    """
    from triton.backends.compiler import Language
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launches: list[tuple[str, tuple[int, ...]]] = []

    def front_end(
        self: Any, key: str, signature: dict, _device: int, constants: dict, options: Any, attrs: dict, _warmup: bool
    ) -> Kernel:
        from triton._C.libtriton import ir

        cache, _, target, compiler, _ = self.device_caches[0]
        source = self.ASTSource(self, signature, constants, attrs)
        assert source.language == Language.TRITON
        context = ir.context()
        ir.load_dialects(context)
        compiler.load_dialects(context)
        functions, modules = compiler.get_codegen_implementation(options), compiler.get_module_map()
        source.make_ir(target, options, functions, modules, context)
        cache[key] = Kernel(self.fn.__name__, launches)
        return cache[key]

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "_do_compile", front_end)
        patch.setattr(backend, "needs_triton", lambda _device: None)
        patch.setattr(fp8, "needs_triton", lambda _device: None)
        for checks in backend._registry.values():
            if "triton" in checks:
                patch.setitem(checks, "triton", lambda _device: None)
        before = driver._active
        driver.set_active(Driver())  # pyright: ignore[reportArgumentType] it has what a launch asks for
        try:
            yield launches
        finally:
            driver._active = before
            for kernel in _kernels():
                kernel.device_caches.clear()


def _kernels() -> list[Any]:
    from pera_kernels.aot import variants

    return [variant.kernel for _, variant in variants()]


def counts(launches: list[tuple[str, tuple[int, ...]]]) -> Counter[str]:
    """Launches of each kernel."""
    return Counter(name for name, _ in launches)


class Aten(TorchDispatchMode):
    """Counts PyTorch's operators that would launch a kernel on a GPU: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        if not view and not any(word in name for word in ("empty", "detach", "_unsafe_view", "promote_types")):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))
