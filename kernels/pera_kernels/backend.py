"""Chooses the implementation of each op, and says why a faster one cannot run.

Each op registers its implementations, fastest first, each with a check that says why it cannot run on a device:

    backend.register("visible_patches", "native", available=backend.needs_native("visible_patches"))
    ...
    match backend.choose("visible_patches", crops.device): ...

``reference`` is every op's last choice; it needs no registration beside a faster one and runs on any device. An op
that has nothing else registers just that: ``backend.register("koleo", "reference")``.

The environment variable ``PERA_BACKEND`` (``auto``, ``reference``, ``native``, ``triton`` or another name that an op
registered) or the context manager ``use`` forces a choice for all ops that have an implementation of that name; the
others choose as usual.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .packing import HALF_OR_SINGLE

__all__ = [
    "Row",
    "choose",
    "kernels",
    "native",
    "needs_native",
    "needs_triton",
    "prefer",
    "register",
    "report",
    "use",
    "wanted",
    "without",
]

REFERENCE = "reference"
ENVIRONMENT = "PERA_BACKEND"
LIBRARY = Path(__file__).with_name("_native.so")
BUILD_HINT = "run `pip install --no-build-isolation --no-deps -e .` in the source folder, with cmake and a C++ compiler"

Check = Callable[[torch.device], str | None]
"""Given a device: None where the implementation runs there, else the reason why not (one clause, no full stop)."""


@dataclass(frozen=True)
class Row:
    """One line of ``pera-fast info``.

    Attributes:
        op: name of the op.
        runs: name of the implementation that would run.
        missing: for each faster implementation, why it does not run; empty if none is faster.
    """

    op: str
    runs: str
    missing: dict[str, str] = field(default_factory=dict)


_registry: dict[str, dict[str, Check]] = {}
# A plain variable rather than a context variable: backward passes and prefetch threads must see the same choice.
_forced: str | None = None
_left_out: frozenset[str] = frozenset()
_preferred: dict[str, str] = {}  # name of an implementation by op


def _always(device: torch.device) -> str | None:
    return None


def register(op: str, name: str, *, available: Check = _always) -> None:
    """Adds an implementation of ``op`` behind those already registered, and before ``reference``.

    Args:
        op: name of the op; appears from now on in ``report``.
        name: name of the implementation, such as ``native`` or ``triton``. A repeated name replaces its check.
        available: given a device, None or the reason why this implementation cannot run there.
    """
    checks = _registry.setdefault(op, {})
    if name != REFERENCE:
        checks[name] = available


def wanted(op: str) -> str | None:
    """Name of the implementation of an op that is forced or preferred, or None. Raises ValueError, see ``choose``."""
    return _wanted() or _preferred.get(op)


def prefer(op: str, name: str | None) -> None:
    """Makes one op choose an implementation from now on, unless another one is forced; None: chooses as usual again.

    Raises:
        KeyError: no such op.
        ValueError: the op has no implementation of that name.
    """
    if name is None:
        _preferred.pop(op, None)
        return
    if name != REFERENCE and name not in _registry[op]:
        raise ValueError(f"{op} has no implementation {name!r}; it has {', '.join(_registry[op])}, {REFERENCE}")
    _preferred[op] = name


def _wanted() -> str | None:
    """The forced name, or None. Raises ValueError for a name that no op has."""
    if _forced is not None:
        return _forced
    name = os.environ.get(ENVIRONMENT, "").strip().lower()
    if name in ("", "auto"):
        return None
    _check_known(name, f"{ENVIRONMENT}={name}")
    return name


def _check_known(name: str, source: str) -> None:
    known = {REFERENCE, "native", "triton"}.union(*_registry.values())
    if name not in known:
        near = difflib.get_close_matches(name, [*sorted(known), "auto"], n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{source}: no such implementation; allowed: auto, {', '.join(sorted(known))}{hint}")


def _select(op: str, device: torch.device) -> tuple[str, dict[str, str]]:
    if op not in _registry:
        raise KeyError(f"no op {op!r} is registered; known: {', '.join(sorted(_registry)) or 'none'}")
    checks = _registry[op]
    asked = wanted(op)
    if asked == REFERENCE:
        return REFERENCE, dict.fromkeys(checks, f"{REFERENCE} is forced")
    missing: dict[str, str] = {}
    for name, available in checks.items():
        if asked in checks and name != asked:
            missing[name] = f"{asked} is forced"
            continue
        reason = "it is left out" if name in _left_out else available(device)
        if reason is None:
            return name, missing
        missing[name] = reason
    return REFERENCE, missing


def choose(op: str, device: torch.device) -> str:
    """Name of the implementation of ``op`` that runs on ``device``: the fastest available or the forced one.

    Raises:
        KeyError: nothing is registered under that name.
        RuntimeError: the forced implementation exists but cannot run; the message says why.
        ValueError: ``PERA_BACKEND`` holds a name that no op has.
    """
    name, missing = _select(op, device)
    asked = wanted(op)
    if asked in missing and asked != name:
        raise RuntimeError(f"{op}: the {asked} implementation was asked for, but {missing[asked]}")
    return name


def kernels(op: str, x: Tensor) -> Any | None:
    """Kernels of an op for x: its Triton module, or the native library; None: PyTorch does it.

    For ops whose Triton module and whose part of the library have functions of the same names.
    """
    name = choose(op, x.device)
    if name == "triton":
        module = import_module(f"pera_kernels.{op}.triton")
        return module if module.why_not(x) is None else None
    return torch.ops.pera_native if name == "native" and x.dtype in HALF_OR_SINGLE else None


@contextmanager
def use(name: str) -> Iterator[None]:
    """Forces the implementation of that name, for all threads, while the block runs; overrides ``PERA_BACKEND``.

    Raises:
        ValueError: no op has an implementation of that name.
    """
    global _forced
    _check_known(name, f"use({name!r})")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Leaves implementations out of every choice, for all threads, while the block runs: ``without("native")``."""
    global _left_out
    before, _left_out = _left_out, _left_out | set(names)
    try:
        yield
    finally:
        _left_out = before


def report(device: torch.device | str = "cpu") -> list[Row]:
    """For every registered op: what would run on ``device``, and why nothing faster. No missing part raises."""
    return [Row(op, *_select(op, torch.device(device))) for op in sorted(_registry)]


@cache
def _load(path: Path) -> str | None:
    """Loads the native library once. Returns None, or why it is not there."""
    if not path.exists():
        return f"the native library was not built: {BUILD_HINT}"
    # It is compiled for AVX2 on x86-64 (CMakeLists.txt); loading it on less would end the process at the first call.
    # Asked is the processor: ATEN_CPU_CAPABILITY holds torch's own code to less, not ours.
    if platform.machine() == "x86_64" and not torch.cpu._is_avx2_supported():
        return "this processor has no AVX2"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:  # built for another machine or on a newer system; or torch < 2.10
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"the native library does not load with torch {torch.__version__} ({first}): {BUILD_HINT}"
    return None


def native() -> Any | None:
    """The namespace ``torch.ops.pera_native`` if the native CPU library was built and loads, else None."""
    return torch.ops.pera_native if _load(LIBRARY) is None else None


def needs_native(*names: str) -> Check:
    """A check for ``register``: the device is the CPU and the native library has all the ops called ``names``."""

    def check(device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"native kernels run on the CPU, not on {device.type}"
        reason = _load(LIBRARY)
        if reason is not None:
            return reason
        lacking = [name for name in names if not hasattr(torch.ops.pera_native, name)]
        return (
            f"the native library is older than this source (lacks {', '.join(lacking)}): {BUILD_HINT}"
            if lacking
            else None
        )

    return check


def needs_triton(device: torch.device) -> str | None:
    """A check for ``register``: Triton is installed, and the device is a GPU or Triton's interpreter is on."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None if _wanted() == "triton" else "Triton's interpreter is for tests: force it with PERA_BACKEND=triton"
    if device.type != "cuda":
        return f"Triton kernels run on a GPU, not on {device.type}"
    return None
