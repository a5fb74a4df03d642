"""Records forward and backward of a micro-batch as one CUDA graph, so that hundreds of launches become one.

Shapes are the same in every step of a run and nothing in between waits for the host, so the work is recorded once and
replayed. The update stays outside: its numbers change with every step, and it is a few launches over all parameters
(``fused_update``).
"""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pera_fast.config import Config
from pera_fast.errors import UserError
from pera_fast.model.inputs import StepInputs

WARMUP = 3  # runs before the recording: kernels compile, libraries make their workspaces

Replay = Callable[[], None]
Forget = Callable[[], None]


@dataclass(frozen=True)
class GraphChoice:
    """Whether a run's micro-batches are a CUDA graph, and the reason, one clause."""

    use: bool
    reason: str


def choose_graph(cfg: Config, device: torch.device) -> GraphChoice:
    """Decide on a CUDA graph (``train.cuda_graph``).

    Raises:
        UserError: one is asked for where there can be none.
    """
    wanted = cfg.train.cuda_graph
    if wanted == "false":
        return GraphChoice(False, "as configured")
    reason = None
    if device.type != "cuda":
        reason = f"wants a GPU, this run has {device.type}"
    elif cfg.loss.centering == "sinkhorn":
        reason = "goes with loss.centering=center only, not with sinkhorn"
    if reason is None:
        return GraphChoice(True, "shapes are the same in every step")
    if wanted == "true":
        raise UserError(f"train.cuda_graph=true: {reason}; leave it out")
    return GraphChoice(False, f"a CUDA graph {reason}")


def record(function: Callable[[], Tensor], forget: Forget) -> tuple[Replay, Tensor]:
    """Record a function of no arguments as a CUDA graph.

    Args:
        function: leaves gradients behind.
        forget: drops or zeroes them; called before every run.

    Returns:
        What replays it, and its result, which every replay overwrites.
    """
    # Of the warm-up and of the recording: autograd remembers the stream of a parameter. Its priority becomes that of
    # the graph's kernels, above the loader's.
    side = torch.cuda.Stream(priority=-1)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            forget()
            function()
        forget()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()  # the graph has memory of its own: what the warm-up took would lie idle beside it
    graph = torch.cuda.CUDAGraph()
    # The loader's thread copies and allocates meanwhile; that is not part of this recording.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        out = function()
    return graph.replay, out


class StepGraph:
    """Runs micro-batches from tensors of its own, whose addresses the graph knows.

    With one micro-batch a step, every replay writes the gradients anew, where the recording has left them. With more,
    they are added to gradients that stay where they are, and `begin_step` zeroes them. Never drop them.

    Args:
        backward: (a micro-batch, teacher temperature []) to its result, leaving gradients behind.
        parameters: all that may get gradients.
        accumulate: micro-batches of a step.
        record: as ``record`` above.

    Attributes:
        backward: as given.
    """

    def __init__(
        self,
        backward: Callable[[StepInputs, Tensor], Tensor],
        parameters: Iterable[torch.nn.Parameter],
        accumulate: int,
        record: Callable[[Callable[[], Tensor], Forget], tuple[Replay, Tensor]] = record,
    ):
        self.backward, self._parameters, self._record = backward, list(parameters), record
        self._adds = accumulate > 1
        self._tensors: list[Tensor] = []  # of the batch, in the order of `apply`
        self._replay: Replay | None = None

    def begin_step(self) -> None:
        """Call before the first micro-batch of every step."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if self._adds and gradients:
            torch._foreach_zero_(gradients)

    def __call__(self, batch: StepInputs, teacher_temp: float) -> Tensor:
        """The result for one micro-batch on the device, whose shapes are those of the first one."""
        if self._replay is None:
            self._begin(batch, teacher_temp)
        else:
            torch._foreach_copy_(self._tensors, batch.tensors())
            self._temp.fill_(teacher_temp)
        assert self._replay is not None
        self._replay()
        return self._out.clone()

    def _begin(self, batch: StepInputs, teacher_temp: float) -> None:
        def keep(tensor: Tensor) -> Tensor:
            self._tensors.append(tensor.clone())
            return self._tensors[-1]

        own = batch.apply(keep)
        self._temp = torch.full((), teacher_temp, device=self._tensors[0].device)
        self._replay, self._out = self._record(lambda: self.backward(own, self._temp), self._forget)
        if self._adds:
            self.begin_step()  # what the warm-up has left

    def _forget(self) -> None:
        for parameter in self._parameters:
            if not self._adds:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()
