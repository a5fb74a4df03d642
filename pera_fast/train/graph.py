"""Forward and backward of a micro-batch as one CUDA graph: a thousand launches become one.

Shapes are the same in every step of a run and nothing in between waits for the host, so the work can be recorded once
and replayed. The optimiser, the center and the EMA stay outside: their numbers change with every step, and they are a
few launches over all parameters. Written without a GPU at hand: tests/train/test_graph.py runs it where there is one.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

WARMUP = 3  # runs before the recording: kernels compile, libraries make their workspaces

Replay = Callable[[], None]


def record(function: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """Records a function of no arguments as a CUDA graph: (replays it, its result, which every replay overwrites)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return graph.replay, out


class StepGraph:
    """Runs micro-batches from tensors of its own, whose addresses the graph knows.

    Gradients are added to those of the parameters, which must stay where they are: zero them in place, never drop them.
    Before the first call there are none.

    Args:
        backward: (inputs with ``apply``, teacher temperature []) to its result, leaving gradients behind.
        parameters: all that may get gradients.
        record: as ``record`` above.
    """

    def __init__(
        self,
        backward: Callable[[Any, Tensor], Tensor],
        parameters: Iterable[torch.nn.Parameter],
        record: Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]] = record,
    ):
        self._backward, self._parameters, self._record = backward, list(parameters), record
        self._tensors: list[Tensor] = []  # of the inputs, in the order of `apply`
        self._replay: Replay | None = None

    def __call__(self, inputs: Any, teacher_temp: float) -> Tensor:
        """The result for one micro-batch on the device, whose shapes are those of the first one."""
        if self._replay is None:
            self._begin(inputs, teacher_temp)
        else:
            waiting = iter(self._tensors)
            inputs.apply(lambda new: next(waiting).copy_(new))
            self._temp.fill_(teacher_temp)
        assert self._replay is not None
        self._replay()
        return self._out.clone()

    def _begin(self, inputs: Any, teacher_temp: float) -> None:
        def keep(tensor: Tensor) -> Tensor:
            self._tensors.append(tensor.clone())
            return self._tensors[-1]

        own = inputs.apply(keep)
        self._temp = torch.full((), teacher_temp, device=self._tensors[0].device)
        self._replay, self._out = self._record(lambda: self._backward(own, self._temp))
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()  # of what the warm-up has left
