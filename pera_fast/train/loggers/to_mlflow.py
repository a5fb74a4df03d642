"""MLflow: a run named as the run folder, in experiment MLFLOW_EXPERIMENT_NAME or pera-fast.

The store is that of MLFLOW_TRACKING_URI, a server or a database.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pera_fast.config.keys import written
from pera_fast.train.loggers.base import PROJECT, About, Ending, Logger, numbers

log = logging.getLogger(__name__)

MOST_METRICS, MOST_PARAMS, MOST_CHARACTERS = 1000, 100, 500  # that MLflow takes in a call, and of a parameter
STATUS: dict[Ending, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class _MLflow:
    def __init__(self, about: About):
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # else it tells how it makes a database
        from mlflow.entities import Metric, Param, RunTag  # type: ignore[import-not-found]
        from mlflow.tracking import MlflowClient  # type: ignore[import-not-found]

        logging.getLogger("alembic").setLevel(logging.WARNING)
        self._metric, self._param, self._tag = Metric, Param, RunTag
        self._client = MlflowClient()  # no global state: a run of the caller's own program stays as it is
        self._id = self._resumed(about) or self._new(about)
        about.keep("mlflow", {"id": self._id})
        log.info("mlflow: run %s in %s", self._id, self._client.tracking_uri)

    def _new(self, about: About) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        run = self._client.create_run(number, run_name=about.name).info.run_id
        self._describe(run, _texts(about), {})
        return run

    def _resumed(self, about: About) -> str | None:
        """The run of an earlier process, running again; None: there is none in this store."""
        known = about.known("mlflow").get("id")
        if known is None:
            return None
        try:
            found = self._client.get_run(known)
        except Exception as error:
            if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                raise
            log.info("mlflow: run %s is not in %s; starting another", known, self._client.tracking_uri)
            return None
        if found.info.lifecycle_stage == "deleted":
            return None
        self._client.update_run(known, status="RUNNING")
        self._describe(known, _texts(about), found.data.params)
        return known

    def _describe(self, run: str, texts: Mapping[str, str], before: Mapping[str, str]) -> None:
        """Logs settings as parameters, which stay as they are for good; those changed on resuming as tags."""
        params = [self._param(key, text) for key, text in texts.items() if key not in before]
        for start in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(run, params=params[start : start + MOST_PARAMS])
        if tags := [self._tag(key, texts[key]) for key in before if texts.get(key, before[key]) != before[key]]:
            self._client.log_batch(run, tags=tags[:MOST_PARAMS])

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        now = time.time_ns() // 10**6
        metrics = [
            self._metric(key, float(value), now, row["step"]) for row in rows for key, value in numbers(row).items()
        ]
        for start in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + MOST_METRICS])

    def finish(self, ending: Ending, final: Mapping[str, Any]) -> None:
        # The last value of a metric is what MLflow shows of it.
        self._client.set_terminated(self._id, STATUS[ending])


def _texts(about: About) -> dict[str, str]:
    return {key: written(value)[:MOST_CHARACTERS] for key, value in about.settings.items()}


def start(about: About) -> Logger:
    """Starts the run, or goes on with it. Raises MLflow's errors: no such server, no room, ..."""
    return _MLflow(about)
