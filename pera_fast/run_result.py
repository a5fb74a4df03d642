"""The result of `pretrain`, in a module that does not import the trainer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """Result of a run.

    Attributes:
        exit_code: 0 done; 130 (SIGINT), 143 (SIGTERM), 138 (SIGUSR1) or 129 (SIGHUP) stopped, with a checkpoint.
        out: the run folder.
        steps: optimiser steps done, those before resuming included.
        metrics: of the last step that this call made (the keys of metrics.jsonl); empty if there was none left.
    """

    exit_code: int
    out: Path
    steps: int
    metrics: dict[str, Any] = field(default_factory=dict)
