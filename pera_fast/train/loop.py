"""The training loop: steps, metrics, checkpoints, and a clean stop."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from pera_fast.config import BatchPlan, Config, to_yaml
from pera_fast.config.keys import flatten
from pera_fast.errors import UserError
from pera_fast.model.inputs import StepInputs
from pera_fast.model.pera import PerA
from pera_fast.storage import MachineError
from pera_fast.train.checkpoint import FORMAT, CheckpointState, NotWrittenError, checkpoint_path, save_checkpoint
from pera_fast.train.checkpoint_fit import misfit
from pera_fast.train.clock import Clock
from pera_fast.train.compute_copies import refresh_copies
from pera_fast.train.console import Progress
from pera_fast.train.distributed import World
from pera_fast.train.flops import device_peak, flops_per_image
from pera_fast.train.fused_update import FusedUpdate
from pera_fast.train.graph import StepGraph
from pera_fast.train.loggers.base import Ending
from pera_fast.train.metrics import Metrics, MetricsWriter, memory_mib
from pera_fast.train.nonfinite import note_nonfinite
from pera_fast.train.probe import KEY, Probe
from pera_fast.train.run_folder import RunFolder
from pera_fast.train.schedules import Schedules
from pera_fast.train.signals import StopRequest, exit_code
from pera_fast.train.step import LaunchedStep, launch_step

log = logging.getLogger(__name__)


class Batches(Iterator[StepInputs], Protocol):
    """Interface of a loader, as the loop uses it."""

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
    pera: PerA  # the model: parameters, center, EMA
    model: torch.nn.Module  # what is called: `pera`, perhaps in DDP
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    batches: Batches
    images: int
    data: str  # digest of the data
    export: Callable[[PerA, Path], None]  # writes the teacher
    begin: Callable[[], None] = lambda: None  # called by rank 0 after the first step of this process
    graph: StepGraph | None = None  # of the micro-batches
    update: FusedUpdate | None = None
    probe: Probe | None = None  # of rank 0; the others wait for it in the next step's collective
    step: int = 0  # optimiser steps done
    position: int = 0  # place in the data, in steps of this total batch from epoch 0; differs if the batch once changed
    nonfinite: dict[str, int] = field(default_factory=lambda: {"total": 0, "row": 0})

    @property
    def place(self) -> int:
        """In the schedules: they follow the data where the length is given in epochs, else the steps."""
        return self.position if self.cfg.train.steps is None else self.step

    def state(self) -> CheckpointState:
        """State for a checkpoint (checkpoint.CheckpointState)."""
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

    def load(self, state: CheckpointState, source: str) -> None:
        """Continues from a checkpoint. Raises UserError if it does not fit the model."""
        fits = f"{source}: does not fit this version's {self.cfg.recipe} model"
        if why := misfit(self.pera, self.optimizer, state):
            raise UserError(f"{fits}: {why}")
        try:
            self.pera.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        except Exception as error:  # whatever odd contents make PyTorch raise
            raise UserError(f"{fits}: {' '.join(str(error).split())[:300]}") from None
        refresh_copies(self.pera)
        if self.update is not None:
            self.update.forget()
        self.step, self.nonfinite = state["step"], dict(state["nonfinite"])
        self.position = state.get("position", self.step)


def fit(run: Run, stop: StopRequest) -> tuple[int, Metrics]:
    """Trains to the last step, or until it is asked to stop.

    On a GPU a step's numbers are read after the next step was launched, so that the device never waits for the host;
    before a checkpoint, at the end and when the loader fails, all that was launched is read. Of several ranks, 0 alone
    probes and looks at the clock, so it may read a step sooner than the others. What a step asks for, to stop or to
    give up, is therefore done only where all ranks have read it.

    Returns:
        (exit code, metrics of the last step): 0 done, 129, 130, 138 or 143 stopped by a signal, with a
        checkpoint written.

    Raises:
        UserError: too many steps in a row that were not finite, or the last checkpoint could not be written.
        MachineError: the images' storage did not answer in time; a checkpoint was written.
        Exception: any other of the loader; the steps before it are in the metrics, and no checkpoint was written.
    """
    cfg, world, first = run.cfg, run.world, run.step
    path, settings = run.folder.metrics if world.main else None, flatten(cfg)
    reader = _Reader(run, MetricsWriter(path, run.step, cfg.train.loggers, settings))
    ending: Ending = "failed"
    clock = Clock(cfg.train.checkpoint_minutes)
    if run.probe is not None and not run.step:
        run.probe.begin()
    try:
        with Progress(run.schedules.steps, run.place, world.main) as progress:
            while run.place < run.schedules.steps:
                try:
                    launch = _launch(run, stop)
                except _NoBatchError as failed:  # in the middle of a step, which has changed nothing yet
                    reader.finish(progress)
                    code = _leave(run, reader.verdict() or stop.exit_code, failed.error, first)
                    ending = "stopped"
                    return code, reader.metrics
                last = run.place == run.schedules.steps
                probed = run.probe is not None and (last or run.probe.is_due(run.step))
                if run.probe is not None and probed:
                    launch.metrics[KEY] = run.probe.run(run.step)
                reader.take(launch, progress)
                stopped = reader.verdict()
                if probed:
                    reader.finish(progress)
                    reader.pause()
                all_save = last or run.step % cfg.train.checkpoint_every == 0
                due = all_save or (world.main and clock.is_due())
                all_read = all_save or bool(stopped) or run.update is None or launch.step.end is None
                if due or all_read:
                    reader.finish(progress)
                if world.size == 1:
                    stopped = stop.exit_code or stopped  # also if it came after the step had asked
                    if stopped:
                        reader.finish(progress)
                # Where rank 0 alone has read this step, for its probe or its clock, the others are about to launch the
                # next one, whose collective would wait for rank 0 for ever if it left here.
                if all_read or world.size == 1:
                    stopped = reader.verdict() or stopped
                if stopped or (due and reader.failure is None):
                    _save(run, must=bool(stopped) or last)
                    reader.pause()
                    clock.restart()
                if stopped and not last:
                    ending = "stopped"
                    log.info("stopped after step %d; continue with --resume", run.step)
                    return stopped, reader.metrics
        ending = "finished"
    finally:
        reader.writer.close(ending)
    if not reader.metrics:
        _catch_up(run)
    return 0, reader.metrics


class _NoBatchError(Exception):
    """The loader failed, with ``error``."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


def _leave(run: Run, stopped: int, error: Exception, first: int) -> int:
    """Saves because the storage gives no batch any more. Returns the exit code of a stop, else raises the error."""
    if not isinstance(error, MachineError):
        raise error from None
    if run.step == first:
        if stopped:
            return stopped
        raise error from None
    _save(run, must=True)
    if stopped:
        log.info("stopped after step %d; continue with --resume", run.step)
        return stopped
    raise MachineError(f"{error}; stopped after step {run.step} with a checkpoint; continue with --resume") from error


@dataclass
class _Launch:
    """A step that was launched, and what the host knew of it then."""

    step: LaunchedStep
    place: int
    metrics: Metrics  # those that do not depend on what the device finds
    waited: float  # seconds that the loader blocked
    seconds: float  # that the host took


@dataclass
class _Reader:
    """Reads launched steps, the last one only when it must, and does what their numbers ask for.

    Attributes:
        metrics: of the last step that was read.
        failure: too many steps that were not finite; see ``verdict``.
    """

    run: Run
    writer: MetricsWriter
    metrics: Metrics = field(default_factory=dict)
    failure: UserError | None = None
    _stopped: int = 0
    _pending: _Launch | None = None
    _before: LaunchedStep | None = None  # the one read last
    _begun: bool = False

    def take(self, launch: _Launch, progress: Progress) -> None:
        """Keep a launched step and read the one before."""
        before, self._pending = self._pending, launch
        if before is not None:
            self._read(before, progress)

    def finish(self, progress: Progress) -> None:
        """Read what was launched, and wait for it."""
        if self._pending is not None:
            launch, self._pending = self._pending, None
            self._read(launch, progress)

    def verdict(self) -> int:
        """Exit code that the steps read so far ask for, 0: go on. Ask where every rank has read the same steps.

        Raises:
            UserError: too many of them in a row were not finite.
        """
        if self.failure is not None:
            raise self.failure
        return self._stopped

    def pause(self) -> None:
        """Do not count the time since the last step that was read towards the next one."""
        self._before = None

    def _read(self, launch: _Launch, progress: Progress) -> None:
        run, result = self.run, launch.step.result()
        seconds, idle = self._times(launch)
        self._before = launch.step
        rate = run.plan.total / seconds
        peak = device_peak(run.world.device, run.cfg.train.precision)
        self.metrics = {
            **{key: launch.metrics[key] for key in ("step", "epoch")},
            **result.losses,
            **{key: launch.metrics[key] for key in ("lr", "wd", "momentum", "teacher_temp")},
            "grad_norm": result.grad_norm,
            "seconds": seconds,
            "images_per_s": rate,
            "data_wait": min(idle / seconds, 1.0),
            "mfu": None if peak is None else rate * flops_per_image(run.cfg) / (peak * run.world.size),
            "mem": memory_mib(run.world.device),
            **{key: launch.metrics[key] for key in (KEY,) if key in launch.metrics},
        }
        if not result.applied:
            self.metrics["nonfinite"] = result.nonfinite
        if result.loss_scale is not None:
            self.metrics["loss_scale"] = result.loss_scale
        if run.world.main and not self._begun:
            run.begin()  # not sooner: what takes no step is no run, and leaves nothing in the way of the next try
            self._begun = True
        self.writer.write(self.metrics)
        progress.update(launch.place, self.metrics)
        self._stopped = exit_code(result.stop) or self._stopped
        try:
            note_nonfinite(run.nonfinite, run.cfg.train.max_nonfinite, launch.metrics["step"], result)
        except UserError as error:
            self.failure = error

    def _times(self, launch: _Launch) -> tuple[float, float]:
        """Seconds of a step, and of those the ones in which it waited for its data.

        On a GPU by its own clock: from the end of one step to the end of the next, and how long it had nothing to do.
        """
        step, before = launch.step, self._before
        if step.begin is None or step.end is None:
            return launch.seconds, launch.waited
        if before is None or before.end is None:
            return step.begin.elapsed_time(step.end) / 1000, 0.0
        return before.end.elapsed_time(step.end) / 1000, step.idle_since(before.end)


def _launch(run: Run, stop: StopRequest) -> _Launch:
    """Launch one optimiser step. Raises _NoBatchError if the loader fails."""
    began, waited = time.perf_counter(), 0.0

    def batches() -> Iterator[StepInputs]:
        nonlocal waited
        while True:
            try:
                batch = next(run.batches)
            except Exception as error:
                raise _NoBatchError(error) from error
            waited += run.batches.wait_seconds
            yield batch

    values = run.schedules.at(run.place)
    step = launch_step(
        run.model, run.pera, run.optimizer, run.scaler, batches(), run.plan.accumulate, values, run.cfg.optim.clip,
        run.world, stop.asked, run.graph, run.update,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    run.step += 1
    run.position += 1
    metrics: Metrics = {
        "step": run.step,
        "epoch": (run.position - 1) // run.batches.steps_per_epoch,
        "lr": values.lr,
        "wd": values.weight_decay,
        "momentum": values.momentum,
        "teacher_temp": values.teacher_temp,
    }
    return _Launch(step, run.place, metrics, waited, seconds)


def _save(run: Run, must: bool) -> None:
    """Checkpoint and export by rank 0; the others go on and wait at the next step's collective.

    Where they cannot be written, training goes on and tries again at the next checkpoint: space may come.

    Raises:
        UserError: they cannot be written and must be, because the run ends here.
    """
    if not run.world.main:
        return
    try:
        save_checkpoint(run.folder.checkpoints, run.state(), run.cfg.train.keep_checkpoints)
        _export(run)
    except NotWrittenError as error:
        if must:
            raise UserError(f"{error}; make room and go on with --resume") from None
        log.warning("%s; training goes on", error)


def _export(run: Run) -> None:
    try:
        run.folder.teacher.parent.mkdir(exist_ok=True)
        run.export(run.pera, run.folder.teacher)
    except OSError as error:
        raise NotWrittenError(f"{run.folder.teacher}: could not be written ({error.strerror or error})") from None


def _catch_up(run: Run) -> None:
    """Export the teacher of a run that is done, if the process ended between its last checkpoint and that."""
    teacher, last = run.folder.teacher, checkpoint_path(run.folder.checkpoints, run.step)
    if not run.world.main or not last.exists():
        return
    if not teacher.exists() or teacher.stat().st_mtime_ns < last.stat().st_mtime_ns:
        _export(run)
