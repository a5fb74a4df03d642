"""Named ranges of a step for traces and profiles: model and train mark their parts, the profile listens."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import record_function

PREFIX = "pera: "  # of the names in a trace, so that they are told from the ops' own
Listener = Callable[[str], AbstractContextManager[object]]

_listener: Listener | None = None
_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[object]:
    """Around a part of a step: a named range while torch's profiler runs, else nothing, in less than a microsecond.

    Ranges of torch's profiler become NVTX ranges under ``torch.autograd.profiler.emit_nvtx``, for Nsight. Where
    torch.compile traces, there is no range: it would split what is compiled as one.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    if _listener is not None:
        return _listener(name)
    return record_function(PREFIX + name) if torch.autograd._profiler_enabled() else _NOTHING


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """While open, ``span(name)`` is ``listener(name)``, for all threads: a backward pass enters spans in its own."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
