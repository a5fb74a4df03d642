"""Schedules in closed form: learning rate, weight decay, teacher momentum, teacher temperature.

docs/method.md section 6.3. Every value is a function of the step alone, so nothing of a schedule needs saving.
"""

import math
from dataclasses import dataclass

from pera_fast.config import Config


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Half a cosine from `start` at step 0 towards `end`, which step `steps` would reach."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))


def warmup(start: float, peak: float, step: int, steps: int) -> float:
    """Entry `step` of linspace(start, peak, steps); both ends are included, so the last of `steps` is at the peak."""
    return start if steps == 1 else start + (peak - start) * step / (steps - 1)


@dataclass(frozen=True)
class StepValues:
    """The values of one optimiser step."""

    lr: float
    weight_decay: float
    momentum: float  # of the teacher's EMA, used after this step's update
    teacher_temp: float


@dataclass(frozen=True)
class Schedules:
    """All schedules of a run.

    Attributes:
        steps: optimiser steps of the whole run.
        lr_warmup: steps of the learning rate's linear warm-up, at most `steps`.
        temp_warmup: steps of the teacher temperature's linear warm-up, at most `steps`.
    """

    cfg: Config
    steps: int
    lr_warmup: int
    temp_warmup: int

    def __str__(self) -> str:
        parts = {"learning rate": self.lr_warmup, "teacher temperature": self.temp_warmup}
        shares = ", ".join(f"{what} {steps} ({steps / self.steps:.0%})" for what, steps in parts.items())
        return f"warm-ups of {self.steps} steps: {shares}; train.steps and train.epochs stretch them"

    def at(self, step: int) -> StepValues:
        """The values of step 0 <= step < steps."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} is not one of the {self.steps} steps of this run")
        o = self.cfg.optim
        if step < self.lr_warmup:
            lr = warmup(o.warmup_lr, o.lr, step, self.lr_warmup)
        else:
            lr = cosine(o.lr, o.final_lr, step - self.lr_warmup, self.steps - self.lr_warmup)
        temp = o.teacher_temp
        if step < self.temp_warmup:
            temp = warmup(o.warmup_teacher_temp, o.teacher_temp, step, self.temp_warmup)
        return StepValues(
            lr=lr,
            weight_decay=cosine(o.weight_decay, o.final_weight_decay, step, self.steps),
            momentum=cosine(o.teacher_momentum, o.final_teacher_momentum, step, self.steps),
            teacher_temp=temp,
        )


def make_schedules(cfg: Config, steps_per_epoch: int) -> Schedules:
    """The schedules of a run of `train.epochs`, or of `train.steps` optimiser steps where those are given.

    With `train.steps` each warm-up keeps the fraction of the run that `*_epochs / train.epochs` says, so a short run
    is the long one in small.
    """
    t, o = cfg.train, cfg.optim
    steps = t.epochs * steps_per_epoch if t.steps is None else t.steps

    def part(epochs: float) -> int:
        return min(steps, round(steps * epochs / t.epochs))

    return Schedules(cfg, steps, lr_warmup=part(o.warmup_epochs), temp_warmup=part(o.teacher_temp_warmup_epochs))
