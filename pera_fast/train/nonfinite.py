"""Counts steps that were skipped because something was not finite, and ends a run that does not recover."""

import logging

from pera_fast.errors import UserError
from pera_fast.train.step import StepResult

log = logging.getLogger(__name__)


def note_nonfinite(counts: dict[str, int], limit: int, step: int, result: StepResult) -> None:
    """Counts a skipped step and says what was not finite.

    Args:
        counts: of the run, changed here: `total`, and `row`, those in a row.
        limit: `train.max_nonfinite`.
        step: number of the step.
        result: of that step.

    Raises:
        UserError: too many in a row.
    """
    if result.applied:
        counts["row"] = 0
        return
    if result.loss_scale is not None and result.nonfinite == ["gradients"] and result.loss_scale > 1:
        log.info("step %d skipped: gradients overflow; loss scale now %g", step, result.loss_scale)
        return  # how loss scaling finds its scale: no sign of trouble
    counts["total"] += 1
    counts["row"] += 1
    row, names = counts["row"], ", ".join(result.nonfinite)
    log.warning("step %d skipped: not finite: %s (%d in a row, %d in all)", step, names, row, counts["total"])
    if row >= limit:
        raise UserError(
            f"step {step}: {names} not finite in {row} steps in a row (train.max_nonfinite={limit}); these steps"
            f" changed nothing; try a lower optim.lr, a longer optim.warmup_epochs or train.precision=fp32"
        )
