"""Says when a checkpoint is due by the clock."""

import time


class Clock:
    """Says when the last checkpoint is so many minutes old (`train.checkpoint_minutes`).

    Only rank 0 asks. The others need not agree: rank 0 alone writes, between two of its steps, and they wait for it in
    the next step's collective. So no step of a GPU costs an exchange or a wait. Nothing that all ranks must do at the
    same step, such as stopping, may depend on this clock.
    """

    def __init__(self, minutes: float | None):
        self._seconds = None if minutes is None else 60 * minutes
        self.restart()

    def restart(self) -> None:
        self._began = time.monotonic()

    def is_due(self) -> bool:
        return self._seconds is not None and time.monotonic() - self._began >= self._seconds
