"""The training loop: step by step through the schedules, with metrics, checkpoints and a clean way to stop."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from pera_fast.config import BatchPlan, Config, to_yaml
from pera_fast.errors import UserError
from pera_fast.train.checkpoint import FORMAT, save_checkpoint
from pera_fast.train.console import Progress
from pera_fast.train.distributed import World
from pera_fast.train.flops import device_peak, flops_per_image
from pera_fast.train.graph import StepGraph
from pera_fast.train.metrics import MetricsWriter, memory_mib
from pera_fast.train.run_folder import RunFolder
from pera_fast.train.schedules import Schedules
from pera_fast.train.signals import StopRequest
from pera_fast.train.step import StepResult, train_step

log = logging.getLogger(__name__)


class Inputs(Iterator[Any], Protocol):
    """What the loop needs of a loader."""

    wait_seconds: float  # that the last __next__ blocked
    steps_per_epoch: int


@dataclass
class Run:
    """All that a run consists of; the loop changes what it holds."""

    cfg: Config
    folder: RunFolder
    world: World
    plan: BatchPlan
    schedules: Schedules
    pera: Any  # the model: parameters, center, EMA
    model: torch.nn.Module  # what is called: `pera`, perhaps in DDP
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    inputs: Inputs
    images: int
    data: str  # digest of the data
    export: Callable[[Any, Any], Any]  # (model, path): writes the teacher
    graph: StepGraph | None = None  # of the micro-batches
    step: int = 0  # optimiser steps done
    position: int = 0  # place in the data, in steps of this total batch from epoch 0; differs if the batch once changed
    nonfinite: dict[str, int] = field(default_factory=lambda: {"total": 0, "row": 0})

    @property
    def place(self) -> int:
        """In the schedules: they follow the data where the length is given in epochs, else the steps."""
        return self.position if self.cfg.train.steps is None else self.step

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds (checkpoint.FIELDS)."""
        return {
            "format": FORMAT,
            "step": self.step,
            "recipe": self.cfg.recipe,
            "config": to_yaml(self.cfg),
            "total_batch": self.plan.total,
            "position": self.position,
            "devices": self.world.size,
            "images": self.images,
            "data": self.data,
            "nonfinite": dict(self.nonfinite),
            "model": self.pera.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: dict[str, Any], source: str) -> None:
        """Continues from a checkpoint. Raises UserError if it does not fit the model."""
        try:
            self.pera.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{source}: does not fit this version's {self.cfg.recipe} model: {reason}") from None
        self.step, self.nonfinite = state["step"], dict(state["nonfinite"])
        self.position = state.get("position", self.step)


def fit(run: Run, stop: StopRequest) -> tuple[int, dict[str, Any]]:
    """Trains to the last step, or until it is asked to stop.

    Returns:
        (exit code, metrics of the last step): 0 done, 130 or 143 stopped by a signal, with a checkpoint written.

    Raises:
        UserError: too many steps in a row that were not finite, or the last checkpoint could not be written.
    """
    cfg, world = run.cfg, run.world
    metrics: dict[str, Any] = {}
    writer = MetricsWriter(run.folder.metrics if world.main else None, run.step)
    try:
        with Progress(run.schedules.steps, run.place, world.main) as progress:
            while run.place < run.schedules.steps:
                metrics, result = _one_step(run, stop)
                writer.write(metrics)
                progress.update(run.place, metrics)
                _note_nonfinite(run, result)
                stopped = 143 if result.stop[1] else 130 if result.stop[0] else 0
                if world.size == 1:
                    stopped = stop.exit_code  # also if it came after the step had asked
                last = run.place == run.schedules.steps
                if stopped or last or run.step % cfg.train.checkpoint_every == 0:
                    saved = _save(run)
                    if last and not saved:
                        raise UserError(
                            f"{run.folder.root}: the last step's weights could not be written; see train.log"
                        )
                if stopped and not last:
                    log.info("stopped after step %d; continue with --resume", run.step)
                    return stopped, metrics
    finally:
        writer.close()
    return 0, metrics


def _one_step(run: Run, stop: StopRequest) -> tuple[dict[str, Any], StepResult]:
    """One optimiser step and its metrics."""
    began, waited = time.perf_counter(), 0.0

    def inputs() -> Iterator[Any]:
        nonlocal waited
        while True:
            batch = next(run.inputs)
            waited += run.inputs.wait_seconds
            yield batch

    values = run.schedules.at(run.place)
    result = train_step(
        run.model, run.pera, run.optimizer, run.scaler, inputs(), run.plan.accumulate, values, run.cfg.optim.clip,
        run.world, stop.asked, run.graph,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    run.step += 1
    run.position += 1
    rate = run.plan.total / seconds
    peak = device_peak(run.world.device, run.cfg.train.precision)
    metrics: dict[str, Any] = {
        "step": run.step,
        "epoch": (run.position - 1) // run.inputs.steps_per_epoch,
        **result.losses,
        "lr": values.lr,
        "wd": values.weight_decay,
        "momentum": values.momentum,
        "teacher_temp": values.teacher_temp,
        "grad_norm": result.grad_norm,
        "images_per_s": rate,
        "data_wait": min(waited / seconds, 1.0),
        "mfu": None if peak is None else rate * flops_per_image(run.cfg) / (peak * run.world.size),
        "mem": memory_mib(run.world.device),
    }
    if not result.applied:
        metrics["nonfinite"] = result.nonfinite
    if run.scaler.is_enabled():
        metrics["loss_scale"] = run.scaler.get_scale()
    return metrics, result


def _note_nonfinite(run: Run, result: StepResult) -> None:
    """Counts a skipped step and says what was not finite; raises UserError after too many in a row."""
    if result.applied:
        run.nonfinite["row"] = 0
        return
    if run.scaler.is_enabled() and result.nonfinite == ["gradients"] and run.scaler.get_scale() > 1:
        log.info("step %d skipped: gradients overflow; loss scale now %g", run.step, run.scaler.get_scale())
        return  # how loss scaling finds its scale: no sign of trouble
    run.nonfinite["total"] += 1
    run.nonfinite["row"] += 1
    row, limit = run.nonfinite["row"], run.cfg.train.max_nonfinite
    names = ", ".join(result.nonfinite)
    log.warning(
        "step %d skipped: not finite: %s (%d in a row, %d in all)", run.step, names, row, run.nonfinite["total"]
    )
    if row >= limit:
        raise UserError(
            f"step {run.step}: {names} not finite in {row} steps in a row (train.max_nonfinite={limit}); these steps"
            f" changed nothing; try a lower optim.lr, a longer optim.warmup_epochs or train.precision=fp32"
        )


def _save(run: Run) -> bool:
    """Checkpoint and export by rank 0; the others go on and wait at the next step's collective. False if it failed."""
    if not run.world.main:
        return True
    if save_checkpoint(run.folder.checkpoints, run.state(), run.cfg.train.keep_checkpoints) is None:
        return False
    try:
        run.folder.teacher.parent.mkdir(exist_ok=True)
        run.export(run.pera, run.folder.teacher)
    except OSError as error:
        log.warning("%s: could not be written (%s)", run.folder.teacher, error.strerror or error)
        return False
    return True
