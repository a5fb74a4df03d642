"""Random packed tokens, and an op compared with its float64 reference, outputs and gradients."""

from importlib import import_module

import pytest
import torch
from torch import Tensor

from pera_kernels import backend, packing

EPS = {torch.float64: 1e-15, torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm; NaN and infinity fail every bound."""
    scale = want.double().norm().item()
    return (got.double() - want.double()).norm().item() / (scale or 1.0)


def outputs_and_grads(fn, tensors: dict[str, Tensor], differentiable: tuple[str, ...], upstream_seed: int = 99):
    """Run fn(**tensors), pull back a non-uniform gradient, return everything by name."""
    leaves = {k: v.detach().clone().requires_grad_(k in differentiable) for k, v in tensors.items()}
    out = fn(**leaves)
    grads = torch.autograd.grad(out, [leaves[k] for k in differentiable], randn(*out.shape, seed=upstream_seed).to(out))
    return {"out": out.detach(), **dict(zip(differentiable, grads, strict=True))}


def compare(fast, reference, tensors: dict[str, Tensor], differentiable: tuple[str, ...], half: set[str]) -> None:
    """Error of fast against the float64 reference: at most three times what the same-dtype reference makes."""
    exact = outputs_and_grads(reference, {k: v.double() for k, v in tensors.items()}, differentiable)
    for dtype in DTYPES:
        inputs = {k: v.to(dtype if dtype == torch.float64 or k in half else torch.float32) for k, v in tensors.items()}
        want = outputs_and_grads(reference, inputs, differentiable)
        got = outputs_and_grads(fast, inputs, differentiable)
        for name in exact:
            assert got[name].dtype == want[name].dtype, (dtype, name)
            bound = 3 * error(want[name], exact[name]) + 2 * EPS[dtype]
            assert error(got[name], exact[name]) <= bound, (dtype, name)


def subset(groups: list[int], seed: int, share: float = 0.7) -> tuple[Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    kept = [max(int(n * share), 1) if n else 0 for n, _ in packing.pairs(groups)]
    keep = [torch.randperm(n, generator=generator)[:k] for (n, _), k in zip(packing.pairs(groups), kept, strict=True)]
    return torch.cat(keep).int(), kept


def each_implementation(op: str, *names: str):
    """A fixture: the device, while an implementation of the op is forced, each on a CPU and on a GPU in turn.

    Skipped with the reason where it cannot run.
    """
    gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

    @pytest.fixture(params=[*names, *(pytest.param(f"{name}-cuda", marks=gpu) for name in names)])
    def device(request: pytest.FixtureRequest):
        name, _, kind = request.param.partition("-")
        where = torch.device(kind or "cpu")
        with backend.use(name):
            try:
                backend.choose(op, where)
            except RuntimeError as reason:
                pytest.skip(str(reason))
            yield where

    return device


@pytest.fixture(params=["reference", "native", "triton"])
def implementation(request):
    """Each implementation in turn; skipped with the reason where it cannot run."""
    ops = "embed_tokens", "mask_tokens", "sequence_norm", "sequence_add"
    for op in ops:
        import_module(f"pera_kernels.{op}")  # registers it
    with backend.use(request.param):
        for op in ops:
            try:
                backend.choose(op, torch.device("cpu"))
            except RuntimeError as reason:
                pytest.skip(str(reason))
        yield request.param


def needs_memory(gib: float, device: str) -> None:
    """Skips a test where a GPU has less free memory."""
    if device != "cpu" and torch.cuda.mem_get_info(device)[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")
