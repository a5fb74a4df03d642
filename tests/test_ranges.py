"""Named ranges: nothing where nobody listens, in traces where a profiler runs, no break where torch compiles."""

from contextlib import contextmanager, nullcontext

import torch
from torch.profiler import profile

from pera_fast.ranges import PREFIX, listening, span


def test_a_span_is_nothing_without_a_listener() -> None:
    assert span("a") is span("b")
    assert isinstance(span("a"), nullcontext)


def test_a_listener_hears_the_spans() -> None:
    heard = []

    @contextmanager
    def listener(name: str):
        heard.append(name)
        yield

    with listening(listener), span("outer"), span("inner"):
        pass
    with span("after"):
        pass
    assert heard == ["outer", "inner"]


def test_the_profiler_sees_the_spans() -> None:
    with profile() as found, span("part"):
        torch.ones(3).sum()
    assert PREFIX + "part" in {event.name for event in found.events()}


def test_spans_do_not_break_the_graph() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x: torch.Tensor) -> torch.Tensor:
        with span("outer"):
            y = x + 1
            with span("inner"):
                return y * 2

    assert compiled(torch.ones(2)).tolist() == [4.0, 4.0]
