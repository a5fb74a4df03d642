"""Weights & Biases: a run named as the run folder, in project WANDB_PROJECT or pera-fast.

All else is as wandb's own environment variables say.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from pera_fast.train.loggers.background import PATIENCE
from pera_fast.train.loggers.base import PROJECT, About, Ending, Logger, numbers

log = logging.getLogger(__name__)

INIT_SECONDS = 30


class _Wandb:
    def __init__(self, about: About):
        os.environ.setdefault("WANDB_SILENT", "true")  # else it asks for a login on the terminal, and waits
        import wandb  # type: ignore[import-not-found]

        known = about.known("wandb")
        self._run = wandb.init(
            project=known.get("project") or os.environ.get("WANDB_PROJECT") or PROJECT,
            id=known.get("id"),
            resume="allow",
            name=about.name,
            config=_by_section(about.settings),
            allow_val_change=True,  # on resuming
            dir=os.environ.get("WANDB_DIR") or str(about.folder),
            settings=wandb.Settings(
                console="off",  # train.log has the messages
                init_timeout=INIT_SECONDS,
                finish_timeout=PATIENCE["finished"],  # offline copies are left, for `wandb sync`
                reinit="create_new",  # a run of the caller's own program stays as it is
            ),
        )
        about.keep("wandb", {"id": self._run.id, "project": self._run.project})
        where = self._run.url or f"offline in {self._run.dir}"
        log.info("wandb: run %s, %s", self._run.id, where)

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self._run.log(numbers(row), step=row["step"])

    def finish(self, ending: Ending, final: Mapping[str, Any]) -> None:
        self._run.summary.update({**numbers(final), "ending": ending})
        self._run.finish(exit_code=0 if ending == "finished" else 1)


def _by_section(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{section: {key: value}} of dotted keys."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return tree


def start(about: About) -> Logger:
    """Starts the run, or goes on with it. Raises wandb's errors: no login, no network, ..."""
    return _Wandb(about)
