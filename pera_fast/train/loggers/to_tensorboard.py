"""TensorBoard: events beside metrics.jsonl, in the run folder."""

from collections.abc import Mapping, Sequence
from typing import Any

from pera_fast.config.keys import written
from pera_fast.train.loggers.base import About, Ending, Logger, numbers


class _TensorBoard:
    def __init__(self, about: About):
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run hides what the process before it logged after the checkpoint.
        self._writer = SummaryWriter(str(about.folder), purge_step=about.done + 1 if about.done else None)
        if about.settings:
            rows = "\n".join(f"| {key} | {written(value)} |" for key, value in about.settings.items())
            self._writer.add_text("settings", f"| key | value |\n| --- | --- |\n{rows}", about.done)

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            for key, value in numbers(row).items():
                self._writer.add_scalar(key, value, row["step"])
        self._writer.flush()

    def finish(self, ending: Ending, final: Mapping[str, Any]) -> None:
        self._writer.close()


def start(about: About) -> Logger:
    """Opens the events. Raises whatever a TensorBoard that is broken raises."""
    return _TensorBoard(about)
