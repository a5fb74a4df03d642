"""The implementations of an op that run on this CPU, and a fixture that forces each of them in turn."""

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch

from pera_kernels import backend, isa
from pera_kernels.isa import Isa


def why_not(op: str, name: str) -> str | None:
    """The reason why an implementation of an op cannot run on this CPU; None: it can."""
    with backend.use(name):
        try:
            backend.choose(op, torch.device("cpu"))
        except RuntimeError as reason:
            return str(reason)
    return None


def runs(op: str, name: str) -> bool:
    return why_not(op, name) is None


def with_threads(call: Callable[[], object], *counts: int) -> list[object]:
    """The results of a call with each of these numbers of PyTorch's threads."""
    before = torch.get_num_threads()
    try:
        return [(torch.set_num_threads(count), call())[1] for count in counts]
    finally:
        torch.set_num_threads(before)


def each_on_cpu(op: str, names: Iterable[str], autouse: bool = False):
    """A fixture: the name of an implementation, which is forced meanwhile; skipped with the reason if it cannot run.

    A name such as native-avx512 also says which instruction set native kernels use.
    """

    @pytest.fixture(params=list(names), autouse=autouse)
    def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
        name, _, limit = request.param.partition("-")
        if reason := why_not(op, name):
            pytest.skip(reason)
        with backend.use(name), isa.at_most(Isa[limit.upper()] if limit else max(Isa)):
            if limit and isa.isa().name.lower() != limit:
                pytest.skip(f"this CPU has no {limit}")
            yield name

    return implementation
