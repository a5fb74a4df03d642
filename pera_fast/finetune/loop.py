"""The loop of a fine-tuning: steps, validations, checkpoints, the best network, and a clean stop."""

import logging
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pera_fast.config import Config, to_yaml
from pera_fast.config.keys import flatten
from pera_fast.errors import UserError
from pera_fast.finetune.data import Batch, LabelledData, Length, micro_batches
from pera_fast.finetune.losses import loss_of
from pera_fast.finetune.model import FineTuner
from pera_fast.finetune.tuned import export
from pera_fast.finetune.validate import validate
from pera_fast.storage import MachineError
from pera_fast.train.checkpoint import FORMAT, CheckpointState, NotWrittenError, save_checkpoint
from pera_fast.train.checkpoint_fit import misfit
from pera_fast.train.clock import Clock
from pera_fast.train.console import Progress
from pera_fast.train.inputs import kept_sequences
from pera_fast.train.loggers.base import Ending
from pera_fast.train.metrics import Metrics, MetricsWriter, memory_mib
from pera_fast.train.nonfinite import note_nonfinite
from pera_fast.train.optim import apply_gradients
from pera_fast.train.run_folder import RunFolder
from pera_fast.train.schedules import Schedules
from pera_fast.train.signals import StopRequest
from pera_fast.train.step import StepResult

log = logging.getLogger(__name__)


@dataclass
class Validations:
    """Results of the validations so far.

    Attributes:
        last: step of the last one; 0: none yet.
        best: score of the best network, the first that `scores` names; None: none yet.
        step: of the best network.
        stale: validations since then.
    """

    last: int = 0
    best: float | None = None
    step: int = 0
    stale: int = 0


@dataclass
class Tuning:
    """All that a fine-tuning consists of; the loop changes what it holds."""

    cfg: Config
    folder: RunFolder
    asked: Config  # for the folder, without what the data decides
    device: torch.device
    model: FineTuner
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    schedules: Schedules
    length: Length
    train: LabelledData
    val: LabelledData | None
    digest: str
    step: int = 0  # optimiser steps done
    nonfinite: dict[str, int] = field(default_factory=lambda: {"total": 0, "row": 0})
    validations: Validations = field(default_factory=Validations)

    @property
    def ended(self) -> bool:
        """Whether the last step is done, or the scores have not risen for too long."""
        patience = self.cfg.finetune.patience
        tired = patience is not None and self.validations.stale >= patience
        return self.step >= self.schedules.steps or tired

    def state(self) -> CheckpointState:
        """State for a checkpoint."""
        return {
            "format": FORMAT,
            "step": self.step,
            "recipe": self.cfg.recipe,
            "config": to_yaml(self.cfg),
            "total_batch": self.length.total,
            "images": len(self.train),
            "data": self.digest,
            "nonfinite": dict(self.nonfinite),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "finetune": {"plan": self.model.plan.told(), "validations": vars(self.validations).copy()},
        }

    def load(self, state: CheckpointState, source: str) -> None:
        """Continues from a checkpoint. Raises UserError if it does not fit."""
        told = state.get("finetune") or {}
        before, now = told.get("plan", {}), self.model.plan.told()
        if changed := [name for name in now if before.get(name) != now[name]]:
            name = changed[0]
            raise UserError(
                f"{source}: its {name} is {before.get(name)!r:.120} and would be {now[name]!r:.120}: the data or the"
                " settings are those of another run; give another --out"
            )
        if why := misfit(self.model, self.optimizer, state):
            raise UserError(f"{source}: does not fit this version's model: {why}")
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            self.validations = Validations(**told["validations"])
        except Exception as error:  # whatever odd contents make PyTorch raise
            raise UserError(f"{source}: does not fit: {' '.join(str(error).split())[:300]}") from None
        self.step, self.nonfinite = state["step"], dict(state["nonfinite"])
        if (state["images"], state["data"], state["total_batch"]) != (len(self.train), self.digest, self.length.total):
            log.warning(
                "the data is not what it was (%d samples, now %d): going on, with other samples per step",
                state["images"], len(self.train),
            )  # fmt: skip


def fit(run: Tuning, stop: StopRequest) -> tuple[int, Metrics]:
    """Trains to the end, or until it is asked to stop.

    Returns:
        (exit code, metrics of the last step): 0 done, 129, 130, 138 or 143 stopped by a signal, with a checkpoint.

    Raises:
        UserError: too many steps in a row that were not finite, or the last checkpoint could not be written.
        MachineError: the storage did not answer in time; a checkpoint was written.
    """
    first = run.step
    ending: Ending = "failed"
    writer = MetricsWriter(run.folder.metrics, run.step, run.cfg.train.loggers, flatten(run.cfg))
    metrics: Metrics = {}
    clock, accumulate = Clock(run.cfg.train.checkpoint_minutes), run.length.accumulate
    batches = micro_batches(run.train, run.length, run.step * accumulate, run.schedules.steps * accumulate)
    try:
        with Progress(run.schedules.steps, run.step, True) as progress, closing(batches):
            if _validation_due(run):  # stopped between the epoch's end and its validation
                _validate(run, writer)
            while not run.ended:
                metrics = _step(run, batches)
                if run.step == first + 1:
                    run.folder.write_config(run.cfg, run.asked)
                writer.write(metrics)
                progress.update(run.step, metrics)
                if _validation_due(run) and not stop.exit_code:
                    _validate(run, writer)
                due = run.ended or run.step % run.cfg.train.checkpoint_every == 0 or clock.is_due()
                if stop.exit_code or due:
                    _save(run, must=bool(stop.exit_code) or run.ended)
                    clock.restart()
                if stop.exit_code and not run.ended:
                    log.info("stopped after step %d; continue with --resume", run.step)
                    ending = "stopped"
                    return stop.exit_code, metrics
        ending = "finished"
    except MachineError as error:
        if run.step == first:
            raise
        _save(run, must=True)
        told = f"{error}; stopped after step {run.step} with a checkpoint; continue with --resume"
        raise MachineError(told) from error
    finally:
        writer.close(ending)
    return 0, metrics


def _step(run: Tuning, batches: Iterator[Batch]) -> Metrics:
    """One optimiser step and its metrics."""
    began, waited = time.perf_counter(), 0.0
    values, f = run.schedules.at(run.step), run.cfg.finetune
    run.optimizer.zero_grad(set_to_none=True)
    losses: list[Tensor] = []
    for micro in range(run.length.accumulate):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        images = batch.images.to(run.device, non_blocking=True)
        targets = batch.targets.to(run.device, non_blocking=True)
        sequences = images.shape[0] * images.shape[1]
        drawn = kept_sequences(run.cfg, [sequences], run.step * run.length.accumulate + micro, 0)
        keep = None if drawn is None else torch.from_numpy(drawn).to(run.device)
        loss = loss_of(run.model(images, keep), targets, f.label_smoothing, f.dice) / run.length.accumulate
        run.scaler.scale(loss).backward()
        losses.append(loss.detach())
    total = torch.stack(losses).sum()
    norm, ok = apply_gradients(run.optimizer, run.scaler, values, run.cfg.optim.clip, total)
    loss_value, norm_value, applied = torch.stack([total, norm, ok]).tolist()  # waits for the device
    seconds = time.perf_counter() - began
    run.step += 1
    scale = float(run.scaler.get_scale()) if run.scaler.is_enabled() else None
    result = StepResult({"loss": loss_value}, norm_value, bool(applied), (), scale)
    metrics: Metrics = {
        "step": run.step,
        "epoch": (run.step - 1) // run.length.steps_per_epoch,
        "loss": loss_value if applied else float("nan"),
        "lr": values.lr,
        "wd": values.weight_decay,
        "grad_norm": norm_value,
        "seconds": seconds,
        "images_per_s": run.length.total / seconds,
        "data_wait": min(waited / seconds, 1.0),
        "mem": memory_mib(run.device),
    }
    if not applied:
        metrics["nonfinite"] = result.nonfinite
    if scale is not None:
        metrics["loss_scale"] = scale
    note_nonfinite(run.nonfinite, run.cfg.train.max_nonfinite, run.step, result)
    return metrics


def _validation_due(run: Tuning) -> bool:
    """Whether the steps done end an epoch that is validated, or the run, and have not been validated."""
    if run.val is None or not run.step or run.validations.last == run.step:
        return False
    epochs, rest = divmod(run.step, run.length.steps_per_epoch)
    return run.step == run.schedules.steps or (rest == 0 and epochs % run.cfg.finetune.validate_every == 0)


def _validate(run: Tuning, writer: MetricsWriter) -> None:
    """Measure the network, and keep it if it is the best."""
    assert run.val is not None
    began = time.perf_counter()
    found = validate(run.model, run.val, run.length.batch, run.cfg.finetune.overlap)
    seen = run.validations
    (name, score), *_ = found.items()
    seen.last, better = run.step, seen.best is None or score > seen.best
    if better:
        seen.best, seen.step, seen.stale = score, run.step, 0
        _export(run)
    else:
        seen.stale += 1
    epoch = (run.step - 1) // run.length.steps_per_epoch
    seconds = time.perf_counter() - began
    writer.write(
        {"step": run.step, "epoch": epoch, **{f"val_{key}": x for key, x in found.items()}, "val_seconds": seconds}
    )
    told = ", ".join(f"{key} {value:.4f}" for key, value in found.items())
    best = "the best so far" if better else f"the best {name} is {seen.best:.4f}, of step {seen.step}"
    log.info("epoch %d validated on %d samples: %s (%s)", epoch, len(run.val), told, best)
    if run.ended and run.step < run.schedules.steps:
        log.info("no better %s in %d validations (finetune.patience): done", name, seen.stale)


def _export(run: Tuning) -> None:
    """Write the network; where it cannot be written, training goes on and the next better one tries again."""
    try:
        export(run.model, run.cfg, run.folder.model)
    except OSError as error:
        log.warning("%s: could not be written (%s)", run.folder.model, error.strerror or error)


def _save(run: Tuning, must: bool) -> None:
    """Checkpoint; where there is no validation, the network as well.

    Raises:
        UserError: it cannot be written and must be, because the run ends here.
    """
    try:
        save_checkpoint(run.folder.checkpoints, run.state(), run.cfg.train.keep_checkpoints)
    except NotWrittenError as error:
        if must:
            raise UserError(f"{error}; make room and go on with --resume") from None
        log.warning("%s; training goes on", error)
    if run.val is None or (run.ended and not run.folder.model.exists()):
        _export(run)
