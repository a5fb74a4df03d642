"""Arguments that a Triton kernel reads and writes through, by its source."""

import importlib
import pkgutil

import pytest

import pera_kernels

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from pera_fast.profile.pointers import use  # noqa: E402


@triton.jit
def put(to_ptr, place, value, mask_ptr, WIDE: tl.constexpr):
    mask = tl.load(mask_ptr + place)
    if WIDE:
        tl.store(to_ptr + place, value, mask=mask)


@triton.jit
def some_kernel(
    in_place_ptr, source_ptr, out_ptr, index_ptr, mask_ptr, spare_ptr, unused_ptr, desc, n, MORE: tl.constexpr
):
    place = tl.load(index_ptr + tl.program_id(0))  # a number: what is stored there is not stored to index_ptr
    moving = source_ptr
    for _ in range(n):
        x = tl.load(moving + place)
        moving += n
        tl.store(in_place_ptr + place, x + tl.load(in_place_ptr + place))
    if not MORE:
        tl.store(spare_ptr, 0.0)
    out = tl.multiple_of(out_ptr, 16)
    put(out, place, desc.load([0]), mask_ptr, MORE)
    put(unused_ptr, place, 0.0, mask_ptr, False)


def names(found: frozenset[str]) -> set[str]:
    """Those of pointers and descriptors: numbers that an address is made of come along."""
    return {name for name in found if name.endswith("_ptr") or name == "desc"}


@pytest.mark.parametrize(("more", "extra"), [(True, "out_ptr"), (False, "spare_ptr")])
def test_pointers_are_followed(more: bool, extra: str) -> None:
    """Through variables, loops, other functions and flags."""
    found = use(some_kernel, {"MORE": more, "n": 3})
    assert names(found.read) == {"in_place_ptr", "source_ptr", "index_ptr", "mask_ptr", "desc"}
    assert names(found.written) == {"in_place_ptr", extra}


def kernels() -> dict[str, object]:
    """Every kernel of pera_kernels that is launched, by name."""
    found = {}
    for module in pkgutil.walk_packages(pera_kernels.__path__, "pera_kernels."):
        if module.name.endswith(".triton"):
            made = vars(importlib.import_module(module.name))
            found |= {name: one for name, one in made.items() if name.endswith("_kernel") and hasattr(one, "arg_names")}
    return found


def test_every_pointer_of_our_kernels_is_used() -> None:
    """Every kernel's source is written in a way that the reader of its loads and stores follows."""
    assert len(kernels()) > 30
    for name, kernel in kernels().items():
        found = use(kernel, {})
        pointers = {argument for argument in kernel.arg_names if argument.endswith(("_ptr", "_desc"))}
        assert pointers <= found.read | found.written, name
    both = {name: names(found.read & found.written) for name, one in kernels().items() if (found := use(one, {}))}
    assert {name for name, of in both.items() if of} == {"gelu_bwd_kernel", "add_norm_fp8_kernel"}
